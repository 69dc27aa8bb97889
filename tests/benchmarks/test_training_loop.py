"""The training loop under every schedule: interruption, logs, divergence; rates as literals."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector
from training import run
from training.driver import Driver
from training.loop import train
from training.recipe import Recipe
from training.run import CHECKPOINT, LOG, RESULT, RunSpec
from training.schedules import SCHEDULES, Setup, window_for
from training.task import Scores
from training.tasks import MODELS, Model

from autodrop_ext import read_log
from autodrop_ext.schedulers import auto_window


class Blobs:
    """Two clouds of points for a small network with batch norm; milliseconds an epoch."""

    measure = "test error, %"
    steps_per_epoch = 12
    evaluate_every = 1

    def __init__(self, optimizer="sgd", epochs=4):
        self.recipe = Recipe(optimizer, 0.05, (0.02, 0.05), epochs=epochs, weight_decay=1e-3)
        self.stop_at = None  # loss calls before the power fails
        self.calls = 0

    def model(self):
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))

    def _batch(self, random, n=16):
        labels = torch.randint(2, (n,), generator=random)
        return torch.randn(n, 4, generator=random) + labels[:, None], labels

    def start_epoch(self, random):
        self.order = torch.randperm(8, generator=random)

    def loss(self, model, random):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        points, labels = self._batch(random)
        return nn.functional.cross_entropy(model(points), labels)

    @torch.no_grad()
    def scores(self, model):
        points, labels = self._batch(torch.Generator().manual_seed(99), 200)
        logits = model(points)
        error = 100 * float((logits.argmax(1) != labels).double().mean())
        return Scores(error, float(nn.functional.cross_entropy(logits, labels)))

    def inputs(self, random):
        return iter([self._batch(random)[0] for _ in range(4)])


@pytest.fixture
def blobs(monkeypatch):
    def use(task):
        monkeypatch.setattr(run, "made_task", lambda *args, **kwargs: task)
        model = Model(recipe=lambda: task.recipe, task=lambda **options: task, windows=())
        monkeypatch.setitem(MODELS, "blobs", model)
        return task

    return use


def settings_of(schedule):
    """Settings under which as much as possible happens within 48 steps."""
    return {
        "autodrop": {"window": 1},
        "epoch-autodrop": {"threshold": 180.0, "max_threshold": 180.0, "delay": 2, "min_lr": 0.0},
        "hd": {"beta": 1e-3},
        "plateau": {"patience": 0},
        "tlr": {"least_gap": 1},
    }.get(schedule, {})


def needs(schedule):
    package = {"schedule-free": "schedulefree", "prodigy": "prodigyopt"}.get(schedule)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; it comes with autodrop_ext[bench]")


def trained(root, spec):
    state = torch.load(spec.folder(root) / CHECKPOINT, weights_only=True)
    return state["model"]


@pytest.mark.parametrize(
    ("schedule", "optimizer"),
    [(name, "sgd") for name in SCHEDULES] + [("hd", "adamw"), ("schedule-free", "adamw")],
)
def test_a_killed_run_ends_with_the_same_bits(blobs, tmp_path, schedule, optimizer):
    needs(schedule)
    spec = RunSpec("blobs", schedule, settings=settings_of(schedule), log_every=5, angles=2)
    blobs(Blobs(optimizer))
    whole = train(spec, tmp_path / "whole")

    task = blobs(Blobs(optimizer))
    for stop_at in (3, 30, 20):  # before the first checkpoint, in the third epoch, in the fourth
        task.calls, task.stop_at = 0, stop_at
        with pytest.raises(KeyboardInterrupt):
            train(spec, tmp_path / "killed")
    task.stop_at = None
    resumed = train(spec, tmp_path / "killed")

    assert resumed == whole
    ends = [trained(tmp_path / name, spec) for name in ("whole", "killed")]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    logs = [(spec.folder(tmp_path / name) / LOG).read_text() for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    assert task.calls < 40  # it went on, and did not start over
    assert whole["error"] < 50  # percent; chance is 50


def test_the_log_has_steps_epochs_and_angles(blobs, tmp_path):
    blobs(Blobs())
    spec = RunSpec("blobs", "constant", log_every=5, angles=2)
    result = train(spec, tmp_path)
    readings, metrics, _ = read_log(spec.folder(tmp_path) / LOG)
    epochs = [m for m in metrics if "epoch" in m]
    steps = [m for m in metrics if "epoch" not in m]
    assert [m["step"] for m in steps[:6]] == [5, 10, 12, 17, 22, 24]
    assert [m["step"] for m in epochs] == [12, 24, 36, 48]
    for record, logged in zip(result["curve"], epochs, strict=True):
        # The epoch's mean is no second "loss" at a step that has one already.
        renamed = {"epoch_loss" if k == "loss" else k: v for k, v in record.items()}
        assert {k: logged[k] for k in renamed} == renamed and "loss" not in logged
        within = [m["loss"] for m in steps if 0 <= record["step"] - m["step"] < 12]
        mean = (5 * within[0] + 5 * within[1] + 2 * within[2]) / 12
        assert mean == pytest.approx(record["loss"], rel=1e-6)  # float32 sums
    assert len(readings) == 48 // 2 - 2
    assert result["angles"] == [[r["step"], r["angle"]] for r in readings]
    assert all(r["test_loss"] > 0 for r in result["curve"])
    assert all(0 < r["angle"] < 180 and r["lr"] == [0.05] for r in readings)


def test_a_finished_run_is_read_and_another_one_refused(blobs, tmp_path):
    task = blobs(Blobs())
    spec = RunSpec("blobs", "constant", epochs=2)
    first = train(spec, tmp_path)
    calls = task.calls
    assert train(spec, tmp_path) == first
    assert task.calls == calls == 24
    with pytest.raises(ValueError, match=r"holds another run: bf16 \(expected True, found False\)"):
        train(RunSpec("blobs", "constant", epochs=2, bf16=True), tmp_path)
    assert RunSpec("blobs", "constant", lr=0.1).folder(tmp_path) != spec.folder(tmp_path)


def test_a_run_of_another_recipe_is_refused(blobs, tmp_path):
    """Finished or not: it would be served, or resumed, under the settings of before."""
    task = blobs(Blobs())
    spec = RunSpec("blobs", "step", epochs=2)
    train(spec, tmp_path)
    task.recipe = replace(task.recipe, weight_decay=2e-3)
    message = r"holds another run: the recipe's weight_decay \(expected 0\.002, found 0\.001\)"
    with pytest.raises(ValueError, match=message):
        train(spec, tmp_path)
    (spec.folder(tmp_path) / RESULT).unlink()
    with pytest.raises(ValueError, match=message):
        train(spec, tmp_path)
    task.recipe = Recipe(
        "sgd", 0.05, (0.02,), 4, weight_decay=1e-3, settings={"step": {"milestones": (0.5,)}}
    )
    with pytest.raises(ValueError, match=r"the recipe's schedule \(expected .*\[0\.5\]"):
        train(spec, tmp_path)
    # What the run itself sets may change in the recipe, and so may what only searches use.
    task.recipe = Recipe("sgd", 0.05, (0.1,), epochs=9, weight_decay=1e-3)
    train(spec, tmp_path)


def test_runs_by_epochs_have_three_meters(blobs, tmp_path):
    """Of the means of epochs, of their ends, and of the recipe's window; also after a kill."""
    task = blobs(Blobs(epochs=5))
    task.recipe = replace(task.recipe, window=6)
    make, models, ends = task.model, [], []
    task.model = lambda: models.append(make()) or models[-1]
    spec = RunSpec("blobs", "constant", angles="epoch")
    whole = train(
        spec,
        tmp_path / "whole",
        on_epoch=lambda *rest: ends.append(parameters_to_vector(models[-1].parameters()).detach()),
    )
    moved = [b - a for a, b in pairwise(ends)]
    angles = [
        float(torch.rad2deg(torch.acos(nn.functional.cosine_similarity(a, b, dim=0))))
        for a, b in pairwise(moved)
    ]
    assert [step for step, _ in whole["end_angles"]] == [36, 48, 60]
    # Float32 differences of parameters of size 1 that move by some 0.1.
    assert [angle for _, angle in whole["end_angles"]] == pytest.approx(angles, abs=0.05)
    assert [step for step, _ in whole["angles"]] == [36, 48, 60]
    assert whole["angles"] != whole["end_angles"]
    assert [step for step, _ in whole["window_angles"]] == list(range(18, 61, 6))
    task.calls, task.stop_at = 0, 40
    with pytest.raises(KeyboardInterrupt):
        train(spec, tmp_path / "killed")
    task.stop_at = None
    assert train(spec, tmp_path / "killed") == whole


