"""What frameworks do to a scheduler in the course of a run, asked of each scheduler of ours."""

from __future__ import annotations

import copy
import inspect
import io
import os
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from test_like_torch import EAGER, Make, each, optimizer, plain, rates, train
from torch import nn
from torch.optim import lr_scheduler

from autodrop_ext import AnalyticAutoDrop, AnytimeAutoDrop, AutoDrop, EpochAutoDrop


def warned(scheduler: Any, steps: int, *also: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(scheduler, steps, *also)
    assert {w.filename for w in caught} <= {__file__, inspect.getsourcefile(train)}
    return [str(w.message) for w in caught]


class Nothing:
    """Stands for a framework that never calls step()."""

    def step(self) -> None:
        pass


# ---- step() is not called -----------------------------------------------------------------------


@pytest.mark.parametrize("made", [AutoDrop, AnytimeAutoDrop])
def test_a_scheduler_that_is_never_stepped_is_pointed_out_once(made: Any) -> None:
    scheduler = made(optimizer())
    (said,) = warned(scheduler, 2100, Nothing())
    assert f"{made.__name__}: step() was never called in 1000 optimizer steps" in said
    assert "call it after every optimizer.step()" in said


def test_a_scheduler_of_epochs_may_have_long_ones() -> None:
    scheduler = EpochAutoDrop(optimizer())
    assert warned(scheduler, 2_000, Nothing()) == []
    with pytest.warns(RuntimeWarning, match="never called in 100000 .* call it once per epoch"):
        for _ in range(98_000):
            scheduler.optimizer.step()


def test_get_lr_in_place_of_step_is_pointed_out() -> None:
    scheduler = AutoDrop(optimizer())

    class Writes:
        def step(self) -> None:
            for group, lr in zip(scheduler.optimizer.param_groups, scheduler.get_lr(), strict=True):
                group["lr"] = lr

    said = warned(scheduler, 1100, Writes())
    assert len(said) == 2
    assert "get_lr() computes nothing" in said[0]
    assert "never called" in said[1] and "get_lr()" in said[1]


@pytest.mark.parametrize("nested", [False, True])
def test_one_that_waits_for_a_milestone_is_not_forgotten(nested: bool) -> None:
    waiting = AutoDrop(optimizer())
    warmup = lr_scheduler.LinearLR(waiting.optimizer, 0.1, 1.0, 1500)
    both: Any = lr_scheduler.SequentialLR(waiting.optimizer, [warmup, waiting], [1500])
    if nested:
        both = lr_scheduler.ChainedScheduler([both])
    assert warned(waiting, 1600, both) == []


@pytest.mark.parametrize("made", [AutoDrop, AnytimeAutoDrop])
@pytest.mark.parametrize("length", [2, 50, 1500])
def test_once_an_epoch_is_noticed_in_two_epochs(made: Any, length: int) -> None:
    scheduler = made(optimizer())
    said = []
    for _ in range(2):
        said += warned(scheduler, length, Nothing())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scheduler.step()
        said += [str(w.message) for w in caught]
    assert len(said) == 1


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages"])
def test_a_warning_passes_by_packages_of_any_folder(tmp_path: Any, folder: str) -> None:
    """Also of folders that are not those of this Python, such as the user's."""
    packages = tmp_path / folder
    packages.mkdir()
    (packages / "framework.py").write_text("def fit(train):\n    train()\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import framework, torch\n"
        "from autodrop_ext import AutoDrop\n"
        "optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)\n"
        "framework.fit(AutoDrop(optimizer).get_lr)\n"
    )
    path = os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{script}:4: RuntimeWarning: AutoDrop: get_lr()" in run.stderr


# ---- made again in mid-run ----------------------------------------------------------------------

WITH_WARMUP: dict[str, Make] = {
    "AutoDrop": lambda o, **s: AutoDrop(o, **EAGER, **s),
    "AnytimeAutoDrop": lambda o, **s: AnytimeAutoDrop(o, min_window=2, critical=1.0, **s),
    "AnalyticAutoDrop": lambda o, **s: AnalyticAutoDrop(o, 0.1, 0.1, 1.5, **s),
}
warmed = pytest.mark.parametrize("make", WITH_WARMUP.values(), ids=WITH_WARMUP)


@warmed
@rates
@pytest.mark.parametrize("done", [10, 11, 40])
def test_a_warm_up_that_is_over_is_not_repeated(make: Make, lr: Any, done: int) -> None:
    first = make(optimizer(lr), warmup_steps=10)
    before = train(first, done)[-1]
    first.close()
    again = make(first.optimizer, warmup_steps=10, last_epoch=done)
    seen = [float(again.get_last_lr()[0]), *train(again, 40)]
    assert seen[0] == before
    assert seen == sorted(seen, reverse=True)


@warmed
@pytest.mark.parametrize("done", [1, 4, 9])
def test_a_warm_up_goes_on_where_it_was(make: Make, done: int) -> None:
    first = make(optimizer(), warmup_steps=10)
    train(first, done)
    first.close()
    again = make(first.optimizer, warmup_steps=10, last_epoch=done)
    assert again.get_last_lr() == pytest.approx([0.5 * (done + 1) / 10])
    whole = train(make(optimizer(), warmup_steps=10), 10)
    assert train(again, 10 - done) == pytest.approx(whole[done:])


@warmed
@rates
def test_a_warm_up_is_not_repeated_if_last_epoch_counts_epochs(make: Make, lr: Any) -> None:
    first = make(optimizer(lr), warmup_steps=40)
    before = train(first, 60)[-1]
    assert 0.1 < before < 0.5
    first.close()
    again = make(first.optimizer, warmup_steps=40, last_epoch=3)  # 20 steps each
    seen = [float(again.get_last_lr()[0]), *train(again, 40)]
    assert seen[0] == before
    assert seen == sorted(seen, reverse=True)
    make(optimizer(lr), warmup_steps=40).load_state_dict(again.state_dict())


@warmed
def test_a_warm_up_goes_on_if_last_epoch_is_one_too_low(make: Make) -> None:
    """As in torch's own convention, in which it is the index of the last epoch."""
    first = make(optimizer(), warmup_steps=10)
    train(first, 5)
    first.close()
    again = make(first.optimizer, warmup_steps=10, last_epoch=4)
    assert train(again, 5)[-1] == pytest.approx(0.5)


@each
@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0.53, 3),
        (torch.tensor(0.7), 3),
        (float("nan"), 3),
        (-4, 3),
        (7, 7),
        (torch.tensor(7), 7),
        (np.int64(7), 7),
        (torch.tensor([0.5, 0.7]), 3),
    ],
)
def test_whatever_step_is_given_the_state_loads(make: Make, epoch: Any, expected: int) -> None:
    scheduler = make(optimizer())
    train(scheduler, 2)
    with pytest.warns(RuntimeWarning, match=r"step\(epoch="):
        scheduler.step(epoch)
    assert scheduler.last_epoch == expected
    assert type(scheduler.last_epoch) is int
    other = make(optimizer())
    other.load_state_dict(scheduler.state_dict())
    assert other.last_epoch == expected


