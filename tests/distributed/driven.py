"""A model whose gradients are given, so that every engine moves it alike, to the bit.

The loss is ``sum(c * p)``: the gradient of a parameter is ``c``, whatever the parameters are. ``c``
holds multiples of 1/256 below 2^10 and rates are powers of two, so that averages over ranks are
exact and parameters do not depend on how they are cut.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from autodrop_ext import AngularVelocity, AutoDrop
from autodrop_ext.agreement import Row
from autodrop_ext.ranks import Ranks
from autodrop_ext.schedulers.base import as_floats

WINDOW = 4
STEPS = 60
SETTINGS: dict[str, Any] = {
    "window": WINDOW,
    "factor": 0.5,
    "threshold": 3.0,
    "buffer_size": 3,
    "min_samples": 2,
}

SHAPES: dict[str, tuple[int, ...]] = {
    "embedding": (131, 32),
    "first": (32, 17),
    "bias": (17,),
    "second": (17, 5),
    "scale": (1,),
}
NUM_ELEMENTS = sum(math.prod(shape) for shape in SHAPES.values())
BUCKETS = 4096  # fewer than there are elements, so that they are hashed


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

    def _remembered(self, ranks: Ranks, row: Row) -> list[Row]:
        self.elements = row.elements
        return self._gather(ranks, row)


sent = Sent()


class Seen(NamedTuple):
    """What a rank saw: every reading with the decision, and the elements that it counted last.

    ``tables`` are mean and displacement of the last window by the kind of the table, ``others`` the
    cosines of meters with other tables than the scheduler's.
    """

    steps: list[int]
    cosines: list[float | None]
    norms: list[float]
    lrs: list[tuple[float, ...]]
    drops: int
    elements: float
    tables: dict[str, np.ndarray]
    others: dict[str, list[float | None]]


def optimizer_of(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=2.0**-5)


class Observers:
    """Meters of the same parameters with hashed tables, and with tables of a rank's own."""

    def __init__(self, scheduler: AutoDrop, process_group: Any = None) -> None:
        self.meters = {
            name: AngularVelocity(
                scheduler.optimizer, WINDOW, buckets=buckets, process_group=process_group
            )
            for name, buckets in (("hashed", BUCKETS), ("own", None))
        }
        self.scheduler = scheduler

    def observe(self) -> None:
        for meter in self.meters.values():
            meter.observe()

    def seen(self) -> Seen:
        return seen(self.scheduler)._replace(
            tables={
                "the scheduler's": tables_of(self.scheduler.meter),
                "hashed": tables_of(self.meters["hashed"]),
            },
            others={n: [r.cosine for r in m.history] for n, m in self.meters.items()},
        )


def tables_of(meter: AngularVelocity) -> np.ndarray:
    """Mean and displacement of the last window, one after the other; empty if ranks keep theirs."""
    tables = meter.state_dict()["tables"]
    if tables["mean"] is None:
        return np.zeros(0)
    return torch.cat([tables["mean"], tables["displacement"]]).numpy()


def train(model: Any, optimizer: Any, scheduler: AutoDrop, steps: int = STEPS) -> Seen:
    """Train by gradients, the way engines that are modules want it."""
    observers = Observers(scheduler)
    for t in range(steps):
        model(t).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        observers.observe()
    return observers.seen()


def seen(scheduler: AutoDrop) -> Seen:
    history = scheduler.history
    return Seen(
        [d.step for d in history],
        [d.cosine for d in history],
        [d.norm for d in history],
        [tuple(as_floats(d.lr)) for d in history],
        scheduler.num_drops,
        sent.elements,
        {},
        {},
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


def assert_same_tables(ranks: list[Seen], expected: Seen) -> None:
    """Every rank has the tables of one process, and the same bits as the other ranks."""
    for rank in ranks:
        for kind, table in expected.tables.items():
            assert len(table) == 2 * (BUCKETS if kind == "hashed" else NUM_ELEMENTS)
            assert np.array_equal(rank.tables[kind], ranks[0].tables[kind])
            # Equal float32 values, added in another order in float64, with weights such as 1/3.
            difference = np.abs(rank.tables[kind] - table).max()
            assert difference <= 1e-12 * np.abs(table).max()
            print(f"{kind}: {difference / np.abs(table).max():.1e} of the largest entry")
        for kind, cosines in expected.others.items():
            assert rank.others[kind] == ranks[0].others[kind]
            pairs = zip(rank.others[kind], cosines, strict=True)
            # As above.
            assert all(a is not None and b is not None and abs(a - b) < 1e-12 for a, b in pairs)
