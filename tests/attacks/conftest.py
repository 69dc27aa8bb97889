"""Attacks use the launcher of ranks and the model with given gradients of ``tests/distributed``."""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "distributed"))
