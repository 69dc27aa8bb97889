"""NVIDIA's names for CMake's list of CUDA architectures."""

from __future__ import annotations

import re


def name_architectures(architectures: str) -> str:
    """Return the architectures that CMake's list stands for, such as "sm_80, sm_90".

    ``80-real`` is machine code for one generation of GPUs; ``120-virtual`` is code that the driver
    compiles for newer ones.
    """
    names = []
    newer = False
    for entry in architectures.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)[a-z]?(-real|-virtual)?", entry)
        newer = newer or match is None or match[2] != "-real"
        if match is None:
            names.append(entry)
        elif match[2] != "-virtual":
            names.append(f"sm_{match[1]}")
    if newer:
        names.append("newer GPUs (compiled when first used)")
    return ", ".join(names)
