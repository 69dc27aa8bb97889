"""EpochAutoDrop: literal tables, an independent implementation, torch's conventions."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import ChainedScheduler, ExponentialLR, LinearLR, SequentialLR
from torch.optim.swa_utils import update_bn
from trajectories import Given, turning

from autodrop_ext import EpochAutoDrop, EpochDecision

# ---- Algorithm 1 once more, in float64 and numpy, sharing no code with the package ------------


def algorithm_1(
    x: np.ndarray,
    train: Callable[[np.ndarray, float, int], np.ndarray],
    epochs: int,
    *,
    rho: float,
    theta: float,
    theta_max: float,
    n_d: int,
    lr_min: float,
    average: bool,
) -> dict[str, list[Any]]:
    """Columns omega, change, theta, lr and x, one row an epoch; ``train(x, lr, t)`` is an epoch."""
    table: dict[str, list[Any]] = {"omega": [], "change": [], "theta": [], "lr": [], "x": []}
    lr, s, last, k, z = 1.0, None, None, None, np.zeros_like(x)
    for t in range(1, epochs + 1):
        y = x
        x = train(x, lr, t)
        s_last, s = s, x - y
        omega = change = None
        if s_last is not None:
            cosine = s @ s_last / np.linalg.norm(s) / np.linalg.norm(s_last)
            omega = float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
        if omega is not None and last is not None:
            change = abs(omega - last)
        last = omega
        table["theta"].append(theta)
        if k is None:
            if change is not None and change < theta:
                k, z = 0, np.zeros_like(x)
        else:
            k += 1
            z = z + k * x
        if k == n_d:
            if average and n_d > 0:
                x = 2 * z / (n_d * (n_d + 1))
            lr, theta, k = min(lr, max(lr_min, rho * lr)), min(theta_max, theta / rho), None
        for name, value in (("omega", omega), ("change", change), ("lr", lr), ("x", x)):
            table[name].append(value)
    return table


class Quadratic(torch.optim.Optimizer):
    """Gradient descent on a quadratic with given noise: ``x <- x - lr (h x - noise_t)``."""

    def __init__(self, steps: int, n: int, dtype: torch.dtype, seed: int):
        random = np.random.default_rng(seed)
        self.h = np.linspace(0.02, 0.5, n)
        self.noise = 0.3 * random.normal(size=(steps, n))
        self.start = 3 * random.normal(size=n)
        self.parameter = torch.nn.Parameter(torch.from_numpy(self.start).to(dtype))
        self.t = 0
        super().__init__([self.parameter], {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        h, noise = (torch.from_numpy(v).to(self.parameter.dtype) for v in (self.h, self.noise))
        self.parameter -= self.param_groups[0]["lr"] * (h * self.parameter - noise[self.t])
        self.t += 1

    def epoch(self, x: np.ndarray, lr: float, t: int) -> np.ndarray:
        """Epoch ``t`` (from 1) of three steps in float64."""
        for i in range(3 * t - 3, 3 * t):
            x = x - lr * (self.h * x - self.noise[i])
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize(("delay", "seed"), [(0, 0), (1, 1), (4, 2), (20, 3)])
def test_equals_an_independent_implementation(
    dtype: torch.dtype, average: bool, delay: int, seed: int
) -> None:
    epochs = 240
    settings = {"threshold": 0.4, "max_threshold": 2.5, "delay": delay, "average": average}
    optimizer = Quadratic(3 * epochs, 40, dtype, seed)
    scheduler = EpochAutoDrop(optimizer, 0.6, min_lr=0.05, **settings)
    wanted = algorithm_1(
        # What the parameters of this precision start from.
        torch.from_numpy(optimizer.start).to(dtype).double().numpy(),
        optimizer.epoch,
        epochs,
        rho=0.6,
        theta=0.4,
        theta_max=2.5,
        n_d=delay,
        lr_min=0.05,
        average=average,
    )
    parameters = []
    for _ in range(epochs):
        for _ in range(3):
            optimizer.step()
        scheduler.step()
        parameters.append(optimizer.parameter.detach().double().numpy().copy())
    got = scheduler.history
    # Rounding moves an angle by 1e-4 degrees here. That no decision hangs on so little is checked.
    undecided = zip(wanted["change"], wanted["theta"], strict=True)
    assert min(abs(c - theta) for c, theta in undecided if c is not None) > 1e-3
    assert [d.angle for d in got] == pytest.approx(wanted["omega"], abs=3e-4)
    assert [d.change for d in got] == pytest.approx(wanted["change"], abs=6e-4)
    assert [d.threshold for d in got] == wanted["theta"]
    assert [d.lr[0] for d in got] == wanted["lr"]
    drops = [t for t in range(1, epochs) if wanted["lr"][t] < wanted["lr"][t - 1]]
    assert [d.window - 1 for d in got if d.dropped] == drops
    assert len(drops) == scheduler.num_drops >= 3
    # Values of up to 9, of which the rounded steps of float32 take 1e-7 each and forget again.
    tolerance = 1e-6 * 9 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose(parameters, wanted["x"], rtol=0, atol=tolerance)
    averaged = [d.window for d in got if d.averaged]
    assert bool(averaged) == (average and delay > 0)
    for t in averaged:
        np.testing.assert_allclose(parameters[t - 1], wanted["x"][t - 1], rtol=1e-6, atol=1e-6)
    assert [d.step for d in got] == list(range(3, 3 * epochs + 1, 3))
    assert [d.window for d in got] == list(range(1, epochs + 1))


# ---- literal tables -------------------------------------------------------------------------


def rates(iterates: np.ndarray, **settings: Any) -> list[float]:
    """Learning rate after each epoch of one step; the first iterate is the reference point."""
    optimizer = Given(iterates[1:])
    scheduler = EpochAutoDrop(optimizer, **settings)
    result = []
    for _ in iterates[1:]:
        optimizer.step()
        scheduler.step()
        result.append(optimizer.param_groups[0]["lr"])
    return result


def test_table_without_delay() -> None:
    # Every epoch turns by 90 degrees: the first change, of 0, comes with epoch 3.
    iterates = turning([90.0] * 6)
    assert rates(iterates, factor=0.5, delay=0) == [1, 1, 0.5, 0.25, 0.125, 0.0625, 0.03125]


def test_table_with_a_delay() -> None:
    # Condition in epoch 3, drop two epochs later; condition again in 6, drop in 8; floor in 11.
    settings = {"factor": 0.1, "delay": 2, "average": False, "min_lr": 0.005}
    assert rates(turning([90.0] * 11), **settings) == [
        1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1 * 0.1, 0.1 * 0.1, 0.1 * 0.1, 0.005, 0.005,
    ]  # fmt: skip


def test_table_of_rising_thresholds() -> None:
    # Angles from epoch 2 on; changes 0.5 (< 0.6: drop), 0.9 (< 1.0, which 0.6 / 0.5 is cut to:
    # drop), 1.1, -5.0 (no drop: the sign does not count), 0.3 (drop).
    iterates = turning([60.0, 60.5, 61.4, 62.5, 57.5, 57.8])
    optimizer = Given(iterates[1:], dtype=torch.float64)
    scheduler = EpochAutoDrop(optimizer, 0.5, threshold=0.6, max_threshold=1.0, delay=0)
    for _ in range(7):
        optimizer.step()
        scheduler.step()
    assert [d.lr[0] for d in scheduler.history] == [1, 1, 0.5, 0.25, 0.25, 0.25, 0.125]
    assert [d.threshold for d in scheduler.history] == [0.6, 0.6, 0.6, 1, 1, 1, 1]
    changes = [d.change for d in scheduler.history]
    # The meter keeps 16 bits of the last displacement: up to 2^-16 of a radian, 9e-4 degrees, in
    # each of two angles, where there are so few elements to average it out.
    assert changes == pytest.approx([None, None, 0.5, 0.9, 1.1, 5.0, 0.3], abs=1.8e-3)


def test_table_of_averages() -> None:
    # On a line all angles are 0. Condition in epoch 3; epochs 4 and 5 at 4 and 5 with the weights 1
    # and 2: 14/3. Then 6 (condition), 7 and 8: 23/3. From 23/3 to 7 is backwards: 180 degrees, and
    # 180 again from 7 to 8; the next change below theta is that of epoch 11, from 8 to 9.
    line = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 7, 8, 9, 10])[:, None]
    optimizer = Given(line)
    averages: list[EpochDecision] = []
    scheduler = EpochAutoDrop(optimizer, 0.5, delay=2, on_average=averages.append)
    seen = []
    for _ in line:
        optimizer.step()
        scheduler.step()
        seen.append(optimizer.parameter.item())
    assert [d.angle for d in scheduler.history] == [None, 0, 0, 0, 0, 0, 0, 0, 180, 180, 0, 0]
    assert [d.lr[0] for d in scheduler.history] == [1] * 4 + [0.5] * 3 + [0.25] * 4 + [0.125]
    assert [d.waited for d in scheduler.history] == [
        None, None, 0, 1, 2, 0, 1, 2, None, 0, 1, 2,
    ]  # fmt: skip
    # One rounding of float32 to the average.
    expected = [1, 2, 3, 4, 14 / 3, 6, 7, 23 / 3, 7, 8, 9, 29 / 3]
    assert seen == pytest.approx(expected, rel=1.2e-7)
    assert [d.window for d in averages] == [5, 8, 12]


def test_a_pending_drop_is_not_put_off_by_the_condition() -> None:
    # The condition holds in every epoch from the third on; as printed, k would never pass 5.
    assert rates(turning([90.0] * 9), factor=0.5, delay=5, average=False) == [1] * 7 + [0.5] * 3


def test_no_drop_is_counted_at_the_floor_but_averages_go_on() -> None:
    optimizer = Given(np.arange(1.0, 13.0)[:, None])
    scheduler = EpochAutoDrop(optimizer, 0.5, delay=2, min_lr=0.5)
    for _ in range(12):
        optimizer.step()
        scheduler.step()
    assert scheduler.num_drops == 1
    assert [d.window for d in scheduler.history if d.averaged] == [5, 8, 11]
    assert optimizer.param_groups[0]["lr"] == 0.5


# ---- what is averaged -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*half-precision parameters hardly moved:RuntimeWarning")
def test_parameters_that_do_not_move_keep_their_bits() -> None:
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    still = [torch.nn.Parameter(torch.randn(1000).to(dtype)) for dtype in dtypes]
    moving = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*still, moving], lr=0.1)
    scheduler = EpochAutoDrop(optimizer, 0.5, delay=20)
    before = [p.detach().clone() for p in still]
    for _ in range(50):
        moving.grad = torch.ones(3)  # a line: all angles are equal
        optimizer.step()
        scheduler.step()
    assert sum(d.averaged for d in scheduler.history) == 2
    assert all(torch.equal(p, q) for p, q in zip(still, before, strict=True))


def test_batch_norm_statistics_are_measured_anew() -> None:
    """The documented hook: after it the statistics are those of the averaged parameters."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    batches = [torch.randn(16, 3) for _ in range(5)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = EpochAutoDrop(
        optimizer,
        threshold=179.0,
        max_threshold=180.0,
        delay=3,
        on_average=lambda decision: update_bn(batches, model),
    )
    for _ in range(6):
        for x in batches:
            optimizer.zero_grad()
            (model(x) - x.mean(dim=1, keepdim=True)).square().mean().backward()
            optimizer.step()
        scheduler.step()
    assert scheduler.history[-1].averaged
    with torch.no_grad():
        hidden = model[0](torch.cat(batches))
    # Batches of one size: the mean of their means is the mean over all, in float32.
    torch.testing.assert_close(model[1].running_mean, hidden.mean(dim=0), rtol=1e-5, atol=1e-6)
    assert model.training


