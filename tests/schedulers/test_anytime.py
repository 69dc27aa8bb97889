"""AnytimeAutoDrop: the rule against an independent version, null processes, state, averages."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from independent import anytime, critical
from torch import Tensor, nn
from trajectories import Given, process

from autodrop_ext import AngularVelocity, AnytimeAutoDrop, AutoDrop, EpochAutoDrop
from autodrop_ext.schedulers.growing import walk_cosine
from autodrop_ext.sketch import Sketch


def run(iterates: np.ndarray, **settings: Any) -> AnytimeAutoDrop:
    optimizer = Given(iterates, dtype=torch.float64)
    scheduler = AnytimeAutoDrop(optimizer, **settings)
    for _ in iterates:
        optimizer.step()
        scheduler.step()
    return scheduler


@pytest.mark.filterwarnings("ignore:AnytimeAutoDrop. .* (held NaN|is not finite):RuntimeWarning")
@pytest.mark.parametrize(
    "nan_at", [None, 1_500, 1_100], ids=["finite", "nan", "nan after doubling"]
)
@pytest.mark.parametrize("kind", ["drift", "walk", "mean-reverting"])
@pytest.mark.parametrize("automatic", [False, True], ids=["no warm-up", "automatic"])
def test_the_rule_step_by_step(automatic: bool, kind: str, nan_at: int | None) -> None:
    iterates = process(kind, 3_000, n=100)
    if nan_at is not None:
        iterates[nan_at - 1] = np.nan  # one of the steps that are read: every fourth one
    closes = anytime(iterates, automatic=automatic)
    history = run(iterates, warmup_steps="auto" if automatic else 0).history
    # A meter reports from the third window on; nothing has been decided before.
    assert len(history) == len(closes) - 2
    for decision, (t, window, mean, power, lr) in zip(history, closes[2:], strict=True):
        assert (decision.step, decision.window_steps) == (t, window)
        assert (decision.mean_cosine is None) == (mean is None)
        rises = decision.warmup is not None
        assert (decision.power is None) == (power is None or rises)
        if mean is not None and power is not None and not rises:
            # The same float64 numbers in another order, and merged means that are rounded.
            assert decision.mean_cosine == pytest.approx(mean, abs=1e-11)
            assert decision.power == pytest.approx(power, abs=5e-11)
        assert decision.lr[0] == pytest.approx(lr, rel=1e-9)


def test_null_processes() -> None:
    """Part of the rate that is left after 30,000 steps without any loss."""
    left = {kind: run(process(kind, 30_000)).get_last_lr()[0] for kind in ("drift", "walk", "ou")}
    assert left["drift"] > 0.9
    assert 0.6 < left["walk"] < 1.0
    assert left["ou"] < 0.2


@pytest.mark.parametrize("readings", [1, 2, 3, 4, 7, 16, 32, 100])
def test_the_cosine_of_a_walk_for_any_number_of_readings(readings: int) -> None:
    assert walk_cosine(readings, 3 * readings) == pytest.approx(critical(readings), abs=1e-15)
    k = min(readings, 16)
    windows = process("walk", 60_000)[: 60_000 // k * k].reshape(-1, k, 300).mean(axis=1)
    s = np.diff(windows, axis=0)
    lengths = np.linalg.norm(s, axis=1)
    cosines = (s[1:] * s[:-1]).sum(axis=1) / (lengths[1:] * lengths[:-1])
    # A cosine in 300 dimensions scatters by 1 / sqrt(300) = 0.06; there are 3,700 at least, and the
    # mean of quotients is off by another 1 / 300.
    assert cosines.mean() == pytest.approx(walk_cosine(k, k), abs=0.01)


@pytest.mark.parametrize(
    ("window", "at"), [(6, [2, 3, 4, 5, 6]), (10, [4, 7, 10]), (7, [2, 4, 6, 7]), (5, [3, 5])]
)
def test_the_cosine_of_a_walk_that_is_read_unevenly(window: int, at: list[int]) -> None:
    """As if the number of readings does not divide the window."""
    walk = np.tril(np.ones((3 * window, 3 * window)))  # row t: the steps that x_t is the sum of
    means = [walk[[i * window + t - 1 for t in at]].mean(axis=0) for i in range(3)]
    s, s_before = means[2] - means[1], means[1] - means[0]
    # Rounding of a few float64 operations.
    expected = s @ s_before / math.sqrt((s @ s) * (s_before @ s_before))
    assert walk_cosine(len(at), window) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(
    "settings",
    [*({"snapshots": n} for n in (1, 2, 4)), {"min_window": 1}, {"min_window": 4, "snapshots": 2}],
    ids=str,
)
def test_a_walk_keeps_its_rate_with_few_readings_in_a_window(settings: dict[str, int]) -> None:
    left = run(process("walk", 10_000), average=False, **settings).get_last_lr()[0]
    # 0.65 with the defaults; with 1/4 whatever the number of readings, 0.08 to 0.40.
    assert left > 0.55


def test_the_same_trajectory_in_twice_the_steps_has_the_same_rates() -> None:
    iterates = process("mean-reverting", 6_000)
    # Linear interpolation: every displacement takes twice as long.
    middle = (iterates[1:] + iterates[:-1]) / 2
    slow = np.empty((2 * len(iterates) - 1, iterates.shape[1]))
    slow[::2], slow[1::2] = iterates, middle
    fast = {d.step: d.lr[0] for d in run(iterates).history}
    twice = {d.step: d.lr[0] for d in run(slow).history}
    common = [t for t in fast if t >= 1_000 and 2 * t in twice]
    assert len(common) > 10
    # Within noise: windows are cut at other places of the trajectory.
    assert all(abs(math.log(twice[2 * t] / fast[t])) < 0.35 for t in common)


@pytest.mark.parametrize(
    ("steps", "open_window", "snapshots", "closes"), [(1_000, 20, 736, 31), (10_000, 24, 1_568, 57)]
)
def test_closes_and_snapshots_grow_like_a_logarithm(
    steps: int,
    open_window: int,
    snapshots: int,
    closes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = {"snapshots": 0, "closes": 0}

    def counting(name: str, kind: str) -> None:
        inner = getattr(Sketch, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            counted[kind] += 1
            return inner(self, *args, **kwargs)

        monkeypatch.setattr(Sketch, name, call)

    counting("add", "snapshots")
    counting("close", "closes")
    run(process("drift", steps, n=3), backend="reference")
    assert counted["snapshots"] == snapshots + open_window
    assert counted["closes"] == closes
    assert abs(closes - (16 + 8 * math.log2(steps / 256))) < 1.5  # whole windows only


def test_a_rate_is_never_raised_and_keeps_to_its_floor() -> None:
    iterates = process("mean-reverting", 4_000, n=50)
    scheduler = run(iterates, min_lr=0.3)
    rates = [d.lr[0] for d in scheduler.history]
    assert all(a >= b for a, b in zip(rates, rates[1:], strict=False))
    assert rates[-1] == 0.3
    assert run(iterates).get_last_lr()[0] < 0.3


def test_nan_starts_over_and_keeps_time_window_and_rate() -> None:
    iterates = process("mean-reverting", 3_000, n=50)
    iterates[1_499] = np.nan  # step 1,500, which is read: every fourth one is
    with pytest.warns(RuntimeWarning, match="held NaN|the average leaves these") as caught:
        scheduler = run(iterates)
    said = [str(w.message) for w in caught]  # once by the average and once by the meter
    assert ["held NaN" in message for message in said] == [False, True]
    unknown = [d for d in scheduler.history if d.angle is None and d.window_steps == 128]
    # The first window after the doubling, the one with NaN, and two until there is an angle again.
    assert len(unknown) == 4
    doubled, *faulty = unknown
    assert doubled.power is not None
    assert [d.power for d in faulty] == [None] * 3
    assert not any(d.dropped for d in faulty)
    before = max((d for d in scheduler.history if d.step < faulty[0].step), key=lambda d: d.step)
    assert faulty[-1].lr == before.lr
    assert scheduler.history[-1].angle is not None
    assert scheduler.window == 256  # doubled at 256, 512, 1,024 and 2,048
    rates = [d.lr[0] for d in scheduler.history]
    assert all(a >= b for a, b in zip(rates, rates[1:], strict=False))


@pytest.mark.filterwarnings("ignore:AnytimeAutoDrop. no parameter moved:RuntimeWarning")
def test_nothing_is_lowered_while_nothing_moves() -> None:
    iterates = process("mean-reverting", 2_000, n=50)
    iterates[1_000:] = iterates[1_000]
    scheduler = run(iterates, windows=1_000)  # the window stays at 16 steps
    # The window from 992 to 1,008 and the next one still hold some motion.
    still = [d for d in scheduler.history if d.step > 1_024]
    assert len(still) == (2_000 - 1_024) // 16
    assert all(d.angle is None and d.power is None and not d.dropped for d in still)
    assert scheduler.get_last_lr()[0] == still[0].lr[0] < 1.0


@pytest.mark.filterwarnings("ignore:AnytimeAutoDrop. no parameter moved:RuntimeWarning")
@pytest.mark.parametrize("elements", [50, 5_000])
def test_parameters_that_stand_still_across_a_doubling_lower_nothing(elements: int) -> None:
    """Merged means are rounded, and what rounding leaves is no displacement."""
    iterates = process("mean-reverting", 600, n=elements)
    iterates[400:] = iterates[400]
    scheduler = run(np.concatenate([iterates, iterates[400:].repeat(4, axis=0)]), buckets=4096)
    assert scheduler.window == 128  # doubled at 256, 512 and 1,024
    # The window of 416 to 448 steps is the first that stands still.
    still = [d for d in scheduler.history if d.step > 512]
    assert len(still) >= 10
    assert [d.angle for d in still] == [None] * len(still)
    assert not any(d.dropped for d in still if d.window_steps == scheduler.window)
    rates = {d.lr[0] for d in still if d.cosine is None and d.step > 576}
    assert len(rates) == 1


def test_warm_up_does_not_count() -> None:
    iterates = process("walk", 400, n=20)
    plain = run(iterates[100:])
    warmed = run(iterates, warmup_steps=100)
    assert [d.cosine for d in warmed.history] == [d.cosine for d in plain.history]
    assert [d.step - 100 for d in warmed.history] == [d.step for d in plain.history]


def test_joining_a_run_without_a_checkpoint() -> None:
    optimizer = Given(process("walk", 200, n=20))
    optimizer.param_groups[0]["initial_lr"] = 1.0
    scheduler = AnytimeAutoDrop(optimizer, last_epoch=5_000)
    # The window doubles while t >= 16 w: 16 to 512.
    assert scheduler.window == 512


def test_wrong_arguments_say_what_was_expected() -> None:
    optimizer = Given(np.zeros((1, 2)))
    for arguments, message in (
        ({"min_window": 0}, "min_window: expected at least 1"),
        ({"critical": 2.0}, "critical: expected a number from -1 to 1"),
        ({"gain": 0.0}, "gain: expected a finite number above 0"),
        ({"max_power": -1.0}, "max_power: expected a finite number above 0"),
        ({"snapshots": 0}, "snapshots: expected at least 1"),
        ({"cosines": 0}, "cosines: expected at least 1"),
        ({"min_lr": -1.0}, "min_lr: expected a finite number of at least 0"),
        ({"windows": 1}, "windows: expected at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            AnytimeAutoDrop(optimizer, **arguments)  # type: ignore[arg-type]


# ---- state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 15, 16, 40, 255, 256, 257, 270, 511, 512, 513, 700])
@pytest.mark.parametrize("way", ["file", "deepcopy"])
def test_resume_is_exact_in_every_phase(at: int, way: str) -> None:
    iterates = process("mean-reverting", 900, n=30)
    whole = run(iterates)
    first = Given(iterates[:at], dtype=torch.float64)
    scheduler = AnytimeAutoDrop(first)
    for _ in range(at):
        first.step()
        scheduler.step()
    buffer = io.BytesIO()
    state = scheduler.state_dict()
    if way == "deepcopy":
        state = copy.deepcopy(scheduler).state_dict()
    torch.save(state, buffer)
    buffer.seek(0)
    rest = Given(iterates[at:], dtype=torch.float64)
    with torch.no_grad():
        rest.parameter.copy_(torch.from_numpy(iterates[at - 1]))
    rest.param_groups[0]["lr"] = first.param_groups[0]["lr"]
    resumed = AnytimeAutoDrop(rest)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for _ in range(at, len(iterates)):
        rest.step()
        resumed.step()
    assert repr(resumed.history) == repr(whole.history)  # NaN does not equal itself
    assert rest.param_groups[0]["lr"] == whole.get_last_lr()[0]


# ---- averaged parameters ------------------------------------------------------------------------


def averaged(optimizer: Any, scheduler: Any) -> tuple[bool, np.ndarray]:
    with scheduler.averaged_parameters() as held:
        return held, optimizer.parameter.detach().numpy().copy()


def average_at_reads(
    iterates: np.ndarray, window: int = 16, windows: int = 8, snapshots: int = 32
) -> np.ndarray:
    """``a <- a + (1 - ((t - d)/t)^8) (x - a)`` in float64, wherever the meter reads."""
    a, last, begin = np.zeros(iterates.shape[1]), 0, 0
    for t, x in enumerate(iterates, 1):
        read = min(window, snapshots)
        place = t - begin
        if place * read // window > (place - 1) * read // window and 512 * (t - last) >= t:
            a = a + (1 - ((t - (t - last)) / t) ** 8) * (x - a)
            last = t
        if place == window:
            begin = t
            if t >= 2 * windows * window:
                window *= 2
    return a


@pytest.mark.parametrize("steps", [1, 7, 16, 20, 100, 256, 300, 560, 1_300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_average_is_that_of_a_float64_recursion_at_the_reads_of_the_meter(
    steps: int, dtype: torch.dtype
) -> None:
    iterates = 1 + 0.01 * process("walk", steps, n=40)
    optimizer = Given(iterates, dtype=dtype)
    scheduler = AnytimeAutoDrop(optimizer)
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    before = optimizer.parameter.detach().clone()
    held, found = averaged(optimizer, scheduler)
    assert held
    # Float32 rounds once an update; with shares of 1/64 and more, errors add up to less than 64.
    tolerance = 1e-12 if dtype == torch.float64 else 8 * 2.0**-24
    assert found == pytest.approx(average_at_reads(iterates), rel=tolerance)
    assert torch.equal(optimizer.parameter, before)


@pytest.mark.parametrize("at", [1, 15, 16, 257, 270, 700])
def test_an_average_resumes_to_the_bit(at: int) -> None:
    iterates = 1 + 0.01 * process("walk", 800, n=40)
    first, rest, other = (Given(part) for part in (iterates, iterates[at:], iterates))
    scheduler = AnytimeAutoDrop(first)
    for t in range(800):
        first.step()
        scheduler.step()
        if t + 1 == at:
            state = copy.deepcopy(scheduler.state_dict())
            with torch.no_grad():
                rest.parameter.copy_(first.parameter)
            rest.param_groups[0]["lr"] = first.param_groups[0]["lr"]
    resumed = AnytimeAutoDrop(rest)
    resumed.load_state_dict(state)
    assert averaged(rest, resumed)[0]
    for _ in range(800 - at):
        rest.step()
        resumed.step()
    assert averaged(rest, resumed)[1].tobytes() == averaged(first, scheduler)[1].tobytes()
    assert other.parameter.numel() == 40


def test_without_an_average_its_use_says_what_to_do() -> None:
    for kind, settings in ((AnytimeAutoDrop, {"average": False}), (AutoDrop, {})):
        scheduler = kind(Given(np.ones((1, 3))), **settings)
        expected = pytest.raises(RuntimeError, match=r"made with average=True, got average=False")
        with expected, scheduler.averaged_parameters():
            pass
        assert "mean" not in scheduler.state_dict()
    scheduler = EpochAutoDrop(Given(np.ones((1, 3))))
    with pytest.raises(RuntimeError), scheduler.averaged_parameters():
        pass


def various() -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(5, 7, generator=g),
        torch.randn(4, 6, 5, 3, generator=g).to(memory_format=torch.channels_last),
        torch.randn(20, 20, generator=g)[:, ::2],
        torch.randn(9, generator=g).bfloat16(),
        torch.randn(9, generator=g).half(),
        torch.randn(9, generator=g).double(),
        torch.randn(3, 3, generator=g, dtype=torch.complex64),
    ]
    return [nn.Parameter(t) for t in tensors]


def bits(t: Tensor) -> bytes:
    return (
        torch.view_as_real(t.detach()).numpy().tobytes()
        if t.is_complex()
        else (t.detach().contiguous().view(torch.uint8).numpy().tobytes())
    )


def drifting(kind: type, parameters: list[nn.Parameter], steps: int, **settings: Any) -> Any:
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    scheduler = kind(optimizer, **settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in parameters:
            real = torch.randn(p.shape, generator=generator)
            p.grad = real.to(p.dtype)
        optimizer.step()
        scheduler.step()
    return scheduler


@pytest.mark.parametrize("ending", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", [AnytimeAutoDrop, AutoDrop])
def test_every_bit_comes_back(kind: type, ending: type[BaseException] | None) -> None:
    parameters = various()
    scheduler = drifting(kind, parameters, 150, average=True)
    with torch.no_grad():
        parameters[0][0, 0] = math.nan
        parameters[0].view(torch.int32)[0, 1] = 0x7FC0BEEF  # a NaN with a payload
        parameters[0][0, 2] = -0.0
    before = [bits(p) for p in parameters]
    expected = contextlib.nullcontext() if ending is None else pytest.raises(ending)
    with expected, scheduler.averaged_parameters():
        assert [bits(p) for p in parameters] != before
        if ending is not None:
            raise ending
    assert [bits(p) for p in parameters] == before


@pytest.mark.parametrize("buckets", [4096, None])  # tables show what is not finite, or do not
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("bad_at", [70, 72, 96, 128])  # within a window, at an end, at doublings
@pytest.mark.filterwarnings("ignore:.*(NaN or infinity|is not finite):RuntimeWarning")
def test_no_snapshot_that_is_not_finite_enters_the_average(
    bad_at: int, bad: float, buckets: int | None
) -> None:
    p = nn.Parameter(torch.zeros(5_000))  # more elements than buckets
    optimizer = torch.optim.SGD([p], lr=0.01)
    scheduler = AnytimeAutoDrop(optimizer, min_window=4, windows=4, buckets=buckets)
    generator = torch.Generator().manual_seed(0)
    iterates, read = torch.randn(140, 5_000, generator=generator, dtype=torch.float64), []
    for t, iterate in enumerate(iterates, 1):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        with torch.no_grad():
            p.copy_(iterate)
            if t == bad_at:
                p[4_321] = bad
        scheduler.step()
        if scheduler.meter.has_read and t != bad_at:
            read.append(t)
    expected = torch.zeros(5_000, dtype=torch.float64)
    for before, t in zip([0, *read], read, strict=False):
        expected += (1 - (before / t) ** 8) * (iterates[t - 1].float() - expected)
    assert bad_at not in read and len(read) > 100
    with scheduler.averaged_parameters() as held:
        assert held
        # float32 with values up to 4: each of 140 updates rounds by at most 2^-24 of them.
        torch.testing.assert_close(p.detach().double(), expected, atol=1e-5, rtol=0)


def test_before_the_first_step_the_block_changes_nothing() -> None:
    parameters = various()
    scheduler = AnytimeAutoDrop(torch.optim.SGD(parameters, lr=0.1))
    before = [bits(p) for p in parameters]
    with (
        pytest.warns(RuntimeWarning, match="changed nothing: there is no average"),
        scheduler.averaged_parameters() as held,
    ):
        assert not held
        assert [bits(p) for p in parameters] == before


def test_batch_normalisation_is_measured_again_in_the_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = AnytimeAutoDrop(optimizer)
    data = [torch.randn(32, 4) for _ in range(4)]
    for i in range(60):
        loss = (model(data[i % 4]) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    statistics = copy.deepcopy(model[1].state_dict())
    with scheduler.averaged_parameters():
        torch.optim.swa_utils.update_bn(data, model)
        model.eval()
        with torch.no_grad():
            hidden = torch.cat([model[0](x) for x in data])
        # update_bn averages over batches.
        torch.testing.assert_close(model[1].running_mean, hidden.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert not torch.equal(statistics["running_mean"], model[1].running_mean)


# ---- cooldown -----------------------------------------------------------------------------------


def cooled(scheduler: Any, steps: int) -> Iterator[float]:
    for _ in range(steps):
        for group in scheduler.optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape).to(p.dtype)
        scheduler.optimizer.step()
        scheduler.step()
        yield float(scheduler.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("kind", [AnytimeAutoDrop, AutoDrop, EpochAutoDrop])
@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ("linear", [0.75, 0.5, 0.25, 0.0, 0.0]),
        ("sqrt", [0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0.0, 0.0]),
        ("cosine", [(1 + math.cos(math.pi * x)) / 2 for x in (0.25, 0.5, 0.75, 1.0)] + [0.0]),
    ],
)
def test_cooldown(kind: type, shape: Any, left: list[float], tensor_lr: bool) -> None:
    lr = torch.tensor(0.5, dtype=torch.float64) if tensor_lr else 0.5
    optimizer = torch.optim.SGD([nn.Parameter(torch.randn(30))], lr=lr)
    scheduler = kind(optimizer, min_lr=0.1)
    rates = list(cooled(scheduler, 3))
    scheduler.cooldown(4, shape)
    expected = [0.1 + (rates[-1] - 0.1) * part for part in left]
    assert list(cooled(scheduler, 5)) == pytest.approx(expected, rel=1e-12)


def test_a_cooldown_resumes() -> None:
    torch.manual_seed(0)
    first = AutoDrop(torch.optim.SGD([nn.Parameter(torch.randn(30))], lr=0.5), window=2)
    list(cooled(first, 9))
    first.cooldown(10)
    list(cooled(first, 3))
    second = AutoDrop(torch.optim.SGD([nn.Parameter(torch.randn(30))], lr=0.5), window=2)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert list(cooled(second, 7)) == pytest.approx(list(cooled(first, 7)), rel=0)
    assert second.optimizer.param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [AutoDrop, AnytimeAutoDrop, EpochAutoDrop])
def test_steps_count_at_the_rate_of_0_that_a_cooldown_ends_at(
    kind: type, dtype: torch.dtype
) -> None:
    """Without a warning about parameters that stand still, or that hardly move."""
    settings = {AutoDrop: {"window": 2}, AnytimeAutoDrop: {"min_window": 2}, EpochAutoDrop: {}}
    optimizer = torch.optim.SGD([nn.Parameter(torch.randn(30).to(dtype))], lr=0.5)
    scheduler = kind(optimizer, **settings[kind])
    list(cooled(scheduler, 9))
    scheduler.cooldown(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(cooled(scheduler, 40))[-1] == 0
    assert scheduler.state_dict()["optimizer_steps"] == 49
    other = kind(
        torch.optim.SGD([nn.Parameter(torch.randn(30).to(dtype))], lr=0.0), **settings[kind]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(scheduler.state_dict())
        list(cooled(other, 40))
    assert other.state_dict()["optimizer_steps"] == 89


@pytest.mark.parametrize("steps", [2, 10])
@pytest.mark.parametrize("kind", [AutoDrop, AnytimeAutoDrop, EpochAutoDrop])
def test_a_cooldown_can_be_ended(kind: type, steps: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.randn(30))], lr=0.5)
    scheduler = kind(optimizer, min_lr=0.1)
    list(cooled(scheduler, 3))
    scheduler.cooldown(4)
    assert list(cooled(scheduler, steps))[-1] < 0.5
    scheduler.end_cooldown()
    optimizer.param_groups[0]["lr"] = 0.3
    state = scheduler.state_dict()
    assert list(cooled(scheduler, 5)) == [0.3] * 5
    scheduler.end_cooldown()  # there is none
    resumed = kind(torch.optim.SGD([nn.Parameter(torch.randn(30))], lr=0.3), min_lr=0.1)
    resumed.load_state_dict(state)
    assert list(cooled(resumed, 5)) == [0.3] * 5


def test_drops_go_on_after_a_cooldown_was_ended() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.randn(30))], lr=0.5)
    scheduler = AutoDrop(optimizer, window=1, threshold=1e6, min_samples=1)
    list(cooled(scheduler, 12))
    scheduler.cooldown(50)
    list(cooled(scheduler, 10))
    drops, lr = scheduler.num_drops, optimizer.param_groups[0]["lr"]
    scheduler.end_cooldown()
    list(cooled(scheduler, 10))
    dropped = scheduler.num_drops - drops
    assert dropped > 0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(lr * 0.95**dropped, rel=1e-12)


@pytest.mark.parametrize("kind", [AutoDrop, AnytimeAutoDrop])
def test_decisions_hold_the_rates_of_a_cooldown(kind: type) -> None:
    seen: list[tuple[float, float]] = []
    optimizer = torch.optim.SGD([nn.Parameter(torch.randn(30))], lr=0.5)
    settings = {"window": 2} if kind is AutoDrop else {"min_window": 2, "windows": 1_000}
    scheduler = kind(
        optimizer,
        on_reading=lambda d: seen.append((d.lr[0], optimizer.param_groups[0]["lr"])),
        **settings,
    )
    list(cooled(scheduler, 40))
    before = len(seen)
    scheduler.cooldown(20)
    list(cooled(scheduler, 20))
    assert len(seen) == before + 10
    assert [lr for lr, _ in seen] == [now for _, now in seen]
    assert seen[-1][0] == 0.0
    if kind is AnytimeAutoDrop:
        assert [d.power for d in scheduler.history[before:]] == [None] * 10


def test_a_state_of_averaged_parameters_is_pointed_out() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.randn(30))], lr=0.5)
    scheduler = AnytimeAutoDrop(optimizer, min_window=2)
    list(cooled(scheduler, 20))
    with (
        scheduler.averaged_parameters(),
        pytest.warns(RuntimeWarning, match="the call came from within a block") as caught,
    ):
        scheduler.state_dict()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.state_dict()


def test_no_drops_during_a_cooldown_and_none_before_the_warm_up_ends() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.randn(30))], lr=0.5)
    scheduler = AutoDrop(optimizer, window=1, threshold=1e6, min_samples=1, warmup_steps=3)
    with pytest.raises(RuntimeError, match=r"cooldown: expected a call after the warm-up of 3"):
        scheduler.cooldown(5)
    list(cooled(scheduler, 12))
    drops = scheduler.num_drops
    assert drops > 0  # the threshold lets every second reading drop
    scheduler.cooldown(50)
    list(cooled(scheduler, 20))
    assert scheduler.num_drops == drops
    assert len(scheduler.history) == 12 - 3 - 2 + 20  # readings went on
    for arguments, message in (
        ((0,), "num_steps: expected at least 1"),
        ((5, "steep"), "shape: expected 'linear', 'sqrt' or 'cosine'"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.cooldown(*arguments)  # type: ignore[arg-type]


# ---- snapshots ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("window", "snapshots"), [(8, 2), (10, 3), (7, 7), (5, 9), (6, 1)])
def test_snapshots_thin_the_iterates(backend: str, window: int, snapshots: int) -> None:
    iterates = process("walk", 6 * window, n=60)
    x = torch.zeros(60, dtype=torch.float64)
    meter = AngularVelocity([x], window, snapshots=snapshots, backend=backend)
    readings = []
    for iterate in iterates:
        x.copy_(torch.from_numpy(iterate))
        readings.append(meter.observe())
    s = min(snapshots, window)
    places = [math.ceil((j + 1) * window / s) - 1 for j in range(s)]
    assert places[-1] == window - 1
    means = iterates.reshape(6, window, 60)[:, places].mean(axis=1)
    moves = np.diff(means, axis=0)
    for i in range(2, 6):
        reading = readings[(i + 1) * window - 1]
        a, b = moves[i - 1], moves[i - 2]
        cosine = a @ b / math.sqrt((a @ a) * (b @ b))
        assert reading is not None and reading.angle is not None
        assert reading.angle == pytest.approx(math.degrees(math.acos(cosine)), abs=1e-9)  # float64


def test_more_snapshots_than_steps_are_all_steps() -> None:
    iterates = process("walk", 40, n=20)

    def angles(**settings: Any) -> list[Any]:
        optimizer = Given(iterates)
        scheduler = AutoDrop(optimizer, window=4, **settings)
        for _ in iterates:
            optimizer.step()
            scheduler.step()
        return scheduler.history

    assert angles(snapshots=4) == angles(snapshots=100) == angles()


@pytest.mark.parametrize("update", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_doubled_window_is_as_exact(update: float, backend: str) -> None:
    """Against float64."""
    k, n = 16, 5_000
    random = np.random.default_rng(0)
    start = random.normal(size=n)
    drift, noise = random.normal(size=n), random.normal(size=(10 * k, n))
    iterates = start + update * np.cumsum(0.3 * drift + noise, axis=0)
    iterates = iterates.astype(np.float32).astype(np.float64)
    x = torch.zeros(n)
    meter = AngularVelocity([x], k, backend=backend)
    readings = []
    for t, iterate in enumerate(iterates, 1):
        x.copy_(torch.from_numpy(iterate))
        readings.append(meter.observe())
        if t == 4 * k:
            meter.double_window()
    means = iterates.reshape(-1, 2 * k, n).mean(axis=1)  # the merged window and all after it
    a, b = means[3] - means[2], means[2] - means[1]
    cosine = a @ b / math.sqrt((a @ a) * (b @ b))
    reading = readings[8 * k - 1]
    assert reading is not None and reading.angle is not None
    # Displacements of 1e-6 next to numbers of 1: 1e-10 of each element.
    assert reading.angle == pytest.approx(math.degrees(math.acos(cosine)), abs=1e-6)
    assert readings[6 * k - 1] is not None and readings[6 * k - 1].angle is None