@each
def test_a_state_can_be_given_to_the_constructor(make: Make) -> None:
    scheduler = make(optimizer())
    state = scheduler.state_dict()
    names = set(inspect.signature(type(scheduler).__init__).parameters) & state.keys()
    again = type(scheduler)(optimizer(), **{name: state[name] for name in names - {"last_epoch"}})
    assert len(names) >= 6
    assert plain({n: again.state_dict()[n] for n in names}) == plain({n: state[n] for n in names})


@each
@rates
def test_a_scheduler_that_is_reset_begins_again(make: Make, lr: Any) -> None:
    reset, new = make(optimizer(lr)), make(optimizer(lr))
    train(reset, 50)
    assert reset.num_drops > 0
    reset.reset()
    assert reset.history == [] and reset.num_drops == 0
    assert [float(rate) for rate in reset.get_last_lr()] == [0.5]
    with torch.no_grad():
        torch.manual_seed(0)
        reset.optimizer.param_groups[0]["params"][0].copy_(torch.randn(40))
    assert train(reset, 50) == train(new, 50)
    other = make(optimizer(lr))
    other.load_state_dict(reset.state_dict())
    assert other.num_drops == reset.num_drops


@warmed
def test_a_scheduler_that_is_reset_warms_up_again_and_ends_a_cooldown(make: Make) -> None:
    scheduler = make(optimizer(), warmup_steps=10)
    before = train(scheduler, 30)
    if make is not WITH_WARMUP["AnalyticAutoDrop"]:
        scheduler.cooldown(5)
        train(scheduler, 5)
    scheduler.reset()
    assert scheduler.get_last_lr() == pytest.approx([0.05])
    assert train(scheduler, 10) == before[:10]