def test_master_weights_are_averaged_in_place_of_the_parameters() -> None:
    masters = [torch.zeros(4)]
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scheduler = EpochAutoDrop(optimizer, delay=2, params=iter(masters))
    for t in range(1, 6):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        masters[0].fill_(float(t))
        parameter.data.copy_(masters[0])
        scheduler.step()
    # One rounding of float32.
    assert masters[0].tolist() == pytest.approx([14 / 3] * 4, rel=1.2e-7)
    assert parameter.tolist() == [5.0] * 4


def test_memory_is_taken_for_the_delay_only() -> None:
    optimizer = Given(np.arange(1.0, 8.0)[:, None] * np.ones((1, 1024)))
    before = bytes_of_averages(optimizer.parameter)
    scheduler = EpochAutoDrop(optimizer, delay=2)
    taken = []
    for _ in range(7):
        optimizer.step()
        scheduler.step()
        taken.append(bytes_of_averages(optimizer.parameter) - before)
    # 4 bytes a parameter after the first of the two epochs, until the second is over.
    assert taken == [0] * 3 + [4096] + [0] * 2 + [4096]


def bytes_of_averages(parameter: torch.Tensor) -> int:
    """Bytes of the float32 tensors of the parameter's size that are alive, without itself."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
    alive = [t for t in tensors if t.dtype == torch.float32 and t.layout == torch.strided]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
    storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(size for size in storages.values() if size == parameter.nbytes)


# ---- learning rates -------------------------------------------------------------------------


def test_every_group_drops_from_its_own_rate_in_place() -> None:
    optimizer = Given(turning([90.0] * 4)[1:])
    rate = torch.tensor(8.0)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate})
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.25})
    scheduler = EpochAutoDrop(optimizer, 0.5, delay=0, min_lr=[0.0, 3.0, 0.5])
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    # The last group starts below its floor: a drop never raises a rate.
    assert optimizer.param_groups[1]["lr"] is rate
    assert [float(lr) for lr in scheduler.get_last_lr()] == [0.125, 3.0, 0.25]
    assert scheduler.history[-1].lr == (0.125, 3.0, 0.25)
    assert [float(lr) for lr in scheduler._get_closed_form_lr()] == [0.125, 3.0, 0.25]


def test_sequential_after_a_warmup_starts_at_the_milestone() -> None:
    # The warm-up goes straight on; then every epoch turns by 90 degrees.
    iterates = turning([0.0] * 3 + [90.0] * 6)
    optimizer = Given(iterates[1:], lr=0.1)
    warmup = LinearLR(optimizer, start_factor=0.1, total_iters=4)
    inner = EpochAutoDrop(optimizer, 0.5, delay=0)
    scheduler = SequentialLR(optimizer, [warmup, inner], milestones=[4])
    lrs = [optimizer.param_groups[0]["lr"]]
    for _ in iterates[1:]:
        optimizer.step()
        scheduler.step()
        lrs.append(optimizer.param_groups[0]["lr"])
    assert lrs[:4] == pytest.approx([0.01, 0.0325, 0.055, 0.0775])
    # Epochs 5 to 7 are the first three: the reference point is where the warm-up ended.
    assert lrs[4:8] == [0.1, 0.1, 0.1, 0.05]
    assert [d.angle for d in inner.history[:3]] == pytest.approx([None, 90.0, 90.0], abs=1e-4)


def test_chained_with_another_schedule_multiplies() -> None:
    optimizer = Given(turning([90.0] * 4)[1:])
    scheduler = ChainedScheduler(
        [EpochAutoDrop(optimizer, 0.5, delay=0), ExponentialLR(optimizer, gamma=0.9)]
    )
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.125 * 0.9**5, rel=1e-12)


# ---- what it tells --------------------------------------------------------------------------


def test_history_metrics_and_callbacks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autodrop_ext.schedulers.base.HISTORY", 4)
    optimizer = Given(turning([90.0] * 5)[1:])
    readings: list[EpochDecision] = []
    drops: list[EpochDecision] = []
    scheduler = EpochAutoDrop(
        optimizer, 0.5, delay=0, on_reading=readings.append, on_drop=drops.append
    )
    assert scheduler.get_metrics() == {"lr": 1.0, "num_drops": 0.0}
    for _ in range(6):
        optimizer.step()
        scheduler.step()
    assert scheduler.history == readings[-4:]
    assert [d.window for d in drops] == [3, 4, 5, 6]
    metrics = scheduler.get_metrics()
    assert metrics["lr"] == 0.0625
    assert metrics["num_drops"] == 4
    assert metrics["angular_velocity"] == pytest.approx(90.0, abs=1e-4)
    assert metrics["angular_velocity_change"] == pytest.approx(0.0, abs=1e-4)
    assert metrics["threshold"] == 0.08
    assert metrics["displacement"] == pytest.approx(1.0, rel=1e-6)
    assert all(type(v) is float for v in metrics.values())


@pytest.mark.parametrize("failing", ["on_average", "on_reading", "on_drop"])
def test_a_failing_callback_leaves_the_scheduler_whole(failing: str) -> None:
    line = np.arange(1.0, 9.0)[:, None]

    def fail(decision: EpochDecision) -> None:
        if decision.averaged:
            raise RuntimeError("disk full")

    optimizer = Given(line)
    scheduler = EpochAutoDrop(optimizer, 0.5, delay=2, **{failing: fail})
    failures = 0
    for _ in line:
        optimizer.step()
        try:
            scheduler.step()
        except RuntimeError:
            failures += 1
    assert failures == scheduler.num_drops == 2
    assert [d.window for d in scheduler.history] == list(range(1, 9))
    assert [d.lr[0] for d in scheduler.history] == [1] * 4 + [0.5] * 3 + [0.25]


def test_plot_shows_delays_and_drops(tmp_path: Any) -> None:
    optimizer = Given(np.arange(1.0, 9.0)[:, None])
    scheduler = EpochAutoDrop(optimizer, 0.5, delay=2)
    with pytest.raises(ValueError, match="readings: expected at least one"):
        scheduler.plot()
    for _ in range(8):
        optimizer.step()
        scheduler.step()
    figure = scheduler.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000
    rate = figure.axes[-1]
    (drops,) = [marks for marks in rate.collections if marks.get_gid() == "marks"]
    assert [segment[0][0] for segment in drops.get_segments()] == [5, 8]
    assert sum(patch.get_gid() == "delay" for patch in rate.patches) == 4
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "degrees",
        "degrees\nper epoch",
        "learning rate",
    ]


def test_close_takes_the_hooks_off_and_frees_the_tables() -> None:
    optimizer = Given(np.arange(1.0, 9.0)[:, None])
    scheduler = EpochAutoDrop(optimizer, delay=3)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    (mean,) = scheduler.state_dict()["mean"]["tensors"].values()
    # Two of three epochs of the delay: 4 with the weight 1 and 5 with the weight 2.
    assert mean.tolist() == pytest.approx([14 / 3], rel=2.0**-23)
    scheduler.close()
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert scheduler.meter.device_bytes == 0
    assert scheduler.state_dict()["mean"]["updates"] == 0


def test_the_hooks_do_not_keep_the_scheduler_alive() -> None:
    optimizer = Given(turning([90.0] * 3))
    scheduler = EpochAutoDrop(optimizer)
    alive = weakref.ref(scheduler)
    del scheduler
    gc.collect()
    assert alive() is None
    optimizer.step()


# ---- wrong arguments ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"factor": 1.0}, ValueError, "factor: expected a number between 0 and 1, got 1.0"),
        ({"threshold": 0}, ValueError, "threshold: expected a finite number of degrees above 0"),
        ({"threshold": "1"}, TypeError, "threshold: expected a finite number of degrees above 0"),
        ({"max_threshold": 0.001}, ValueError, "at least threshold=0.01, got 0.001"),
        ({"max_threshold": math.inf}, ValueError, "max_threshold: expected a finite number"),
        ({"delay": -1}, ValueError, "delay: expected at least 0, got -1"),
        ({"delay": 2.5}, TypeError, "delay: expected an int, got 2.5"),
        ({"average": 1}, TypeError, "average: expected a bool, got 1"),
        ({"min_lr": -1}, ValueError, "min_lr: expected a finite number of at least 0, got -1"),
        ({"min_lr": [0, 0]}, ValueError, "min_lr: expected one number or 1, one per param group"),
        ({"backend": "gpu"}, ValueError, "backend: expected 'auto' or one of"),
        ({"params": 3}, TypeError, "params: expected an iterable of tensors"),
        ({"on_average": 3}, TypeError, "on_average: expected a function or None, got 3"),
        ({"on_reading": 3}, TypeError, "on_reading: expected a function or None, got 3"),
    ],
)
def test_wrong_arguments_say_what_was_expected(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    optimizer = Given(turning([90.0]))
    with pytest.raises(error, match=message):
        EpochAutoDrop(optimizer, **arguments)
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_it_has_the_shape_of_a_scheduler() -> None:
    scheduler = EpochAutoDrop(Given(turning([90.0])))
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    assert not callable(scheduler)
    assert not hasattr(scheduler, "total_steps")
    assert not hasattr(scheduler, "_schedulers")
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer, got str"):
        EpochAutoDrop("adam")  # type: ignore[arg-type]
