"""The compiled CUDA backend: one launch per device and step, one synchronisation per window.

A step can be captured in a CUDA graph. A close waits for its stream, so inside a capture it is
refused with a RuntimeError that names cudaErrorStreamCaptureUnsupported; the capture goes on.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import native
from .architectures import name_architectures
from .interface import Sums
from .plan import Plan
from .streams import StreamUse, current_device

_NO_CODE = ("cudaErrorNoKernelImageForDevice", "cudaErrorUnsupportedPtxVersion")


class CudaBackend:
    name = "cuda"

    def missing(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"it runs on cuda tensors, not on {device.type}"
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
        return _probe(torch.cuda.current_device() if device.index is None else device.index)

    def bind(self, plan: Plan) -> CudaOperations:
        return CudaOperations(plan)


@functools.cache
def _probe(device: int) -> str | None:
    """Launch a kernel on one GPU; what went wrong, or None.

    Only the GPU that is used: a context takes hundreds of megabytes on each that is touched, for
    every rank of a machine.
    """
    assert native.core is not None, "checked by CudaBackend.missing"
    try:
        with current_device(torch.device("cuda", device)):
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
        f"it was built for {name_architectures(native.core.cuda_architectures)}, and GPU {device} "
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
        self._host_total = sums((4,), device="cpu", pin_memory=True)
        tables = (plan.chunks, plan.tiles, plan.tensor_chunks, plan.row_weights)
        buffers = (self._partials, self.per_tensor, self._total)
        parameters = (part for s in plan.segments for part in (s.alias, s.flat))
        self._streams = StreamUse(plan.device, (*tables, *buffers, *parameters))
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
        with current_device(self._plan.device):
            stream = self._streams.current(running, mean)
            self._native.accumulate(running.data_ptr(), native.address(mean), first, weight, stream)

    def close_sum(self, running: Tensor, previous: Tensor, before: Tensor, window: int) -> Sums:
        arenas = (running, previous, before)
        with current_device(self._plan.device):
            stream = self._streams.current(*arenas)
            self._native.close_sum(*(a.data_ptr() for a in arenas), float(window), stream)
        return Sums(*self._host_total.tolist())

    def close_delta(self, running: Tensor, previous: Tensor, mean: Tensor, window: int) -> Sums:
        arenas = (running, previous, mean)
        with current_device(self._plan.device):
            stream = self._streams.current(*arenas)
            self._native.close_delta(*(a.data_ptr() for a in arenas), float(window), stream)
        return Sums(*self._host_total.tolist())

    def write_back(self, arena: Tensor, mean: Tensor | None, scale: float) -> None:
        with current_device(self._plan.device):
            stream = self._streams.current(arena, mean)
            self._native.write_back(arena.data_ptr(), native.address(mean), scale, stream)
        self._plan.publish()
