"""Ctrl-C at every place where Python can deliver it, one after the other, by tracing.

CPython looks for signals after calls, at the start of a function and where a loop jumps back. A
trace function raises KeyboardInterrupt at the n-th such place within one call of the meter or
scheduler, in code of this package. Afterwards training goes on: no angle may be false, readings
come again, the state saved right after it loads and is right, and there is at most one warning.
"""

from __future__ import annotations

import contextlib
import dis
import gc
import math
import pathlib
import random
import warnings
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import interrupter
import numpy as np
import pytest
import torch
from oracle import LARGE
from trajectories import Given, process
from trials import KINDS, Trial, aftermath, calls_until_right, half_dropped

import autodrop_ext
from autodrop_ext import AnytimeAutoDrop

PACKAGE = str(pathlib.Path(autodrop_ext.__file__).parent)
CHECKED = ("CALL", "JUMP_BACKWARD", "JUMP_ABSOLUTE", "RESUME", "SETUP_FINALLY")

# Which call is interrupted, of windows of three steps: the first one at all, one in the middle of a
# window, the ends of a window without and with a reading, and the first step of the window after.
CALLS = {"first": 0, "inside": 7, "end": 5, "reading": 8, "after a reading": 9}


class Interrupter(interrupter.Interrupter):
    """Raises KeyboardInterrupt where a signal's may come from within the package, or counts.

    Args:
        at: number of the place, from 0; None counts only.
        act: called there, as a signal's handler that returns; None to raise KeyboardInterrupt.
    """

    _after: dict[CodeType, set[int]] = {}  # noqa: RUF012 (a cache for all of them)

    def __init__(self, at: int | None, act: Callable[[], None] | None = None) -> None:
        super().__init__(at, lambda code: code.co_filename.startswith(PACKAGE))
        self.act = act

    def is_place(self, frame: FrameType) -> bool:
        return frame.f_lasti in self._checked(frame.f_code)

    def interrupt(self) -> None:
        if self.act is None:
            super().interrupt()
        else:
            self.act()

    def _checked(self, code: CodeType) -> set[int]:
        """Offsets of instructions before which signals are delivered.

        A signal's exception belongs to the instruction that was just executed, that of a trace
        function to the one that follows. Where a ``with`` block ends between the two, only the
        first is inside it, so that the trace function would raise where no signal can.
        """
        if code not in self._after:
            instructions = list(dis.get_instructions(code))
            blocks = [  # Python 3.11 and later have a table; 3.10 has a stack, which is exact
                (entry.start, entry.end, entry.target)
                for entry in getattr(dis.Bytecode(code), "exception_entries", ())
            ]

            def handlers(offset: int) -> list[int]:
                return [target for start, end, target in blocks if start <= offset < end]

            self._after[code] = {
                following.offset
                for one, following in zip(instructions, instructions[1:], strict=False)
                if one.opname.startswith(CHECKED)
                and handlers(one.offset) == handlers(following.offset)
            }
        return self._after[code]


