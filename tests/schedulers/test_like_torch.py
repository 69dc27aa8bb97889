"""What torch expects of every scheduler, as a table: each row is asked of each scheduler of ours.

The rows are those of torch's own tests that hold for schedulers of any kind: references, state,
pickling, compositions, order of calls. Where ours differ on purpose, the row says how and why in
:data:`DIFFERENCES`, which ``docs/schedules.md`` repeats for users.
"""

from __future__ import annotations

import copy
import gc
import io
import pathlib
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, lr_scheduler

from autodrop_ext import AnalyticAutoDrop, AnytimeAutoDrop, AutoDrop, EpochAutoDrop

Make = Callable[..., Any]

EAGER = {"window": 1, "threshold": 1e6, "min_samples": 1, "buffer_size": 1}
SCHEDULERS: dict[str, Make] = {
    "AutoDrop": lambda o, **s: AutoDrop(o, **EAGER, **s),
    "AutoDrop, per_group": lambda o, **s: AutoDrop(o, **EAGER, per_group=True, **s),
    "AutoDrop, average": lambda o, **s: AutoDrop(o, **EAGER, average=True, **s),
    "AutoDrop, snapshots": lambda o, **s: AutoDrop(o, **EAGER | {"window": 2}, snapshots=1, **s),
    "EpochAutoDrop": lambda o, **s: EpochAutoDrop(o, threshold=1.0, delay=2, average=False, **s),
    "AnalyticAutoDrop": lambda o, **s: AnalyticAutoDrop(o, 4.0, 0.1, 1.5, **s),
    "AnytimeAutoDrop": lambda o, **s: AnytimeAutoDrop(o, min_window=2, windows=2, **s),
}

DIFFERENCES = {
    "step() before optimizer.step()": "no warning; the call counts nothing",
    "optimizer.step replaced after the scheduler was made": "no warning; hooks still run",
    "step(epoch)": "warns, as torch does, and never sets a rate",
    "load_state_dict with another class's state": "raises ValueError",
    "add_param_group": "the new group takes part, with min_lr 0",
}
"""What torch's tests expect otherwise, and what happens here; the reasons are in the document."""

each = pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
rates = pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])


def optimizer(lr: Any = 0.5, groups: int = 1) -> SGD:
    torch.manual_seed(0)
    lr = lr.clone() if isinstance(lr, torch.Tensor) else lr
    one = {"lr": lr}
    return SGD([{"params": [nn.Parameter(torch.randn(40))]} | one for _ in range(groups)], lr=0.1)


def train(scheduler: Any, steps: int, *also: Any) -> list[float]:
    """Seeded steps; the first group's rate after each of them."""
    optimizer, seen = scheduler.optimizer, []
    for t in range(steps):
        random = torch.Generator().manual_seed(t)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=random)
        optimizer.step()
        for s in also or (scheduler,):
            s.step()
        seen.append(float(optimizer.param_groups[0]["lr"]))
    return seen


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# ---- rates of the runs below do fall: the rows would hold for a scheduler that does nothing ------


@each
def test_the_rates_of_these_runs_fall(make: Make) -> None:
    seen = train(make(optimizer()), 80)
    assert seen[-1] < 0.5
    assert all(later <= earlier for earlier, later in zip(seen, seen[1:], strict=False))


# ---- references -------------------------------------------------------------------------------


@each
def test_a_scheduler_is_freed_without_the_garbage_collector(make: Make) -> None:
    scheduler = make(optimizer())
    train(scheduler, 20)
    gone = weakref.ref(scheduler)
    with without_garbage_collection():
        del scheduler
        assert gone() is None


@each
def test_an_optimizer_is_freed_with_its_scheduler(make: Make) -> None:
    scheduler = make(optimizer())
    train(scheduler, 20)
    gone = weakref.ref(scheduler.optimizer)
    with without_garbage_collection():
        del scheduler
        gc.collect()
        assert gone() is None


# ---- rates ------------------------------------------------------------------------------------


