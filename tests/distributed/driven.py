"""A model whose gradients are given, so that every engine moves it alike, to the bit.

The loss is ``sum(c * p)``: the gradient of a parameter is ``c``, whatever the parameters are. ``c``
holds multiples of 1/256 below 2^10 and rates are powers of two, so that averages over ranks are
exact and parameters do not depend on how they are cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from autodrop_ext import AutoDrop
from autodrop_ext.distributed.agreement import Row
from autodrop_ext.distributed.group import Ranks
from autodrop_ext.schedulers.base import as_floats

WINDOW = 4
STEPS = 60
SETTINGS: dict[str, Any] = {
    "window": WINDOW,
    "factor": 0.5,
    "threshold": 0.5,
    "buffer_size": 3,
    "min_samples": 2,
}

SHAPES: dict[str, tuple[int, ...]] = {
    "embedding": (13, 8),
    "first": (8, 17),
    "bias": (17,),
    "second": (17, 5),
    "scale": (1,),
}
NUM_ELEMENTS = sum(math.prod(shape) for shape in SHAPES.values())


class Driven(nn.Module):
    """Parameters of odd sizes; ``forward(t)`` is a loss with known gradients."""

    def __init__(self, names: tuple[str, ...] = tuple(SHAPES)) -> None:
        super().__init__()
        self.names = names
        for name in names:
            setattr(self, name, nn.Parameter(start(name)))

    def forward(self, t: int) -> Tensor:
        return torch.stack(
            [_term(drive(name, t), getattr(self, name)) for name in self.names]
        ).sum()


def _term(gradient: Tensor, parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        return (gradient * parameter).sum().full_tensor()
    return (gradient * parameter).sum()


def start(name: str) -> Tensor:
    """Initial value of a parameter."""
    generator = torch.Generator().manual_seed(list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator)


def drive(name: str, t: int) -> Tensor:
    """Gradient of a parameter at step ``t``: a direction that turns slowly, and noise."""
    index = list(SHAPES).index(name)
    generator = torch.Generator().manual_seed(100 + index)
    ahead, aside = torch.randn(2, *SHAPES[name], generator=generator).unbind()
    noise = torch.randn(SHAPES[name], generator=generator.manual_seed(1000 * t + index))
    turned = ahead * math.cos(t / 9) + aside * math.sin(t / 9) + noise * (t / 20)
    return (turned * 64).round() / 256


class Sent:
    """Remembers the newest row that this rank has sent to the others."""

    def __init__(self) -> None:
        self.elements = math.nan
        self._gather = Ranks.gather
        Ranks.gather = lambda ranks, row: self._remembered(ranks, row)  # type: ignore[method-assign]

    def _remembered(self, ranks: Ranks, row: Sequence[float]) -> list[list[float]]:
        # Settings are compared as text before the first row; at a window's end rows come last.
        if len(row) >= len(Row._fields):
            self.elements = Row(*row[: len(Row._fields)]).elements
        return self._gather(ranks, row)


sent = Sent()


class Seen(NamedTuple):
    """What a rank saw: every reading with the decision, and the elements that it counted last."""

    steps: list[int]
    cosines: list[float | None]
    norms: list[float]
    lrs: list[tuple[float, ...]]
    drops: int
    elements: float


def optimizer_of(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=2.0**-5)


def train(model: Any, optimizer: Any, scheduler: AutoDrop, steps: int = STEPS) -> Seen:
    """Train by gradients, the way engines that are modules want it."""
    for t in range(steps):
        model(t).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return seen(scheduler)


def seen(scheduler: AutoDrop) -> Seen:
    history = scheduler.history
    return Seen(
        [d.step for d in history],
        [d.cosine for d in history],
        [d.norm for d in history],
        [tuple(as_floats(d.lr)) for d in history],
        scheduler.num_drops,
        sent.elements,
    )


def alone(steps: int = STEPS, **settings: Any) -> Seen:
    """The same training in one process, without ``torch.distributed``."""
    model = Driven()
    optimizer = optimizer_of(model)
    return train(model, optimizer, AutoDrop(optimizer, **(SETTINGS | settings)), steps)


def assert_same(ranks: list[Seen], expected: Seen, elements: float = NUM_ELEMENTS) -> None:
    """All ranks decided like one process."""
    assert expected.drops >= 3
    for rank in ranks:
        assert rank.steps == expected.steps
        assert rank.lrs == expected.lrs  # to the bit
        assert rank.drops == expected.drops
        assert rank.cosines == ranks[0].cosines  # between ranks, to the bit
        for ours, theirs in zip(rank.cosines, expected.cosines, strict=True):
            assert (ours is None) == (theirs is None)
            # Products of equal float32 values, added in another order in float64.
            assert ours is None or theirs is None or abs(ours - theirs) < 1e-12
        for ours, theirs in zip(rank.norms, expected.norms, strict=True):
            assert math.isclose(ours, theirs, rel_tol=1e-12) or math.isnan(theirs)
    counted = sum(rank.elements for rank in ranks)
    assert math.isclose(counted, elements, rel_tol=1e-12)  # weights such as 1/3 are rounded
