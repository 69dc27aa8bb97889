"""Samples of shards: every rank draws from what it holds, and all read the same angle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launch import run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from autodrop_ext import AngularVelocity, AutoDrop, Reading
from autodrop_ext.distributed import DisagreementError, PipelineStages
from autodrop_ext.sampling import sums
from autodrop_ext.sampling.survey import Survey

SHAPES = {"embedding": (150, 300), "first": (200, 310), "bias": (310,), "second": (90, 500)}
STEPS = 30
WINDOW = 2
SEEDS = 6


class Walk(nn.Module):
    """Parameters that are moved by hand; every rank knows the whole motion."""

    def __init__(self, names: tuple[str, ...] = tuple(SHAPES)) -> None:
        super().__init__()
        for name in names:
            generator = torch.Generator().manual_seed(list(SHAPES).index(name))
            value = torch.randn(SHAPES[name], generator=generator)
            setattr(self, name, nn.Parameter(value))


def motion(name: str, t: int) -> Tensor:
    index = list(SHAPES).index(name)
    generator = torch.Generator().manual_seed(100 + index)
    drift, scale = torch.randn(2, *SHAPES[name], generator=generator).unbind()
    noise = torch.randn(SHAPES[name], generator=generator.manual_seed(1000 * t + index))
    rows = torch.exp(1.2 * scale.flatten(1)[:, :1]) if scale.ndim > 1 else 1.0
    return 1e-2 * rows * (drift + noise)


@torch.no_grad()
def move(model: nn.Module, t: int) -> None:
    for name, parameter in model.named_parameters():
        change = motion(name, t)
        if isinstance(parameter, DTensor):
            from torch.distributed.tensor import distribute_tensor

            placed = distribute_tensor(change, parameter.device_mesh, parameter.placements)
            parameter.to_local().add_(placed.to_local())
        else:
            parameter.add_(change)


def watch(model: nn.Module, **options: Any) -> dict[str, Any]:
    """Readings of an exact meter and of sampled ones with several seeds."""
    named = list(model.named_parameters())
    exact = AngularVelocity(named, WINDOW, per_tensor=True, **options)
    meters = [
        AngularVelocity(named, WINDOW, sample=1 / 4, seed=s, per_tensor=True, **options)
        for s in range(SEEDS)
    ]
    found: list[Any] = []
    undefined = []
    for t in range(STEPS):
        move(model, t)
        readings = [meter.observe() for meter in (exact, *meters)]
        if None not in readings:
            undefined.append([r.angle is None for r in readings if r is not None])
            found.append([of(r) for r in readings if r is not None])
    held = sum(meter.device_bytes for meter in meters) / SEEDS / exact.device_bytes
    return {"found": found, "undefined": undefined, "held": held}


def of(reading: Reading) -> tuple[Any, ...]:
    """What a test compares: equal where readings are, also where there is NaN."""
    parts = {n: p.angle for n, p in (reading.per_tensor or {}).items()}
    values = (reading.angle, reading.standard_error, reading.margin)
    return (*(None if v is None or math.isnan(v) else v for v in values), parts)


def fsdp2(rank: int, shape: tuple[int, ...]) -> dict[str, Any]:
    names = ("replicate", "shard")[-len(shape) :]
    model = Walk()
    fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    return watch(model)


def replicas(rank: int) -> dict[str, Any]:
    return watch(Walk())


def check(ranks: list[dict[str, Any]]) -> None:
    for other in ranks[1:]:
        # What every rank reads comes from the same numbers: equal to the bit.
        assert other["found"] == ranks[0]["found"]
        assert other["undefined"] == ranks[0]["undefined"]
    alone = watch(Walk())
    found = ranks[0]["found"]
    exact = [row[0][0] for row in found]
    assert exact == pytest.approx([row[0][0] for row in alone["found"]], abs=1e-9)
    for row, other in zip(found, alone["found"], strict=True):
        for name, angle in row[0][3].items():
            assert angle == pytest.approx(other[0][3][name], abs=1e-9)
    # All ranks survey for a window; three gather, of which the last has the first angle.
    undefined = ranks[0]["undefined"]
    assert undefined[0] == [False] + [True] * SEEDS
    assert undefined[1:] == [[False] * (1 + SEEDS)] * (STEPS // WINDOW - 3)
    late = found[1:]
    errors = np.array([[seed[0] - row[0][0] for seed in row[1:]] for row in late])
    reported = np.array([[seed[1] for seed in row[1:]] for row in late])
    margins = np.array([[seed[2] for seed in row[1:]] for row in late])
    assert (reported > 0).all()
    # Six seeds: their mean is known to 0.41 standard errors; a bias of four times that would show.
    assert abs((errors / reported).mean()) < 4 * 0.41
    assert (np.abs(errors) <= margins).mean() > 0.8
    assert all(0.2 < rank["held"] < 0.35 for rank in ranks)


@pytest.mark.parametrize("shape", [(2,), (3,), (2, 2)], ids=["2 ranks", "3 ranks", "HSDP 2x2"])
def test_sampled_shards(shape: tuple[int, ...]) -> None:
    check(run(math.prod(shape), fsdp2, shape))


def test_sampled_replicas() -> None:
    ranks = run(2, replicas)
    check(ranks)
    # Copies of the same chunks count once: errors and margins are those of one process.
    alone = watch(Walk())["found"]
    for together, single in zip(ranks[0]["found"][1:], alone[1:], strict=True):
        for ours, theirs in zip(together[1:], single[1:], strict=True):
            assert ours[:3] == pytest.approx(theirs[:3], rel=1e-9)


def with_scheduler(rank: int) -> tuple[list[Any], list[Any]]:
    model = Walk()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    named = list(model.named_parameters())
    optimizer = torch.optim.SGD([{"params": named[:2]}, {"params": named[2:]}], lr=1.0)
    scheduler = AutoDrop(
        optimizer, WINDOW, 0.5, threshold=5.0, min_samples=2, sample=1 / 4, per_group=True
    )
    for t in range(40):
        for name, parameter in named:
            move_gradient(parameter, name, t)
        optimizer.step()
        scheduler.step()
    decisions = [
        (d.group_angles, d.dropped_groups, d.lr, None if math.isnan(d.margin) else d.margin)
        for d in scheduler.history
    ]
    return decisions, scheduler.group_drops


def move_gradient(parameter: Any, name: str, t: int) -> None:
    from torch.distributed.tensor import distribute_tensor

    change = motion(name, t)
    parameter.grad = distribute_tensor(change, parameter.device_mesh, parameter.placements)


def test_groups_of_sampled_shards_decide_alike_on_all_ranks() -> None:
    (decisions, drops), *others = run(3, with_scheduler)
    assert all(other == (decisions, drops) for other in others)
    assert min(drops) >= 1
    # The first decision is from the window after the survey, without an angle.
    assert all(margin > 0 for *_, margin in decisions[1:])


def disagree(rank: int, options: list[dict[str, Any]]) -> str:
    model = Walk()
    meter = AngularVelocity(list(model.named_parameters()), WINDOW, **options[rank])
    try:
        for t in range(6):
            move(model, t)
            meter.observe()
    except DisagreementError as error:
        return str(error)
    return "fine"


@pytest.mark.parametrize(
    "options",
    [
        [{"sample": 1 / 4}, {"sample": 1 / 8}],
        [{"sample": 1 / 4}, {"sample": 1 / 4, "seed": 1}],
        [{"sample": 1 / 4}, {}],
        [{"per_tensor": True}, {}],
    ],
)
def test_ranks_with_other_settings_disagree(options: list[dict[str, Any]]) -> None:
    messages = run(2, disagree, options)
    assert messages[0] == messages[1]
    name = next(n for n in ("seed", "sample", "per_tensor") if n in (options[0] | options[1]))
    assert messages[0].startswith(f"{name}: expected the same on all ranks, got ")


def one_rank_moves_its_parameters(rank: int, at: int) -> tuple[list[Any], list[Any]]:
    """Angles at each window's end, and digests of the chunks that are read then."""
    model = Walk()
    named = list(model.named_parameters())
    meter = AngularVelocity(named, WINDOW, sample=1 / 4, per_tensor=True)
    angles, drawn = [], []
    for t in range(40):
        move(model, t)
        if t == at and rank == 1:
            model.first.data = model.first.data.clone()
        reading = meter.observe()
        if (t + 1) % WINDOW == 0:
            angles.append(None if reading is None else reading.angle)
            drawn.append(meter.state_dict()["sample"]["drawn"])
    assert meter.history[-1].per_tensor is not None
    return angles, drawn


