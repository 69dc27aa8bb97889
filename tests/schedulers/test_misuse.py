"""What others do to the rate and to step(): noticed once, in words, and nothing is lost."""

from __future__ import annotations

import gc
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from autodrop_ext import AnalyticAutoDrop, AnytimeAutoDrop, AutoDrop

EAGER = {"window": 1, "threshold": 1e6, "min_samples": 1, "buffer_size": 1}  # drops soon and often


def made(lr: Any = 0.5, kind: Any = AutoDrop, **settings: Any) -> Any:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.randn(40))], lr=lr)
    return kind(optimizer, **(EAGER | settings if kind is AutoDrop else settings))


def train(scheduler: Any, steps: int, write: Any = None, also: Any = ()) -> list[str]:
    optimizer = scheduler.optimizer
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(steps):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.randn(p.shape)
            if write is not None:
                optimizer.param_groups[0]["lr"] = write(t)
            optimizer.step()
            for other in (scheduler, *also):
                other.step()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    "write", [lambda t: 0.5, lambda t: 0.5 * math.cos(t / 100)], ids=["constant", "cosine"]
)
def test_a_script_that_writes_the_rate_is_pointed_out(write: Any) -> None:
    said = train(made(), 30, write)
    assert len(said) == 1
    assert "AutoDrop: the learning rate of param group 0 was lowered from 0." in said[0]
    assert "drops have no effect if a script" in said[0]


def test_a_script_that_undoes_modelled_drops_is_pointed_out() -> None:
    scheduler = made(kind=AnalyticAutoDrop, gamma=4.0, epsilon=0.1, tau0=0.05)
    (said,) = train(scheduler, 30, lambda t: 0.5)
    assert "AnalyticAutoDrop: the learning rate of param group 0 was lowered from 0.5" in said


@pytest.mark.parametrize("kind", [AutoDrop, AnytimeAutoDrop])
def test_a_script_that_undoes_a_cooldown_is_pointed_out(kind: Any) -> None:
    scheduler = made(kind=kind, **({"threshold": -1e6} if kind is AutoDrop else {}))
    train(scheduler, 2)
    scheduler.cooldown(10)
    (said,) = train(scheduler, 10, lambda t: 0.5)
    assert f"{kind.__name__}: the learning rate of param group 0 was lowered from 0.5" in said
    quiet = made(kind=kind)
    quiet.cooldown(10)
    assert train(quiet, 12) == []