def interrupted(kind: str, call: int, at: int | None) -> tuple[Trial, Interrupter, list[str]]:
    """A run whose given call was interrupted, and what it had said until then."""
    gc.collect()  # a run and its scheduler refer to each other, and keep up to 50 MB of iterates
    trial = Trial(kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trial.advance(call)
        trial.train()
        with Interrupter(at) as interrupter:
            try:
                trial.measured()
            except KeyboardInterrupt:
                trial.interrupted.append(trial.call)
        trial.note()
    return trial, interrupter, [str(w.message) for w in caught]


def places(kind: str, call: int, few: int) -> list[int]:
    """Numbers of the places to try: a seeded choice of some, in large of six times as many."""
    total = interrupted(kind, call, None)[1].places
    assert total > 10
    chosen = min(total, few * (6 if LARGE else 1))
    return sorted(random.Random(f"{kind} {call}").sample(range(total), chosen))


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    """One thread; afterwards torch's own switches are as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # collections between the runs skip what was there before them
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)
    assert torch._C._is_torch_function_enabled()
    assert torch.is_grad_enabled()


def call_of(kind: str, moment: str) -> int:
    """The call that a moment stands for."""
    if kind == "EpochAutoDrop":  # windows of one call; the rest repeats
        return {"first": 0, "inside": 1, "end": 2, "reading": 4, "after a reading": 5}[moment]
    return CALLS[moment]


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_interrupt_nothing_is_wrong(kind: str) -> None:
    """The judge itself: it finds no fault where there is none, and one where an iterate is lost."""
    trial = Trial(kind)
    trial.advance(call_of(kind, "reading") + 1)
    assert trial.reported
    assert aftermath(trial, []) == []
    del trial.witness.seen[-2]
    assert list(trial.problems())


@pytest.mark.parametrize("moment", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_at_every_place(kind: str, moment: str) -> None:
    call = call_of(kind, moment)
    wrong: dict[str, list[str]] = {}
    tried = places(kind, call, 16)
    for at in tried:
        trial, interrupter, said = interrupted(kind, call, at)
        if not interrupter.where:
            continue  # the first call of all has more places than later ones: it fills caches
        swallowed = ["the interrupt was swallowed"]
        found = aftermath(trial, said) if trial.interrupted else swallowed
        for problem in found:
            wrong.setdefault(problem.split(":")[0], []).append(f"{interrupter.where}: {problem}")
    shown = "\n".join(f"{len(v)} x {k}, such as {v[0]}" for k, v in wrong.items())
    assert not wrong, f"of {len(tried)} places:\n{shown}"


@pytest.mark.parametrize("kind", ["AutoDrop", "per_group"])
def test_an_interrupted_drop_is_whole(kind: str) -> None:
    """All param groups or none, and counted as often as it was carried out."""
    call = 11
    undisturbed = interrupted(kind, call, None)[0]
    assert undisturbed.history[-1].dropped
    wrong = []
    tried = places(kind, call, 150)
    for at in tried:
        trial, interrupter, _ = interrupted(kind, call, at)
        problem = half_dropped(trial)
        if problem is not None:
            wrong.append(f"{interrupter.where}: {problem}")
    assert not wrong, f"{len(wrong)} of {len(tried)} places:\n" + "\n".join(wrong[:6])


def test_an_interrupted_average_leaves_training_alive() -> None:
    """Inside the call that writes averaged parameters back and drops the rate."""

    def run(at: int | None) -> tuple[Trial, Interrupter, str | None]:
        trial = Trial("EpochAutoDrop")
        trial.measure.close()
        trial.measure = autodrop_ext.EpochAutoDrop(
            trial.optimizer, threshold=179.0, max_threshold=180.0, delay=2
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            trial.advance(7)
            trial.train()
            with Interrupter(at) as interrupter:
                try:
                    trial.measured()
                except KeyboardInterrupt:
                    trial.interrupted.append(trial.call)
            try:
                trial.advance(0 if at is None else 10)
            except RuntimeError as error:
                return trial, interrupter, f"a later step raises: {error}"
        return trial, interrupter, None if at is None else outcome(trial)

    def outcome(trial: Trial) -> str | None:
        angles = [d.angle for d in trial.history[-6:]]
        expected = 0.5 * 0.2**trial.measure.num_drops
        if angles.count(None) > 2:
            return f"angles {angles}"
        if not all(p.isfinite().all() for p in trial.parameters):
            return "parameters are not finite"
        if any(abs(rate / expected - 1) > 1e-9 for rate in trial.rates):
            return f"rates {trial.rates} after {trial.measure.num_drops} drops"
        return None

    undisturbed, counter, _ = run(None)
    assert undisturbed.history[-1].averaged and undisturbed.history[-1].dropped
    tried = range(counter.places)
    if not LARGE:
        tried = sorted(random.Random(0).sample(tried, 40))  # type: ignore[assignment]
    wrong = []
    for at in tried:
        _, interrupter, problem = run(at)
        if problem is not None:
            wrong.append(f"{interrupter.where}: {problem}")
    assert not wrong, f"{len(wrong)} of {len(tried)} places:\n" + "\n".join(wrong[:6])


def steps_with_interrupt(
    optimizer: Given, scheduler: Any, steps: int, close: int, at: int | None
) -> Interrupter:
    """Take the steps of a run, and interrupt the scheduler in one of them at a place."""
    for t in range(1, steps + 1):
        optimizer.step()
        if t == close:
            with Interrupter(at) as interrupter, contextlib.suppress(KeyboardInterrupt):
                scheduler.step()
        else:
            scheduler.step()
    return interrupter


def test_an_interrupted_close_doubles_the_window() -> None:
    """Where a close is known, the window is what other ranks have; and no cosine is false."""
    iterates = process("mean-reverting", 255, n=30)
    close = 128  # with 4 windows, the window of 16 steps doubles after 8 of them

    def disturbed(at: int | None) -> tuple[AnytimeAutoDrop, Interrupter]:
        optimizer = Given(iterates, dtype=torch.float64)
        scheduler = AnytimeAutoDrop(optimizer, min_window=4, windows=4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that a window is discarded
            return scheduler, steps_with_interrupt(optimizer, scheduler, len(iterates), close, at)

    def problems(scheduler: AnytimeAutoDrop) -> Iterator[str]:
        history = scheduler.history
        lost = scheduler.last_epoch < len(iterates)  # interrupted before the call had begun
        seen = np.delete(iterates, close - 1, axis=0) if lost else iterates
        rates = [d.lr[0] for d in history]
        if sorted(rates, reverse=True) != rates:
            yield f"a rate rose: {rates}"
        after = [(d.step, d.window_steps) for d in history if d.step > close]
        known = [d.step for d in history].count(close)
        if known > 1:
            yield "the close is in the history twice"
        if known and after != [(160, 32), (192, 32), (224, 32)]:
            yield f"windows after it: {after}"
        if not any(d.cosine is not None for d in history if d.step > close):
            yield "no cosine after it"
        for d in history:
            w = d.window_steps
            if d.cosine is not None and (d.step <= close or known):
                means = seen[d.step - 3 * w : d.step].reshape(3, w, -1).mean(axis=1)
                a, b = np.diff(means, axis=0)
                true = a @ b / math.sqrt((a @ a) * (b @ b))
                if abs(d.cosine - true) > 4e-4:  # 0.02 degrees
                    yield f"{d.cosine} at {d.step}, where {true} is true"

    undisturbed, counter = disturbed(None)
    assert list(problems(undisturbed)) == []
    assert len([d for d in undisturbed.history if d.step == close]) == 1
    tried = list(range(counter.places))
    if not LARGE:
        tried = sorted(random.Random(0).sample(tried, 100))
    wrong = []
    doubled = 0
    for at in tried:
        scheduler, interrupter = disturbed(at)
        doubled += scheduler.window == 32
        wrong += [f"{interrupter.where}: {problem}" for problem in problems(scheduler)]
    assert not wrong, f"{len(wrong)} in {len(tried)} places:\n" + "\n".join(wrong[:6])
    assert doubled > len(tried) / 2  # most places come after the window was counted


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # that a window is discarded
@pytest.mark.parametrize("kind", ["AnytimeAutoDrop", "AutoDrop"])
@pytest.mark.parametrize("close", [64, 80, 88], ids=["doubles", "rises", "ends the rise"])
def test_an_interrupt_in_an_automatic_warm_up(kind: str, close: int) -> None:
    """A rise is done once or not at all, and the warm-up ends once, wherever it is interrupted."""
    iterates = process("mean-reverting", 330, n=60)

    def run(at: int | None) -> tuple[Any, Interrupter]:
        optimizer = Given(iterates, dtype=torch.float64)
        window = {"window": 16} if kind == "AutoDrop" else {}
        scheduler = getattr(autodrop_ext, kind)(optimizer, warmup_steps="auto", **window)
        return scheduler, steps_with_interrupt(optimizer, scheduler, len(iterates), close, at)

    def problems(scheduler: Any, highest: float) -> Iterator[str]:
        steps = [d.step for d in scheduler.history]
        rates = [d.lr[0] for d in scheduler.history]
        ends = [d.step for d in scheduler.history if d.warmup in ("reached", "confined")]
        if len(steps) != len(set(steps)):
            yield "a close is in the history twice"
        if len(ends) != 1:
            yield f"the warm-up ends at {ends}"
        # A window that is lost may delay the end of the rise by some windows of an eighth of it.
        elif max(rates) > 1.5 * highest:
            yield f"a rate of {max(rates)}, without an interrupt {highest}"
        if not any(d.cosine is not None for d in scheduler.history if d.step > close + 96):
            yield "no cosine after it"

    undisturbed, counter = run(None)
    highest = max(d.lr[0] for d in undisturbed.history)
    assert list(problems(undisturbed, highest)) == []
    assert undisturbed.history[[d.step for d in undisturbed.history].index(88)].warmup == "confined"
    # Each of some 800 places takes half a second.
    tried = sorted(random.Random(0).sample(range(counter.places), 60 if LARGE else 12))
    wrong = []
    for at in tried:
        scheduler, interrupter = run(at)
        wrong += [f"{interrupter.where}: {problem}" for problem in problems(scheduler, highest)]
    assert not wrong, f"{len(wrong)} in {len(tried)} places:\n" + "\n".join(wrong[:6])


@pytest.mark.filterwarnings("ignore:AutoDrop. the last observation was interrupted")
@pytest.mark.parametrize("kind", ["AutoDrop", "AnalyticAutoDrop"])
def test_an_interrupt_in_the_last_step_of_a_warm_up(kind: str) -> None:
    """The rate is the initial one afterwards, wherever the call was interrupted."""

    def run(at: int | None) -> tuple[float, Interrupter]:
        parameter = torch.nn.Parameter(torch.ones(4))
        optimizer = torch.optim.SGD([parameter], lr=0.5)
        scheduler: Any = (
            autodrop_ext.AutoDrop(optimizer, warmup_steps=4)
            if kind == "AutoDrop"
            else autodrop_ext.AnalyticAutoDrop(optimizer, 0.1, 0.1, 0.01, warmup_steps=4)
        )
        for step in range(6):
            parameter.grad = torch.ones(4)
            optimizer.step()
            interrupter = Interrupter(at if step == 2 else None)
            with contextlib.suppress(KeyboardInterrupt), interrupter:
                scheduler.step()
            if step == 2:
                of_last = interrupter
        return optimizer.param_groups[0]["lr"], of_last

    total = run(None)[1].places
    assert total > 10
    wrong = [(x.where, rate) for at in range(total) for rate, x in [run(at)] if rate != 0.5]
    assert not wrong


# A scheduler's decision on a reading is carried out by the call after the interrupt.
@pytest.mark.parametrize(
    ("kind", "moment"),
    [*(("meter", m) for m in CALLS), ("AutoDrop", "inside"), ("AutoDrop", "end")],
)
def test_a_warning_that_is_an_error_comes_after_the_window_was_discarded(
    kind: str, moment: str
) -> None:
    """The next call raises it, and every angle after that is right."""
    call = call_of(kind, moment)
    wrong = []
    for at in places(kind, call, 8):
        trial, interrupter, _ = interrupted(kind, call, at)
        raised = 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(8 * trial.window):
                trial.train()
                try:
                    trial.measured()
                except RuntimeWarning:
                    raised += 1
                trial.note()
        problems = list(trial.problems())
        if raised > 1 or problems or not trial.reported:
            wrong.append(f"{interrupter.where}: {raised} raised, {problems[:2]}")
    assert not wrong, "\n".join(wrong[:6])


@pytest.mark.parametrize("moment", ["reading", "after a reading"])
def test_no_reading_is_decided_on_twice(moment: str) -> None:
    """A second decision would put the same angle into the filter again, and could drop the rate.

    Nor is one left out: other ranks may have decided on the reading.
    """
    call = call_of("AutoDrop", moment)
    for at in places("AutoDrop", call, 48):
        trial, interrupter, _ = interrupted("AutoDrop", call, at)
        measured = [reading.window for reading in trial.measure.meter.history]
        assert measured == [decision.window for decision in trial.history], interrupter.where
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial.advance(5 * trial.window)
        windows = [decision.window for decision in trial.history]
        assert len(windows) > 1
        assert windows == sorted(set(windows)), interrupter.where


@pytest.mark.parametrize("moment", CALLS)
@pytest.mark.parametrize("kind", ["AutoDrop", "per_group", "AnalyticAutoDrop"])
def test_a_state_that_a_signals_handler_saves_is_of_a_whole_step(kind: str, moment: str) -> None:
    """Of the last step or of the one at hand, and the run goes on as if nothing had happened."""
    call = CALLS[moment] + (2 if moment == "reading" else 0)  # with a drop

    def run(at: int | None) -> tuple[Trial, Interrupter, list[dict[str, Any]], list[Trial]]:
        trial, states, resumed = Trial(kind), [], []

        def save() -> None:
            states.append(trial.measure.state_dict())
            resumed.append(trial.resumed())

        trial.advance(call)
        trial.train()
        if at is None:
            save()
        with Interrupter(at, save) as interrupter:
            trial.measured()
        if at is None:
            save()
        trial.note()
        trial.advance(3 * trial.window)
        return trial, interrupter, states, resumed

    def own(state: dict[str, Any]) -> str:
        """What the scheduler itself has; the meter's open window is discarded."""
        return repr({key: value for key, value in state.items() if key != "meter"})

    undisturbed, counter, states, _ = run(None)
    whole = [own(state) for state in states]
    assert whole[0] != whole[1]
    tried = random.Random(f"{kind} {moment}").sample(range(counter.places), 24)
    for at in tried:
        trial, interrupter, (state,), (resumed,) = run(at)
        assert own(state) in whole, interrupter.where
        assert repr(trial.history) == repr(undisturbed.history), interrupter.where
        assert trial.rates == undisturbed.rates, interrupter.where
        resumed.interrupted.append(call)  # its meter may lack that iterate
        with warnings.catch_warnings():
            # Rates are those of the parameters' step, which is not always the state's.
            warnings.filterwarnings("ignore", message=".* the learning rates are")
            resumed.advance(calls_until_right(resumed) + resumed.window)
        if kind != "AnalyticAutoDrop":
            assert list(resumed.problems()) == [], interrupter.where
            angles = [r.angle for c, r in resumed.reported.items() if c > call]
            assert any(angle is not None for angle in angles), interrupter.where
