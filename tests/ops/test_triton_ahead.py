"""Triton compiles every kernel for GPUs that are not here, and what it makes moves 16 bytes a time.

The interpreter, which the other tests use, accepts kernels that the compiler refuses.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
from triton_ahead import DEFAULT_THREADS, DTYPES, TARGETS, variants

pytest.importorskip("triton", reason="needs triton: pip install triton")

PROGRAM = pathlib.Path(__file__).with_name("triton_ahead.py")
ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}

# What an older Triton lacks for a target, by a part of its compiler's message.
ABSENT = {
    "is not defined for option 'gpu-name'": "the ptxas of this Triton does not know the target",
    "ld.lld not found": "this Triton needs ROCm's linker, which is not installed",
}


def compiled(target: str) -> list[dict]:
    command = [sys.executable, str(PROGRAM), "--targets", target]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def wide(accesses: dict[str, int], kind: str) -> int:
    """How many instructions of a kind, "ld" or "st", move 16 bytes."""
    word = {"ld": "load", "st": "store"}[kind]
    widest = (f"{kind}.global.v4.b32", f"{kind}.global.v2.b64", f"_{word}_dwordx4", f"_{word}_b128")
    return sum(n for name, n in accesses.items() if name.endswith(widest))


def expected_wide(variant: str, target: str) -> tuple[int, int]:
    """Return 16-byte loads and stores of a thread for what is aligned: one for every 16 bytes."""
    kernel, *words = variant.split()
    threads = DEFAULT_THREADS * TARGETS[target][2] // 32
    sizes = [ITEMSIZE[d] for d in (DTYPES if words[:1] == ["mixed"] else words)]
    if kernel == "accumulate":
        return sum(16 * size // 16 for size in sizes), 0
    if kernel == "accumulate_exact":
        elements = 1024 // threads
        table = elements * 8 // 16
        # Half precision on a GPU with 64 lanes has 8 bytes a thread: one narrower instruction.
        return sum(elements * size // 16 for size in sizes) + table, table
    assert kernel in ("add_partials", "close")
    table = 512 // threads * 8 // 16
    return 3 * table, (3 if kernel == "close" else 1) * table


FIRST = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.mark.parametrize(
    "target", [t if t in FIRST else pytest.param(t, marks=pytest.mark.slow) for t in TARGETS]
)
def test_kernels_compile_without_spills_and_move_16_bytes(target: str) -> None:
    rows = compiled(target)
    assert len(rows) == 2 * (len(DTYPES) + 1) + 3
    errors = {row["error"] for row in rows if "error" in row}
    for sign, reason in ABSENT.items():
        if errors and all(sign in error for error in errors):
            pytest.skip(f"{target}: {reason}")
    assert not errors
    assert {row["variant"]: row["spills"] for row in rows if row["spills"]} == {}
    for row in rows:
        loads, stores = (wide(row["accesses"], kind) for kind in ("ld", "st"))
        expected_loads, expected_stores = expected_wide(row["variant"], target)
        assert stores == expected_stores, row
        if target.startswith("gfx"):
            # LLVM merges narrow loads, of table rows among them, and unrolls loops.
            assert loads >= expected_loads, row
        else:
            assert loads == expected_loads, row


def test_every_variant_has_a_name() -> None:
    names = [v.name for v in variants()]
    assert len(names) == len(set(names)) == 13
