"""States with one entry replaced: they load and work, or a ValueError names the entry.

Where a state is refused, nothing has changed, to the bit. Where it is loaded, training goes on for
three windows and longer: no exception, readings come, rates stay finite, positive and no higher
than they were.
"""

from __future__ import annotations

import copy
import math
import random
import re
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from oracle import count
from torch import Tensor
from trials import Trial

from autodrop_ext import AnalyticAutoDrop, AnytimeAutoDrop, AutoDrop, EpochAutoDrop
from autodrop_ext.settings import ANALYTIC, AUTODROP, EPOCH

Path = tuple[Any, ...]
KINDS = (
    *("meter", "AutoDrop", "per_group", "EpochAutoDrop", "averaging"),
    *("AnalyticAutoDrop", "AnytimeAutoDrop"),
)

PATIENCE = 4.0
"""Seconds in which a state must load and train; an undamaged one takes a hundredth."""

HOSTILE: list[Any] = [
    None,
    True,
    -1,
    0,
    -(10**9),
    10**9,
    10**30,
    10**400,
    2.5,
    -0.5,
    math.nan,
    math.inf,
    -math.inf,
    1e300,
    "x",
    "",
    [],
    [None],
    [math.nan],
    {},
    {"x": 1},
    torch.zeros(()),
    torch.full((3,), math.nan),
]
"""What takes the place of a plain entry."""


def _other_tensors(tensor: Tensor) -> list[Any]:
    return [
        tensor.double(),
        tensor.to(torch.int64),
        tensor.to(torch.complex64),
        tensor[..., :-1] if tensor.dim() and tensor.shape[-1] else tensor.new_zeros(2),
        tensor.reshape(1, *tensor.shape),
        tensor.new_zeros(0),
        torch.full_like(tensor, math.nan),
        torch.full_like(tensor, 3e38),
        tensor.to_sparse() if tensor.dim() else None,
        tensor.to("meta"),
        tensor.tolist(),
        None,
        "x",
        0,
    ]


class Subject(Trial):
    """A trial in the middle of a window, of a delay, or between two modelled drops."""

    def __init__(self, kind: str) -> None:
        self.asked = kind
        like = {"averaging": "EpochAutoDrop", "AnytimeAutoDrop": "AutoDrop"}
        super().__init__(like.get(kind, kind))
        if kind == "AnytimeAutoDrop":
            self.measure.close()
            self.measure = AnytimeAutoDrop(self.optimizer, min_window=3, windows=2)
            self.measure.cooldown(1000)
        if kind == "averaging":
            self.measure.close()
            self.measure = EpochAutoDrop(
                self.optimizer, threshold=100.0, max_threshold=180.0, delay=6
            )

    def works(self) -> str | None:
        """What goes wrong in the next windows, or None."""
        before = self.rates
        try:
            settings = self.measure.state_dict()
            window = max(1, settings.get("window", 1))
            if self.asked == "AnytimeAutoDrop":
                window = self.measure.window
            # The rest of this window, one with whatever sums were loaded, three good ones.
            calls = min(6 * window, 60)
            self.reported.clear()
            self.advance(calls)
            self.measure.state_dict()
            if self.asked != "meter":
                self.measure.get_metrics()
                self.measure._get_closed_form_lr()  # what torch's SequentialLR asks for
            if self.asked != "AnalyticAutoDrop":
                for reading in self.history:
                    reading.as_dict()
            warming = settings.get("warmup_steps", 0) > 0
        except TimeoutError:
            raise
        except Exception as error:
            return f"a later step raises {type(error).__name__}: {error}"
        if not all(0 < lr < math.inf for lr in self.rates):
            return f"rates {self.rates}"
        if any(now > was for now, was in zip(self.rates, before, strict=True)):
            return f"rates rise from {before} to {self.rates}"
        if calls < 60 and not warming and self.asked != "AnalyticAutoDrop":
            angles = [reading.angle for reading in self.reported.values()]
            if not any(angle is not None for angle in angles):
                return f"dead: angles {angles} in {calls} calls"
        return None


def target(kind: str) -> Subject:
    """What a state is loaded into: it has some history, so that a change of it shows."""
    subject = Subject(kind)
    subject.advance({"averaging": 6, "EpochAutoDrop": 4, "AnalyticAutoDrop": 20}.get(kind, 13))
    return subject


def saved(kind: str) -> tuple[dict[str, Any], Subject]:
    """A state with everything in it, and the run that it belongs to."""
    subject = Subject(kind)
    subject.advance({"averaging": 8, "EpochAutoDrop": 7, "AnalyticAutoDrop": 40}.get(kind, 32))
    return subject.measure.state_dict(), subject


