"""Readings of single tensors and param groups, and param groups that drop on their own."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autodrop_ext import AngularVelocity, AutoDrop, Decision, JsonLinesLog, Reading, read_log
from autodrop_ext.reading import PARTS_KEPT, PartReading, remember

SHAPES = {"first": (40, 70), "bias": (40,), "second": (200, 90), "one": (1,)}
SETTINGS: dict[str, Any] = {"factor": 0.5, "threshold": 0.5, "buffer_size": 3, "min_samples": 2}


class Moved(torch.optim.Optimizer):
    """Moves each parameter by a drift that turns and fades at its own speed, and by noise."""

    def __init__(self, groups: list[dict[str, Any]], seed: int = 0) -> None:
        super().__init__(groups, {"lr": 0.1})
        self.generators = {
            p: torch.Generator().manual_seed(100 * seed + i)
            for i, p in enumerate(p for g in self.param_groups for p in g["params"])
        }
        self.drifts = {p: torch.randn(p.shape, generator=g) for p, g in self.generators.items()}
        self.t = 0

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        self.t += 1
        for g, group in enumerate(self.param_groups):
            fade = math.exp(-self.t / (60 if g == 0 else 200))
            for p in group["params"]:
                noise = torch.randn(p.shape, generator=self.generators[p])
                p += 0.01 * group["lr"] * (fade * self.drifts[p] + 0.3 * noise)


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()}


def groups_of(named: dict[str, nn.Parameter], *, of: int | None = None) -> list[dict[str, Any]]:
    """``first`` and ``bias`` are group 0, ``second`` and ``one`` are group 1."""
    pairs = list(named.items())
    groups = [{"params": pairs[:2]}, {"params": pairs[2:]}]
    return groups if of is None else [groups[of]]


def test_angles_of_tensors_are_those_of_separate_meters() -> None:
    named = parameters()
    optimizer = Moved(groups_of(named))
    together = AngularVelocity(optimizer, 3, per_tensor=True)
    alone = {n: AngularVelocity([(n, p)], 3) for n, p in named.items()}
    pairs = [groups_of(named, of=g)[0]["params"] for g in range(2)]
    of_group = [AngularVelocity(p, 3) for p in pairs]
    count = 0
    for _ in range(30):
        optimizer.step()
        reading = together.observe()
        separate = {n: meter.observe() for n, meter in alone.items()}
        grouped = [meter.observe() for meter in of_group]
        if reading is None:
            continue
        count += 1
        assert reading.per_tensor is not None and reading.per_group is not None
        assert list(reading.per_tensor) == list(SHAPES)
        parts = [*reading.per_tensor.values(), *reading.per_group]
        for part, wanted in zip(parts, [*separate.values(), *grouped], strict=True):
            assert wanted is not None
            assert part.angle == pytest.approx(wanted.angle, abs=1e-9)
            assert part.norm == pytest.approx(wanted.norm, rel=1e-12)  # sums in another order
            assert part.standard_error == 0.0
        # Of a single number: the last bit of the cosine is 1.2e-6 degrees.
        assert abs(90 - (reading.per_tensor["one"].angle or 0)) == pytest.approx(90, abs=2e-6)
    assert count == 8


def test_readings_without_parts_have_none() -> None:
    optimizer = Moved(groups_of(parameters()))
    plain, grouped = AngularVelocity(optimizer, 2), AngularVelocity(optimizer, 2, per_group=True)
    for _ in range(6):
        optimizer.step()
        reading, other = plain.observe(), grouped.observe()
    assert reading is not None and reading.per_tensor is None and reading.per_group is None
    assert other is not None and other.per_tensor is None and len(other.per_group or ()) == 2
    # Float64 sums in another order.
    assert reading.angle == pytest.approx(other.angle, abs=1e-9)
    assert reading.norm == pytest.approx(other.norm, rel=1e-12)
    assert "per_tensor" not in reading.as_dict()


def sparse_and_dense() -> tuple[torch.optim.Optimizer, Any]:
    """A group with an embedding of which two rows move in a step, and one that moves as a whole."""
    generator = torch.Generator().manual_seed(0)
    embedding = nn.Parameter(torch.randn(6_400, 64, generator=generator))
    dense = nn.Parameter(torch.randn(400, 1024, generator=generator))
    optimizer = torch.optim.SGD(
        [{"params": [("embedding", embedding)]}, {"params": [("dense", dense)]}], lr=1.0
    )
    drift = torch.randn(dense.shape, generator=generator)

    def step() -> None:
        embedding.grad = torch.zeros_like(embedding)
        embedding.grad[torch.randperm(6_400, generator=generator)[:2]] = 0.01
        dense.grad = 0.1 * (drift + torch.randn(drift.shape, generator=generator))
        optimizer.step()

    return optimizer, step


def test_a_group_with_few_moving_rows_has_an_angle() -> None:
    """Every row is read, so that its angle is that of float64 and it decides like the others."""
    optimizer, step = sparse_and_dense()
    parameters = [g["params"] for g in optimizer.param_groups]
    meter = AngularVelocity(optimizer, 2, per_group=True, buckets=4096)
    exact = [AngularVelocity(p, 2, buckets=None) for p in parameters]
    seen = 0
    for _ in range(20):
        step()
        reading, wanted = meter.observe(), [one.observe() for one in exact]
        if reading is None:
            continue
        assert reading.per_group is not None
        for part, one in zip(reading.per_group, wanted, strict=True):
            assert part.angle is not None and one is not None and one.angle is not None
            assert part.standard_error > 0.3
            # Rows of 64 meet as a whole: the error has a kurtosis of 6 (60 windows of 6 hashes).
            assert abs(part.angle - one.angle) < 6 * part.standard_error
        seen += 1
    assert seen == 8


@pytest.mark.parametrize("buckets", [2**18, None])
def test_groups_that_decide_for_themselves_equal_separate_schedulers(
    buckets: int | None,
) -> None:
    steps, window = 240, 3
    named = parameters()
    optimizer = Moved(groups_of(named))
    together = AutoDrop(optimizer, window, per_group=True, buckets=buckets, **SETTINGS)
    for _ in range(steps):
        optimizer.step()
        together.step()

    drops = []
    for g in range(2):
        again = parameters()
        other = Moved(groups_of(again))  # both groups move, one is watched and dropped
        other.param_groups[1 - g]["lr"] = 0.0
        mine = list(groups_of(again, of=g)[0]["params"])
        watched = AutoDrop(other, window, params=mine, buckets=buckets, **SETTINGS)
        for _ in range(steps):
            other.step()
            watched.step()
        rates = [decision.lr[g] for decision in watched.history]
        assert [decision.lr[g] for decision in together.history] == rates
        assert together.group_drops[g] == watched.num_drops
        angles = [decision.group_angles[g] for decision in together.history]
        # Exact angles are float64 sums in another order.
        assert angles == pytest.approx([d.angle for d in watched.history], abs=1e-9)
        drops.append(watched.num_drops)
    assert min(drops) >= 3 and drops[0] != drops[1]
    dropped = [g for decision in together.history for g in decision.dropped_groups]
    assert [dropped.count(g) for g in range(2)] == drops
    assert together.num_drops == sum(decision.dropped for decision in together.history)
    metrics = together.get_metrics()
    assert metrics["num_drops/1"] == drops[1] and "angular_velocity/0" in metrics
    assert together._get_closed_form_lr() == pytest.approx([0.1 * 0.5**n for n in drops], rel=1e-12)


def test_min_lr_holds_for_each_group() -> None:
    optimizer = Moved(groups_of(parameters()))
    scheduler = AutoDrop(optimizer, 2, per_group=True, min_lr=[0.05, 0.0], **SETTINGS)
    for _ in range(300):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert optimizer.param_groups[1]["lr"] < 0.05
    assert scheduler.group_drops[0] == 1


def test_groups_resume_bit_exactly(tmp_path: pathlib.Path) -> None:
    def make() -> tuple[Moved, AutoDrop]:
        optimizer = Moved(groups_of(parameters()))
        return optimizer, AutoDrop(optimizer, 3, per_group=True, per_tensor=True, **SETTINGS)

    def go(optimizer: Moved, scheduler: AutoDrop, steps: int) -> None:
        for _ in range(steps):
            optimizer.step()
            scheduler.step()

    optimizer, scheduler = make()
    go(optimizer, scheduler, 100)
    torch.save(scheduler.state_dict(), tmp_path / "state.pt")
    other, again = make()
    go(other, AutoDrop(other, 3, per_group=True, **SETTINGS), 0)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad():
        pairs = zip(optimizer.param_groups, other.param_groups, strict=True)
        for mine, theirs in pairs:
            theirs["lr"] = mine["lr"]
            for p, q in zip(mine["params"], theirs["params"], strict=True):
                q.copy_(p)
                other.generators[q].set_state(optimizer.generators[p].get_state())
    other.t = optimizer.t
    go(optimizer, scheduler, 80)
    go(other, again, 80)
    assert again.group_drops == scheduler.group_drops and sum(again.group_drops) > 2
    assert again.history[-20:] == scheduler.history[-20:]
    saved = scheduler.state_dict()["history"]
    assert "per_tensor" not in saved and len(saved["group_angles"]) == len(scheduler.history)


def test_states_from_before_groups_could_decide_are_loaded() -> None:
    optimizer = Moved(groups_of(parameters()))
    scheduler = AutoDrop(optimizer, 3, **SETTINGS)
    for _ in range(40):
        optimizer.step()
        scheduler.step()
    state = scheduler.state_dict()
    del state["groups"], state["per_group"]
    for column in ("dropped_groups", "group_angles", "group_smoothed", "group_rises"):
        del state["history"][column]
    again = AutoDrop(Moved(groups_of(parameters())), 3, **SETTINGS)
    again.load_state_dict(state)
    assert again.num_drops == scheduler.num_drops
    assert [d.angle for d in again.history] == [d.angle for d in scheduler.history]


def test_added_groups_get_a_detector() -> None:
    named = parameters()
    optimizer = Moved(groups_of(named, of=0))
    scheduler = AutoDrop(optimizer, 2, per_group=True, **SETTINGS)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    assert len(scheduler.history[-1].group_angles) == 1
    new = [p for _, p in groups_of(named, of=1)[0]["params"]]
    for i, p in enumerate(new):
        optimizer.generators[p] = torch.Generator().manual_seed(50 + i)
        optimizer.drifts[p] = torch.randn(p.shape, generator=optimizer.generators[p])
    optimizer.add_param_group({"params": [("second", new[0]), ("one", new[1])]})
    with pytest.warns(RuntimeWarning, match="were replaced, added"):
        for _ in range(40):
            optimizer.step()
            scheduler.step()
    assert len(scheduler.history[-1].group_angles) == 2
    assert len(scheduler.group_drops) == 2


def test_given_parameters_must_come_in_the_optimizers_groups() -> None:
    named = parameters()
    optimizer = Moved(groups_of(named))
    flat: list[Tensor] = list(named.values())
    with pytest.raises(ValueError, match=r"params: expected 2 param groups .* got 1"):
        AutoDrop(optimizer, 2, per_group=True, params=flat)
    masters = [
        {"params": [p.detach().clone() for p in g["params"]]} for g in optimizer.param_groups
    ]
    scheduler = AutoDrop(optimizer, 1, per_group=True, params=masters)
    for step in range(4):
        optimizer.step()
        for group in masters:
            for master in group["params"]:
                master += 0.01 * torch.randn(master.shape) + step
        scheduler.step()
    assert None not in scheduler.history[-1].group_angles


def test_parts_fit_the_log(tmp_path: pathlib.Path) -> None:
    optimizer = Moved(groups_of(parameters()))
    log = JsonLinesLog(tmp_path / "run.jsonl")
    scheduler = AutoDrop(optimizer, 2, per_group=True, per_tensor=True, on_reading=log, **SETTINGS)
    for _ in range(30):
        optimizer.step()
        scheduler.step()
    readings = read_log(tmp_path / "run.jsonl").readings
    last = scheduler.history[-1]
    assert last.per_tensor is not None
    assert readings[-1] == json.loads(json.dumps({"event": "reading", **last.as_dict()}))
    assert readings[-1]["per_tensor"]["second"]["angle"] == last.per_tensor["second"].angle
    assert readings[-1]["group_angles"] == list(last.group_angles)
    assert readings[-1]["standard_error"] == last.standard_error == 0.0


def test_histories_keep_parts_of_the_last_readings_only() -> None:
    part = PartReading(1.0, 1.0, 1.0, 1.0)
    history: list[Decision] = []
    for i in range(PARTS_KEPT + 50):
        remember(
            history,
            Decision(i, i, 1.0, 1.0, 1.0, 1.0, per_tensor={"w": part}, per_group=(part,)),
            bound=PARTS_KEPT + 20,
        )
    assert [d.step for d in history] == list(range(30, PARTS_KEPT + 50))
    assert [d.per_tensor is None for d in history] == [True] * 20 + [False] * PARTS_KEPT
    assert [d.per_group is None for d in history] == [True] * 20 + [False] * PARTS_KEPT


def test_undefined_parts_are_plain_in_a_log() -> None:
    part = PartReading(None, None, math.nan, 0.0, math.nan)
    reading = Reading(1, 1, None, None, math.nan, 0.0, per_tensor={"w": part})
    plain = reading.as_dict()
    nothing = {"angle": None, "cosine": None, "norm": None, "previous_norm": 0.0}
    assert plain["per_tensor"] == {"w": {**nothing, "standard_error": None}}
    assert np.isfinite([v for v in plain.values() if isinstance(v, float)]).all()
