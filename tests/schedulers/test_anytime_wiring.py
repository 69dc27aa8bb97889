"""AnytimeAutoDrop next to others: param groups, torch's schedulers, callbacks, joins."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from independent import anytime
from test_anytime import run
from torch.optim.lr_scheduler import ChainedScheduler, ExponentialLR, LinearLR, SequentialLR
from trajectories import Given, process

from autodrop_ext import AnytimeAutoDrop, AnytimeDecision, JsonLinesLog, read_log


def step(scheduler: Any, optimizer: Any, times: int) -> None:
    for _ in range(times):
        optimizer.step()
        scheduler.step()


# ---- the rule -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"min_window": 8, "windows": 2, "snapshots": 4},
        {"min_window": 5, "windows": 3, "snapshots": 5},
        {"min_window": 16, "windows": 4, "snapshots": 16},
    ],
)
def test_the_rule_with_other_windows(settings: dict[str, int]) -> None:
    """Windows double soon after each other, as often as before there are four cosines."""
    iterates = process("mean-reverting", 1_500, n=100)
    names = {"min_window": "window"}
    closes = anytime(iterates, **{names.get(k, k): v for k, v in settings.items()})
    history = run(iterates, **settings).history
    assert len(history) == len(closes) - 2  # nothing is reported before the third window
    for decision, (t, window, mean, power, lr) in zip(history, closes[2:], strict=True):
        assert (decision.step, decision.window_steps) == (t, window)
        assert (decision.mean_cosine is None) == (mean is None)
        if mean is not None and power is not None:
            # As in test_the_rule_step_by_step.
            assert decision.mean_cosine == pytest.approx(mean, abs=4e-4)
            assert decision.power == pytest.approx(power, abs=5 * 4e-4)
        assert decision.lr[0] == pytest.approx(lr, rel=5e-3)


def test_a_mean_of_cosines_is_of_windows_of_one_length() -> None:
    history = run(process("mean-reverting", 3_000, n=50)).history
    for window in (16, 32, 64, 128):
        of_this = [d for d in history if d.window_steps == window]
        known = [d for d in of_this if d.cosine is not None]
        # 16 windows of the first length, two of which have no angle; then 8, of which one has none.
        assert len(known) == (14 if window == 16 else 7)
        for i, decision in enumerate(known):
            newest = [d.cosine for d in known[max(0, i - 7) : i + 1]]
            mean = math.fsum(newest) / len(newest)  # type: ignore[arg-type]
            assert decision.mean_cosine == (None if window == 16 and i < 3 else mean)
        if window > 16:
            # Until there is a cosine of this length, the mean of the shorter windows is in use.
            before = [d for d in history if d.window_steps == window // 2][-1]
            first = of_this[0]
            assert first.cosine is None
            assert (first.mean_cosine, first.power) == (before.mean_cosine, before.power)


def test_the_rate_after_nan_follows_the_rule() -> None:
    """NaN costs that window and the cosines of the next two; mean, time and rate are kept."""
    iterates = process("mean-reverting", 1_200, n=50)
    iterates[699] = np.nan
    with pytest.warns(RuntimeWarning, match="AnytimeAutoDrop: .* (held NaN|is not finite)"):
        history = run(iterates).history
    rates, lr = [], 1.0
    for decision in history:
        if decision.power is not None:
            t, w = decision.step, decision.window_steps
            lr *= ((t - w) / t) ** decision.power
        rates.append(lr)
    assert [d.lr[0] for d in history] == pytest.approx(rates, rel=1e-12)
    at = next(i for i, d in enumerate(history) if d.step >= 700)
    lost = history[at : at + 3]
    assert [d.cosine for d in lost] == [None] * 3
    assert {d.mean_cosine for d in lost} == {history[at - 1].mean_cosine}
    assert history[at + 3].cosine is not None


class Groups(torch.optim.SGD):
    """Two param groups that are moved by hand."""

    def __init__(self, iterates: np.ndarray, rates: tuple[Any, Any]) -> None:
        half = iterates.shape[1] // 2
        self.parameters = [torch.nn.Parameter(torch.zeros(half)) for _ in rates]
        super().__init__(
            [{"params": [p], "lr": lr} for p, lr in zip(self.parameters, rates, strict=True)], lr=1
        )
        self.rest = iter(iterates)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        x = torch.from_numpy(next(self.rest)).float()
        for p, part in zip(self.parameters, x.chunk(2), strict=True):
            p.copy_(part)


@pytest.mark.parametrize("tensors", [False, True])
def test_groups_keep_their_ratio_down_to_their_own_floors(tensors: bool) -> None:
    iterates = process("mean-reverting", 1_500, n=60)
    single = run(iterates).history[-1].lr[0]
    rates: tuple[Any, Any] = (1.0, 0.25)
    if tensors:
        rates = tuple(torch.tensor(lr, dtype=torch.float64) for lr in rates)  # type: ignore[assignment]
    optimizer = Groups(iterates, rates)
    scheduler = AnytimeAutoDrop(optimizer, min_lr=[0.0, 0.2])
    step(scheduler, optimizer, len(iterates))
    # The meter of ``run`` reads float64 and this one float32.
    assert scheduler.history[-1].lr[0] == pytest.approx(single, rel=1e-3)
    assert single < 0.2 / 0.25  # else the floor would not be reached
    assert scheduler.history[-1].lr[1] == 0.2
    for decision in scheduler.history:
        assert decision.lr[1] == max(0.2, decision.lr[1])
        if decision.lr[1] > 0.2:
            assert decision.lr[1] == pytest.approx(0.25 * decision.lr[0], rel=1e-12)
    if tensors:
        assert optimizer.param_groups[0]["lr"] is rates[0]  # in place, for compiled steps


# ---- torch's schedulers -------------------------------------------------------------------------


def test_chained_with_another_schedule_multiplies() -> None:
    iterates = process("mean-reverting", 600, n=30)
    alone = run(iterates).get_last_lr()[0]
    optimizer = Given(iterates, dtype=torch.float64)
    scheduler = ChainedScheduler([AnytimeAutoDrop(optimizer), ExponentialLR(optimizer, gamma=0.99)])
    step(scheduler, optimizer, 600)
    assert alone < 0.9
    assert optimizer.param_groups[0]["lr"] == pytest.approx(alone * 0.99**600, rel=1e-12)


def test_after_a_warm_up_of_torch_the_run_begins_with_the_milestone() -> None:
    iterates = process("mean-reverting", 600, n=30)
    plain = run(iterates[100:])
    optimizer = Given(iterates, dtype=torch.float64)
    anytime = AnytimeAutoDrop(optimizer)
    warmup = LinearLR(optimizer, start_factor=0.1, total_iters=100)
    scheduler = SequentialLR(optimizer, [warmup, anytime], milestones=[100])
    step(scheduler, optimizer, 100)
    assert optimizer.param_groups[0]["lr"] == 1.0
    step(scheduler, optimizer, 500)
    assert [d.cosine for d in anytime.history] == [d.cosine for d in plain.history]
    assert [d.lr for d in anytime.history] == [d.lr for d in plain.history]


def test_sequential_asks_again_for_the_rate_after_all_windows() -> None:
    """A milestone after some windows: base rate times all factors so far, kept at the floor."""
    scheduler = run(process("mean-reverting", 900, n=30), min_lr=0.1)
    expected = scheduler.get_last_lr()[0]
    assert 0.1 < expected < 0.9
    assert scheduler._get_closed_form_lr() == pytest.approx([expected], rel=1e-12)


# ---- what it tells ------------------------------------------------------------------------------


def test_callbacks_history_metrics_and_log_agree(tmp_path: Any) -> None:
    iterates = process("mean-reverting", 700, n=30)
    drops: list[AnytimeDecision] = []
    seen: list[AnytimeDecision] = []
    log = JsonLinesLog(tmp_path / "log.jsonl")

    def note(decision: AnytimeDecision) -> None:
        seen.append(decision)
        log(decision)

    scheduler = run(iterates, on_reading=note, on_drop=drops.append)
    assert len(seen) == len(scheduler.history)
    assert all(a is b for a, b in zip(seen, scheduler.history, strict=True))
    assert drops == [d for d in scheduler.history if d.dropped]
    assert scheduler.num_drops == len(drops) > 5
    last = scheduler.history[-1]
    metrics = scheduler.get_metrics()
    assert metrics["lr"] == last.lr[0]
    assert metrics["num_drops"] == len(drops)
    assert metrics["window_steps"] == last.window_steps == 64
    assert metrics["cosine"] == last.cosine
    assert metrics["mean_cosine"] == last.mean_cosine
    assert metrics["power"] == last.power
    assert all(type(value) is float for value in metrics.values())
    records = read_log(tmp_path / "log.jsonl").readings
    names = ("step", "window_steps", "cosine", "mean_cosine", "power", "dropped")
    assert [[r[n] for n in names] for r in records] == [
        [getattr(d, n) for n in names] for d in scheduler.history
    ]


@pytest.mark.parametrize("fails", ["on_reading", "on_drop"])
def test_a_failing_callback_keeps_no_window_from_doubling(fails: str) -> None:
    """Other ranks, whose callbacks do not fail, have doubled theirs."""
    iterates = process("mean-reverting", 900, n=30)
    expected = run(iterates)

    def fail(decision: AnytimeDecision) -> None:
        raise OSError("disk full")

    optimizer = Given(iterates, dtype=torch.float64)
    scheduler = AnytimeAutoDrop(optimizer, **{fails: fail})
    failures = 0
    for _ in iterates:
        optimizer.step()
        try:
            scheduler.step()
        except OSError:
            failures += 1
    assert failures == (len(expected.history) if fails == "on_reading" else expected.num_drops)
    assert repr(scheduler.history) == repr(expected.history)


# ---- joining ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last_epoch", "warmup_steps", "lr", "window"),
    [
        (5_000, 0, 0.4, 512),
        (5_000, 100, 0.4, 512),  # the warm-up is over, and the rate is the run's
        (50, 100, 0.51, 16),  # step 51 of the warm-up to a rate of 1
        (4_196, 100, 0.4, 512),  # 4,096 steps after it: 16 windows of 256
        (4_195, 100, 0.4, 256),
    ],
)
def test_joining_keeps_the_rate_or_goes_on_with_the_warm_up(
    last_epoch: int, warmup_steps: int, lr: float, window: int
) -> None:
    optimizer = Given(process("walk", 300, n=20))
    optimizer.param_groups[0] |= {"initial_lr": 1.0, "lr": 0.4}
    scheduler = AnytimeAutoDrop(optimizer, warmup_steps=warmup_steps, last_epoch=last_epoch)
    assert scheduler.window == window
    assert scheduler.get_last_lr() == [lr]
    assert optimizer.param_groups[0]["lr"] == lr
    step(scheduler, optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == (lr if last_epoch > 100 else 0.52)


def test_a_joined_run_awaits_four_cosines() -> None:
    iterates = process("mean-reverting", 2_000, n=50)
    optimizer = Given(iterates)
    optimizer.param_groups[0]["initial_lr"] = 1.0
    scheduler = AnytimeAutoDrop(optimizer, last_epoch=3_000)
    assert scheduler.window == 256  # 16 windows of 128 are 2,048 steps, of 256 4,096
    step(scheduler, optimizer, len(iterates))
    cosines = [d.cosine for d in scheduler.history if d.window_steps == 256]
    # It has doubled at 4,096, a window's end later: 3,000 and 5 windows are 4,280 steps.
    assert [d.step for d in scheduler.history if d.window_steps == 256] == [3_768, 4_024, 4_280]
    assert None not in cosines
    assert scheduler.window == 512
    assert all(d.mean_cosine is None and d.power is None for d in scheduler.history[:3])


def test_a_window_that_doubles_before_it_has_an_angle_is_refused() -> None:
    with pytest.raises(ValueError, match="windows: expected at least 2, got 1"):
        AnytimeAutoDrop(Given(np.zeros((1, 2))), windows=1)
