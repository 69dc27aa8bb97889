"""The benchmark of memory: what it counts on devices, and that a process stays small."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import memory
import pytest

SHAPES = [(1000, 4096), (65, 3, 3), (7,)]


def test_a_rank_holds_the_first_part_of_each_shape() -> None:
    whole, first = memory.on_device(SHAPES, 1), memory.on_device(SHAPES, 64)
    assert whole["parameters here"] == sum(map(math.prod, SHAPES))
    assert first["parameters here"] == 16 * 4096 + 2 * 9 + 1
    assert whole["tables"] == first["tables"] == 3 * 8 * 2**18
    runs = 8 * (64 * 8 + 1)  # where the pieces of 64 rows and 8 swaps begin
    # A row of 4,096 is a chunk, and a piece of 32 bytes; the small ones are one each.
    assert whole["pieces"] == 32 * (1000 + 2) + runs
    assert first["pieces"] == 32 * (16 + 2) + runs


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_the_process_grows_by_less_than_a_table_of_all_elements() -> None:
    """In a process of its own, whose peak nothing else has raised."""
    program = Path(memory.__file__)
    done = subprocess.run(
        [sys.executable, str(program), "--elements", "20000000"],
        capture_output=True,
        text=True,
        check=True,
    )
    grown = float(done.stdout.split("grows by ")[1].split(" MiB")[0])
    # Three tables take 6 MiB, 20 million float32 sums would take 76; threads and the first
    # imports of torch have taken 10.
    assert 6 <= grown < 32
