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

from autodrop_ext import AngularVelocity, AutoDrop
from autodrop_ext import meter as velocity
from autodrop_ext.distributed import DisagreementError, PipelineStages

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
    auto = AngularVelocity(named, WINDOW, sample="auto", tolerance=0.8, **options)
    found: list[Any] = []
    fractions = []
    for t in range(STEPS):
        move(model, t)
        readings = [meter.observe() for meter in (exact, auto, *meters)]
        fractions.append(auto.fraction)
        if readings[0] is not None:
            found.append(
                [
                    (
                        r.angle,
                        r.standard_error,
                        r.margin,
                        {n: p.angle for n, p in r.per_tensor.items()},
                    )
                    if r.per_tensor is not None
                    else (r.angle, r.standard_error, r.margin, {})
                    for r in readings
                    if r is not None
                ]
            )
    held = sum(meter.device_bytes for meter in meters) / SEEDS / exact.device_bytes
    return {"found": found, "fractions": fractions, "held": held}


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
        assert other["fractions"] == ranks[0]["fractions"]
    alone = watch(Walk())
    found = ranks[0]["found"]
    exact = [row[0][0] for row in found]
    assert exact == pytest.approx([row[0][0] for row in alone["found"]], abs=1e-9)
    for row, other in zip(found, alone["found"], strict=True):
        for name, angle in row[0][3].items():
            assert angle == pytest.approx(other[0][3][name], abs=1e-9)
    # The auto meter settled, on more than it began with, and lost no reading.
    assert ranks[0]["fractions"][0] == 1 / 64 < ranks[0]["fractions"][-1]
    assert all(row[1][0] is not None for row in found)
    assert all(abs(row[1][0] - row[0][0]) < 6 * 0.8 for row in found[-3:])
    late = found[4:]  # drawn by the survey
    errors = np.array([[seed[0] - row[0][0] for seed in row[2:]] for row in late])
    reported = np.array([[seed[1] for seed in row[2:]] for row in late])
    margins = np.array([[seed[2] for seed in row[2:]] for row in late])
    assert (reported > 0).all()
    # Six seeds: their mean is known to 0.41 standard errors; a bias of four times that would show.
    assert abs((errors / reported).mean()) < 4 * 0.41
    assert (np.abs(errors) <= margins).mean() > 0.8
    assert all(0.2 < rank["held"] < 0.35 for rank in ranks)


@pytest.mark.parametrize("shape", [(2,), (3,), (2, 2)], ids=["2 ranks", "3 ranks", "HSDP 2x2"])
def test_sampled_shards(shape: tuple[int, ...]) -> None:
    check(run(math.prod(shape), fsdp2, shape))


def test_sampled_replicas() -> None:
    check(run(2, replicas))


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
    decisions = [(d.group_angles, d.dropped_groups, d.lr, d.margin) for d in scheduler.history]
    return decisions, scheduler.group_drops


def move_gradient(parameter: Any, name: str, t: int) -> None:
    from torch.distributed.tensor import distribute_tensor

    change = motion(name, t)
    parameter.grad = distribute_tensor(change, parameter.device_mesh, parameter.placements)


def test_groups_of_sampled_shards_decide_alike_on_all_ranks() -> None:
    (decisions, drops), *others = run(3, with_scheduler)
    assert all(other == (decisions, drops) for other in others)
    assert min(drops) >= 1
    assert all(margin > 0 for *_, margin in decisions)


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
        [{"sample": "auto"}, {"sample": 1 / 4}],
    ],
)
def test_ranks_with_other_settings_are_told(options: list[dict[str, Any]]) -> None:
    messages = run(2, disagree, options)
    assert messages[0] == messages[1]
    assert "on all ranks, and meters with the same settings" in messages[0]


def one_rank_moves_its_parameters(rank: int) -> list[float | None]:
    model = Walk()
    named = list(model.named_parameters())
    meter = AngularVelocity(named, WINDOW, sample="auto", tolerance=0.8, per_tensor=True)
    angles = []
    for t in range(40):
        move(model, t)
        if t == 17 and rank == 1:  # in the middle of a window
            model.first.data = model.first.data.clone()
        reading = meter.observe()
        if (t + 1) % WINDOW == 0:
            angles.append(None if reading is None else reading.angle)
    assert meter.history[-1].per_tensor is not None
    return angles


def test_a_rank_that_starts_over_takes_the_others_along() -> None:
    """Rows stay of one length, although only one rank knows at first."""
    first, second = run(2, one_rank_moves_its_parameters)
    assert first == second
    assert first[7] is not None and first[8] is None
    assert None not in first[12:]


def other_survey(rank: int) -> tuple[list[Any], list[int]]:
    class Survey(velocity.Survey):
        """Of a processor that rounds another way, exaggerated."""

        def step(self) -> None:
            super().step()
            for size in self.sizes.values():
                size *= 1 + rank * np.linspace(0, 1, len(size))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(velocity, "Survey", Survey)
        model = Walk()
        named = list(model.named_parameters())
        meter, exact = AngularVelocity(named, WINDOW, sample=1 / 8), AngularVelocity(named, WINDOW)
        found: list[Any] = []
        for t in range(STEPS):
            move(model, t)
            reading, true = meter.observe(), exact.observe()
            if reading is not None and true is not None:
                found.append((reading.angle, true.angle, reading.standard_error))
    assert meter._arenas is not None and meter._arenas[0].plan.choice is not None
    return found, meter._arenas[0].plan.choice.start.tolist()


def test_replicas_may_draw_different_chunks() -> None:
    (found, chunks), (other, other_chunks) = run(2, other_survey)
    assert chunks != other_chunks
    assert found == other
    for angle, true, error in found[4:]:
        assert abs(angle - true) < 5 * error


def stages(rank: int) -> tuple[Any, str]:
    names = (("embedding", "first"), ("bias", "second"))[rank]
    model = Walk(names)
    named = list(model.named_parameters())
    group = PipelineStages(rank, 2)
    meter = AngularVelocity(named, WINDOW, sample=1 / 4, process_group=group)
    for t in range(12):
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
    for t in range(12):
        move(model, t)
        exact = meter.observe()
    assert exact is not None
    assert abs(first[0] - exact.angle) < 5 * first[1]
