"""The compiled kernels for NVIDIA GPUs: two launches for a read, one wait at a window's end.

A read can be captured in a CUDA graph if a read of the same tensors came before. A close waits for
its stream, so it is refused inside a capture with a RuntimeError, and so is an upload of addresses;
the capture goes on.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from . import native
from .backends import add_blocks, close_blocks
from .plan import FloatArray, IntArray, Plan, Table

_NO_CODE = ("cudaErrorNoKernelImageForDevice", "cudaErrorUnsupportedPtxVersion")


class CudaBackend:
    """The compiled kernels for NVIDIA GPUs."""

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

    def core(self) -> ModuleType:
        """Return the compiled core."""
        return native.loaded()

    def bind(self, plan: Plan) -> CudaAccumulation:
        return CudaAccumulation(plan, self.core())

    def close(
        self, running: Tensor, mean: Tensor, displacement: Tensor, divisor: float, bounds: IntArray
    ) -> FloatArray:
        device = running.device

        def launch(blocks: Tensor, sums: Tensor) -> None:
            self.core().cuda_close(
                device.index or 0,
                running.data_ptr(),
                mean.data_ptr(),
                displacement.data_ptr(),
                divisor,
                blocks.data_ptr(),
                len(blocks),
                sums.data_ptr(),
                current_stream(device),
            )

        return close_on(device, bounds, launch)


@functools.cache
def _probe(device: int) -> str | None:
    """Launch a kernel on one GPU; return what went wrong, or None.

    Only the GPU that is used: a context takes hundreds of megabytes on each that is touched, for
    every rank of a machine.
    """
    try:
        with current_device(torch.device("cuda", device)):
            native.loaded().cuda_probe(device)
    except RuntimeError as error:
        return explain(str(error), device)
    return None


def explain(error: str, device: int) -> str:
    """Return what a CUDA error at a launch means for the user, in a sentence."""
    if not any(name in error for name in _NO_CODE):
        return f"a test launch on GPU {device} failed: {error}"
    major, minor = torch.cuda.get_device_capability(device)
    built = native.loaded().cuda_architectures
    return (
        f"it was built for the CUDA architectures {built}, and GPU {device} "
        f"({torch.cuda.get_device_name(device)}) is sm_{major}{minor}; reinstall with "
        f"CUDAARCHS={major}{minor} AUTODROP_CUDA=1 and an nvcc that knows this GPU"
    )


class CudaAccumulation:
    def __init__(self, plan: Plan, core: ModuleType) -> None:
        self._plan = plan
        self._core = core
        self._tables = DeviceTables(plan)
        self._partials = partial_rows(plan)

    def accumulate(self, table: Tensor, bases: IntArray) -> None:
        plan, device = self._plan, self._plan.device
        with current_device(device):
            stream = current_stream(device)
            tables = self._tables
            addresses = tables.addresses(bases)
            if plan.hashed:
                self._core.cuda_accumulate(
                    device.index or 0,
                    tables.table.data_ptr(),
                    tables.runs.data_ptr(),
                    plan.num_rows,
                    splits(plan),
                    addresses.data_ptr(),
                    self._partials.data_ptr(),
                    table.data_ptr(),
                    plan.weighted,
                    stream,
                )
            else:
                self._core.cuda_accumulate_exact(
                    device.index or 0,
                    tables.table.data_ptr(),
                    len(plan.table),
                    addresses.data_ptr(),
                    table.data_ptr(),
                    stream,
                )
            tables.record(self._partials, table)


class DeviceTables:
    """The tables of a plan on its device, and the tensors' addresses, uploaded if they change."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.table = _to(plan.table, plan.device)
        self.runs = torch.from_numpy(plan.runs).to(plan.device)
        self._uploaded = np.zeros(0, np.int64)
        self._addresses = torch.empty(0)
        self._first = current_stream(plan.device)
        self._known = {self._first}

    def addresses(self, bases: IntArray) -> Tensor:
        """Return the addresses of the tensors on the device."""
        if not np.array_equal(bases, self._uploaded):
            if _is_capturing(self._plan.device):
                raise RuntimeError(
                    "accumulate: expected tensors in the memory of the step before, got others "
                    "inside a CUDA graph's capture; take a step before the capture"
                )
            host = torch.from_numpy(bases)
            if self._plan.device.type == "cuda":
                host = host.pin_memory()  # torch keeps the pages until the copy is done
            self._addresses = host.to(self._plan.device, non_blocking=True)
            self._uploaded = bases
        return self._addresses

    def record(self, *used: Tensor) -> None:
        """Tell torch's allocator that kernels use all of this on the current stream.

        Kernels get addresses, so that torch does not see what they read. Memory that is freed while
        a kernel waits could otherwise be given away before the kernel has run.
        """
        if current_stream(self._plan.device) == self._first:
            return
        stream = torch.cuda.current_stream(self._plan.device)
        tensors = (self.table, self.runs, self._addresses, *used)
        if stream.cuda_stream not in self._known:
            self._known.add(stream.cuda_stream)
            tensors += tuple(source.current() for source in self._plan.sources)
        for tensor in tensors:
            tensor.record_stream(stream)