@each
@rates
def test_initial_lr_stays_what_it_was(make: Make, lr: Any) -> None:
    scheduler = make(optimizer(lr, groups=2))
    train(scheduler, 80)
    for group in scheduler.optimizer.param_groups:
        assert float(group["lr"]) < 0.5
        assert float(group["initial_lr"]) == 0.5
    assert [float(lr) for lr in scheduler.base_lrs] == [0.5, 0.5]


@each
@rates
def test_get_last_lr_is_a_copy_of_the_present_rates(make: Make, lr: Any) -> None:
    scheduler = make(optimizer(lr, groups=2))
    assert [float(x) for x in scheduler.get_last_lr()] == [0.5, 0.5]
    early = scheduler.get_last_lr()
    train(scheduler, 80)
    now = [float(group["lr"]) for group in scheduler.optimizer.param_groups]
    assert [float(x) for x in scheduler.get_last_lr()] == now != [0.5, 0.5]
    assert [float(x) for x in early] == [0.5, 0.5]


@each
def test_what_is_done_to_returned_tensors_changes_no_rate(make: Make) -> None:
    scheduler = make(optimizer(torch.tensor(0.5)))
    train(scheduler, 80)
    (rate,) = (float(lr) for lr in scheduler.get_last_lr())
    scheduler.get_last_lr()[0].zero_()
    assert float(scheduler.optimizer.param_groups[0]["lr"]) == rate > 0
    scheduler.optimizer.param_groups[0]["lr"].fill_(0.25)
    assert [float(lr) for lr in scheduler.base_lrs] == [0.5]
    assert float(scheduler.optimizer.param_groups[0]["initial_lr"]) == 0.5


@each
def test_a_tensor_rate_stays_the_same_tensor(make: Make) -> None:
    scheduler = make(optimizer(torch.tensor(0.5)))
    rate = scheduler.optimizer.param_groups[0]["lr"]
    train(scheduler, 80)
    assert scheduler.optimizer.param_groups[0]["lr"] is rate
    assert float(rate) < 0.5


@each
def test_float_and_tensor_rates_fall_alike(make: Make) -> None:
    floats, tensors = (train(make(optimizer(lr)), 80) for lr in (0.5, torch.tensor(0.5)))
    assert tensors == pytest.approx(floats, rel=1e-5)  # products of float32


class Counted(float):
    """A rate that counts how often it is read as a number; reading one from a GPU waits for it."""

    reads = 0

    def __float__(self) -> float:
        Counted.reads += 1
        return super().__float__()


def test_a_step_within_a_window_reads_no_rate() -> None:
    scheduler = AutoDrop(optimizer(), window=100)
    train(scheduler, 3)
    scheduler.optimizer.param_groups[0]["lr"] = Counted(0.5)
    for _ in range(20):
        scheduler.optimizer.step()
        before = Counted.reads
        scheduler.step()
        assert Counted.reads == before


# ---- state ------------------------------------------------------------------------------------


def copied(state: dict[str, Any], weights_only: bool = True) -> dict[str, Any]:
    """Through a file, as torch.load reads it by default."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=weights_only)
    return loaded


def plain(state: Any) -> Any:
    """The same with lists in place of tensors and a word for NaN, so that == compares."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [plain(value) for value in state]
    if isinstance(state, torch.Tensor):
        return plain(state.tolist())
    return "nan" if state != state else state


@each
@rates
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_loaded_state_is_the_state_that_was_saved(
    make: Make, lr: Any, weights_only: bool
) -> None:
    scheduler = make(optimizer(lr))
    train(scheduler, 45)
    saved = scheduler.state_dict()
    other = make(optimizer(lr))
    assert plain(other.state_dict()) != plain(saved)
    with torch.no_grad():
        for to, of in zip(params(other), params(scheduler), strict=True):
            to.copy_(of)
    other.optimizer.load_state_dict(scheduler.optimizer.state_dict())
    other.load_state_dict(copied(saved, weights_only))
    assert plain(other.state_dict()) == plain(saved)


