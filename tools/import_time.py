"""Measures what importing this package takes once torch is there.

    python tools/import_time.py [--limit 50]

The least of several processes, in milliseconds of processor time, so that other programs disturb
little. ``python -X importtime -c 'import torch, autodrop_ext'`` shows where it goes. Bytecode is
cached first, as it is after ``pip install``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile

SCRIPT = """
import torch, time
start = time.process_time()
import autodrop_ext
print(1000 * (time.process_time() - start))
"""


def main() -> None:
    """Print the time, and fail above the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=50.0, metavar="MS")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-X", f"pycache_prefix={cache}", "-c", SCRIPT]
        # -B and PYTHONDONTWRITEBYTECODE would make every run compile the sources.
        times = [_measure(command) for _ in range(options.repeats + 1)][1:]
    print(f"import autodrop_ext after torch: {min(times):.1f} ms (limit {options.limit:g} ms)")
    if min(times) > options.limit:
        sys.exit(1)


def _measure(command: list[str]) -> float:
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PYTHONDONTWRITEBYTECODE": ""}
    )
    return float(done.stdout)


if __name__ == "__main__":
    main()
