"""Where the elements of tensors are in memory: dense or not, shared or not."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Named = tuple[str, Tensor]

# Two interleaved strided views that span more elements than this are not compared one by one.
_MAX_COMPARED_SPAN = 1 << 30


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in any order of the axes."""
    if tensor.is_contiguous():
        return True
    expected = 1
    axes = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    for stride, size in axes:
        if size == 0:
            return True
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def as_real(tensor: Tensor) -> Tensor:
    """The tensor without its history; complex elements as pairs of real ones."""
    tensor = tensor.detach()
    if not tensor.is_complex():
        return tensor
    if tensor.is_conj():
        # The memory holds the conjugates; angles and norms are the same for both.
        tensor = tensor.conj()
    return torch.view_as_real(tensor)


def distinct(named: Sequence[Named]) -> list[int]:
    """Indices of the tensors to keep where some are the same elements again.

    Raises:
        ValueError: two tensors overlap in memory without being the same; the message names both.
    """
    by_device: dict[torch.device, list[tuple[int, int, int]]] = {}
    for i, (_, tensor) in enumerate(named):
        begin = tensor.data_ptr()
        end = begin + _span(tensor) * tensor.element_size()
        by_device.setdefault(tensor.device, []).append((begin, end, i))
    repeated = set()
    for spans in by_device.values():
        open_spans: list[tuple[int, int, int]] = []
        for begin, end, i in sorted(s for s in spans if s[0] < s[1]):
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
    return [i for i in range(len(named)) if i not in repeated]


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last that the tensor touches, both included."""
    if tensor.is_contiguous():
        return tensor.numel()
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _same_elements(a: Tensor, b: Tensor) -> bool:
    if a.data_ptr() != b.data_ptr() or a.dtype != b.dtype or a.numel() != b.numel():
        return False
    same_view = a.shape == b.shape and a.stride() == b.stride()
    return same_view or (is_dense(a) and is_dense(b))


def _share_elements(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose spans meet have an element in common."""
    if (is_dense(a) and is_dense(b)) or a.dtype != b.dtype:
        return True
    size = a.element_size()
    start = min(a.data_ptr(), b.data_ptr())
    span = max(t.data_ptr() // size + _span(t) for t in (a, b)) - start // size
    if (a.data_ptr() - b.data_ptr()) % size or span > _MAX_COMPARED_SPAN:
        return True
    touched = torch.zeros(span, dtype=torch.bool, device="cpu")
    touched.as_strided(a.shape, a.stride(), (a.data_ptr() - start) // size).fill_(True)
    return bool(touched.as_strided(b.shape, b.stride(), (b.data_ptr() - start) // size).any())


@contextlib.contextmanager
def needing(elements: int, dtype: torch.dtype, device: torch.device, advice: str) -> Iterator[None]:
    """Turn a failed allocation into an error that says what was needed and what to do instead.

    Args:
        elements: elements of ``dtype`` that the block allocates.
        dtype: their type.
        device: where they go.
        advice: the end of the message.

    Raises:
        RuntimeError: there is no memory; other errors of the block pass.
    """
    try:
        yield
    except RuntimeError as error:
        # The CPU's allocator raises a plain RuntimeError.
        if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error)):
            raise
        raise RuntimeError(
            f"no memory on {device}: {elements * dtype.itemsize:,} bytes were needed; {advice}"
        ) from error


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Let Python collect no garbage in the block.

    A plan makes several objects for every tensor, and all of them stay. Looking for garbage among
    them took two thirds of the first step at 10,000 tensors.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