@pytest.mark.parametrize("schedule", ["constant", "plateau", "cosine"])
def test_a_run_that_diverges_ends_and_says_so(blobs, tmp_path, schedule):
    blobs(Blobs())
    result = train(RunSpec("blobs", schedule, lr=1e30), tmp_path)
    assert result["diverged"] and result["error"] is None and result["loss"] is None
    assert len(result["curve"]) < 4


def test_seeds_decide_and_schedules_start_alike(blobs, tmp_path):
    blobs(Blobs(epochs=1))
    losses = {
        (schedule, seed): train(RunSpec("blobs", schedule, seed), tmp_path)["loss"]
        for schedule in ("constant", "epoch-autodrop")
        for seed in (0, 1)
    }
    assert losses["constant", 0] == losses["epoch-autodrop", 0] != losses["constant", 1]


def test_averaged_parameters_are_evaluated_with_their_own_statistics(blobs, tmp_path):
    needs("schedule-free")
    task = blobs(Blobs())
    spec = RunSpec("blobs", "schedule-free")
    result = train(spec, tmp_path)
    model = task.model()
    model.load_state_dict(trained(tmp_path, spec))
    assert task.scores(model.eval()).error == result["error"]
    norm = model[1]
    inputs = torch.cat([model[0](x) for x in task.inputs(torch.Generator().manual_seed(0))])
    # Mean of four batch means, in float32.
    assert torch.allclose(norm.running_mean, inputs.mean(0), atol=1e-5)