# ---- groups that come later ---------------------------------------------------------------------


@warmed
@pytest.mark.parametrize("form", ["float", "tensor", "shared"])
def test_a_group_that_joins_a_warm_up_takes_part(make: Make, form: str) -> None:
    shared = form == "shared"
    lr = torch.tensor(0.1) if form == "tensor" else 0.1
    first = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([first], lr=torch.tensor(0.5) if shared else 0.5)
    scheduler = make(optimizer, warmup_steps=10)
    train(scheduler, 4)
    group = {"params": [nn.Parameter(torch.ones(3))], **({} if shared else {"lr": lr})}
    optimizer.add_param_group(group)
    used = []
    optimizer.register_step_post_hook(
        lambda o, *_: used.append([float(group["lr"]) for group in o.param_groups])
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the measured parameters have changed, after the warm-up
        train(scheduler, 7)
        state = copy.deepcopy(scheduler.state_dict())
        train(scheduler, 3)
    # A tensor holds float32.
    shares = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert [rate for rate, _ in used[:6]] == pytest.approx([0.5 * x for x in shares], rel=1e-6)
    joined = 0.5 if shared else 0.1
    assert [rate for _, rate in used[:6]] == pytest.approx([joined * x for x in shares], rel=1e-6)
    groups = [{"params": [nn.Parameter(torch.ones(3))]} for _ in range(2)]
    make(torch.optim.SGD(groups, lr=0.5), warmup_steps=10).load_state_dict(state)


def test_a_helpers_step_at_a_rate_of_zero_lets_no_group_join() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.5)
    scheduler = AutoDrop(optimizer, warmup_steps=10)
    train(scheduler, 4)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 0.1})
    kept = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, kept, strict=True):
        group["lr"] = rate
    train(scheduler, 1)
    assert scheduler.get_last_lr() == pytest.approx([0.3, 0.06])


# ---- compositions that are resumed --------------------------------------------------------------


def composed(kind: str, make: Make) -> Any:
    scheduler = make(optimizer())
    o = scheduler.optimizer
    warmup = lr_scheduler.LinearLR(o, 0.2, 1.0, 8)
    if kind == "after a warm-up":
        return scheduler, lr_scheduler.SequentialLR(o, [warmup, scheduler], [8])
    if kind == "before a decay":
        decay = lr_scheduler.ExponentialLR(o, 0.9)
        return scheduler, lr_scheduler.SequentialLR(o, [scheduler, decay], [30])
    exponential = lr_scheduler.ExponentialLR(o, 0.99)
    if kind == "chained":
        return scheduler, lr_scheduler.ChainedScheduler([scheduler, exponential])
    sequence = lr_scheduler.SequentialLR(o, [warmup, scheduler], [8])
    return scheduler, lr_scheduler.ChainedScheduler([sequence, exponential])


@each
@pytest.mark.parametrize("kind", ["after a warm-up", "before a decay", "chained", "nested"])
@pytest.mark.parametrize("saved", [3, 7, 8, 9, 29, 30, 31])
def test_a_composition_resumes_bit_for_bit(make: Make, kind: str, saved: int) -> None:
    scheduler, whole = composed(kind, make)
    other, resumed = composed(kind, make)
    train(scheduler, saved, whole)
    buffer = io.BytesIO()
    torch.save((scheduler.optimizer.state_dict(), whole.state_dict()), buffer)
    with torch.no_grad():
        other.optimizer.param_groups[0]["params"][0].copy_(
            scheduler.optimizer.param_groups[0]["params"][0]
        )
    buffer.seek(0)
    of_optimizer, of_schedulers = torch.load(buffer, weights_only=False)
    other.optimizer.load_state_dict(of_optimizer)
    resumed.load_state_dict(of_schedulers)
    assert train(other, 60, resumed) == train(scheduler, 60, whole)
    assert plain(other.state_dict()) == plain(scheduler.state_dict())
