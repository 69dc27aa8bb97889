"""The case table that every backend is tested and timed with.

A case is a name and a function that makes a list of tensors from a generator. To cover a new kind
of parameter, add a case; to cover a new backend, add it to BACKENDS. Nothing else has to change.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from emulated import EmulatedCuda
from torch import Tensor

from autodrop_ext.ops import Backend, native
from autodrop_ext.ops.backends import CpuBackend, ReferenceBackend
from autodrop_ext.ops.plan import LANES
from autodrop_ext.ops.triton import TritonBackend

Make = Callable[[torch.Generator], list[Tensor]]


def _normal(*shape: int, dtype: torch.dtype = torch.float32) -> Make:
    return lambda g: [torch.randn(*shape, generator=g).to(dtype)]


def _mixed(g: torch.Generator) -> list[Tensor]:
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    return [torch.randn(31 * (i + 1), generator=g).to(dtypes[i % 4]) for i in range(12)]


def _misaligned(g: torch.Generator) -> list[Tensor]:
    # Starts that are a multiple of the element size and of nothing larger.
    tensors = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        base = torch.randn(1200, generator=g).to(dtype)
        tensors += [base[1:8], base[9:50], base[63 : 63 + 517]]
    return tensors


def _layouts(g: torch.Generator) -> list[Tensor]:
    return [
        torch.randn(4, 6, 5, 3, generator=g).to(memory_format=torch.channels_last),
        torch.randn(17, 9, generator=g).t(),
        torch.randn(20, 20, generator=g)[:, ::2],
        torch.randn(20, 20, generator=g)[3:7, 5:9],
        torch.randn(3, 1, 5, generator=g).permute(2, 1, 0),
        torch.randn(6, generator=g)[::3],
    ]


def _complex(g: torch.Generator) -> list[Tensor]:
    values = torch.view_as_complex(torch.randn(7, 5, 2, generator=g))
    return [values.clone(), values.clone().conj(), values.clone().t(), values.clone()[:, ::2]]


def _empty(g: torch.Generator) -> list[Tensor]:
    return [
        torch.empty(0),
        torch.tensor(1.5),
        torch.empty(0, 3, dtype=torch.bfloat16),
        torch.randn(3, generator=g),
        torch.empty(2, 0),
    ]


def _extreme(g: torch.Generator) -> list[Tensor]:
    # Subnormal, largest and signed-zero values of every dtype.
    tensors = []
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        info = torch.finfo(dtype)
        small = info.smallest_normal
        large = min(info.max / 8, 1e30)
        tensors.append(
            torch.tensor([0.0, -0.0, small, -small, small / 4, large, -large, 1 + info.eps]).to(
                dtype
            )
        )
    return tensors


CASES: dict[str, Make] = {
    "one element": _normal(1),
    "odd sizes": lambda g: [torch.randn(n, generator=g) for n in (1, 3, 7, 8, 9, 15, 31, 33, 127)],
    "chunk edges": lambda g: [torch.randn(LANES + d, generator=g) for d in (-1, 0, 1)],
    "several chunks bf16": _normal(3 * LANES + 5, dtype=torch.bfloat16),
    "several chunks fp16": _normal(2 * LANES + 11, dtype=torch.float16),
    "several chunks fp64": _normal(2 * LANES + 3, dtype=torch.float64),
    "many small": lambda g: [torch.randn(64, generator=g) for _ in range(24)],
    "threads": lambda g: [torch.randn(50_000 + 17 * i, generator=g) for i in range(6)],
    "mixed dtypes": _mixed,
    "misaligned": _misaligned,
    "one table row": _normal(40, 3 * LANES // 40),
    "layouts": _layouts,
    "complex": _complex,
    "empty and 0-d": _empty,
    "extreme values": _extreme,
}


def runs(isa: str) -> bool:
    """Return True if this processor runs the kernels of an instruction set."""
    try:
        native.loaded().accumulate_exact(0, 0, 0, 0, 1, isa)  # of no spans
    except ValueError:
        return False
    return True


ISAS = [isa for isa in ("baseline", "avx2", "avx512") if runs(isa)]
"""Instruction sets of the compiled kernels that this processor runs."""

BACKENDS: dict[str, Backend] = {
    "reference": ReferenceBackend(),
    **{f"cpu {isa}": CpuBackend(isa) for isa in ISAS},
    "cuda emulated": EmulatedCuda(),  # the real table.cu, see csrc/tests/emulator
    "triton": TritonBackend(),  # in the interpreter, see conftest.py
}

every_case = pytest.mark.parametrize("case", CASES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def make(case: str, seed: int = 0) -> list[Tensor]:
    """The tensors of a case, the same for the same seed."""
    return CASES[case](torch.Generator().manual_seed(seed))