@pytest.mark.parametrize("at", [17, 18], ids=["inside of a window", "at its beginning"])
def test_a_rank_whose_parameters_changed_surveys_again_while_the_others_wait(at: int) -> None:
    """Rows stay of one length, although only one rank knows at first."""
    (first, kept), (second, drawn) = run(2, one_rank_moves_its_parameters, at)
    assert first == second
    changed = at // WINDOW  # the window in which it happens
    assert None not in first[3:changed]
    # The window of the change, that of the survey if it is another, and two that gather.
    again = changed + 1 if at % WINDOW else changed
    lost = [angle is None for angle in first[changed:]]
    assert lost == [True] * (again - changed + 3) + [False] * (len(lost) - (again - changed) - 3)
    # The other rank goes on with what it reads; this one draws by the new survey.
    assert kept[-1] == kept[changed - 1] == drawn[changed - 1] != drawn[-1]


def one_rank_loads_a_survey(rank: int) -> tuple[list[Any], list[bool]]:
    """Rank 1 resumes after its survey, rank 0 has a state from inside of it."""
    model = Walk()
    named = list(model.named_parameters())
    meter = AngularVelocity(named, WINDOW, sample=1 / 4)
    states = []
    for t in range(2 * WINDOW):
        move(model, t)
        meter.observe()
        states.append(meter.state_dict())
    other = AngularVelocity(named, WINDOW, sample=1 / 4)
    state = states[-1] if rank == 1 else {**states[-1], "sample": states[0]["sample"]}
    state = state if rank == 1 else {**state, "arenas": {}}
    other.load_state_dict(state)
    angles, surveying = [], []
    for t in range(2 * WINDOW, 12 * WINDOW):
        move(model, t)
        reading = other.observe()
        if (t + 1) % WINDOW == 0:
            angles.append(None if reading is None else reading.angle)
            surveying.append(not other.state_dict()["sample"]["sized"])
    return angles, surveying