def test_bf16_autocast_changes_the_arithmetic_and_still_learns(blobs, tmp_path):
    blobs(Blobs())
    full, half = (
        train(RunSpec("blobs", "autodrop", bf16=bf16), tmp_path / str(bf16))
        for bf16 in (False, True)
    )
    assert half["loss"] != full["loss"]
    assert half["error"] < 50  # percent; chance is 50


def test_a_validation_run_is_evaluated_at_its_end_only(blobs, tmp_path):
    blobs(Blobs())
    curve = train(RunSpec("blobs", "constant", validation=True), tmp_path)["curve"]
    assert [r["error"] is not None for r in curve] == [False, False, False, True]


# ---- learning rates as literals -------------------------------------------------------------


def driver_of(schedule, epochs=10, steps=4, warmup=0, optimizer="sgd", **settings):
    needs(schedule)
    model = nn.Linear(2, 1)
    recipe = Recipe(optimizer, 0.1, (0.1,), epochs=epochs)
    changed = SCHEDULES[schedule].settings_with(settings)
    setup = Setup(model, recipe, 0.1, epochs, steps, changed, warmup_steps=warmup)
    driver: Driver = SCHEDULES[schedule].driver(setup)
    return model, driver


def rates(schedule, epochs=10, steps=4, **settings):
    """Rate of each epoch's first step, and the one after the last."""
    model, driver = driver_of(schedule, epochs, steps, **settings)
    seen = []
    for _ in range(epochs):
        seen.append(driver.lr)
        for _ in range(steps):
            driver.optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            driver.step()
        driver.end_epoch(1.0)
    driver.close()
    return [*seen, driver.lr]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.1] * 11),
        ("step", [0.1] * 3 + [0.02] * 3 + [0.004] * 2 + [0.0008] * 3),
        ("exponential", [0.1 * 0.01 ** (i / 10) for i in range(11)]),
        ("linear", [0.1 * (1 - i / 10) for i in range(11)]),
        # Half a cosine from 0.1 to 0: the values at 0, 18, 36, ... degrees.
        ("cosine", [0.1, 0.0975528, 0.0904508, 0.0793893, 0.0654508, 0.05, 0.03454915, 0.02061074]),
        # A loss that never falls: the first epoch is the best one, then patience is 1.
        ("plateau", [0.1] * 3 + [0.01] * 2 + [0.001] * 2 + [0.0001] * 2),
        # Half a cycle is one epoch; the height above a quarter of the rate halves each cycle.
        ("clr", [0.025, 0.1, 0.025, 0.0625, 0.025, 0.04375, 0.025]),
    ],
)
def test_rates(schedule, expected):
    # torch multiplies rates up step by step: errors of some 1e-16 each.
    assert rates(schedule)[: len(expected)] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def used_rates(driver, model, steps, epoch=4):
    """The rate of each step, which is what the driver says before it."""
    used = []
    handle = driver.optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: used.append(float(optimizer.param_groups[0]["lr"]))
    )
    for step in range(steps):
        said = driver.lr
        driver.optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        driver.step()
        assert said == pytest.approx(used[step], rel=1e-12)
        if step % epoch == epoch - 1:
            driver.end_epoch(1.0)
    handle.remove()
    return used


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1]),
        # After 4 steps of warm-up, 36 of decay.
        ("linear", [0.025, 0.05, 0.075, 0.1, 0.1, 0.1 * 35 / 36, 0.1 * 34 / 36]),
        ("cosine", [0.025, 0.05, 0.075, 0.1, 0.1, 0.05 * (1 + math.cos(math.pi / 36))]),
        # By epochs of 4 steps, which count from the start of the run.
        ("step", [0.025, 0.05, 0.075, 0.1] + [0.1] * 8 + [0.02] * 4),
        ("exponential", [0.025, 0.05, 0.075, 0.1] + [0.1 * 0.01**0.1] * 4),
        ("autodrop", [0.025, 0.05, 0.075, 0.1, 0.1, 0.1]),
    ],
)
def test_a_warm_up_rises_before_the_schedule_takes_over(schedule, expected):
    model, driver = driver_of(schedule, warmup=4)
    # torch multiplies rates up step by step: errors of some 1e-16 each.
    assert used_rates(driver, model, len(expected)) == pytest.approx(expected, rel=1e-9)
    driver.close()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s not in ("hd", "schedule-free")])
