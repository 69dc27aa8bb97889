"""The memory that a tensor's elements fill: one stretch or several, shared or not."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


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


def has_memory(tensor: Tensor) -> bool:
    """Return True if the storage holds every element, which ``resize_`` of a storage may change."""
    if tensor.numel() == 0:
        return True
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return tensor.data_ptr() != 0 and end <= tensor.untyped_storage().nbytes()


def distinct(named: Sequence[tuple[str, Tensor]]) -> list[int]:
    """Return the indices of the tensors without those that are the same elements again.

    Raises:
        ValueError: two dense tensors overlap in memory without being the same; the message names
            both. Strided ones are not compared: columns of a matrix meet without sharing elements.
    """
    first: dict[Any, int] = {}
    spans = []
    for i, (_, tensor) in enumerate(named):
        begin, dense = tensor.data_ptr(), is_dense(tensor)
        view = tensor.numel() if dense else (tensor.shape, tensor.stride())
        key = (tensor.device, begin, tensor.dtype, view) if tensor.numel() else i
        if first.setdefault(key, i) == i and dense and tensor.numel():
            spans.append((str(tensor.device), begin, begin + tensor.nbytes, i))
    spans.sort()
    for (device, _, end, i), (other_device, begin, _, j) in itertools.pairwise(spans):
        if device == other_device and begin < end:
            one, two = (named[k][0] for k in sorted((i, j)))
            raise ValueError(
                f"params: {one} and {two} overlap in memory without being the same tensor; "
                "expected separate or identical parameters"
            )
    return list(first.values())


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
