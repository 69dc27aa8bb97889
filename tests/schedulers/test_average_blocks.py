"""Blocks of averaged_parameters(): what ends them, interrupts, whose average they hold."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from types import CodeType
from typing import Any

import pytest
import torch
from interrupter import Interrupter
from torch import Tensor, nn

from autodrop_ext import AnytimeAutoDrop, AutoDrop, average
from autodrop_ext.schedulers import metered


class Run:
    """A small model that is trained on noise, float32 and bfloat16 parameters among it."""

    def __init__(self, kind: type = AnytimeAutoDrop, steps: int = 24, **settings: Any) -> None:
        torch.manual_seed(0)
        dtypes = (torch.float32, torch.bfloat16)
        self.parameters = [nn.Parameter(torch.randn(4, 3).to(dtype)) for dtype in dtypes]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.05)
        own = {"min_window": 4} if kind is AnytimeAutoDrop else {"window": 4, "average": True}
        self.scheduler = kind(self.optimizer, **own, **settings)
        self.step(steps)

    def step(self, number: int = 1, *, moves: bool = True) -> None:
        for _ in range(number):
            for p in self.parameters:
                p.grad = torch.randn(p.shape).to(p.dtype) if moves else None
            self.optimizer.step()
            self.scheduler.step()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    def holds(self, values: list[Tensor]) -> bool:
        return all(map(torch.equal, self.parameters, values))


def a_block(run: Run) -> None:
    with run.scheduler.averaged_parameters() as held:
        assert held


ENDINGS: dict[str, Callable[[Run], object]] = {
    "state_dict()": lambda run: run.scheduler.state_dict(),
    "a block": a_block,
    "step()": lambda run: run.step(moves=False),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("copied", [None, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_block_that_was_not_left_ends_with_the_next_call(
    ending: str, copied: Callable[[Any], Any] | None
) -> None:
    """As after a Ctrl-C right where it ends, or in a copy that was made within."""
    run = Run()
    own = run.values()
    block = run.scheduler.averaged_parameters()
    assert block.__enter__()
    other = run if copied is None else copied(run)
    assert not other.holds(own)
    with pytest.warns(RuntimeWarning, match="AnytimeAutoDrop: the parameters held their average"):
        ENDINGS[ending](other)
    assert other.holds(own)
    block.__exit__(None, None, None)
    assert run.holds(own)
    other.step(9)
    now = other.values()
    a_block(other)
    assert other.holds(now)


@pytest.mark.parametrize("kind", [AnytimeAutoDrop, AutoDrop])
def test_a_step_of_the_optimizer_moves_the_parameters_themselves(kind: type) -> None:
    run, undisturbed = Run(kind), Run(kind)
    with run.scheduler.averaged_parameters():
        torch.manual_seed(1)
        with pytest.warns(RuntimeWarning, match="held their average"):
            run.step()
    torch.manual_seed(1)
    undisturbed.step()
    assert run.holds(undisturbed.values())


FILES = (average.__file__, metered.__file__, contextlib.__file__)


def left(run: Run) -> None:
    with run.scheduler.averaged_parameters():
        pass


def of_a_block(code: CodeType) -> bool:
    return code.co_filename in FILES or code is left.__code__


@pytest.mark.filterwarnings(
    "ignore:AnytimeAutoDrop. (the parameters held|no parameter moved):RuntimeWarning"
)
@pytest.mark.parametrize("ending", ENDINGS)
def test_an_interrupt_anywhere_ends_with_the_next_call(ending: str) -> None:
    """Also while the exception is handled, which is where people save."""
    run = Run(steps=9)
    own = run.values()
    with Interrupter(None, of_a_block) as counter:
        left(run)
    assert counter.places > 300 and run.holds(own)
    late = 0
    for at in range(list(ENDINGS).index(ending), counter.places, len(ENDINGS)):
        interrupter = Interrupter(at, of_a_block)
        try:
            with interrupter:
                left(run)
            raise AssertionError("the interrupt did not happen")
        except KeyboardInterrupt:
            late += not run.holds(own)
            ENDINGS[ending](run)
            assert run.holds(own), interrupter.where
        assert run.holds(own), interrupter.where
    assert late < counter.places / 100  # of contextlib's own end of a block


# ---- what is averaged -----------------------------------------------------------------------


def masters_of(run: Run) -> list[Tensor]:
    return [p.detach().float() for p in run.parameters]


MEASURED: dict[str, Callable[[Run], Any]] = {
    "float32 master weights": masters_of,
    "a function that returns master weights": lambda run: lambda: masters,
    "a function that computes them": lambda run: lambda: masters_of(run),
    "some parameters": lambda run: run.parameters[:1],
    "names": lambda run: [(f"layer.{i}", p) for i, p in enumerate(run.parameters)],
}
masters: list[Tensor] = []


@pytest.mark.parametrize("measured", MEASURED)
@pytest.mark.parametrize("kind", [AnytimeAutoDrop, AutoDrop])
def test_the_models_own_parameters_hold_the_average_whatever_is_measured(
    kind: type, measured: str
) -> None:
    run = Run(kind, steps=0)
    run.scheduler.close()
    masters[:] = masters_of(run)
    own = {"min_window": 4} if kind is AnytimeAutoDrop else {"window": 4, "average": True}
    run.scheduler = kind(run.optimizer, params=MEASURED[measured](run), **own)
    reference, t = [p.detach().double() for p in run.parameters], 0
    for t in range(1, 17):
        run.step()
        share = 1 - ((t - 1) / t) ** 8
        reference = [
            a + share * (p.detach() - a) for a, p in zip(reference, run.parameters, strict=True)
        ]
    before = run.values()
    with run.scheduler.averaged_parameters() as held:
        assert held
        for p, a in zip(run.parameters, reference, strict=True):
            # The average is kept in float32 and rounded to the parameter, whose values are below 4.
            torch.testing.assert_close(
                p.double(), a, rtol=0, atol=2 * torch.finfo(p.dtype).eps + 16 * 4 * 2.0**-24
            )
    assert run.holds(before)


@pytest.mark.parametrize("function", [False, True])
def test_parameters_of_another_optimizer_are_averaged_if_they_are_measured(function: bool) -> None:
    """As in the recipe of docs/integrations.md for several optimizers."""
    run = Run(steps=0)
    run.scheduler.close()
    other = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))]
    every = [*run.parameters, *other]
    params = (lambda: every) if function else every
    run.scheduler = AnytimeAutoDrop(run.optimizer, min_window=4, params=params)
    for _ in range(12):
        with torch.no_grad():
            for p in other:
                p += 1
        run.step()
    before = [p.detach().clone() for p in every]
    with run.scheduler.averaged_parameters() as held:
        assert held
        assert not any(map(torch.equal, before, every))
    assert all(map(torch.equal, before, every))


class ScheduleFree(torch.optim.SGD):
    """Its groups say which of two sets of parameters the model has, as schedulefree's do."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.train()

    def train(self, mode: bool = True) -> None:
        for group in self.param_groups:
            group["train_mode"] = mode

    def eval(self) -> None:
        self.train(mode=False)