def test_every_schedule_can_be_warmed_up(schedule, optimizer):
    options = {"least_gap": 1, "gap_epochs": 0.25} if schedule == "tlr" else {}
    model, driver = driver_of(schedule, warmup=4, optimizer=optimizer, **options)
    rate = driver.optimizer.param_groups[0]
    used = []
    handle = driver.optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: used.append(float(rate["lr"]))
    )
    for _ in range(4):
        driver.optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        driver.step()
    handle.remove()
    assert used == pytest.approx([used[3] * (i + 1) / 4 for i in range(4)])
    assert driver.state_dict()["steps"] == driver.warmup_steps or schedule == "autodrop"
    driver.close()


def test_schedule_free_warms_up_by_itself():
    _, driver = driver_of("schedule-free", warmup=4)
    assert driver.optimizer.param_groups[0]["warmup_steps"] == 4 and driver.warmup_steps == 0


def test_hd_keeps_what_it_learns_in_a_warm_up():
    # By hand: the gradient is (1, 1, 1), directions are 1, 1.9, 2.71 in each of three coordinates,
    # and each step adds beta times the product with the direction before.
    model, driver = driver_of("hd", warmup=4, beta=0.01)
    scheduled = []
    for _ in range(4):
        driver.optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        driver.step()
        scheduled.append(driver.optimizer.param_groups[0]["lr"])
    # Sums in float32.
    assert scheduled == pytest.approx([0.1, 0.13, 0.187, 0.2683], rel=1e-6)


def test_onecycle_rises_to_the_rate_and_falls_to_nothing():
    lrs = rates("onecycle")
    assert lrs[0] == pytest.approx(0.1 / 25)
    assert max(lrs) == pytest.approx(lrs[3], rel=1e-12) == pytest.approx(0.1, rel=0.01)
    assert lrs[-1] == pytest.approx(0.1 / 25 / 1e4)


def test_the_window_lets_short_runs_reach_a_hundredth():
    # ln 0.01 / ln 0.95 is 89.8 drops of 11 windows each; rounded up, as the package does.
    assert [window_for(steps) for steps in (640, 2980, 78_200)] == [1, 4, 80]
    assert window_for is auto_window.window_for


def test_the_window_of_a_run_follows_the_rule_without_a_floor():
    def window(epochs, warmup=0, **settings):
        changed = SCHEDULES["autodrop"].settings_with(settings)
        recipe = Recipe("sgd", 0.1, (0.1,), epochs=epochs)
        return Setup(nn.Linear(2, 1), recipe, 0.1, epochs, 149, changed, warmup_steps=warmup).window

    # One window for each 11 * 89.8 steps, begun ones included: of 2,980, 1,480 and 740 steps.
    assert (window(20), window(20, warmup=1500), window(20, warmup=2240)) == (4, 2, 1)
    # 2,980 steps in (m + 1) * 89.8 windows of k: 2 at m = 20, 6 at m = 5.
    assert window(20, min_samples=20) == 2 and window(20, min_samples=5) == 6
    assert window(20, window=7) == 7


@pytest.mark.parametrize("name", SCHEDULES)
def test_settings_are_named_and_checked(name):
    schedule = SCHEDULES[name]
    assert set(schedule.search) <= set(schedule.settings)
    with pytest.raises(ValueError, match=r"settings: .* got nothing_like_it"):
        schedule.settings_with({"nothing_like_it": 1})


def test_a_meter_that_watches_sees_what_autodrop_sees(blobs, tmp_path):
    blobs(Blobs())
    spec = RunSpec("blobs", "autodrop", settings={"window": 2}, angles=2)
    train(spec, tmp_path)
    readings = read_log(spec.folder(tmp_path) / LOG).readings
    angles = [r["angle"] for r in readings]
    assert angles[::2] == angles[1::2]
    assert len(angles) == 2 * (48 // 2 - 2)


def test_results_are_plain_json(blobs, tmp_path):
    blobs(Blobs())
    result = train(RunSpec("blobs", "step", epochs=1), tmp_path)
    assert json.loads(json.dumps(result)) == result
