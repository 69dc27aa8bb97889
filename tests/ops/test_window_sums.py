"""The sums of windows over all devices of a rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autodrop_ext.ops.window_sums import COVARIANCES, Watched, WindowSums


def watched(*tensors: Tensor, weight: float = 1.0) -> list[Watched]:
    return [Watched(f"t{i}", t, weight, f"t{i}", t.numel()) for i, t in enumerate(tensors)]


def test_element_types_on_one_device_share_a_plan() -> None:
    tensors = [torch.randn(5).to(d) for d in (torch.float32, torch.bfloat16, torch.float64)]
    sums = WindowSums(watched(*tensors), "auto")
    (device,) = sums.devices
    assert [segment.name for segment in device.plan.segments] == ["t0", "t1", "t2"]
    assert sums.kept == [[0, 1, 2]]


def test_views_of_the_same_elements_are_kept_once() -> None:
    x, y = torch.randn(4, 3), torch.randn(2)
    sums = WindowSums(watched(x, y, x.view(12), x), "auto")
    assert sums.kept == [[0, 1]]
    assert list(sums.views()) == ["t0", "t1"]


def test_weights_scale_the_totals_and_the_table_but_not_the_rows() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    moves = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    results = []
    for weight in (1.0, 0.25):
        p = x.clone()
        sums = WindowSums(watched(p, weight=weight), "reference")
        for move in moves:
            p += move
            sums.begin_window()
            sums.add("delta", first=True)
            total = sums.close(1)
        assert total is not None
        (table,), (rows,) = sums.tensor_table(), sums.per_tensor()
        assert table.shape == (1, 3 + COVARIANCES)
        assert table[0, :3].tolist() == list(total[:3])
        assert not table[0, 3:].any()  # every element is read
        results.append((list(total), rows.tolist()))
    (plain, rows), (weighted, same_rows) = results
    assert weighted == [0.25 * value for value in plain]  # to the bit: a power of two
    assert rows == same_rows == [plain]


def test_nothing_is_an_empty_sum() -> None:
    sums = WindowSums([], "auto")
    sums.add("delta", first=True)
    assert sums.close(1) == (0.0, 0.0, 0.0, 0.0)
    assert (sums.tensor_table(), sums.device_bytes) == ([], 0)


def test_a_tensor_on_the_meta_device_is_named() -> None:
    with pytest.raises(TypeError, match="t1: expected a parameter with data, got one on device"):
        WindowSums(watched(torch.zeros(2), torch.zeros(2, device="meta")), "auto")


def test_saved_sums_that_do_not_fit_are_explained() -> None:
    sums = WindowSums(watched(torch.randn(4)), "auto")
    sums.add("delta", first=True)
    state, arenas = sums.state(), {name: dict(roles) for name, roles in sums.views().items()}
    assert sums.problem_of(state, arenas) is None
    assert sums.problem_of(state, {}) == "t0 is not in it"
    other = WindowSums(watched(torch.randn(5)), "auto")
    assert other.problem_of(state, arenas) == "t0 was (4,), now it is (5,)"
    del arenas["t0"]["third"]
    assert sums.problem_of(state, arenas) == "t0 has no 'third'"
    sampled = sums.problem_of({**state, "fraction": 0.25}, arenas)
    assert sampled == "it has sample=0.25, and now everything is read"
