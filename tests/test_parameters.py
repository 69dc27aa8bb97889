"""Which tensors are measured, under which names, and when they are the same as before."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autodrop_ext.parameters import ParameterSource


def parameters(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(size)) for size in sizes]


def addresses(source: ParameterSource) -> list[int] | None:
    now = source.addresses()
    return None if now is None else now.tolist()


def names(source: ParameterSource) -> list[str]:
    return [shard.name for shard in source.shards()]


# ---- names and groups -------------------------------------------------------------------------


def test_names_and_groups() -> None:
    a, b, c = parameters(1, 2, 3)
    source = ParameterSource(torch.optim.SGD([{"params": [a]}, {"params": [b, c]}], lr=0.1))
    assert names(source) == [
        f"param_groups[{g}]['params'][{i}]" for g, i in ((0, 0), (1, 0), (1, 1))
    ]
    assert [shard.group for shard in source.shards()] == [0, 1, 1]
    assert source.num_groups() == 2
    pairs = ParameterSource([("x", a), ("x", b), ("x", a)])
    assert names(pairs) == ["x", "x (2)"]
    assert pairs.num_groups() == 1
    assert names(ParameterSource(iter([a, b]))) == ["params[0]", "params[1]"]
    module = nn.Linear(2, 3)
    assert names(ParameterSource(module.named_parameters)) == ["weight", "bias"]
    by_hand = ParameterSource([{"params": [a], "param_names": ["one"]}, {"params": [b]}])
    assert names(by_hand) == ["one", "param_groups[1]['params'][0]"]
    assert by_hand.num_groups() == 2


@pytest.mark.parametrize("params", [torch.zeros(3), 7, nn.Linear(2, 2)])
def test_what_is_no_iterable_of_tensors(params: Any) -> None:
    with pytest.raises(TypeError, match=r"params: expected an iterable of tensors, of .* got "):
        ParameterSource(params)


def test_an_item_that_is_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"params\[1\]: expected a tensor, .* got int"):
        ParameterSource([torch.zeros(2), 5])


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.zeros(2, 2).to_sparse(), "layout torch.sparse_coo"),
        (torch.zeros(3, dtype=torch.int64), "dtype torch.int64"),
        (torch.zeros(3, dtype=torch.float8_e4m3fn), "dtype torch.float8_e4m3fn"),
    ],
)
def test_what_cannot_be_measured(tensor: Tensor, problem: str) -> None:
    source = ParameterSource([("w", tensor)])
    for call in (source.check, source.shards):
        with pytest.raises(TypeError, match=rf"w: expected a dense .* got {problem}; freeze it"):
            call()


def test_meta_tensors_may_be_filled_later() -> None:
    source = ParameterSource([("w", nn.Parameter(torch.zeros(3, device="meta")))])
    source.check()
    with pytest.raises(RuntimeError, match="w: expected a parameter with data, got one on device"):
        source.shards()


# ---- which are measured -----------------------------------------------------------------------


def test_what_is_measured_stays_measured_while_it_is_frozen() -> None:
    a, b, c = parameters(1, 2, 3)
    c.requires_grad_(False)
    source = ParameterSource(torch.optim.SGD([a, b, c], lr=0.1))
    assert len(source.shards()) == 2
    b.requires_grad_(False)
    assert source.unchanged() and len(source.shards()) == 2
    c.requires_grad_(True)  # moves from now on
    assert not source.unchanged()
    assert len(source.shards()) == 3 and source.unchanged()
    c.requires_grad_(False)
    assert source.unchanged() and len(source.shards()) == 3


def test_frozen_after_the_meter_was_made_and_before_the_first_step() -> None:
    (a,) = parameters(2)
    source = ParameterSource(torch.optim.SGD([a], lr=0.1))
    source.check()
    a.requires_grad_(False)
    assert len(source.shards()) == 1


def test_a_parameter_that_was_taken_out_and_comes_back_frozen() -> None:
    a, b = parameters(1, 2)
    optimizer = torch.optim.SGD([a, b], lr=0.1)
    source = ParameterSource(optimizer)
    source.shards()
    optimizer.param_groups[0]["params"] = [a]
    assert not source.unchanged() and len(source.shards()) == 1
    b.requires_grad_(False)
    optimizer.param_groups[0]["params"] = [a, b]
    assert not source.unchanged() and len(source.shards()) == 1
    b.requires_grad_(True)
    assert not source.unchanged() and len(source.shards()) == 2


def test_what_moves_at_a_step_is_measured_whatever_it_is_later() -> None:
    a, b, c = parameters(1, 2, 3)
    b.requires_grad_(False)
    c.requires_grad_(False)
    source = ParameterSource(torch.optim.SGD([a, b, c], lr=0.1))
    b.grad = torch.ones(2)  # before anything was looked for
    source.notice()
    b.grad = None
    assert len(source.shards()) == 2 and source.unchanged()
    c.requires_grad_(True)  # only while it is trained
    source.notice()
    c.requires_grad_(False)
    assert not source.unchanged()
    assert len(source.shards()) == 3 and source.unchanged()


def test_tensors_by_hand_need_no_gradient() -> None:
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    assert names(ParameterSource([("master", torch.zeros(2)), ("frozen", frozen)])) == ["master"]


# ---- the same memory --------------------------------------------------------------------------


def test_identical_views_count_once() -> None:
    a = nn.Parameter(torch.randn(2, 3))
    views = [("a", a), ("again", a.detach()), ("turned", a.detach().t()), ("other", a.clone())]
    assert names(ParameterSource(views)) == ["a", "other"]


@pytest.mark.parametrize("order", [1, -1])
def test_overlapping_views_are_named(order: int) -> None:
    whole = torch.randn(10)
    views = [("first", whole[:6]), ("far", torch.randn(3)), ("second", whole[5:])][::order]
    with pytest.raises(ValueError, match=r"params: (first and second|second and first) overlap"):
        ParameterSource(views).shards()


def test_columns_of_one_tensor_do_not_overlap() -> None:
    whole = torch.randn(6, 4)
    source = ParameterSource([("left", whole[:, :2]), ("right", whole[:, 2:])])
    assert [shard.staged for shard in source.shards()] == [True, True]


# ---- changes ----------------------------------------------------------------------------------


def test_new_memory_is_the_same_parameter() -> None:
    a, b = parameters(3, 4)
    source = ParameterSource(torch.optim.SGD([a, b], lr=0.1))
    shards = source.shards()
    assert addresses(source) == [a.data_ptr(), b.data_ptr()]
    old = a.data
    a.data = torch.randn(3)
    assert a.data_ptr() != old.data_ptr()
    assert addresses(source) == [a.data_ptr(), b.data_ptr()]
    assert shards[0].current().data_ptr() == a.data_ptr()
    assert source.unchanged()
    b.data.share_memory_()
    assert addresses(source) == [a.data_ptr(), b.data_ptr()]
    assert source.unchanged()


CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "shape": lambda p: setattr(p, "data", torch.randn(3, 2)),
    "dtype": lambda p: setattr(p, "data", p.data.half()),
    "order in memory": lambda p: setattr(p, "data", torch.randn(3, 2).t()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_form_is_another_parameter(change: str) -> None:
    (a,) = [nn.Parameter(torch.randn(2, 3))]
    source = ParameterSource(torch.optim.SGD([a], lr=0.1))
    source.shards()
    CHANGES[change](a)
    assert not source.unchanged()
    assert addresses(source) is None


def test_memory_that_is_gone_or_too_small_is_not_read() -> None:
    (a,) = parameters(1000)
    source = ParameterSource(torch.optim.SGD([a], lr=0.1))
    source.shards()
    storage = a.untyped_storage()
    for size in (0, 400):
        storage.resize_(size)
        assert addresses(source) is None
        assert source.unchanged()  # of which addresses() can read nothing for the moment
    storage.resize_(4000)
    assert addresses(source) == [a.data_ptr()]
    assert source.unchanged()


def test_added_replaced_and_moved_between_groups() -> None:
    a, b = parameters(1, 2)
    optimizer = torch.optim.SGD([a], lr=0.1)
    source = ParameterSource(optimizer)
    assert not source.unchanged()  # nothing has been found yet
    with pytest.raises(RuntimeError, match=r"addresses: expected a call after shards\(\)"):
        source.addresses()
    source.shards()
    optimizer.load_state_dict(optimizer.state_dict())  # replaces param_groups
    assert source.unchanged()
    optimizer.add_param_group({"params": [b]})
    assert not source.unchanged()
    assert len(source.shards()) == 2 and source.unchanged()
    optimizer.param_groups[0]["params"].append(optimizer.param_groups[1]["params"].pop())
    assert not source.unchanged()
    source.shards()
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.randn(1))
    assert not source.unchanged()


def test_a_function_may_make_new_objects_for_the_same_memory() -> None:
    model = nn.Linear(3, 2)
    source = ParameterSource(lambda: [p.detach() for p in model.parameters()])
    source.shards()
    assert source.unchanged()
    same = ParameterSource(model.parameters)
    same.shards()
    model.weight.data = model.weight.data.clone()
    assert source.unchanged()
    assert list(source.addresses()) == [p.data_ptr() for p in model.parameters()]
    assert same.unchanged()  # the function returns the parameters themselves
    wrapped = ParameterSource(lambda: [nn.Parameter(p.data) for p in model.parameters()])
    wrapped.shards()
    assert wrapped.unchanged()
    model.weight.data = model.weight.data.clone()
    assert not wrapped.unchanged()  # another nn.Parameter in another memory is another one


def test_a_function_may_compute_the_tensors_at_every_read() -> None:
    (half,), remainder = parameters(6), torch.zeros(6)
    calls = []

    def compensated() -> list[Tensor]:
        calls.append(half.float() + remainder)
        return calls[-1:]

    source = ParameterSource(compensated)
    (shard,) = source.shards()
    for _ in range(3):
        remainder += 1
        before = len(calls)
        (address,) = source.addresses() or [0]
        assert len(calls) == before + 1 and address == calls[-1].data_ptr()
        assert source.unchanged()
    half.data = torch.randn(7)
    remainder = torch.zeros(7)
    assert source.addresses() is None and not source.unchanged()
    assert shard.tensor.numel() == 6


def test_parameters_are_asked_for_at_the_ends_of_windows_only() -> None:
    model, calls = nn.Linear(3, 2), []

    def given() -> list[nn.Parameter]:
        calls.append(1)
        return list(model.parameters())

    source = ParameterSource(given)
    source.shards()
    before = len(calls)
    source.addresses()
    assert len(calls) == before


@pytest.mark.parametrize("kind", ["master weights", "frozen while it is looked at"])
def test_what_an_optimizer_moves_is_measured(kind: str) -> None:
    if kind == "master weights":
        tensor = torch.randn(5)
        optimizer = torch.optim.SGD([tensor], lr=0.1)
    else:
        tensor = nn.Parameter(torch.randn(5), requires_grad=False)
        optimizer = torch.optim.SGD([tensor], lr=0.1)
        frozen = ParameterSource(optimizer)
        assert not frozen.shards()
        tensor.grad = torch.randn(5)
        assert not frozen.unchanged()
    (shard,) = ParameterSource(optimizer).shards()
    assert shard.origin is tensor


def test_a_copy_has_found_nothing_and_knows_what_was_measured() -> None:
    (a,) = parameters(3)
    optimizer = torch.optim.SGD([a], lr=0.1)
    source = ParameterSource(optimizer)
    source.shards()
    a.requires_grad_(False)
    for other in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert not other.unchanged()
        (shard,) = other.shards()
        assert shard.tensor.data_ptr() != a.data_ptr()


def test_ten_thousand_parameters_take_milliseconds() -> None:
    source = ParameterSource(torch.optim.SGD(parameters(*[4] * 10_000), lr=0.1))

    def fastest(call: Callable[[], object]) -> float:
        seconds = []
        for _ in range(3):
            begin = time.process_time()
            call()
            seconds.append(time.process_time() - begin)
        return min(seconds)

    # Measured: 50, 7 and 1 ms; several times as much on a busy machine.
    assert fastest(source.shards) < 0.3
    assert fastest(source.unchanged) < 0.05
    assert fastest(source.addresses) < 0.01