def _to(table: Table, device: torch.device) -> Tensor:
    """Return rows of 32 bytes on a device, int64 ``[n, 4]``."""
    return torch.from_numpy(table.view("<i8").reshape(-1, 4)).to(device)


def splits(plan: Plan) -> int:
    """Return into how many blocks of a GPU a row is divided.

    It follows from the plan alone, so that results do not depend on the GPU. Eight blocks for each
    of 64 rows fill a GPU of 132 multiprocessors; a row of a small model is not worth them.
    """
    per_row = len(plan.table) // max(1, plan.num_rows)
    return min(8, max(1, per_row // 8))


def partial_rows(plan: Plan) -> Tensor:
    """Return memory for the rows of all blocks, float64 ``[splits, num_rows * 4096]``."""
    blocks = splits(plan) if plan.hashed else 0
    size = (blocks, plan.num_buckets) if blocks > 1 else (0,)
    return torch.empty(size, dtype=torch.float64, device=plan.device)


def close_on(
    device: torch.device, bounds: IntArray, launch: Callable[[Tensor, Tensor], None]
) -> FloatArray:
    """Return the sums of each part of the tables; wait for the device.

    Args:
        device: of the tables.
        bounds: first bucket of each part, and the end of the last one.
        launch: takes first bucket and the one after the last of each block, int64
            ``[num_blocks, 2]``, and writes the block's sums, float64 ``[num_blocks, 2]``.

    Raises:
        RuntimeError: a CUDA graph is being captured. The capture goes on.
    """
    with current_device(device):
        if _is_capturing(device):
            raise RuntimeError(
                "close: expected the end of a window outside of a CUDA graph's capture, because "
                "the host waits for its sums; capture steps that do not end a window"
            )
    blocks, part = close_blocks(bounds)
    on_device = torch.from_numpy(blocks).to(device)
    sums = torch.empty(len(blocks), 2, dtype=torch.float64, device=device)
    with current_device(device):
        launch(on_device, sums)
    return add_blocks(sums.cpu().numpy(), part, len(bounds) - 1)


def current_stream(device: torch.device) -> int:
    """Return the handle of a device's current stream; 0 for the CPU."""
    if device.type != "cuda":
        return 0
    handle: int = torch.cuda.current_stream(device).cuda_stream
    return handle


def _is_capturing(device: torch.device) -> bool:
    """Return True if the current stream of the current device is captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one for a while; for the CPU, nothing.

    Nothing is done either if the device is current already. Otherwise torch's own switch is used
    because it knows which devices have a context: CUDA's would make one on the device that it goes
    back to, hundreds of megabytes that no one asked for.
    """
    if device.type == "cpu" or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    guard: AbstractContextManager[object] = torch.cuda.device(device)
    return guard
