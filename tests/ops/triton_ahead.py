"""Compiles the Triton kernels ahead of time, for GPUs that are not there.

Run as a program: ``python tests/ops/triton_ahead.py [--only WORDS]``
prints a JSON object for each kernel and target, one a line. Triton decides at its import whether
kernels are interpreted, so the tests, which interpret them, run this in another process.
"""

from __future__ import annotations

import argparse
import collections
import inspect
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

POINTER_ALIGNMENT = 16  # bytes: tables come from torch's allocator
DTYPES = {"float32": 1, "float64": 2, "float16": 4, "bfloat16": 8}  # bits of DTYPES of the kernels
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32)}
TARGETS |= {"sm_103": ("cuda", 103, 32), "sm_120": ("cuda", 120, 32)}
TARGETS |= {"gfx942": ("hip", "gfx942", 64), "gfx950": ("hip", "gfx950", 64)}
TARGETS["gfx1250"] = ("hip", "gfx1250", 32)
DEFAULT_THREADS = 128  # of a program whose launch gives no warps: four of 32; of 64, 256 threads


class Variant(NamedTuple):
    """One specialisation of a kernel.

    Attributes:
        name: of the kernel, then what distinguishes the variant.
        kernel: name of the kernel's function.
        signature: types of the arguments that exist at run time.
        constants: values of the others.
        threads: of a program; 0 for Triton's default.
    """

    name: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, int]
    threads: int = 0


def variants() -> Iterator[Variant]:
    """Those that :mod:`triton_kernels.launches` launches, for each dtype and for all at once."""
    from triton_kernels import launches

    pieces = {"pieces": "*i64", "runs": "*i64", "bases": "*i64", "partials": "*fp64"}
    spans = {"spans": "*i64", "bases": "*i64", "table": "*fp64"}
    for name, bits in (*DTYPES.items(), ("mixed", 15)):
        yield Variant(
            f"accumulate {name}",
            "accumulate_kernel",
            pieces | {"buckets": "i64"},
            {"splits": 1, "DTYPES": bits},  # Triton compiles a 1 in
            launches.THREADS,
        )
        yield Variant(
            f"accumulate_exact {name}",
            "accumulate_exact_kernel",
            spans,
            {"DTYPES": bits, "BLOCK": launches.BLOCK},
        )
    yield Variant(
        "accumulate mixed split",
        "accumulate_kernel",
        pieces | {"buckets": "i64", "splits": "i32"},
        {"DTYPES": 15},
        launches.THREADS,
    )
    yield Variant(
        "add_partials",
        "add_partials_kernel",
        {"partials": "*fp64", "table": "*fp64", "buckets": "i64", "count": "i32"},
        {"BLOCK": launches.PARTIALS_BLOCK},
    )
    tables = {"running": "*fp64", "mean": "*fp64", "displacement": "*fp64"}
    yield Variant(
        "close",
        "close_kernel",
        tables | {"divisor_bits": "i64", "blocks": "*i64", "block_sums": "*fp64"},
        {"BLOCK": launches.CLOSE_BLOCK},
    )


def source(kernels: Any, variant: Variant) -> Any:
    """What triton.compile takes; its arguments were renamed after Triton 3.2."""
    from triton.compiler import ASTSource

    function = getattr(kernels, variant.kernel)
    names = function.arg_names
    constants = variant.constants
    # Buckets are a multiple of 4,096.
    aligned = [
        names.index(n) for n, t in variant.signature.items() if t.startswith("*") or n == "buckets"
    ]
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


def options(variant: Variant, target: str) -> dict[str, Any]:
    warps = {"num_warps": variant.threads // TARGETS[target][2]} if variant.threads else {}
    return {"enable_fp_fusion": False} | warps


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
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=list(TARGETS))
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    # Every variant is compiled, whatever an earlier run has left on the disk.
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
    import triton
    from triton.backends.compiler import GPUTarget

    from triton_kernels import table

    for variant in variants():
        if arguments.only not in variant.name:
            continue
        for target in arguments.targets:
            row: dict[str, Any] = {"variant": variant.name, "target": target}
            row["triton"] = triton.__version__
            start = time.perf_counter()
            try:
                compiled = triton.compile(
                    source(table, variant),
                    target=GPUTarget(*TARGETS[target]),
                    options=options(variant, target),
                )
                row |= report(compiled, target)
            except Exception as error:  # the compiler raises what it likes; the test shows it
                row["error"] = f"{type(error).__name__}: {error}"
            row["seconds"] = round(time.perf_counter() - start, 2)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
