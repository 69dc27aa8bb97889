"""The Triton backend: GPUs without the compiled kernels, AMD's among them."""

from __future__ import annotations

import functools
import importlib
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from . import reference
from .interface import Sums
from .plan import Plan
from .streams import StreamUse, current_device


class TritonBackend:
    """Args:
    block: elements that a program handles at a time, a power of two.
    """

    name = "triton"

    def __init__(self, block: int = 1024) -> None:
        self._block = block

    def missing(self, device: torch.device) -> str | None:
        # Triton's interpreter, which tests use, runs kernels on the CPU.
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device.type not in (("cpu", "cuda") if interpreted else ("cuda",)):
            return f"it runs on GPUs, not on {device.type}"
        try:
            importlib.import_module("triton")
        except ImportError as error:
            return f"triton does not load ({error}): pip install triton"
        if interpreted:
            return None
        if not torch.cuda.is_available():
            return "torch sees no GPU"
        return _probe(device)

    def bind(self, plan: Plan) -> TritonOperations:
        return TritonOperations(plan, self._block)


@functools.cache
def _probe(device: torch.device) -> str | None:
    """Run a tiny window on a device before the kernels are trusted; the failure, or None."""
    try:
        x = torch.ones(3, device=device)
        running, nothing = torch.zeros(32, device=x.device), torch.zeros(32, device=x.device)
        operations = TritonOperations(Plan([("probe", x)], x.device), block=32)
        operations.accumulate(running, None, first=True)
        sums = operations.close_sum(running, nothing, nothing, 1)
    except Exception as error:  # compilers and drivers raise whatever they like
        return f"a test launch failed: {type(error).__name__}: {error}"
    return None if sums.norm == 3.0 else f"a test launch gave |s|^2 = {sums.norm} instead of 3"


class TritonOperations:
    def __init__(self, plan: Plan, block: int) -> None:
        self._block = block
        # Imported here: Triton is optional and takes a second to load.
        self._kernels: Any = importlib.import_module("autodrop_ext.triton_kernels")
        self._language: Any = importlib.import_module("triton.language")
        self._plan = plan
        self._launches = _launches(plan)
        sums = functools.partial(torch.zeros, dtype=torch.float64, device=plan.device)
        self.per_tensor = sums((plan.num_rows, 4))
        self._partials = sums((plan.num_chunks, 4))
        tables = (
            plan.chunks,
            plan.tensor_chunks,
            plan.row_weights,
            *(r for _, _, r in self._launches),
        )
        parameters = (part for s in plan.segments for part in (s.alias, s.flat))
        buffers = (self.per_tensor, self._partials)
        self._streams = StreamUse(plan.device, (*tables, *buffers, *parameters))

    def accumulate(
        self, running: Tensor, mean: Tensor | None, *, first: bool, weight: float = 1.0
    ) -> None:
        self._plan.refresh()
        with self._on(running, mean):
            for dtype, aligned, rows in self._launches:
                self._kernels.accumulate_kernel[(len(rows),)](
                    self._plan.chunks,
                    rows,
                    running,
                    running if mean is None else mean,
                    weight,
                    DTYPE=self._type(dtype),
                    ALIGNED=aligned,
                    DELTA=mean is not None,
                    FIRST=first,
                    WEIGHTED=weight != 1.0,
                    BLOCK=self._block,
                    enable_fp_fusion=False,
                )

    def close_sum(self, running: Tensor, previous: Tensor, before: Tensor, window: int) -> Sums:
        with self._on(running, previous, before):
            if self._plan.num_chunks:
                self._kernels.close_sum_kernel[(self._plan.num_chunks,)](
                    self._plan.chunks,
                    running,
                    previous,
                    before,
                    self._partials,
                    BLOCK=self._block,
                    enable_fp_fusion=False,
                )
            return self._total(1.0 / window**2, 1.0 / window**2)

    def close_delta(self, running: Tensor, previous: Tensor, mean: Tensor, window: int) -> Sums:
        with self._on(running, previous, mean):
            if self._plan.num_chunks:
                self._kernels.close_delta_kernel[(self._plan.num_chunks,)](
                    self._plan.chunks,
                    running,
                    previous,
                    mean,
                    self._partials,
                    torch.tensor(window, device=self._plan.device),
                    BLOCK=self._block,
                    enable_fp_fusion=False,
                )
            return self._total(1.0 / window**2, 1.0)

    def write_back(self, arena: Tensor, mean: Tensor | None, scale: float) -> None:
        # A plain float argument would be rounded to float32.
        factor = torch.tensor(scale, dtype=torch.float64, device=self._plan.device)
        with self._on(arena, mean):
            for dtype, aligned, rows in self._launches:
                self._kernels.write_back_kernel[(len(rows),)](
                    self._plan.chunks,
                    rows,
                    arena,
                    arena if mean is None else mean,
                    factor,
                    DTYPE=self._type(dtype),
                    ALIGNED=aligned,
                    WITH_MEAN=mean is not None,
                    BLOCK=self._block,
                    enable_fp_fusion=False,
                )
        self._plan.publish()

    def _on(self, *arenas: Tensor | None) -> AbstractContextManager[object]:
        """Triton launches on the current device, on the stream that is current there."""
        if self._plan.device.type != "cpu":
            self._streams.current(*arenas)
        return current_device(self._plan.device)

    def _type(self, dtype: torch.dtype) -> Any:
        """Element type for a kernel; bfloat16 goes by its bits."""
        name = "uint16" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")
        return getattr(self._language, name)

    def _total(self, displacement_scale: float, mean_scale: float) -> Sums:
        if self._plan.num_rows:
            self._kernels.tensor_kernel[(self._plan.num_rows,)](
                self._plan.tensor_chunks, self._partials, self.per_tensor, BLOCK=256
            )
        scales = [displacement_scale] * 3 + [mean_scale]
        self.per_tensor *= torch.tensor(scales, dtype=torch.float64, device=self._plan.device)
        return Sums(*(self._plan.row_weights[:, None] * self.per_tensor).sum(dim=0).tolist())


def _launches(plan: Plan) -> list[tuple[torch.dtype, bool, Tensor]]:
    """Dtype, alignment and int64 chunk indices of each launch of a step."""
    chunks = plan.chunks.cpu()
    aligned = chunks[:, 0] % 16 == 0
    launches = []
    for code, dtype in enumerate(reference.DTYPES):
        for is_aligned in (True, False):
            rows = ((chunks[:, 3] == code) & (aligned == is_aligned)).nonzero().flatten()
            if len(rows):
                launches.append((dtype, is_aligned, rows.to(plan.device)))
    return launches
