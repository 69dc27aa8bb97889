"""The numbers next to a rank's row: as many on every rank, and none lost by a resume."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from driven import WINDOW, Driven, optimizer_of
from launch import run
from torch import nn

from autodrop_ext import AngularVelocity, AutoDrop
from autodrop_ext.distributed import DisagreementError, PipelineStages


def walk(params: list[nn.Parameter], step: int, size: float = 1e-3) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in params:
            p.add_(torch.randn(p.shape, generator=generator), alpha=size)


def moved_at(rank: int, at: int) -> tuple[list[float | None], list[float | None]]:
    """Rank 1 surveys again from a step on, and sends no numbers meanwhile; rank 0 has some."""
    p = nn.Parameter(torch.randn(400_000, generator=torch.Generator().manual_seed(0)))
    meter = AngularVelocity([p], window=2, sample=1 / 16)
    for step in range(40):
        walk([p], step)
        if step == at and rank == 1:
            p.data = p.data.clone()
        meter.observe()
    return (
        [reading.angle for reading in meter.history],
        [None if math.isnan(r.margin) else r.margin for r in meter.history],
    )


@pytest.mark.filterwarnings("ignore:AngularVelocity. the watched parameters were moved")
@pytest.mark.parametrize("at", [1, 2, 3, 6, 7, 20])
def test_a_rank_that_starts_over_takes_the_others_along(at: int) -> None:
    """In the survey, at the draw, while the sample gathers, and later."""
    first, second = run(2, moved_at, at)
    assert first == second
    angles, margins = first
    assert angles[-1] is not None and margins[-1] is not None and margins[-1] > 0
    assert [a is None for a in angles] == [m is None for m in margins]


def groups_of_stages(rank: int) -> str:
    params = [nn.Parameter(torch.ones(40)) for _ in range(2 + rank)]
    groups = [{"params": [p]} for p in params]
    stage = PipelineStages(rank, 2)
    meter = AngularVelocity(groups, window=2, per_group=True, process_group=stage)
    try:
        for step in range(6):
            walk(params, step)
            meter.observe()
    except DisagreementError as error:
        return str(error)
    return "fine"


def test_stages_with_other_numbers_of_groups_disagree() -> None:
    first, second = run(2, groups_of_stages)
    assert first == second
    assert "with per_group=True as many param groups on all ranks" in first


def train(scheduler: AutoDrop, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        scheduler.optimizer.step()
        scheduler.step()


def resumed(rank: int) -> list[list[Any]]:
    def make() -> tuple[list[nn.Parameter], torch.optim.Optimizer, AutoDrop]:
        params = [nn.Parameter(torch.full((4000,), float(j))) for j in (1, 2)]
        optimizer = torch.optim.SGD([{"params": [p]} for p in params], lr=1e-3)
        return params, optimizer, AutoDrop(optimizer, window=2, per_group=True)

    params, optimizer, scheduler = make()
    train(scheduler, params, range(20))
    state, of_optimizer = scheduler.state_dict(), optimizer.state_dict()
    values = [p.detach().clone() for p in params]
    train(scheduler, params, range(20, 60))

    again, optimizer, other = make()
    optimizer.load_state_dict(of_optimizer)
    other.load_state_dict(state)
    with torch.no_grad():
        for p, value in zip(again, values, strict=True):
            p.copy_(value)
    train(other, again, range(20, 60))
    return [
        [(d.window, d.group_angles, d.dropped_groups) for d in s.history]
        for s in (scheduler, other)
    ]


def test_groups_decide_the_same_after_a_resume() -> None:
    for whole, stopped in run(2, resumed):
        assert stopped == whole
        assert all(angles for _, angles, _ in whole)
        assert any(groups for *_, groups in whole)


def infinite_on_one_rank(rank: int) -> list[float | None]:
    p = nn.Parameter(torch.ones(64, 3000))
    meter = AngularVelocity([p], window=2, sample=1 / 4)
    for step in range(12):
        walk([p], step)
        if step == 5 and rank == 1:
            p.data[:] = torch.inf
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "AngularVelocity: ")
            meter.observe()
    return [reading.angle for reading in meter.history]


def test_arithmetic_of_a_sample_warns_of_nothing_before_the_collective() -> None:
    """A warning that is an error would leave the other ranks waiting."""
    first, second = run(2, infinite_on_one_rank)
    assert first == second
    assert first[-1] is None


def norms_of_parts(rank: int) -> tuple[dict[str, float], float]:
    """The length of each parameter's displacement, and that of all of them."""
    model = Driven()
    reduced = model if rank < 0 else nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_of(reduced)
    meter = AngularVelocity(list(model.named_parameters()), WINDOW, per_tensor=True)
    for t in range(3 * WINDOW):
        reduced(t).backward()
        optimizer.step()
        optimizer.zero_grad()
        meter.observe()
    reading = meter.history[-1]
    assert reading.per_tensor is not None
    return {name: part.norm for name, part in reading.per_tensor.items()}, reading.norm


def test_parts_of_copies_are_as_long_as_those_of_one_process() -> None:
    """Each rank counts its copy by half."""
    alone, total = norms_of_parts(-1)
    assert sum(norm**2 for norm in alone.values()) == pytest.approx(total**2, rel=1e-12)
    for parts, norm in run(2, norms_of_parts):
        assert norm == pytest.approx(total, rel=1e-12)
        assert parts == pytest.approx(alone, rel=1e-12)