def test_a_rank_that_surveys_longer_is_waited_for() -> None:
    (first, long), (second, short) = run(2, one_rank_loads_a_survey)
    assert first == second
    assert any(long) and not any(short)
    waiting = long.index(False)  # from this window on both read
    assert [angle is None for angle in first] == [True] * (waiting + 2) + [False] * (8 - waiting)


class OtherProcessor(Survey):
    """Rounds another way on rank 1, exaggerated."""

    def step(self) -> None:
        super().step()
        for moved in self.motion.values():
            moved *= 1 + dist.get_rank() * np.linspace(0, 1, len(moved))


def other_survey(rank: int) -> tuple[list[Any], list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "Survey", OtherProcessor)
        model = Walk()
        named = list(model.named_parameters())
        meter, exact = AngularVelocity(named, WINDOW, sample=1 / 4), AngularVelocity(named, WINDOW)
        found: list[Any] = []
        for t in range(STEPS):
            move(model, t)
            reading, true = meter.observe(), exact.observe()
            if reading is not None and true is not None and reading.angle is not None:
                found.append((reading.angle, true.angle, reading.standard_error))
    return found, meter.state_dict()["sample"]["drawn"]


def test_replicas_may_draw_different_chunks() -> None:
    """They are not compared with each other then, and the angle is the mean of both."""
    (found, chunks), (other, other_chunks) = run(2, other_survey)
    assert chunks != other_chunks
    assert found == other
    assert len(found) > 8
    for angle, true, error in found:
        assert abs(angle - true) < 5 * error


# Stages do not know each other's sizes, so that every survey takes eight windows; three follow.
STAGE_STEPS = 12 * WINDOW


def stages(rank: int) -> tuple[Any, str]:
    names = (("embedding", "first"), ("bias", "second"))[rank]
    model = Walk(names)
    named = list(model.named_parameters())
    group = PipelineStages(rank, 2)
    meter = AngularVelocity(named, WINDOW, sample=1 / 4, process_group=group)
    for t in range(STAGE_STEPS):
        move(model, t)
        reading = meter.observe()
    assert reading is not None
    refused = AngularVelocity(named, WINDOW, per_tensor=True, process_group=group)
    with pytest.raises(ValueError, match="per_tensor: expected a model that is not cut") as error:
        refused.observe()
    return (reading.angle, reading.standard_error), str(error.value)


def test_pipeline_stages_can_be_sampled_but_not_read_tensor_by_tensor() -> None:
    (first, message), (second, _) = run(2, stages)
    assert first == second
    assert "got 2 stages" in message
    model = Walk()
    meter = AngularVelocity(list(model.named_parameters()), WINDOW)
    for t in range(STAGE_STEPS):
        move(model, t)
        exact = meter.observe()
    assert exact is not None
    assert abs(first[0] - exact.angle) < 5 * first[1]
