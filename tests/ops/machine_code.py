"""What nvcc makes of csrc/cuda/kernels.cu: registers and spills by ptxas, accesses by nvdisasm.

Run as a program, it prints a table: ``python tests/ops/machine_code.py [--csrc FOLDER] [90 ...]``.
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

_NAMES = re.compile(
    r"\d(accumulate|close_sum|close_delta|row|tensor|total|write_back|nothing)_kernel"
    r"(?:ILb(\d)ELb(\d)ELb(\d)E)?"
)
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_FLOAT64 = re.compile(r"D(ADD|MUL|FMA|SETP)|F2F\.F(32\.F)?64|I2F\.F64|F2I\S*\.F64|MUFU\.RCP64H")


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


def float64(block: list[str]) -> int:
    """Instructions for the float64 unit, conversions included."""
    return sum(bool(_FLOAT64.match(i)) for i in block)


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
    """Every kernel by name; those of accumulate as "accumulate DELTA FIRST WEIGHTED" in 0 and 1.

    Raises:
        RuntimeError: a tool failed, with what it said.
    """
    nvcc, nvdisasm = tools()
    assert nvcc is not None and nvdisasm is not None, "checked by the caller"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        source = csrc / "cuda" / "kernels.cu"
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
    return " ".join(group for group in match.groups() if group is not None)


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
        print(f"\n| sm_{architecture} | registers | spilled | most bytes in flight | float64 |")
        print("|:--|--:|--:|--:|--:|")
        for name, kernel in kernels(architecture, arguments.csrc).items():
            most = max((sum(in_flight(b)) for b in kernel.blocks), default=0)
            doubles = sum(map(float64, kernel.blocks))
            print(f"| {name} | {kernel.registers} | {kernel.spilled} | {most} | {doubles} |")


if __name__ == "__main__":
    main()
