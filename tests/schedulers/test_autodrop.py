"""AutoDrop step by step: literal tables, an independent implementation, torch's conventions."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import independent
import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    ExponentialLR,
    LinearLR,
    SequentialLR,
)
from trajectories import Given, noisy_walk, turning

from autodrop_ext import AngularVelocity, AutoDrop, Decision

SMALL = {"buffer_size": 2, "min_samples": 2}  # decides from the third angle on


def rates(iterates: np.ndarray, **settings: Any) -> list[float]:
    """Learning rate after each step."""
    optimizer = Given(iterates)
    scheduler = AutoDrop(optimizer, **settings)
    result = []
    for _ in iterates:
        optimizer.step()
        scheduler.step()
        result.append(optimizer.param_groups[0]["lr"])
    return result


# ---- literal tables -------------------------------------------------------------------------


def test_table_constant_turning() -> None:
    # Every window turns by 90 degrees. Angles come with windows 3, 4, 5, ...; the second smoothed
    # value, at the third angle, has risen by 0: drop, start over, drop three angles later.
    iterates = turning([90.0] * 10)
    assert rates(iterates, window=1, factor=0.5, **SMALL) == [
        1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125,
    ]  # fmt: skip


def test_table_rising_then_level() -> None:
    # The filter over two values that lie 10 apart (sigma = m / 2 = 1) is the newer one: 70, 80, 90.
    # The second 90, the fifth angle and with it step 7, no longer rises.
    iterates = turning([60.0, 70.0, 80.0, 90.0, 90.0, 90.0, 90.0])
    assert rates(iterates, window=1, factor=0.1, **SMALL) == [
        1, 1, 1, 1, 1, 1, 0.1, 0.1, 0.1,
    ]  # fmt: skip


def test_table_windows_of_two_steps_and_a_floor() -> None:
    iterates = turning([90.0] * 8, k=2)
    assert rates(iterates, window=2, factor=0.1, min_lr=0.03, **SMALL) == [
        1, 1, 1, 1, 1, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.03, 0.03, 0.03, 0.03, 0.03,
    ]  # fmt: skip


def test_table_of_algorithm_1_with_its_defaults() -> None:
    # Ten angles fill the buffer, the eleventh gives the second smoothed value: one drop in 11.
    iterates = turning([90.0] * 24)
    expected = [1.0] * 12 + [0.95] * 11 + [0.95 * 0.95] * 3
    assert rates(iterates, window=1) == expected


# ---- against the independent implementation -------------------------------------------------


@pytest.mark.parametrize("kernel", ["value", "time"])
@pytest.mark.parametrize(("k", "seed"), [(1, 0), (3, 1), (8, 2)])
def test_noisy_trajectory_step_by_step(kernel: str, k: int, seed: int) -> None:
    iterates = noisy_walk(60 * k, 50, seed).astype(np.float32)
    optimizer = Given(iterates)
    scheduler = AutoDrop(optimizer, window=k, factor=0.5, kernel=kernel, min_lr=0.01)
    lrs = []
    for _ in iterates:
        optimizer.step()
        scheduler.step()
        lrs.append(optimizer.param_groups[0]["lr"])
    angle_list = independent.angles(iterates, k)
    smoothed, wanted = independent.schedule(
        angle_list, 1.0, rho=0.5, min_lr=0.01, time_kernel=kernel == "time"
    )
    decisions = scheduler.history
    # 50 elements share the roundings of float32 sums: 1e-3 degrees is ten times what was seen.
    assert [d.angle for d in decisions] == pytest.approx(angle_list, abs=1e-3)
    got = [d.smoothed for d in decisions]
    assert [v is None for v in got] == [v is None for v in smoothed]
    assert [v for v in got if v] == pytest.approx([v for v in smoothed if v], abs=2e-3)
    assert lrs[3 * k - 1 :: k] == wanted
    assert scheduler.num_drops == len(set(wanted)) - (1.0 in wanted) > 1
    assert all(d.lr == (lr,) for d, lr in zip(decisions, wanted, strict=True))


def test_noisy_quadratic_model_settles_at_the_limit_of_theorem_3_2() -> None:
    """x <- x - lr A (x - c), c ~ N(0, 1), A = diag(0.1 .. 20), 200 dimensions (section 3)."""
    a = np.arange(1, 201) / 10
    for lr in (0.06, 0.03, 0.01):
        random = np.random.default_rng(0)
        x = np.zeros(200)
        parameter = torch.nn.Parameter(torch.zeros(200, dtype=torch.float64))
        meter = AngularVelocity([parameter], window=1)
        cosines = []
        for t in range(6000):
            x = x - lr * a * (x - random.normal(size=200))
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(x))
            reading = meter.observe()
            if t >= 2000:
                assert reading is not None and reading.cosine is not None
                cosines.append(reading.cosine)
        weights = a**2 / (2 - lr * a)
        limit = -lr / 2 * (a * weights).sum() / weights.sum()
        settled = math.degrees(math.acos(np.mean(cosines)))
        assert settled == pytest.approx(math.degrees(math.acos(limit)), abs=1.0)


# ---- learning rates -------------------------------------------------------------------------


def drop_three_times(optimizer: Given, **settings: Any) -> AutoDrop:
    scheduler = AutoDrop(optimizer, window=1, factor=0.5, **SMALL, **settings)
    for _ in range(11):
        optimizer.step()
        scheduler.step()
    assert scheduler.num_drops == 3
    return scheduler


def test_every_group_drops_from_its_own_rate() -> None:
    optimizer = Given(turning([90.0] * 9))
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 8.0})
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.25})
    scheduler = drop_three_times(optimizer, min_lr=[0.0, 3.0, 0.5])
    # The last group starts below its floor: a drop never raises a rate.
    assert [g["lr"] for g in optimizer.param_groups] == [0.125, 3.0, 0.25]
    assert scheduler.get_last_lr() == [0.125, 3.0, 0.25]


def test_tensor_rates_are_changed_in_place() -> None:
    optimizer = Given(turning([90.0] * 9))
    rate = torch.tensor(1.0)
    optimizer.param_groups[0]["lr"] = rate
    scheduler = drop_three_times(optimizer)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.125
    last = scheduler.get_last_lr()[0]
    assert isinstance(last, torch.Tensor) and last is not rate
    assert scheduler.history[-1].lr == (0.125,)


def test_no_drop_is_counted_at_the_floor() -> None:
    optimizer = Given(turning([90.0] * 12))
    drops: list[Decision] = []
    scheduler = AutoDrop(optimizer, window=1, factor=0.5, min_lr=0.5, on_drop=drops.append, **SMALL)
    for _ in range(14):
        optimizer.step()
        scheduler.step()
    assert scheduler.num_drops == len(drops) == 1
    assert sum(d.dropped for d in scheduler.history) == 1


def test_warmup_is_linear_and_measures_nothing() -> None:
    iterates = turning([90.0] * 12)
    lrs = [0.25, *rates(iterates, window=1, factor=0.5, warmup_steps=4, **SMALL)]
    # Steps 1 to 4 run at 1/4, 2/4, 3/4 and 4/4; the first window closes with step 5.
    assert lrs[:9] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]
    assert lrs[9] == 0.5


def test_decisions_count_the_steps_of_the_warmup() -> None:
    optimizer = Given(iterates := turning([90.0] * 12))
    scheduler = AutoDrop(optimizer, window=1, factor=0.5, warmup_steps=4, **SMALL)
    for _ in iterates:
        optimizer.step()
        scheduler.step()
    assert next(d.step for d in scheduler.history if d.dropped) == 9
    assert scheduler.history[0].step == 4 + 3


def test_sequential_with_a_torch_warmup_reaches_the_base_rate() -> None:
    optimizer = Given(turning([90.0] * 20), lr=0.1)
    autodrop = AutoDrop(optimizer, window=1, factor=0.5, **SMALL)
    warmup = LinearLR(optimizer, start_factor=0.1, total_iters=5)
    scheduler = SequentialLR(optimizer, [warmup, autodrop], milestones=[5])
    lrs = [optimizer.param_groups[0]["lr"]]
    for _ in range(12):
        optimizer.step()
        scheduler.step()
        lrs.append(optimizer.param_groups[0]["lr"])
    assert lrs[:5] == pytest.approx([0.01, 0.028, 0.046, 0.064, 0.082])
    assert lrs[5] == 0.1
    # The meter starts with the milestone: first angle three windows later, drop two after that.
    assert lrs[5:10] == [0.1] * 5
    assert lrs[10] == 0.05


def test_chained_with_another_schedule_multiplies() -> None:
    optimizer = Given(turning([90.0] * 9))
    scheduler = ChainedScheduler(
        [AutoDrop(optimizer, window=1, factor=0.5, **SMALL), ExponentialLR(optimizer, gamma=0.9)]
    )
    for _ in range(11):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.125 * 0.9**11, rel=1e-12)


def test_chained_constant_warmup_hands_over() -> None:
    optimizer = Given(turning([90.0] * 9))
    scheduler = ChainedScheduler(
        [ConstantLR(optimizer, 0.5, 2), AutoDrop(optimizer, window=1, factor=0.5, **SMALL)]
    )
    for _ in range(11):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.125


# ---- counting real steps --------------------------------------------------------------------


def test_calls_without_a_step_measure_nothing() -> None:
    iterates = turning([90.0] * 9)
    optimizer = Given(iterates)
    scheduler = AutoDrop(optimizer, window=1, factor=0.5, **SMALL)
    for _ in range(11):
        optimizer.step()
        for _ in range(3):
            scheduler.step()
    assert len(scheduler.history) == 9
    assert scheduler.num_drops == 3


def test_observing_happens_after_the_step_not_in_the_hook() -> None:
    """Parameters changed between optimizer.step() and scheduler.step() are seen as changed."""
    optimizer = Given(np.zeros((3, 2)))
    scheduler = AutoDrop(optimizer, window=1)
    for value in (0.0, 1.0, 3.0):
        optimizer.step()
        with torch.no_grad():
            optimizer.parameter.fill_(value)
        scheduler.step()
    reading = scheduler.history[0]
    assert reading.previous_norm == pytest.approx(math.sqrt(2), rel=1e-6)
    assert reading.norm == pytest.approx(2 * math.sqrt(2), rel=1e-6)


def test_step_takes_no_metric_and_is_not_called() -> None:
    scheduler = AutoDrop(Given(turning([90.0])))
    assert not callable(scheduler)
    assert not hasattr(scheduler, "total_steps")
    assert not hasattr(scheduler, "_schedulers")


def test_last_epoch_needs_initial_rates_as_in_torch() -> None:
    optimizer = Given(turning([90.0]))
    with pytest.raises(KeyError, match="initial_lr"):
        AutoDrop(optimizer, last_epoch=3)
    optimizer.param_groups[0]["initial_lr"] = 2.0
    scheduler = AutoDrop(optimizer, last_epoch=3)
    assert scheduler.last_epoch == 4
    assert scheduler.base_lrs == [2.0]


# ---- what it tells --------------------------------------------------------------------------


def test_history_metrics_and_callbacks_agree() -> None:
    readings: list[Decision] = []
    drops: list[Decision] = []
    optimizer = Given(turning([90.0] * 9))
    scheduler = drop_three_times(optimizer, on_reading=readings.append, on_drop=drops.append)
    assert readings == scheduler.history
    assert [d.step for d in drops] == [5, 8, 11]
    assert drops == [d for d in readings if d.dropped]
    metrics = scheduler.get_metrics()
    assert metrics["lr"] == 0.125
    assert metrics["num_drops"] == 3
    assert metrics["angular_velocity"] == pytest.approx(90.0, abs=1e-4)
    assert metrics["angular_velocity_smoothed"] == pytest.approx(90.0, abs=1e-4)
    assert metrics["angular_velocity_rise"] == pytest.approx(0.0, abs=1e-4)
    assert all(type(v) is float for v in metrics.values())


def test_metrics_before_the_first_reading() -> None:
    assert AutoDrop(Given(turning([90.0]))).get_metrics() == {"lr": 1.0, "num_drops": 0.0}


def test_history_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autodrop_ext.schedulers.base.HISTORY", 5)
    monkeypatch.setattr("autodrop_ext.meter.HISTORY", 5)
    optimizer = Given(turning([90.0] * 9))
    scheduler = drop_three_times(optimizer)
    assert [d.window for d in scheduler.history] == [6, 7, 8, 9, 10]
    assert len(scheduler.meter.history) == 5


def test_a_failing_callback_leaves_the_scheduler_whole() -> None:
    optimizer = Given(turning([90.0] * 9))

    def fail(decision: Decision) -> None:
        raise RuntimeError("disk full")

    scheduler = AutoDrop(optimizer, window=1, factor=0.5, on_drop=fail, **SMALL)
    failures = 0
    for _ in range(11):
        optimizer.step()
        try:
            scheduler.step()
        except RuntimeError:
            failures += 1
    assert failures == scheduler.num_drops == 3
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_close_takes_the_hook_off() -> None:
    optimizer = Given(turning([90.0] * 9))
    scheduler = drop_three_times(optimizer)
    scheduler.close()
    assert not optimizer._optimizer_step_post_hooks
    assert scheduler.meter.device_bytes == 0


def test_the_hook_does_not_keep_the_scheduler_alive() -> None:
    import gc
    import weakref

    optimizer = Given(turning([90.0] * 3))
    scheduler = AutoDrop(optimizer)
    alive = weakref.ref(scheduler)
    del scheduler
    gc.collect()
    assert alive() is None
    optimizer.step()


# ---- wrong arguments ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"window": 0}, ValueError, "window: expected at least 1, got 0"),
        ({"window": 6.4}, TypeError, "window: expected an int, got 6.4"),
        ({"window": True}, TypeError, "window: expected an int, got True"),
        ({"factor": 1.0}, ValueError, "factor: expected a number between 0 and 1, got 1.0"),
        ({"factor": "0.5"}, TypeError, "factor: expected a number between 0 and 1, got '0.5'"),
        ({"threshold": math.nan}, ValueError, "threshold: expected a finite number of degrees"),
        ({"buffer_size": 0}, ValueError, "buffer_size: expected at least 1, got 0"),
        ({"min_samples": 2.5}, TypeError, "min_samples: expected an int, got 2.5"),
        ({"kernel": "box"}, ValueError, "kernel: expected 'value' or 'time', got 'box'"),
        ({"min_lr": -1}, ValueError, "min_lr: expected a finite number of at least 0, got -1"),
        ({"min_lr": [0, 0]}, ValueError, "min_lr: expected one number or 1, one per param group"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps: expected at least 0, got -1"),
        ({"backend": "gpu"}, ValueError, "backend: expected 'auto' or one of"),
        ({"params": 3}, TypeError, "params: expected an iterable of tensors"),
        ({"params": [3]}, TypeError, r"params\[0\]: expected a tensor, .* got int"),
        ({"on_drop": 3}, TypeError, "on_drop: expected a function or None, got 3"),
        ({"buckets": 1000}, ValueError, "buckets: expected at least 4096, got 1000"),
        ({"sample": None}, TypeError, "sample: expected no such argument; .* buckets= sets its"),
        ({"average": 8}, TypeError, "average: expected a bool, got 8"),
        ({"process_group": 1}, TypeError, "process_group: expected None"),
    ],
)
def test_wrong_arguments_say_what_was_expected(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    optimizer = Given(turning([90.0]))
    with pytest.raises(error, match=message):
        AutoDrop(optimizer, **arguments)
    assert not optimizer._optimizer_step_post_hooks
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_wrong_optimizers_say_what_was_expected() -> None:
    with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, got str"):
        AutoDrop("adam")  # type: ignore[arg-type]
    optimizer = Given(turning([90.0]))
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=r"param_groups\[0\] has no 'lr'"):
        AutoDrop(optimizer)


# ---- frameworks' habits ---------------------------------------------------------------------


def test_a_compiled_step_before_the_scheduler_is_made_works() -> None:
    """torch's own base class fails on it with AttributeError: __func__."""
    optimizer = Given(turning([90.0] * 9))
    inner = optimizer.step
    optimizer.step = lambda closure=None: inner(closure)  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drop_three_times(optimizer)


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("before", [False, True])
def test_compiled_steps_are_counted(before: bool, lr: float | torch.Tensor) -> None:
    """Compiled: optimizer.step itself, before the scheduler is made, or a caller of it."""
    torch.compiler.reset()
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([parameter], lr=lr)
    if before:
        optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
    scheduler = AutoDrop(optimizer, window=2, **SMALL)
    step = optimizer.step if before else torch.compile(lambda: optimizer.step(), backend="eager")
    for i in range(12):
        parameter.grad = torch.full((4,), math.sin(i))
        step()
        scheduler.step()
    assert scheduler.meter.steps == 12
    assert len(scheduler.history) == 4
    assert not any("item()" in reason for reason in breaks)  # our hook is not traced


def test_gradient_accumulation_counts_optimizer_steps() -> None:
    optimizer = Given(turning([90.0] * 9))
    scheduler = AutoDrop(optimizer, window=1, factor=0.5, **SMALL)
    for micro in range(44):
        if micro % 4 == 3:
            optimizer.step()
        scheduler.step()
    assert scheduler.num_drops == 3


def test_deepcopy_goes_on_alone() -> None:
    optimizer = Given(noisy_walk(40, 5, 0))
    scheduler = AutoDrop(optimizer, window=2, factor=0.5, **SMALL)
    for _ in range(13):
        optimizer.step()
        scheduler.step()
    optimizer._iterates = iter(list(optimizer._iterates))  # generators cannot be copied
    rest = list(optimizer._iterates)
    optimizer._iterates = iter(rest)
    twin = copy.deepcopy(scheduler)
    assert twin.optimizer is not optimizer
    twin.optimizer.parameter = twin.optimizer.param_groups[0]["params"][0]
    twin.optimizer._iterates = iter(rest)
    for _ in range(20):
        for s in (scheduler, twin):
            s.optimizer.step()
            s.step()
    assert twin.history == scheduler.history
    assert len(twin.history) > 10
