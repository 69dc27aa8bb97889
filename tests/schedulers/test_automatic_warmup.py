"""The automatic warm-up of AnytimeAutoDrop and AutoDrop; the rule itself is in test_anytime.py."""

from __future__ import annotations

import copy
import io
import json
import math
import pathlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from independent import anytime
from torch import nn
from torch.optim.lr_scheduler import SequentialLR
from trajectories import Given, process

from autodrop_ext import AnytimeAutoDrop, AutoDrop, JsonLinesLog

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "anytime": (AnytimeAutoDrop, {}),
    "autodrop": (AutoDrop, {"window": 16, "threshold": 1e6, "min_samples": 1}),
    "autodrop, few reads": (AutoDrop, {"window": 16, "snapshots": 4}),
}


def made(kind: str, optimizer: Any, **more: Any) -> Any:
    scheduler, settings = KINDS[kind]
    return scheduler(optimizer, warmup_steps="auto", **settings, **more)


def run(kind: str, iterates: np.ndarray, lr: float = 1.0, **more: Any) -> tuple[Any, list[float]]:
    optimizer = Given(iterates, lr=lr, dtype=torch.float64)
    scheduler = made(kind, optimizer, **more)
    rates = [float(optimizer.param_groups[0]["lr"])]
    for _ in iterates:
        optimizer.step()
        scheduler.step()
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return scheduler, rates


def ends_of(scheduler: Any) -> list[str]:
    return [d.warmup for d in scheduler.history if d.warmup not in ("rising", None)]


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_at_a_share_of_the_rate_and_never_passes_the_rate(kind: str) -> None:
    for motion, end, share in (("drift", "reached", 1.0), ("mean-reverting", "confined", 0.5)):
        scheduler, rates = run(kind, process(motion, 700, n=60), lr=0.3)
        assert rates[:17] == [0.3 / 32] * 17  # nothing is known in the first 16 steps
        assert ends_of(scheduler) == [end]
        peak = max(rates)
        assert peak == 0.3 if share == 1.0 else 0.3 / 32 <= peak < share * 0.3
        top = rates.index(peak)
        assert rates[: top + 1] == sorted(rates[: top + 1])
        assert rates[top:] == sorted(rates[top:], reverse=True)
        # At most in proportion to the steps, from 1/32 after 16 of them.
        assert all(lr <= 0.3 * t / 512 * (1 + 1e-12) for t, lr in enumerate(rates) if t >= 16)


def test_a_steady_drift_takes_512_steps() -> None:
    _, rates = run("anytime", process("drift", 600, n=300))
    # Windows of 32 steps end at 480 and 512; a cosine of 0.9 rises with an exponent of 1.
    assert rates[479] < 1.0 and 1.0 in (rates[512], rates[544])


@pytest.mark.parametrize("kind", KINDS)
def test_after_it_the_scheduler_is_the_usual_one(kind: str) -> None:
    iterates = process("mean-reverting", 1_500, n=60)
    scheduler, rates = run(kind, iterates)
    end = next(d.step for d in scheduler.history if d.warmup == "confined")
    if kind == "anytime":
        closes = anytime(iterates, automatic=True)
        # The same float64 numbers in another order.
        assert rates[-1] == pytest.approx(closes[-1][4], rel=1e-9)
        assert scheduler.window == closes[-1][1] == 128
        return
    assert scheduler.window == scheduler.meter.window == 16
    optimizer = Given(iterates[end:], lr=rates[end], dtype=torch.float64)
    alone = AutoDrop(optimizer, **KINDS[kind][1])
    for _ in iterates[end:]:
        optimizer.step()
        alone.step()
    after = [d for d in scheduler.history if d.step > end]
    later = [d for d in alone.history if d.angle is not None]
    assert [d.step - end for d in after if d.angle is not None] == [d.step for d in later]
    assert [d.angle for d in after if d.angle is not None] == [d.angle for d in later]
    assert rates[-1] == alone.get_last_lr()[0]


def test_param_groups_keep_their_ratios_and_tensors() -> None:
    a, b = nn.Parameter(torch.zeros(30)), nn.Parameter(torch.zeros(30))
    optimizer = torch.optim.SGD(
        [{"params": [a], "lr": torch.tensor(0.5)}, {"params": [b], "lr": 0.125}]
    )
    tensor = optimizer.param_groups[0]["lr"]
    scheduler = AnytimeAutoDrop(optimizer, warmup_steps="auto")
    iterates = torch.from_numpy(process("drift", 300, n=60)).float()
    for x in iterates:
        optimizer.step()
        with torch.no_grad():
            a.copy_(x[:30])
            b.copy_(x[30:])
        scheduler.step()
        first, second = (float(group["lr"]) for group in optimizer.param_groups)
        # A float32 rate is rounded at each of some 50 rises.
        assert first / second == pytest.approx(4.0, rel=50 * 2.0**-24)
    assert optimizer.param_groups[0]["lr"] is tensor
    assert 0.1 < float(tensor) < 0.5


