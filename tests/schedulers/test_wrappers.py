"""Optimizers inside of others: whose steps count, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, SequentialLR

from autodrop_ext import AnalyticAutoDrop, AngularVelocity, AnytimeAutoDrop, AutoDrop, EpochAutoDrop

EAGER: dict[str, Any] = {"window": 2, "min_samples": 1, "buffer_size": 2, "threshold": 1e3}


def parameters(count: int = 2) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3)) for _ in range(count)]


def sgd(params: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=0.1)


def train(scheduler: Any, step: Any, params: list[Any], steps: int) -> None:
    """As a loop does; a warning would be an error."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        step()
        scheduler.step()


class Slots(Optimizer):
    """Holds its optimizer behind a property, and does not call Optimizer.__init__."""

    def __init__(self, inner: Any) -> None:
        self.held = inner

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.held.param_groups

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.held.step(closure)


class InList(Optimizer):
    """Holds one optimizer for each parameter, as offloading optimizers do."""

    def __init__(self, params: Any) -> None:
        self.parts = {p: sgd([p]) for p in params}

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for part in self.parts.values():
            part.step(closure)


class SharpnessAware(Optimizer):
    """Calls Optimizer.__init__; its second_step() steps the inner optimizer."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.base = inner
        self.param_groups = inner.param_groups

    def second_step(self) -> None:
        self.base.step()

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.base.step()
        self.second_step()


class NotAnOptimizer:
    """A wrapper that is no Optimizer."""

    def __init__(self, inner: Any) -> None:
        self.wrapped = inner
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> None:
        self.wrapped.step(closure)


class Alone(Optimizer):
    """Takes its own steps, and torch has never wrapped them."""

    def __init__(self, params: Any) -> None:
        self.param_groups = [{"params": list(params), "lr": 0.1}]
        self.state = {}  # type: ignore[assignment]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad, alpha=-0.1)


def post_local_sgd(inner: Any) -> Any:
    averagers = pytest.importorskip("torch.distributed.algorithms.model_averaging.averagers")
    wrappers = pytest.importorskip("torch.distributed.optim")
    averager = averagers.ModelAverager.__new__(averagers.PeriodicModelAverager)
    averager.average_parameters = lambda params: None
    return wrappers.PostLocalSGDOptimizer(inner, averager)


@pytest.mark.parametrize(
    "wrapped",
    [
        Slots,
        NotAnOptimizer,
        lambda inner: Slots(NotAnOptimizer(inner)),
        pytest.param(
            post_local_sgd,
            marks=pytest.mark.skipif(
                not torch.distributed.is_available(), reason="this torch has no torch.distributed"
            ),
        ),
    ],
)
@pytest.mark.parametrize("kind", [AutoDrop, AnytimeAutoDrop])
def test_the_steps_of_the_optimizer_inside_count(wrapped: Any, kind: type[Any]) -> None:
    settings = EAGER if kind is AutoDrop else {}
    runs = []
    for wrap in (wrapped, lambda inner: inner):
        params = parameters()
        optimizer = wrap(sgd(params))
        scheduler = kind(optimizer, **settings)
        train(scheduler, optimizer.step, params, 100)
        lr = optimizer.param_groups[0]["lr"]
        runs.append((scheduler.meter.steps, lr, [d.angle for d in scheduler.history]))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("wrapped", [lambda sam: sam, NotAnOptimizer, Slots])
def test_an_optimizer_that_is_stepped_twice_in_one_step_counts_once(wrapped: Any) -> None:
    params = parameters()
    wrapper = wrapped(SharpnessAware(sgd(params)))
    scheduler = AutoDrop(wrapper, **EAGER)
    train(scheduler, wrapper.step, params, 20)  # a warning of late calls would be an error
    assert scheduler.meter.steps == 20


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")  # LinearLR saw no step()
def test_a_method_of_the_wrapper_may_step_the_optimizer_inside() -> None:
    params = parameters()
    wrapper = SharpnessAware(sgd(params))
    scheduler = AutoDrop(wrapper, **EAGER)
    train(scheduler, wrapper.second_step, params, 20)
    assert scheduler.meter.steps == 20
    # The wrapper is the scheduler's optimizer, as SequentialLR demands.
    params = parameters()
    wrapper = SharpnessAware(sgd(params))
    both = [LinearLR(wrapper, 0.5, 1.0, 4), AutoDrop(wrapper, **EAGER)]
    sequence = SequentialLR(wrapper, both, [4])
    train(sequence, wrapper.second_step, params, 60)
    assert wrapper.param_groups[0]["lr"] < 0.1


def test_one_step_of_many_optimizers_counts_once() -> None:
    params = parameters(5)
    wrapper = InList(params)
    scheduler = AutoDrop(wrapper, **EAGER)
    assert scheduler.optimizer is wrapper
    train(scheduler, wrapper.step, params, 60)
    assert scheduler.meter.steps == 60
    assert [part.param_groups[0]["lr"] for part in wrapper.parts.values()] == (
        [scheduler.get_last_lr()[0]] * 5
    )
    assert scheduler.get_last_lr()[0] < 0.1


class WithErrors(SharpnessAware):
    fails = False

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if self.fails:
            raise RuntimeError("out of memory")
        return super().step(closure)


def test_a_step_after_one_that_failed_counts() -> None:
    params = parameters()
    wrapper = WithErrors(sgd(params))
    scheduler = AutoDrop(wrapper, window=1000)
    for t in range(12):
        wrapper.fails = t % 3 == 0
        for p in params:
            p.grad = torch.ones(3)
        try:
            wrapper.step()
        except RuntimeError:
            continue
        scheduler.step()
    assert scheduler.meter.steps == 8


def test_the_inner_optimizer_and_its_wrapper_are_one_for_two_schedulers() -> None:
    params = parameters()
    wrapper = SharpnessAware(sgd(params))
    first, second = AutoDrop(wrapper, **EAGER), AutoDrop(wrapper.base, **EAGER)
    with pytest.warns(RuntimeWarning, match="another scheduler of this package"):
        for _ in range(3):
            train(first, wrapper.second_step, params, 1)
            second.step()


def test_a_composite_is_measured_and_lowered_whole() -> None:
    """Its inner optimizer, for vectors, has no param group of the composite's."""

    class Composite(torch.optim.SGD):
        def __init__(self, matrices: Any, vectors: Any) -> None:
            super().__init__([{"params": matrices}, {"params": vectors}], lr=0.1)
            self.optimizer = torch.optim.AdamW(vectors, lr=0.1)

    params = parameters(4)
    composite = Composite(params[:3], params[3:])
    scheduler = AutoDrop(composite, **EAGER)
    assert scheduler.optimizer is composite
    assert len(scheduler.meter.named_parameters()) == 4
    train(scheduler, composite.step, params, 60)
    assert composite.param_groups[0]["lr"] == composite.param_groups[1]["lr"] < 0.1


