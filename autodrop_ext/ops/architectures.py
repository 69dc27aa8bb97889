"""Names of GPUs for CMake's names of CUDA architectures."""

from __future__ import annotations

import re

_GPUS = {  # GPUs that people know, by compute capability
    "75": "T4, RTX 20",
    "80": "A100, A30",
    "86": "A10, A40, RTX 30",
    "89": "L4, L40, RTX 40",
    "90": "H100, H200",
    "100": "B200",
    "103": "B300",
    "120": "RTX 50",
}


def name_architectures(architectures: str) -> str:
    """Return what CMake's list of CUDA architectures means for people who buy GPUs.

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
            gpus = _GPUS.get(match[1])
            names.append(f"sm_{match[1]} ({gpus})" if gpus else f"sm_{match[1]}")
    if newer:
        names.append("newer GPUs (compiled when first used)")
    return ", ".join(names)
