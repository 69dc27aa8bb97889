"""The numbers beside a rank's row: always as many on every rank, and none lost by a resume."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from launch import run
from torch import nn

from autodrop_ext import AngularVelocity, AutoDrop
from autodrop_ext.distributed import DisagreementError, PipelineStages


def walk(params: list[nn.Parameter], step: int, size: float = 1e-3) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in params:
            p.add_(torch.randn(p.shape, generator=generator), alpha=size)


def moved_after_the_choice(rank: int) -> tuple[list[float | None], float | None]:
    """The moved rank knows of the choice, the others do not know of the move."""
    p = nn.Parameter(torch.randn(400_000, generator=torch.Generator().manual_seed(0)))
    meter = AngularVelocity([p], window=2, sample="auto", tolerance=0.5)
    chosen_at = None
    for step in range(60):
        walk([p], step)
        meter.observe()
        assert meter._auto is not None
        if meter._auto.chosen is not None and chosen_at is None:
            chosen_at = step
            if rank == 1:
                p.data = p.data.clone()
    assert chosen_at is not None and chosen_at < 30
    return [reading.angle for reading in meter.history], meter.fraction


@pytest.mark.filterwarnings("ignore:AngularVelocity. the watched parameters were moved")
def test_a_rank_that_starts_over_at_the_choice_takes_the_others_along() -> None:
    first, second = run(2, moved_after_the_choice)
    assert first == second
    angles, fraction = first
    assert fraction is not None and fraction > 1 / 64  # chosen again
    assert angles[-1] is not None


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


def test_stages_with_other_numbers_of_groups_are_told() -> None:
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