@pytest.mark.parametrize("length", [1, 2, 3])
def test_optimizers_that_refer_to_each_other_are_no_loop(length: int) -> None:
    params = parameters()
    ring: list[Any] = [sgd(params) for _ in range(length)]
    for one, other in zip(ring, [*ring[1:], ring[0]], strict=True):
        one.optimizer = other
        one.param_groups = ring[0].param_groups
    scheduler = AutoDrop(ring[0], **EAGER)
    assert scheduler.optimizer is ring[0]
    train(scheduler, ring[0].step, params, 5)
    assert scheduler.meter.steps == 5


@pytest.mark.parametrize("kind", [AutoDrop, AnytimeAutoDrop, EpochAutoDrop, AnalyticAutoDrop])
@pytest.mark.parametrize(
    "optimizer",
    [
        Alone(parameters()),
        NotAnOptimizer(Alone(parameters())),
        type("SGD", (), {"param_groups": [{"params": parameters(), "lr": 0.1}], "step": None})(),
    ],
    ids=["not initialised", "wrapped", "of another library"],
)
def test_what_torch_never_steps_is_refused_by_its_full_name(optimizer: Any, kind: Any) -> None:
    name = rf"{type(optimizer).__module__}\.{type(optimizer).__qualname__}"
    settings = {"gamma": 4.0, "epsilon": 0.1, "tau0": 0.05} if kind is AnalyticAutoDrop else {}
    with pytest.raises(TypeError, match=f"optimizer: expected .*, got {name}, whose step"):
        kind(optimizer, **settings)


def test_a_meter_follows_the_optimizer_inside() -> None:
    params = parameters()
    meter = AngularVelocity(Slots(sgd(params)), window=1)
    assert [p is q for p, (_, q) in zip(params, meter.named_parameters(), strict=True)] == [
        True
    ] * 2


# ---- rates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AutoDrop, AnytimeAutoDrop, EpochAutoDrop])
@pytest.mark.parametrize(
    ("lr", "error"),
    [
        (None, TypeError),
        ("0.1", TypeError),
        (True, TypeError),
        (torch.tensor(1), TypeError),
        (torch.tensor([0.1, 0.2]), TypeError),
        (float("nan"), ValueError),
        (torch.tensor(float("inf")), ValueError),
        (-0.1, ValueError),
    ],
)
def test_a_rate_that_cannot_be_lowered_is_refused(kind: Any, lr: Any, error: Any) -> None:
    first, second = parameters()
    optimizer = sgd([{"params": [first]}, {"params": [second]}])
    optimizer.param_groups[1]["lr"] = lr
    with pytest.raises(error, match=r"optimizer: param_groups\[1\]\['lr'\]: expected .*, got"):
        kind(optimizer)


class OneRate(torch.optim.SGD):
    """As D-Adaptation and Prodigy: one distance for all groups."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, lr=1.0)
        for group in self.param_groups:
            group.update(defaults)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if len({group["lr"] for group in self.param_groups}) > 1:
            raise RuntimeError("Setting different lr values in different parameter groups")
        return super().step(closure)


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        (AutoDrop, {"per_group": True}, "per_group"),
        (AutoDrop, {"min_lr": [0.0, 0.5]}, "min_lr"),
        (AnytimeAutoDrop, {"min_lr": [0.1, 0.5]}, "min_lr"),
        (EpochAutoDrop, {"min_lr": [0.1, 0.5]}, "min_lr"),
    ],
)
def test_an_optimizer_of_one_rate_is_not_given_several(kind: Any, settings: Any, name: str) -> None:
    first, second = parameters()

    def groups() -> Any:
        return [{"params": [first]}, {"params": [second]}]

    with pytest.raises(ValueError, match=f"{name}: expected the same rate .* OneRate"):
        kind(OneRate(groups(), d=1e-6, k=0), **settings)
    assert kind(OneRate(groups()), **settings).num_drops == 0  # it is another optimizer
    if name == "per_group":
        one = OneRate([first, second], d=1e-6, k=0)
        assert kind(one, **settings).num_drops == 0  # one group has one rate


def test_an_optimizer_of_one_rate_keeps_it() -> None:
    params = parameters()
    optimizer = OneRate([{"params": [p]} for p in params], d=1e-6, k=0)
    scheduler = AutoDrop(optimizer, min_lr=[0.9, 0.9], **EAGER)
    train(scheduler, optimizer.step, params, 60)
    scheduler.cooldown(5)
    train(scheduler, optimizer.step, params, 5)
    assert scheduler.get_last_lr() == [0.9, 0.9]
