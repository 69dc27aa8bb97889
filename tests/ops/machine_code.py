"""What nvcc makes of csrc/cuda/table.cu: registers and spills by ptxas, instructions by nvdisasm.

Run as a program, it prints tables: ``python tests/ops/machine_code.py [--csrc FOLDER] [90 ...]``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

CSRC = pathlib.Path(__file__).parents[2] / "csrc"

# As csrc/CMakeLists.txt has them.
FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-Xptxas=-v")

_NAMES = re.compile(r"\d(accumulate|add_partials|accumulate_exact|close|nothing)_kernel")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_FLOAT64 = re.compile(r"D(ADD|MUL|FMA|SETP)|MUFU\.RCP64H")
_CONVERSION = re.compile(r"F2F|I2F\.F64|F2I\S*\.F64")
_FLOAT32 = re.compile(r"F(ADD|FMA)(\.|$)")
_PAIRS = re.compile(r"F(ADD|FMA)2(\.|$)")  # two additions each
ADDITIONS = 10  # of float32 that add an element to two float32 numbers (csrc/cuda/sums.h)
THREADS = 256
REGISTERS = 65_536  # of a multiprocessor


@dataclasses.dataclass
class Kernel:
    """One kernel of a binary.

    Attributes:
        registers: of a thread.
        spilled: bytes that a thread stores to and loads from local memory for want of registers.
        blocks: its instructions in straight lines, without operands.
    """

    registers: int = 0
    spilled: int = 0
    blocks: list[list[str]] = dataclasses.field(default_factory=list)

    def count(self, pattern: str) -> int:
        """Instructions that match, in the binary; most of them are there several times."""
        return sum(bool(re.match(pattern, i)) for block in self.blocks for i in block)


def width(instruction: str) -> int:
    """Bytes that a load or store moves."""
    return _WIDTHS.get(instruction.rsplit(".", 1)[-1], 4)


def in_flight(block: list[str]) -> list[int]:
    """Widths of the loads of global memory that come before the first store."""
    stores = (i for i, name in enumerate(block) if name.startswith("STG"))
    first = next(stores, len(block))
    return [width(name) for name in block[:first] if name.startswith("LDG")]


def count(block: list[str], pattern: re.Pattern[str]) -> int:
    return sum(bool(pattern.match(i)) for i in block)


@dataclasses.dataclass(frozen=True)
class Pass:
    """A pass over whole pieces of one dtype, the same for every exclusive or.

    Attributes:
        elements: of a thread.
        bytes_in_flight: of a thread, loaded before the first arithmetic.
        instructions: the most of all exclusive ors.
        float64: additions and multiplications of float64.
        conversions: to float64.
        float32: additions of float32, two for an instruction that adds two pairs.
    """

    elements: int
    bytes_in_flight: int
    instructions: int
    float64: int
    conversions: int
    float32: int

    @property
    def an_element(self) -> float:
        return self.instructions / self.elements


# Elements of a thread in the largest pass of a dtype, and bytes of an element.
PASSES = {"float32": (32, 4), "float64": (16, 8), "float16": (64, 2), "bfloat16": (64, 2)}


def passes(accumulate: Kernel) -> dict[str, Pass]:
    """The largest pass of each dtype, found by its loads and its arithmetic.

    Conversions of float16 to float32 (``HADD2.F32``) tell it from bfloat16.
    """
    found: dict[str, list[Pass]] = {name: [] for name in PASSES}
    for block in accumulate.blocks:
        loaded = in_flight(block)
        if not loaded or set(loaded) != {16}:
            continue
        doubles, conversions = count(block, _FLOAT64), count(block, _CONVERSION)
        floats = count(block, _FLOAT32) + 2 * count(block, _PAIRS)
        halves = count(block, re.compile(r"HADD2\.F32"))
        for name, (elements, itemsize) in PASSES.items():
            is_half = name == "float16"
            right = (doubles, floats) in ((elements, 0), (0, ADDITIONS * elements))
            if right and sum(loaded) == elements * itemsize and bool(halves) == is_half:
                issued = [i for i in block if i != "NOP"]  # sm_120 fills waits for float64
                counts = (len(issued), doubles, conversions, floats)
                found[name].append(Pass(elements, sum(loaded), *counts))
    return {name: max(each, key=lambda p: p.instructions) for name, each in found.items() if each}


def blocks_at_once(kernel: Kernel) -> int:
    """Blocks of a kernel that the registers of a multiprocessor hold; given by the 8."""
    return REGISTERS // (THREADS * -(-kernel.registers // 8) * 8)


def tools() -> tuple[str | None, str | None]:
    """nvcc and nvdisasm; Triton's wheel has the latter."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    nvdisasm = shutil.which("nvdisasm")
    triton = importlib.util.find_spec("triton")
    if nvdisasm is None and triton is not None and triton.origin is not None:
        bundled = pathlib.Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        nvdisasm = str(bundled) if bundled.exists() else None
    return nvcc, nvdisasm