@each
@rates
@pytest.mark.parametrize("way", ["file", "pickle", "deepcopy"])
def test_a_run_goes_on_as_if_it_had_not_been_interrupted(make: Make, lr: Any, way: str) -> None:
    whole = train(make(optimizer(lr)), 90)[45:]
    scheduler = make(optimizer(lr))
    train(scheduler, 45)
    if way == "file":
        other = make(optimizer(lr))
        with torch.no_grad():
            for to, of in zip(params(other), params(scheduler), strict=True):
                to.copy_(of)
        other.optimizer.load_state_dict(copied(scheduler.optimizer.state_dict()))
        other.load_state_dict(copied(scheduler.state_dict()))
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(scheduler))
    else:
        other = copy.deepcopy(scheduler)
    rest = []
    for t in range(45, 90):
        random = torch.Generator().manual_seed(t)
        for p in params(other):
            p.grad = torch.randn(p.shape, generator=random)
        other.optimizer.step()
        other.step()
        rest.append(float(other.optimizer.param_groups[0]["lr"]))
    assert rest == whole


def params(scheduler: Any) -> list[Any]:
    return [p for group in scheduler.optimizer.param_groups for p in group["params"]]


@each
def test_an_optimizer_that_was_loaded_too_early_is_pointed_out(make: Make) -> None:
    scheduler = make(optimizer())
    train(scheduler, 80)
    (rate,) = scheduler.get_last_lr()
    early, right = optimizer(), make(optimizer())
    early.load_state_dict(scheduler.optimizer.state_dict())
    early.param_groups[0]["lr"] = 0.3  # as a scheduler with a warm-up sets it where it is made
    wrong = make(early)
    right.optimizer.load_state_dict(scheduler.optimizer.state_dict())
    for other in (wrong, right):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other.load_state_dict(copied(scheduler.state_dict()))
    message = f"the learning rates are 0.3, those of the checkpoint were {rate:g}"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        wrong.step()
        wrong.step()
        right.step()
    assert len(caught) == 1