def entries(state: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every entry of a state, containers and what they hold."""
    items: Any = ()
    if isinstance(state, Mapping):
        items = state.items()
    elif isinstance(state, list):
        items = enumerate(state[:2])  # the others are of the same kind
    for key, value in items:
        yield (*path, key), value
        yield from entries(value, (*path, key))


def damages(state: dict[str, Any]) -> list[tuple[Path, str, Callable[[], Any]]]:
    """All damages by one entry: its path, words for it, and the damaged state."""
    found: list[tuple[Path, str, Callable[[], Any]]] = []
    for path, value in entries(state):
        others = _other_tensors(value) if isinstance(value, Tensor) else HOSTILE
        if isinstance(value, list):
            others = [*others, value[:-1], [*value, *value], [*value, "x"]]
        for other in others:
            if type(other) is type(value) and not isinstance(value, Tensor) and other == value:
                continue
            found.append((path, _words(other), lambda p=path, o=other: _with(state, p, o)))
        if not isinstance(path[-1], int):
            found.append((path, "gone", lambda p=path: _with(state, p, _with)))
            found.append((path, "renamed", lambda p=path: _renamed(state, p)))
    return found


def _words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype} on {value.device}, {value.layout}"
    return repr(value)[:60]


def _parent(state: dict[str, Any], path: Path) -> tuple[Any, Any]:
    whole = copy.deepcopy(state)
    at: Any = whole
    for key in path[:-1]:
        at = at[key]
    return whole, at


def _with(state: dict[str, Any], path: Path, value: Any) -> Any:
    whole, parent = _parent(state, path)
    if value is _with:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return whole


def _renamed(state: dict[str, Any], path: Path) -> Any:
    whole, parent = _parent(state, path)
    parent[f"{path[-1]}?"] = parent.pop(path[-1])
    return whole


def frozen(subject: Subject) -> str:
    """Everything that a load may change, as text."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype, value.shape, value.flatten().tolist()
        if isinstance(value, Mapping):
            return [(key, plain(item)) for key, item in value.items()]
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    try:
        return repr((plain(subject.measure.state_dict()), subject.rates, len(subject.history)))
    except Exception as error:
        return f"state_dict() raises {type(error).__name__}: {error}"


def named(path: Path, message: str) -> bool:
    """Whether a message has the name of an entry or of what holds it, as a word."""
    names = [key for key in path if isinstance(key, str)][-2:]
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message) for name in names)


def attacked(kind: str, path: Path, damaged: Any) -> str | None:
    """Load a damaged state and use it: what is wrong, or None."""
    subject = target(kind)
    before = frozen(subject)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        return used(subject, before, path, damaged)
    except TimeoutError:
        return f"hangs: more than {PATIENCE} seconds"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def used(subject: Subject, before: str, path: Path, damaged: Any) -> str | None:
    """Load a damaged state and train: what is wrong, or None."""
    try:
        subject.measure.load_state_dict(damaged)
    except TimeoutError:
        raise
    except ValueError as error:
        if not named(path, str(error)):
            return f"refused without naming it: {error}"
        return None if frozen(subject) == before else f"refused, and yet changed: {error}"
    except Exception as error:
        changed = "" if frozen(subject) == before else " and half loaded"
        return f"{type(error).__name__}{changed}: {error}"
    return subject.works()


def _too_long(*_: Any) -> None:
    raise TimeoutError


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    handler = signal.signal(signal.SIGALRM, _too_long)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGALRM, handler)


@pytest.mark.parametrize("kind", KINDS)
def test_the_undamaged_state_loads_and_works(kind: str) -> None:
    state, _ = saved(kind)
    subject = target(kind)
    subject.measure.load_state_dict(state)
    assert subject.works() is None


@pytest.mark.parametrize("kind", KINDS)
def test_states_with_one_entry_replaced(kind: str) -> None:
    state, _ = saved(kind)
    all_of_them = damages(state)
    chosen = list(all_of_them)
    random.Random(kind).shuffle(chosen)
    # In small, two for each entry and a few more; in large, hundreds of each kind.
    chosen = chosen[: count(30, 400)]
    wrong: dict[str, list[str]] = {}
    for path, words, make in chosen:
        problem = attacked(kind, path, make())
        if problem is not None:
            name = ".".join(map(str, path))
            wrong.setdefault(problem.split(":")[0], []).append(f"{name} = {words}: {problem}")
    total = sum(map(len, wrong.values()))
    shown = "\n".join(f"{len(v)} x {k}\n    " + "\n    ".join(v[:3]) for k, v in wrong.items())
    assert not wrong, f"{total} of {len(chosen)} damaged states:\n{shown}"


@pytest.mark.parametrize("kind", ["AutoDrop", "EpochAutoDrop", "AnalyticAutoDrop"])
def test_settings_that_the_constructor_refuses(kind: str) -> None:
    """A setting in a state is held to what the argument of the same name is."""
    state, _ = saved(kind)
    wrong = []
    settings = {"AutoDrop": AUTODROP, "EpochAutoDrop": EPOCH, "AnalyticAutoDrop": ANALYTIC}[kind]
    for name in (setting.name for setting in settings if setting.saved):
        for value in (*HOSTILE, 1.5, "0.5", "auto", [0.0, 0.0, 0.0], [-1.0, -1.0]):
            if not _refused(kind, name, value):
                continue
            subject = target(kind)
            before = frozen(subject)
            damaged = _with(state, (name,), value)
            try:
                subject.measure.load_state_dict(damaged)
                problem = "was loaded"
            except ValueError as error:
                problem = "" if name in str(error) else f"is not named: {error}"
            except Exception as error:
                problem = f"ends in {type(error).__name__}: {error}"
            if not problem and frozen(subject) != before:
                problem = "was refused, and yet something changed"
            if problem:
                wrong.append(f"{name}={_words(value)} {problem}")
    assert not wrong, f"{len(wrong)} settings:\n" + "\n".join(wrong[:12])


def _refused(kind: str, name: str, value: Any) -> bool:
    """Whether the constructor refuses a value of an argument."""
    optimizer = Trial("meter").optimizer
    try:
        if kind == "EpochAutoDrop":
            # The two thresholds are checked against each other.
            limits = {"threshold": 1e-9, "max_threshold": 180.0} | {name: value}
            EpochAutoDrop(optimizer, **limits)  # type: ignore[arg-type]
        elif kind == "AnalyticAutoDrop":
            arguments = {"gamma": 4.0, "epsilon": 0.1, "tau0": 0.05} | {name: value}
            AnalyticAutoDrop(optimizer, **arguments)  # type: ignore[arg-type]
        elif name == "window" and value == "auto":
            return True  # is resolved where the scheduler is made
        else:
            AutoDrop(optimizer, **{name: value})
    except (TypeError, ValueError):
        return True
    return False