def kernels(architecture: int, csrc: pathlib.Path = CSRC) -> dict[str, Kernel]:
    """Every kernel by name, without "_kernel".

    Raises:
        RuntimeError: a tool failed, with what it said.
    """
    nvcc, nvdisasm = tools()
    assert nvcc is not None and nvdisasm is not None, "checked by the caller"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        source = csrc / "cuda" / "table.cu"
        compiler = (nvcc, *FLAGS, "-cubin", f"-arch=sm_{architecture}", f"-I{csrc}", str(source))
        report = _run(*compiler, "-o", cubin.name)
        assembly = _run(nvdisasm, "-c", cubin.name)
    found: dict[str, Kernel] = {}
    for entry in report.split("Compiling entry function '")[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        assert spills is not None and registers is not None, entry
        spilled = int(spills[1]) + int(spills[2])
        found[_name(entry)] = Kernel(registers=int(registers[1]), spilled=spilled)
    block: list[str] = []
    for line in assembly.splitlines():
        section = re.match(r"\.text\.(\S+):", line)
        if section is not None or re.match(r"\.L_", line):
            block = []
            if section is not None:
                kernel = found[_name(section[1])]
            kernel.blocks.append(block)
        elif instruction := _INSTRUCTION.search(line):
            block.append(instruction[1])
            if re.match("BRA|BRX|EXIT|CALL|RET|JMP", instruction[1]):
                block = []
                kernel.blocks.append(block)
    return found


def _name(mangled: str) -> str:
    match = _NAMES.search(mangled)
    assert match is not None, mangled
    return match[1]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("architectures", nargs="*", type=int, default=[90])
    parser.add_argument("--csrc", type=pathlib.Path, default=CSRC)
    arguments = parser.parse_args()
    for architecture in arguments.architectures:
        found = kernels(architecture, arguments.csrc)
        print(f"\n| sm_{architecture} | registers | spilled | blocks | most bytes in flight |")
        print("|:--|--:|--:|--:|--:|")
        for name, kernel in found.items():
            most = max((sum(in_flight(b)) for b in kernel.blocks), default=0)
            blocks = blocks_at_once(kernel)
            print(f"| {name} | {kernel.registers} | {kernel.spilled} | {blocks} | {most} |")
        counted = "instructions | float64 | conversions | float32"
        print(f"\n| sm_{architecture} | in flight, KiB | {counted} |")
        print("|:--|--:|--:|--:|--:|--:|")
        blocks = blocks_at_once(found["accumulate"])
        for name, p in passes(found["accumulate"]).items():
            kib = p.bytes_in_flight * THREADS * blocks // 1024
            print(
                f"| {name} | {kib} | {p.an_element:.1f} "
                f"| {p.float64 / p.elements:.1f} | {p.conversions / p.elements:.1f} "
                f"| {p.float32 / p.elements:.1f} |"
            )


if __name__ == "__main__":
    main()
