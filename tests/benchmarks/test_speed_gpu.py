"""Apex's kernels as peers of the reads on a GPU, with stand-ins for them."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any

import gpu
import pytest
import torch
from torch import Tensor


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)


def test_apex_is_measured_if_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    params, sums = [torch.full((3,), 2.0)], [torch.ones(3)]
    assert gpu.apex(params, sums) == {}

    def apply(operation: Callable[..., Any], overflow: Tensor, lists: Any, *rest: Any) -> Any:
        """As apex's multi_tensor_applier, which puts the chunk's size first."""
        assert overflow.dtype == torch.int32
        return operation(2048 * 32, overflow, lists, *rest)

    def norm(chunk: int, overflow: Tensor, lists: list[list[Tensor]], of_each: bool) -> Tensor:
        assert not of_each
        return torch.stack([x.norm() for x in lists[0]]).norm()

    def axpby(
        chunk: int, overflow: Tensor, lists: list[list[Tensor]], a: float, b: float, checked: int
    ) -> None:
        for x, y, out in zip(*lists, strict=True):
            out.copy_(a * x + b * y)

    module(monkeypatch, "amp_C", multi_tensor_l2norm=norm, multi_tensor_axpby=axpby)
    module(monkeypatch, "apex")
    module(monkeypatch, "apex.multi_tensor_apply", multi_tensor_applier=apply)
    calls = gpu.apex(params, sums)
    assert calls["apex l2norm"]() == pytest.approx(12**0.5)
    calls["apex axpby"]()
    assert torch.equal(sums[0], torch.full((3,), 3.0))
