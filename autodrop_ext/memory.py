"""The memory that a tensor's elements fill: one stretch or several, shared or not."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

# Two interleaved strided views that span more elements than this are not compared one by one.
_MAX_COMPARED_SPAN = 1 << 30


def is_dense(tensor: Tensor) -> bool:
    """Return True if the elements fill one stretch of memory, in any order of the axes."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def span(tensor: Tensor) -> int:
    """Return the elements from the first to the last that the tensor touches, both included."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return tensor.numel()
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def has_memory(tensor: Tensor) -> bool:
    """Return True if the storage holds every element, which ``resize_`` of a storage may change."""
    if tensor.numel() == 0:
        return True
    end = (tensor.storage_offset() + span(tensor)) * tensor.element_size()
    return tensor.data_ptr() != 0 and end <= tensor.untyped_storage().nbytes()


def distinct(named: Sequence[tuple[str, Tensor]]) -> list[int]:
    """Return the indices of the tensors without those that are the same elements again.

    Raises:
        ValueError: two tensors overlap in memory without being the same; the message names both.
    """
    by_device: dict[torch.device, list[int]] = {}
    for i, (_, tensor) in enumerate(named):
        if tensor.numel():
            by_device.setdefault(tensor.device, []).append(i)
    repeated: set[int] = set()
    for indices in by_device.values():
        tensors = [named[i][1] for i in indices]
        begin = np.array([tensor.data_ptr() for tensor in tensors], np.uint64)
        size = np.array([span(t) * t.element_size() for t in tensors], np.uint64)
        order = np.argsort(begin, kind="stable")
        ends = (begin + size)[order]
        if (ends[:-1] > begin[order][1:]).any():  # otherwise nothing overlaps
            spans = zip(begin[order].tolist(), ends.tolist(), order.tolist(), strict=True)
            repeated |= _repeated(named, [(b, e, indices[i]) for b, e, i in spans])
    return [i for i in range(len(named)) if i not in repeated]


def _repeated(
    named: Sequence[tuple[str, Tensor]], spans: Sequence[tuple[int, int, int]]
) -> set[int]:
    """Return the tensors to leave out; each span has begin, end and index, sorted by the begin."""
    repeated: set[int] = set()
    open_spans: list[tuple[int, int, int]] = []
    for begin, end, i in spans:
        open_spans = [s for s in open_spans if s[1] > begin]
        for _, _, other in open_spans:
            if _same_elements(named[i][1], named[other][1]):
                repeated.add(max(i, other))
            elif _share_elements(named[i][1], named[other][1]):
                first, second = (named[j][0] for j in sorted((i, other)))
                raise ValueError(
                    f"params: {first} and {second} overlap in memory without being "
                    "the same tensor; expected separate or identical parameters"
                )
        open_spans.append((begin, end, i))
    return repeated


def _same_elements(a: Tensor, b: Tensor) -> bool:
    if a.data_ptr() != b.data_ptr() or a.dtype != b.dtype or a.numel() != b.numel():
        return False
    same_view = a.shape == b.shape and a.stride() == b.stride()
    return same_view or (is_dense(a) and is_dense(b))


def _share_elements(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors whose spans meet have an element in common."""
    if (is_dense(a) and is_dense(b)) or a.dtype != b.dtype:
        return True
    size = a.element_size()
    start = min(a.data_ptr(), b.data_ptr())
    both = max(t.data_ptr() // size + span(t) for t in (a, b)) - start // size
    if (a.data_ptr() - b.data_ptr()) % size or both > _MAX_COMPARED_SPAN:
        return True
    touched = torch.zeros(both, dtype=torch.bool, device="cpu")
    touched.as_strided(a.shape, a.stride(), (a.data_ptr() - start) // size).fill_(True)
    return bool(touched.as_strided(b.shape, b.stride(), (b.data_ptr() - start) // size).any())


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Let Python collect no garbage in the block.

    Finding parameters makes several objects for each, and so does a plan, and all of them stay.
    Looking for garbage among them took two thirds of the time at 10,000 tensors.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
