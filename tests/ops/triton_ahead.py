"""Compiles the Triton kernels ahead of time, for GPUs that are not there.

Run as a program: ``python tests/ops/triton_ahead.py [--block 1024] [--only WORDS] [--every]``
prints a JSON object for each kernel and target, one a line. Triton decides at its import whether
kernels are interpreted, so the tests, which interpret them, run this in another process.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

POINTER_ALIGNMENT = 16  # bytes: arenas and tables come from torch's allocator
DTYPES = {"float32": "float32", "float64": "float64", "float16": "float16", "bfloat16": "uint16"}
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32)}
TARGETS["gfx942"] = ("hip", "gfx942", 64)
OF_CHUNKS = {"chunks": "*i64", "rows": "*i64"}  # arguments of kernels that touch parameters


class Variant(NamedTuple):
    """One specialisation of a kernel.

    Attributes:
        name: of the kernel, then what distinguishes the variant.
        kernel: name of the kernel's function.
        signature: types of the arguments that exist at run time.
        constants: values of the others.
    """

    name: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]


def variants(block: int, every: bool = False) -> Iterator[Variant]:
    """Those that a window of each dtype launches, or every specialisation that can be launched."""
    for name in DTYPES:
        for aligned in (True, False):
            for delta, first, weighted in itertools.product((False, True), repeat=3):
                usual = not weighted and not (delta and first) and (aligned or not (delta or first))
                if every or usual:
                    yield accumulate(block, name, aligned, delta, first, weighted)
            for with_mean in (True, False):
                if every or (aligned and with_mean):
                    yield write_back(block, name, aligned, with_mean)
    arenas = {"chunks": "*i64", "running": "*fp32", "previous": "*fp32"}
    sums = {"partials": "*fp64"}
    constants: dict[str, Any] = {"BLOCK": block}
    yield Variant("close_sum", "close_sum_kernel", arenas | {"before": "*fp32"} | sums, constants)
    yield Variant(
        "close_delta",
        "close_delta_kernel",
        arenas | {"mean": "*fp32"} | sums | {"window": "*i64"},
        constants,
    )
    yield Variant(
        "tensor",
        "tensor_kernel",
        {"tensor_chunks": "*i64", "partials": "*fp64", "per_tensor": "*fp64"},
        {"BLOCK": 256},
    )


def accumulate(
    block: int, dtype: str, aligned: bool, delta: bool, first: bool, weighted: bool
) -> Variant:
    words = ["aligned" if aligned else "misaligned", "delta" if delta else "sum"]
    words += ["first"] * first + ["weighted"] * weighted
    return Variant(
        f"accumulate {dtype} {' '.join(words)}",
        "accumulate_kernel",
        OF_CHUNKS | {"running": "*fp32", "mean": "*fp32", "weight": "fp32"},
        {"DTYPE": DTYPES[dtype], "ALIGNED": aligned, "DELTA": delta, "FIRST": first}
        | {"WEIGHTED": weighted, "BLOCK": block},
    )


def write_back(block: int, dtype: str, aligned: bool, with_mean: bool) -> Variant:
    words = ["aligned" if aligned else "misaligned"] + ["without mean"] * (not with_mean)
    return Variant(
        f"write_back {dtype} {' '.join(words)}",
        "write_back_kernel",
        OF_CHUNKS | {"arena": "*fp32", "mean": "*fp32", "scale": "*fp64"},
        {"DTYPE": DTYPES[dtype], "ALIGNED": aligned, "WITH_MEAN": with_mean, "BLOCK": block},
    )


def source(kernels: Any, variant: Variant) -> Any:
    """What triton.compile takes; its arguments were renamed after Triton 3.2."""
    import triton.language as tl
    from triton.compiler import ASTSource

    function = getattr(kernels, variant.kernel)
    names = function.arg_names
    constants = {k: getattr(tl, v) if k == "DTYPE" else v for k, v in variant.constants.items()}
    aligned = [names.index(n) for n, t in variant.signature.items() if t.startswith("*")]
    if "constants" in inspect.signature(ASTSource.__init__).parameters:
        from triton.backends.compiler import AttrsDescriptor

        attributes = AttrsDescriptor.from_dict(
            {"arg_properties": {"tt.divisibility": aligned}, "cls": "AttrsDescriptor"}
        )
        ordered = {n: variant.signature[n] for n in names if n in variant.signature}
        return ASTSource(function, ordered, constants=constants, attrs=attributes)
    signature = {n: variant.signature.get(n, "constexpr") for n in names}
    places = {(names.index(n),): value for n, value in constants.items()}
    divisible = {(i,): [["tt.divisibility", POINTER_ALIGNMENT]] for i in aligned}
    return ASTSource(function, signature, constexprs=places, attrs=divisible)


def report(compiled: Any, target: str) -> dict[str, Any]:
    """Registers, spills, and how often each global load and store appears, from the binary."""
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        numbers = {k: int(v) for k, v in re.findall(r"\.(vgpr_\w*count):\s+(\d+)", text)}
        found = re.findall(r"\b((?:global|buffer|flat)_(?:load|store)_\w+)", text)
        spills = numbers["vgpr_spill_count"]
        registers = numbers["vgpr_count"]
    else:
        found = re.findall(r"\b((?:ld|st)\.global[\w.:]*)", compiled.asm["ptx"])
        registers, spills = resources(compiled.asm["cubin"])
    return {
        "registers": registers,
        "spills": spills,
        "accesses": dict(sorted(collections.Counter(found).items())),
    }


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread, as NVIDIA's tools of Triton's wheel report."""
    import triton

    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]), int(found[2]) + int(found[3])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--block", type=int, default=1024)
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--every", action="store_true", help="not only what a window launches")
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=list(TARGETS))
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    # Every variant is compiled, whatever an earlier run has left on the disk.
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
    import triton
    from triton.backends.compiler import GPUTarget

    from triton_kernels import kernels

    for variant in variants(arguments.block, arguments.every):
        if arguments.only not in variant.name:
            continue
        for target in arguments.targets:
            row: dict[str, Any] = {"variant": variant.name, "target": target}
            row["triton"] = triton.__version__
            start = time.perf_counter()
            try:
                compiled = triton.compile(
                    source(kernels, variant),
                    target=GPUTarget(*TARGETS[target]),
                    options={"enable_fp_fusion": False},
                )
                row |= report(compiled, target)
            except Exception as error:  # the compiler raises what it likes; the test shows it
                row["error"] = f"{type(error).__name__}: {error}"
            row["seconds"] = round(time.perf_counter() - start, 2)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
