"""The device and the stream that a launch goes to, and the memory that it may still be using."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device the current one for a while; for the CPU, nothing.

    Nothing is done either where the device is current already. Otherwise torch's own switch is used
    because it knows which devices have a context: CUDA's would make one on the device that it goes
    back to, hundreds of megabytes that no one asked for.
    """
    if device.type == "cpu" or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    guard: AbstractContextManager[object] = torch.cuda.device(device)
    return guard


class StreamUse:
    """Tells torch's allocator on which streams memory is used.

    Kernels get addresses, so torch does not see their reads and writes. It knows the stream that
    was current when the memory was allocated. On any other stream, memory that is freed while a
    kernel waits in the queue could be given away before the kernel has run.

    Args:
        device: of all tensors.
        tensors: what every launch uses.
    """

    def __init__(self, device: torch.device, tensors: Iterable[Tensor]) -> None:
        self._device = device
        self._tensors = list(tensors)
        self._known: dict[int, set[int]] = {}
        """For each stream but the first, addresses of arenas that were used on it."""
        if device.type == "cuda":
            self._first = torch.cuda.current_stream(device).cuda_stream

    def current(self, *arenas: Tensor | None) -> int:
        """Handle of the device's current stream, on which ``arenas`` are used from now on."""
        stream = torch.cuda.current_stream(self._device)
        handle: int = stream.cuda_stream
        if handle == self._first:
            return handle
        if handle not in self._known:
            self._known[handle] = set()
            for tensor in self._tensors:
                tensor.record_stream(stream)
        known = self._known[handle]
        for arena in arenas:
            if arena is not None and arena.data_ptr() not in known:
                known.add(arena.data_ptr())
                arena.record_stream(stream)
        return handle
