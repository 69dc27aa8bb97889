"""Situations in which torch's own schedulers work, and which have broken ours before."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autodrop_ext import AnytimeAutoDrop, AutoDrop, EpochAutoDrop

EAGER: dict[str, Any] = {"window": 4, "min_samples": 1, "buffer_size": 2, "threshold": 1e3}


def train(scheduler: Any, parameters: list[Tensor], steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        scheduler.optimizer.step()
        scheduler.step()


def groups(lr: Any = 0.1, **second: Any) -> tuple[list[Tensor], torch.optim.SGD]:
    parameters = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)]
    lists = [{"params": [parameters[0]]}, {"params": [parameters[1]], **second}]
    return parameters, torch.optim.SGD(lists, lr=lr)


@pytest.mark.parametrize(
    ("lazy", "shape"), [(nn.LazyLinear(3), (2, 5)), (nn.LazyConv1d(3, 2), (2, 4, 6))]
)
def test_lazy_modules_are_measured_from_the_first_step(lazy: nn.Module, shape: Any) -> None:
    optimizer = torch.optim.SGD(lazy.parameters(), lr=0.1)
    scheduler = AutoDrop(optimizer, **EAGER)
    lazy(torch.ones(shape))
    train(scheduler, list(lazy.parameters()), 40)
    assert scheduler.num_drops > 0


def test_a_lazy_module_without_an_input_is_named_at_the_first_step() -> None:
    parameters, optimizer = groups()
    lazy = nn.LazyLinear(3)
    scheduler = AutoDrop(optimizer, params=list(lazy.parameters()), **EAGER)
    with pytest.raises(RuntimeError, match="expected a parameter with a shape at the first step"):
        train(scheduler, parameters, 1)


@pytest.mark.parametrize("kind", [AutoDrop, AnytimeAutoDrop, EpochAutoDrop])
def test_a_lazy_module_without_an_input_has_a_state(kind: type[Any]) -> None:
    """Frameworks save and load before the first batch."""
    states, rates = [], []
    for _ in range(2):
        torch.manual_seed(0)
        lazy = nn.LazyLinear(3)
        settings = EAGER if kind is AutoDrop else {}
        scheduler = kind(torch.optim.SGD(lazy.parameters(), lr=0.1), **settings)
        scheduler.load_state_dict(states[0] if states else scheduler.state_dict())
        states.append(scheduler.state_dict())
        lazy(torch.ones(2, 5))
        train(scheduler, list(lazy.parameters()), 60)
        rates.append((scheduler.get_last_lr(), [d.angle for d in scheduler.history]))
    assert rates[0] == rates[1]
    assert rates[0][1][-1] is not None
    fresh = kind(torch.optim.SGD(nn.LazyLinear(3).parameters(), lr=0.1), **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fresh.load_state_dict(scheduler.state_dict())  # before the model's
    assert ["has no shape before the first forward pass" in str(w.message) for w in caught] == (
        [True] if kind is AnytimeAutoDrop else []
    )


class TwiceSgd(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class TwiceAdam(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("kind", [TwiceSgd, TwiceAdam])
def test_a_step_that_calls_super_counts_once(kind: Any) -> None:
    p = torch.ones(3, requires_grad=True)
    kind.__base__(
        [torch.ones(1, requires_grad=True)], lr=0.1
    )  # from here on torch's hooks run twice
    scheduler = EpochAutoDrop(kind([p], lr=0.1))
    for _ in range(3):
        for _ in range(4):
            p.grad = torch.ones(3)
            scheduler.optimizer.step()
        scheduler.step()
    assert [decision.step for decision in scheduler.history] == [4, 8, 12]
    every_step = AutoDrop(kind([p], lr=0.1), **EAGER)
    train(every_step, [p], 20)  # a warning would be an error
    assert every_step.meter.steps == 20


@pytest.mark.parametrize("settings", [{"min_lr": [0.05, 0.09]}, {"min_lr": [0.0, 0.08]}])
def test_groups_that_share_a_tensor_rate_keep_their_own_floors(settings: dict[str, Any]) -> None:
    ends = []
    for lr in (0.1, torch.tensor(0.1)):
        parameters, optimizer = groups(lr)
        scheduler = AutoDrop(optimizer, factor=0.5, **EAGER, **settings)
        train(scheduler, parameters, 80)
        ends.append([float(group["lr"]) for group in optimizer.param_groups])
    # The tensor holds float32.
    assert ends[1] == pytest.approx(ends[0], rel=1e-6)
    assert ends[0][0] != ends[0][1]


def test_groups_that_share_a_tensor_rate_have_their_own_cooldown() -> None:
    parameters, optimizer = groups(torch.tensor(0.1))
    scheduler = AnytimeAutoDrop(optimizer, min_lr=[0.0, 0.05])
    train(scheduler, parameters, 3)
    scheduler.cooldown(4)
    train(scheduler, parameters, 4)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    assert rates == pytest.approx([0.0, 0.05], abs=1e-9)


@pytest.mark.parametrize("kind", [AutoDrop, AnytimeAutoDrop, EpochAutoDrop])
@pytest.mark.parametrize("later", [False, True])
def test_a_state_with_another_number_of_groups_loads(kind: type[Any], later: bool) -> None:
    parameters, both = groups()
    one = torch.optim.SGD([parameters[0]], lr=0.1)
    saved, loaded = (kind(both), kind(one)) if later else (kind(one), kind(both))
    train(saved, parameters, 5)
    with warnings.catch_warnings(record=True):  # the meter starts over with other parameters
        warnings.simplefilter("always")
        loaded.load_state_dict(saved.state_dict())
        train(loaded, parameters, 60)
    assert loaded.last_epoch == 65


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_group_that_joins_a_cooldown_ends_with_it(shape: Any) -> None:
    p, q = (torch.ones(3, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.SGD([p], lr=0.1)
    scheduler = AutoDrop(optimizer, window=1000)
    train(scheduler, [p], 2)
    scheduler.cooldown(10, shape)
    train(scheduler, [p], 4)
    optimizer.add_param_group({"params": [q], "lr": 0.01})
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        train(scheduler, [p, q], 3)
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert 0 < second < 0.01 and 0 < first < 0.1
        train(scheduler, [p, q], 3)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.parametrize("kind", [AutoDrop, AnytimeAutoDrop])
def test_the_first_step_may_be_in_inference_mode(kind: type[Any]) -> None:
    p = torch.ones(3, requires_grad=True)
    settings = EAGER if kind is AutoDrop else {}
    scheduler = kind(torch.optim.SGD([p], lr=0.1), **settings)
    p.grad = torch.ones(3)
    scheduler.optimizer.step()
    with torch.inference_mode():
        scheduler.step()
    train(scheduler, [p], 80)
    assert scheduler.history[-1].angle is not None


@pytest.mark.parametrize("changed", [0.055, 0.2])
def test_another_schedule_may_run_between_loading_and_the_first_step(changed: float) -> None:
    parameters, optimizer = groups()
    scheduler = AutoDrop(optimizer, **EAGER)
    train(scheduler, parameters, 6)
    states = optimizer.state_dict(), scheduler.state_dict()
    parameters, optimizer = groups()
    again = AutoDrop(optimizer, **EAGER)
    optimizer.load_state_dict(states[0])
    again.load_state_dict(states[1])
    for group in optimizer.param_groups:
        group["lr"] = changed
    train(again, parameters, 1)  # a warning would be an error
    assert again.get_last_lr() == [changed, changed]