@pytest.mark.parametrize("kind", [AnytimeAutoDrop, AutoDrop])
def test_a_schedule_free_optimizer_has_its_own_average(kind: type) -> None:
    run = Run(kind, steps=0)
    optimizer = run.optimizer = ScheduleFree(run.parameters, lr=0.05)
    run.scheduler = kind(optimizer, average=True)
    run.step(20)
    own = run.values()
    message = "averaged_parameters.. changed nothing: a schedule-free optimizer has its own average"
    with pytest.warns(RuntimeWarning, match=message), run.scheduler.averaged_parameters() as held:
        assert not held and run.holds(own)
    with run.scheduler.averaged_parameters() as held:  # warned once
        assert not held
    optimizer.step()
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"got those of its eval mode; call step\(\) before"):
        run.scheduler.step()
    optimizer.train()
    with pytest.warns(RuntimeWarning, match="the last observation was interrupted"):
        run.step()


def test_master_weights_of_deepspeed_are_not_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    own = run.values()
    monkeypatch.setattr(metered, "zero_optimizer_of", lambda optimizer: object())
    message = "changed nothing: DeepSpeed's optimizer holds float32 copies"
    with pytest.warns(RuntimeWarning, match=message), run.scheduler.averaged_parameters() as held:
        assert not held and run.holds(own)


def test_each_reason_for_no_average_is_given_once() -> None:
    run = Run(steps=0)
    with (
        pytest.warns(RuntimeWarning, match="no average of the present parameters .there is none"),
        run.scheduler.averaged_parameters() as held,
    ):
        assert not held
    run.step(9)
    run.parameters[0].data = run.parameters[0].data.double()
    with (
        pytest.warns(RuntimeWarning, match="was averaged in torch.float32, now it is torch.float"),
        run.scheduler.averaged_parameters() as held,
    ):
        assert not held
    with run.scheduler.averaged_parameters() as held:
        assert not held
