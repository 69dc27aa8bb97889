"""The compiled CPU backend: one call into ``csrc/cpu`` per operation, whatever the model."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .interface import Sums
from .plan import Plan


class CpuBackend:
    """Args:
    isa: an instruction set by name ("baseline", "avx2") instead of the widest that runs here.
    """

    name = "cpu"

    def __init__(self, isa: str = "") -> None:
        self._isa = isa

    def missing(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it runs on cpu tensors, not on {device.type}"
        if native.core is None:
            return native.why_missing()
        return None

    def bind(self, plan: Plan) -> CpuOperations:
        return CpuOperations(plan, self._isa)


class CpuOperations:
    def __init__(self, plan: Plan, isa: str = "") -> None:
        assert native.core is not None, "checked by CpuBackend.missing"
        self._plan = plan
        self._partials = torch.empty(plan.num_chunks, 4, dtype=torch.float64, device="cpu")
        self.per_tensor = torch.zeros(plan.num_rows, 4, dtype=torch.float64, device="cpu")
        self._native = native.core.CpuPlan(
            plan.chunks.data_ptr(),
            plan.num_chunks,
            plan.tensor_chunks.data_ptr(),
            plan.row_weights.data_ptr(),
            plan.num_rows,
            isa,
        )

    def accumulate(
        self, running: Tensor, mean: Tensor | None, *, first: bool, weight: float = 1.0
    ) -> None:
        self._plan.refresh()
        self._native.accumulate(
            running.data_ptr(), native.address(mean), first, weight, torch.get_num_threads()
        )

    def close_sum(self, running: Tensor, previous: Tensor, before: Tensor, window: int) -> Sums:
        return Sums(
            *self._native.close_sum(*self._close_arguments(running, previous, before, window))
        )

    def close_delta(self, running: Tensor, previous: Tensor, mean: Tensor, window: int) -> Sums:
        return Sums(
            *self._native.close_delta(*self._close_arguments(running, previous, mean, window))
        )

    def write_back(self, arena: Tensor, mean: Tensor | None, scale: float) -> None:
        self._native.write_back(
            arena.data_ptr(), native.address(mean), scale, torch.get_num_threads()
        )
        self._plan.publish()

    def _close_arguments(
        self, running: Tensor, previous: Tensor, third: Tensor, window: int
    ) -> tuple[int | float, ...]:
        return (
            running.data_ptr(),
            previous.data_ptr(),
            third.data_ptr(),
            float(window),
            self._partials.data_ptr(),
            self.per_tensor.data_ptr(),
            torch.get_num_threads(),
        )
