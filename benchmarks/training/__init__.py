"""Training runs that compare learning-rate schedules; ``command.py`` is their command."""

import sys
from pathlib import Path

# The small tasks are the demo's.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
