"""Real signals inside calls of meters and schedulers, in a process of their own."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

from oracle import count

FOLDER = pathlib.Path(__file__).parent


def test_real_signals_inside_calls() -> None:
    """No false angle, no dead meter, one warning at most, a checkpoint that is right."""
    each = count(8, 60)  # of five kinds
    done = subprocess.run(
        [sys.executable, str(FOLDER / "signalled.py"), str(each), "0"],
        capture_output=True,
        text=True,
        timeout=count(120, 900),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)
    struck = sum(result["struck"] for result in results.values())
    wrong = [f"{kind}: {w}" for kind, result in results.items() for w in result["wrong"]]
    assert struck >= count(30, 300)
    assert not wrong, f"{len(wrong)} problems after {struck} signals:\n" + "\n".join(wrong[:12])
