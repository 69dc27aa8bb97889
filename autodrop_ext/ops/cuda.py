"""The compiled CUDA backend: one launch per device and step, one synchronisation per window."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import native
from .interface import Sums
from .plan import Plan

_NO_CODE = ("cudaErrorNoKernelImageForDevice", "cudaErrorUnsupportedPtxVersion")


class CudaBackend:
    name = "cuda"

    def missing(self, device_type: str) -> str | None:
        if device_type != "cuda":
            return f"it runs on cuda tensors, not on {device_type}"
        if native.core is None:
            return native.why_missing()
        if not native.core.cuda_built:
            return (
                f"the compiled core has no CUDA kernels: {native.core.cuda_reason}; install the "
                "CUDA toolkit and reinstall with AUTODROP_CUDA=1"
            )
        if torch.version.hip is not None:
            return "this torch runs on AMD GPUs, which the triton backend serves"
        if not torch.cuda.is_available():
            return "torch sees no CUDA GPU"
        return _probe()

    def bind(self, plan: Plan) -> CudaOperations:
        return CudaOperations(plan)


@functools.cache
def _probe() -> str | None:
    """Launch a kernel on every visible GPU; what went wrong, or None."""
    assert native.core is not None, "checked by CudaBackend.missing"
    torch.cuda.current_device()  # initialises CUDA
    for device in range(torch.cuda.device_count()):
        try:
            native.core.cuda_probe(device)
        except RuntimeError as error:
            return explain(str(error), device)
    return None


def explain(error: str, device: int) -> str:
    """What a CUDA error at a launch means for the user, in a sentence."""
    if not any(name in error for name in _NO_CODE):
        return f"a test launch on GPU {device} failed: {error}"
    assert native.core is not None
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"it was built for the architectures {native.core.cuda_architectures}, and GPU {device} "
        f"({torch.cuda.get_device_name(device)}) is sm_{major}{minor}; reinstall with "
        f"CUDAARCHS={major}{minor} AUTODROP_CUDA=1 and an nvcc that knows this GPU"
    )


class CudaOperations:
    def __init__(self, plan: Plan) -> None:
        assert native.core is not None, "checked by CudaBackend.missing"
        self._plan = plan
        sums = functools.partial(torch.zeros, dtype=torch.float64)
        self.per_tensor = sums((plan.num_rows, 4), device=plan.device)
        self._partials = sums((plan.num_chunks, 4), device=plan.device)
        self._total = sums((4,), device=plan.device)
        self._host_total = sums((4,), pin_memory=True)
        # The compiled plan holds addresses only; these tensors stay alive with this object.
        self._native = native.core.CudaPlan(
            plan.device.index,
            plan.chunks.data_ptr(),
            plan.tiles.data_ptr(),
            len(plan.tiles),
            plan.tensor_chunks.data_ptr(),
            plan.row_weights.data_ptr(),
            plan.num_rows,
            self._partials.data_ptr(),
            self.per_tensor.data_ptr(),
            self._total.data_ptr(),
            self._host_total.data_ptr(),
        )

    def accumulate(
        self, running: Tensor, mean: Tensor | None, *, first: bool, weight: float = 1.0
    ) -> None:
        self._plan.refresh()
        self._native.accumulate(
            running.data_ptr(), native.address(mean), first, weight, self._stream()
        )

    def close_sum(self, running: Tensor, previous: Tensor, before: Tensor, window: int) -> Sums:
        arenas = (running.data_ptr(), previous.data_ptr(), before.data_ptr())
        self._native.close_sum(*arenas, float(window), self._stream())
        return Sums(*self._host_total.tolist())

    def close_delta(self, running: Tensor, previous: Tensor, mean: Tensor, window: int) -> Sums:
        arenas = (running.data_ptr(), previous.data_ptr(), mean.data_ptr())
        self._native.close_delta(*arenas, float(window), self._stream())
        return Sums(*self._host_total.tolist())

    def write_back(self, arena: Tensor, mean: Tensor | None, scale: float) -> None:
        self._native.write_back(arena.data_ptr(), native.address(mean), scale, self._stream())
        self._plan.publish()

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._plan.device).cuda_stream