@each
def test_a_checkpoint_of_chained_schedules_is_loaded_without_a_warning(make: Make) -> None:
    def chained() -> tuple[Any, Any]:
        scheduler = make(optimizer())
        cosine = lr_scheduler.CosineAnnealingLR(scheduler.optimizer, 100)
        return scheduler, lr_scheduler.ChainedScheduler([scheduler, cosine])

    (scheduler, both), (other, others) = chained(), chained()
    train(scheduler, 45, both)
    other.optimizer.load_state_dict(scheduler.optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        others.load_state_dict(both.state_dict())
        others.step()


@each
def test_a_state_does_not_change_when_the_run_goes_on(make: Make) -> None:
    scheduler = make(optimizer())
    train(scheduler, 30)
    state = scheduler.state_dict()
    # The average is in it without a copy, as the optimizer's moments are in the optimizer's state.
    state.pop("mean", None)
    before = plain(state)
    train(scheduler, 30)
    assert plain(state) == before != plain(scheduler.state_dict())


@each
def test_a_state_holds_no_optimizer(make: Make) -> None:
    scheduler = make(optimizer())
    train(scheduler, 10)
    assert "optimizer" not in scheduler.state_dict()


@each
def test_resuming_needs_initial_rates(make: Make) -> None:
    with pytest.raises(KeyError, match="initial_lr"):
        make(optimizer(), last_epoch=5)
    resumed = optimizer()
    resumed.param_groups[0]["initial_lr"] = 0.7
    assert [float(lr) for lr in make(resumed, last_epoch=5).base_lrs] == [0.7]


# ---- wrong calls ------------------------------------------------------------------------------


@each
def test_what_is_no_optimizer_is_refused(make: Make) -> None:
    with pytest.raises(TypeError, match="Optimizer"):
        make(nn.Linear(2, 2))


@each
def test_get_lr_outside_of_step_warns_once_and_gives_the_present_rates(make: Make) -> None:
    scheduler = make(optimizer())
    train(scheduler, 80)
    with pytest.warns(RuntimeWarning, match=r"use get_last_lr\(\)") as caught:
        assert scheduler.get_lr() == scheduler.get_last_lr() == scheduler.get_lr()
    assert len(caught) == 1
    assert caught[0].filename == __file__


@each
def test_an_epoch_given_to_step_warns_once_and_sets_no_rate(make: Make) -> None:
    scheduler = make(optimizer())
    with pytest.warns(RuntimeWarning, match=r"step\(epoch=7\) sets last_epoch") as caught:
        scheduler.step(7)
        scheduler.step(epoch=8)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert scheduler.last_epoch == 8
    assert scheduler.get_last_lr() == [0.5]


# ---- order of calls ---------------------------------------------------------------------------


@each
def test_the_usual_order_warns_of_nothing(make: Make) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(make(optimizer()), 40)


@each
def test_a_step_before_the_optimizers_counts_nothing(make: Make) -> None:
    early, usual = make(optimizer()), make(optimizer())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns here
        early.step()
    assert train(early, 80) == train(usual, 80)


@each
def test_a_replaced_step_of_the_optimizer_is_still_counted(make: Make) -> None:
    replaced, usual = make(optimizer()), make(optimizer())
    step = replaced.optimizer.step
    replaced.optimizer.step = lambda *args, **kwargs: step(*args, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns here
        assert train(replaced, 80) == train(usual, 80)


# ---- compositions -----------------------------------------------------------------------------


@each
def test_chained_with_a_schedule_of_torch_rates_multiply(make: Make) -> None:
    alone = train(make(optimizer()), 80)
    scheduler = make(optimizer())
    half = lr_scheduler.MultiStepLR(scheduler.optimizer, [40], gamma=0.5)
    chained = lr_scheduler.ChainedScheduler([scheduler, half])
    assert chained.get_last_lr() == [0.5]
    together = train(scheduler, 80, chained)
    assert chained.get_last_lr() == [together[-1]]
    assert together[:39] == alone[:39]
    assert together[39] <= 0.5 * together[38]


@each
def test_behind_a_warm_up_of_torch_the_run_begins_at_the_base_rate(make: Make) -> None:
    scheduler_optimizer = optimizer()
    warm_up = lr_scheduler.LinearLR(scheduler_optimizer, 0.1, total_iters=5)
    scheduler = make(scheduler_optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sequence = lr_scheduler.SequentialLR(
            scheduler_optimizer, [warm_up, scheduler], milestones=[5]
        )
        seen = train(scheduler, 90, sequence)
    assert seen[:4] == pytest.approx([0.5 * (0.1 + 0.9 * t / 5) for t in range(1, 5)])
    assert seen[4] == 0.5
    assert seen[-1] < 0.5
    assert scheduler_optimizer.param_groups[0]["initial_lr"] == 0.5


@each
def test_before_a_schedule_of_torch_rates_fall_until_the_milestone(make: Make) -> None:
    alone = train(make(optimizer()), 80)
    scheduler = make(optimizer())
    after = lr_scheduler.ConstantLR(scheduler.optimizer, 1.0, total_iters=0)
    sequence = lr_scheduler.SequentialLR(scheduler.optimizer, [scheduler, after], milestones=[60])
    seen = train(scheduler, 80, sequence)
    assert seen[:59] == alone[:59]
    assert seen[58] < 0.5 == seen[59] == seen[-1]  # the other schedule begins at the initial rate


@each
def test_a_param_group_that_is_added_takes_part(make: Make) -> None:
    scheduler = make(optimizer())
    train(scheduler, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the window starts over, which is said
        scheduler.optimizer.add_param_group({"params": [nn.Parameter(torch.randn(8))], "lr": 0.25})
        train(scheduler, 100)
    assert len(scheduler.get_last_lr()) == 2
    assert float(scheduler.optimizer.param_groups[1]["lr"]) <= 0.25


def test_the_differences_are_in_the_documentation() -> None:
    page = pathlib.Path(__file__).parents[2] / "docs" / "schedules.md"
    text = " ".join(page.read_text(encoding="utf-8").replace("`", "").split())
    for what, here in DIFFERENCES.items():
        assert what in text
        assert here in text
