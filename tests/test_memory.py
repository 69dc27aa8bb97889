"""The memory of tensors: whether it is dense, present, and shared with another tensor."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autodrop_ext.memory import distinct, has_memory, is_dense, no_garbage_collection


def kept(*tensors: Tensor) -> list[int]:
    return distinct([(f"t{i}", tensor) for i, tensor in enumerate(tensors)])


def test_dense_tensors() -> None:
    base = torch.randn(4, 6, 5, 3)
    dense = [
        base.clone(),
        base.clone().to(memory_format=torch.channels_last),
        base.clone().permute(3, 1, 0, 2),
        base.clone()[1:3],
        torch.randn(5, 1, 3)[:, 0],
        torch.tensor(1.0),
        torch.randn(0, 3),
        torch.randn(4, dtype=torch.cfloat),
    ]
    assert all(is_dense(t) for t in dense)
    strided = [base[:, :2], base[..., ::2], torch.randn(3, 1).expand(3, 4)]
    assert not any(is_dense(t) for t in strided)


def test_tied_tensors_count_once() -> None:
    a = torch.randn(3, 4)
    assert kept(a, a, a.view(3, 4), a.t(), a.view(-1)) == [0]
    strided = torch.randn(6, 6)[:, ::2]
    assert kept(torch.zeros(2), strided, strided[:]) == [0, 1]
    empty = torch.zeros(0)
    assert kept(empty, empty, torch.zeros(0, 3)) == [0, 1, 2]


def test_interleaved_views_are_separate_tensors() -> None:
    base = torch.randn(6, 8)
    assert kept(base[:, :3], base[:, 3:], torch.randn(2)) == [0, 1, 2]
    assert kept(base[:, ::2], base[:, 1::2]) == [0, 1]
    assert kept(base[1, :3], base[:, 3:]) == [0, 1]


@pytest.mark.parametrize(
    "overlapping",
    [
        lambda b: (b[:4], b[3:]),
        lambda b: (b, b[2]),
        lambda b: (b.view(-1)[:10], b.view(-1)[:9]),
        lambda b: (b, b.view(torch.int32).view(torch.float32)[1:]),
    ],
)
def test_partly_overlapping_tensors_are_refused(
    overlapping: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> None:
    first, second = overlapping(torch.randn(6, 8))
    with pytest.raises(ValueError, match="params: t1 and t2 overlap in memory without"):
        kept(torch.randn(3), first, second)


def test_a_storage_that_shrank_holds_no_elements() -> None:
    x = torch.zeros(10)[4:]
    assert has_memory(x) and has_memory(torch.zeros(0))
    x.untyped_storage().resize_(9 * 4)
    assert not has_memory(x)
    x.untyped_storage().resize_(0)
    assert not has_memory(x)


def test_garbage_is_collected_again_after_an_exception() -> None:
    seen = {}

    @no_garbage_collection()
    def fail() -> None:
        seen["enabled"] = gc.isenabled()
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == {"enabled": False}
    assert gc.isenabled()