def test_a_group_that_joins_the_warm_up_takes_part_in_it() -> None:
    iterates = process("drift", 200, n=60)
    optimizer = Given(iterates, dtype=torch.float64)
    scheduler = AnytimeAutoDrop(optimizer, warmup_steps="auto")
    for _ in range(100):
        optimizer.step()
        scheduler.step()
    joined = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [joined], "lr": 0.25})
    with pytest.warns(
        RuntimeWarning, match="no average|parameters"
    ):  # meter and average start over
        for _ in range(100):
            optimizer.step()
            scheduler.step()
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert second == pytest.approx(0.25 * first, rel=1e-12)  # products in another order
    assert 0.1 < first < 1.0


def test_reset_begins_it_again() -> None:
    iterates = process("mean-reverting", 600, n=60)
    optimizer = Given(iterates, dtype=torch.float64)
    scheduler = AnytimeAutoDrop(optimizer, warmup_steps="auto")
    rates: list[list[float]] = []
    for _ in range(2):
        rates.append([optimizer.param_groups[0]["lr"]])
        for _ in range(300):
            optimizer.step()
            scheduler.step()
            rates[-1].append(optimizer.param_groups[0]["lr"])
        assert ends_of(scheduler) == ["confined"]
        scheduler.reset()
    assert rates[0][:17] == rates[1][:17] == [1 / 32] * 17
    assert scheduler.window == 2


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact_in_every_phase(kind: str) -> None:
    iterates = process("mean-reverting", 420, n=30)
    whole, rates = run(kind, iterates)
    end = next(d.step for d in whole.history if d.warmup == "confined")
    assert 40 < end < 350  # both phases are resumed
    for at in (1, 2, 3, 6, 15, 16, 17, 31, 32, 33, 64, 65, end - 1, end, end + 1, end + 40):
        first = Given(iterates[:at], dtype=torch.float64)
        scheduler = made(kind, first)
        for _ in range(at):
            first.step()
            scheduler.step()
        buffer = io.BytesIO()
        torch.save(scheduler.state_dict(), buffer)
        buffer.seek(0)
        rest = Given(iterates[at:], dtype=torch.float64)
        with torch.no_grad():
            rest.parameter.copy_(torch.from_numpy(iterates[at - 1]))
        resumed = made(kind, rest)
        rest.param_groups[0]["lr"] = first.param_groups[0]["lr"]
        resumed.load_state_dict(torch.load(buffer, weights_only=True))
        for _ in range(at, len(iterates)):
            rest.step()
            resumed.step()
        assert repr(resumed.history) == repr(whole.history)  # NaN does not equal itself
        assert rest.param_groups[0]["lr"] == rates[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_sequential_lr_begins_it_at_a_milestone(kind: str) -> None:
    iterates = process("drift", 120, n=60)
    optimizer = Given(iterates, lr=0.5, dtype=torch.float64)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=1)
    scheduler = made(kind, optimizer)
    sequence = SequentialLR(optimizer, [constant, scheduler], milestones=[20])
    rates = []
    for _ in iterates:
        optimizer.step()
        sequence.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:19] == [0.5] * 19
    assert rates[19] == 0.5 / 32
    assert 0.5 / 32 < rates[-1] < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_cooldown_ends_the_rise(kind: str) -> None:
    iterates = process("drift", 300, n=60)
    optimizer = Given(iterates, dtype=torch.float64)
    scheduler = made(kind, optimizer)
    rates = []
    for t in range(len(iterates)):
        if t == 200:
            scheduler.cooldown(100)
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert max(rates) == rates[199] < 1.0
    assert rates[-1] == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_scheduler_that_joins_a_run_does_not_rise(kind: str) -> None:
    optimizer = Given(process("drift", 50, n=20), lr=0.7)
    optimizer.param_groups[0]["initial_lr"] = 1.0
    scheduler = made(kind, optimizer, last_epoch=100)
    for _ in range(50):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] <= 0.7
    assert not ends_of(scheduler)


