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
from triton_ahead import DTYPES, TARGETS, variants

pytest.importorskip("triton", reason="needs triton: pip install triton")

PROGRAM = pathlib.Path(__file__).with_name("triton_ahead.py")
BLOCK = 1024  # as TritonBackend's default
ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
# Four warps, Triton's default, of 32 or 64 threads.
ELEMENTS_PER_THREAD = {t: BLOCK // (4 * TARGETS[t][2]) for t in TARGETS}

# What an older Triton lacks for a target, by a part of its compiler's message.
ABSENT = {
    "is not defined for option 'gpu-name'": "the ptxas of this Triton does not know the target",
    "ld.lld not found": "this Triton needs ROCm's linker, which is not installed",
}


def compiled(target: str, every: bool) -> list[dict]:
    command = [sys.executable, str(PROGRAM), "--block", str(BLOCK), "--targets", target]
    command += ["--every"] * every
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def wide(accesses: dict[str, int], kind: str) -> int:
    """How many instructions of a kind, "ld" or "st", move 16 bytes."""
    word = {"ld": "load", "st": "store"}[kind]
    widest = (f"{kind}.global.v4.b32", f"{kind}.global.v2.b64", f"_{word}_dwordx4")
    return sum(n for name, n in accesses.items() if name.endswith(widest))


def expected_wide(variant: str, target: str) -> tuple[int, int]:
    """16-byte loads and stores of a thread's part of a whole block: one for every 16 bytes.

    Half precision on a GPU with 64 lanes has 8 bytes a thread, which is one narrower instruction.
    """
    elements = ELEMENTS_PER_THREAD[target]
    arena = elements * 4 // 16
    kernel, *words = variant.split()
    if kernel == "close_sum":
        return 3 * arena, 0
    if kernel == "close_delta":
        return 3 * arena, 3 * arena
    if kernel == "tensor":
        return 0, 0
    parameters = elements * ITEMSIZE[words[0]] // 16 if words[1] == "aligned" else 0
    if kernel == "write_back":
        return arena if words[2:] else 2 * arena, parameters
    reads = (words[2] == "delta") + ("first" not in words)
    return parameters + reads * arena, arena


@pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["usual", "every"]
)
@pytest.mark.parametrize("target", TARGETS)
def test_variants_compile_without_spills_and_move_16_bytes(target: str, every: bool) -> None:
    rows = compiled(target, every)
    assert [row["variant"] for row in rows] == [v.name for v in variants(BLOCK, every)]
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
        if target.startswith("gfx") and "misaligned" in row["variant"]:
            # AMD GPUs take wide loads from any address, and LLVM merges narrow ones.
            assert loads >= expected_loads, row
        else:
            assert loads == expected_loads, row


def test_the_variants_are_those_that_a_window_launches() -> None:
    names = [v.name for v in variants(BLOCK)]
    assert len(names) == len(set(names)) == 23
    for dtype in DTYPES:
        for words in ("aligned sum first", "aligned sum", "aligned delta", "misaligned sum"):
            assert f"accumulate {dtype} {words}" in names
    everything = [v.name for v in variants(BLOCK, every=True)]
    assert len(everything) == len(set(everything)) == 4 * 2 * (2**3 + 2) + 3
    assert set(names) < set(everything)