def test_a_chained_scheduler_is_no_cause() -> None:
    scheduler = made()
    chained = lr_scheduler.ChainedScheduler(
        [scheduler, lr_scheduler.ExponentialLR(scheduler.optimizer, 0.99)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            scheduler.optimizer.param_groups[0]["params"][0].grad = torch.randn(40)
            scheduler.optimizer.step()
            chained.step()
    assert scheduler.num_drops > 3


def test_two_schedulers_of_ours_on_one_optimizer() -> None:
    first = made()
    second = AutoDrop(first.optimizer, **EAGER)  # type: ignore[arg-type]
    said = train(first, 10, also=[second])
    assert sum("another scheduler of this package is stepped" in s for s in said) == 1
    first.close()
    assert train(second, 10) == []


def test_two_schedulers_are_noticed_where_one_is_also_stepped_for_micro_batches() -> None:
    first = made()
    second = AutoDrop(first.optimizer, **EAGER)  # type: ignore[arg-type]
    said = train(first, 10, also=[first, second])  # the second call of first finds no new step
    assert sum("another scheduler of this package is stepped" in s for s in said) >= 1
    second.close()


def test_a_discarded_scheduler_is_no_second_one_and_leaves_no_hook() -> None:
    optimizer = made().optimizer
    gc.collect()
    for _ in range(50):
        AutoDrop(optimizer)
        AnalyticAutoDrop(optimizer, gamma=4.0, epsilon=0.1, tau0=0.05)
    gc.collect()
    assert len(optimizer._optimizer_step_post_hooks) == 0
    assert train(AutoDrop(optimizer, **EAGER), 5) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [2, 3, 19, 25])
@pytest.mark.parametrize("kind", [AutoDrop, AnytimeAutoDrop])
def test_stepped_once_an_epoch_is_pointed_out_however_short_the_epochs(
    kind: Any, steps: int
) -> None:
    scheduler = made(kind=kind)
    said = []
    for _ in range(6):
        for _ in range(steps):
            scheduler.optimizer.param_groups[0]["params"][0].grad = torch.randn(40)
            scheduler.optimizer.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scheduler.step()
        said += [str(w.message) for w in caught]
    assert len(said) == 1
    assert f"{kind.__name__}: {steps} optimizer steps passed since the last step()" in said[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_rate_at_its_floor_counts_no_drops(dtype: torch.dtype) -> None:
    scheduler = made(torch.tensor(0.5, dtype=dtype), factor=0.5, min_lr=0.1)
    train(scheduler, 40)
    # 0.25, 0.125, and the floor; 0.1 is no float32.
    assert scheduler.num_drops == 3
    assert float(scheduler.optimizer.param_groups[0]["lr"]) == float(torch.tensor(0.1, dtype=dtype))


def test_last_lr_is_new_inside_on_drop() -> None:
    seen: list[tuple[float, float]] = []
    scheduler = made(on_drop=lambda decision: seen.append((decision.lr[0], last())))

    def last() -> float:
        return float(scheduler.get_last_lr()[0])

    train(scheduler, 20)
    assert seen and all(a == b for a, b in seen)


def test_a_zero_rate_that_is_filled_past_autograd_is_seen() -> None:
    scheduler = made(torch.tensor(0.0))
    train(scheduler, 5)
    assert scheduler.meter.steps == 0
    scheduler.optimizer.param_groups[0]["lr"].data.fill_(0.1)  # changes no version
    train(scheduler, 5)
    assert scheduler.meter.steps == 5


def test_parameters_that_change_their_group_start_over() -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(20)) for _ in range(4)]
    optimizer = torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.1)
    scheduler = AutoDrop(optimizer, window=2, per_group=True)

    def steps(count: int) -> None:
        for _ in range(count):
            for p in parameters:
                p.grad = torch.randn(20)
            optimizer.step()
            scheduler.step()

    steps(10)
    assert scheduler.history[-1].group_angles
    moved = optimizer.param_groups[0]["params"].pop()
    optimizer.param_groups[1]["params"].append(moved)
    with pytest.warns(RuntimeWarning, match="AutoDrop: the measured parameters were replaced"):
        steps(2)
    steps(4)
    assert scheduler.history[-1].group_angles == ()
    steps(2)
    assert scheduler.history[-1].group_angles != ()


def test_a_warning_points_to_the_line_of_the_user() -> None:
    scheduler = made()
    optimizer = scheduler.optimizer
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(30):
            optimizer.param_groups[0]["params"][0].grad = torch.randn(40)
            optimizer.param_groups[0]["lr"] = 0.5
            optimizer.step()
            scheduler.step()
    assert [w.filename for w in caught] == [__file__]


def test_a_checkpoint_after_parameters_were_replaced_discards_the_window() -> None:
    """Its open table is that of parameters that the optimizer no longer trains."""
    scheduler = made(window=4)
    train(scheduler, 18)
    group = scheduler.optimizer.param_groups[0]
    group["params"] = [torch.nn.Parameter(group["params"][0].detach().clone())]
    state = scheduler.state_dict()
    tables = state["meter"]["tables"]
    assert tables["running"] is None and tables["mean"] is None
    resumed = AutoDrop(scheduler.optimizer, **(EAGER | {"window": 4}))  # type: ignore[arg-type]
    scheduler.close()
    resumed.load_state_dict(state)
    before = len(resumed.history)
    (message,) = train(resumed, 4)
    assert "parameters had changed" in message and "the meter warms up again" in message
    assert all(decision.angle is None for decision in resumed.history[before:])


def test_a_checkpoint_after_memory_was_replaced_goes_on() -> None:
    scheduler, twin = made(window=4), made(window=4)
    for one in (scheduler, twin):
        torch.manual_seed(1)
        train(one, 18)
    parameter = scheduler.optimizer.param_groups[0]["params"][0]
    parameter.data = parameter.data.clone()
    resumed = AutoDrop(scheduler.optimizer, **(EAGER | {"window": 4}))  # type: ignore[arg-type]
    state = scheduler.state_dict()
    scheduler.close()
    resumed.load_state_dict(state)
    for one in (resumed, twin):
        torch.manual_seed(2)
        train(one, 10)
    assert resumed.history == twin.history
    assert resumed.history[-1].angle is not None


def test_get_lr_returns_copies() -> None:
    scheduler = made(lr=torch.tensor(0.5))
    with pytest.warns(RuntimeWarning, match="use get_last_lr"):
        (lr,) = scheduler.get_lr()
    lr.zero_()
    assert float(scheduler.optimizer.param_groups[0]["lr"]) == 0.5