def test_the_log_and_the_history_say_what_ended_it(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "run.jsonl"
    scheduler, _ = run("anytime", process("walk", 900, n=60), on_reading=JsonLinesLog(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    logged = [line["warmup"] for line in lines if "warmup" in line]
    assert set(logged[:-1]) == {"rising"} and logged[-1] == ends_of(scheduler)[0]
    assert lines[0]["settings"]["warmup_steps"] == "auto"
    assert "warmup" not in lines[-1]
    restored = AnytimeAutoDrop(Given(np.zeros((1, 60)), dtype=torch.float64), warmup_steps="auto")
    restored.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    assert repr(restored.history) == repr(scheduler.history)


def test_null_processes() -> None:
    """Part of the rate that was set that is left after 30,000 steps without any loss."""
    left, peak = {}, {}
    for kind in ("drift", "walk", "ou"):
        _, rates = run("anytime", process(kind, 30_000), buckets=None, average=False)
        left[kind], peak[kind] = rates[-1], max(rates)
    assert peak["drift"] == left["drift"] == 1.0
    # A walk is at the null itself: where it ends the rise is chance, what follows is as without.
    assert 0.6 < left["walk"] / peak["walk"] <= 1.0
    assert left["ou"] / peak["ou"] < 0.3


def test_after_the_rise_rates_follow_the_trajectory_whatever_its_speed() -> None:
    iterates = process("mean-reverting", 6_000)
    slow = np.empty((2 * len(iterates) - 1, iterates.shape[1]))
    slow[::2], slow[1::2] = iterates, (iterates[1:] + iterates[:-1]) / 2
    logs = []
    for motion in (iterates, slow):
        scheduler, rates = run("anytime", motion, average=False)
        logs.append({d.step: d.lr[0] / max(rates) for d in scheduler.history})
    fast, twice = logs
    common = [t for t in fast if t >= 1_000 and 2 * t in twice]
    assert len(common) > 10
    # Within noise: windows are cut at other places of the trajectory.
    assert all(abs(math.log(twice[2 * t] / fast[t])) < 0.35 for t in common)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_values_say_what_was_expected(kind: str) -> None:
    scheduler, settings = KINDS[kind]
    optimizer = Given(np.zeros((1, 2)))
    for value, error, message in (
        ("automatic", ValueError, "warmup_steps: expected an int or 'auto', got 'automatic'"),
        (-1, ValueError, "warmup_steps: expected at least 0, got -1"),
        (1.5, TypeError, "warmup_steps: expected an int, got 1.5"),
        (None, TypeError, "warmup_steps: expected an int, got None"),
    ):
        with pytest.raises(error, match=message):
            scheduler(optimizer, warmup_steps=value, **settings)
    assert optimizer.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("kind", ["anytime", "autodrop"])
def test_damaged_states_change_nothing(kind: str) -> None:
    scheduler, _ = run(kind, process("mean-reverting", 100, n=20))
    state = scheduler.state_dict()
    before = repr(state)
    for entry, value in (
        ("rising", 1),
        ("share", 1.5),
        ("share", math.nan),
        ("mean_cosine", -2.0),
        ("newest_cosines", [0.0, "x"]),
        ("doubled", None),
    ):
        damaged = copy.deepcopy(state)
        (damaged if kind == "anytime" else damaged["growth"])[entry] = value
        with pytest.raises(ValueError, match=entry):
            scheduler.load_state_dict(damaged)
        assert repr(scheduler.state_dict()) == before
    damaged = copy.deepcopy(state)
    damaged["warmup_steps"] = 5
    (damaged if kind == "anytime" else damaged["growth"])["rising"] = True
    with pytest.raises(ValueError, match=r"rising.*expected False with warmup_steps=5"):
        scheduler.load_state_dict(damaged)
    assert repr(scheduler.state_dict()) == before


def test_states_without_one_load_into_a_scheduler_with_one() -> None:
    """The checkpoint's settings hold: a run without a warm-up does not rise."""
    plain = AutoDrop(Given(process("walk", 60, n=20)), window=4)
    for _ in range(60):
        plain.optimizer.step()
        plain.step()
    state = plain.state_dict()
    del state["growth"]  # as an earlier release saved it
    optimizer = Given(process("walk", 60, n=20))
    scheduler = AutoDrop(optimizer, window=4, warmup_steps="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that settings differ
        scheduler.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = plain.get_last_lr()[0]
        for _ in range(60):
            optimizer.step()
            scheduler.step()
    assert scheduler.warmup_steps == 0 and not ends_of(scheduler)
    assert optimizer.param_groups[0]["lr"] <= plain.get_last_lr()[0]
