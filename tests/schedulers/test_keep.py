"""``load_state_dict(state, keep=...)``: settings that stay as they are on resume."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from other_settings import OTHERS as ALL

from autodrop_ext import AnalyticAutoDrop, AnytimeAutoDrop, AutoDrop, EpochAutoDrop

Kind = type[Any]

FIXED_NAMES: dict[Kind, tuple[str, ...]] = {
    AutoDrop: ("window", "per_group", "warmup_steps"),
    AnytimeAutoDrop: ("min_window", "windows", "snapshots", "warmup_steps"),
    EpochAutoDrop: (),
    AnalyticAutoDrop: ("warmup_steps",),
}
FIXED: dict[Kind, dict[str, Any]] = {
    kind: {name: ALL[kind][name] for name in names} for kind, names in FIXED_NAMES.items()
}
OTHERS: dict[Kind, dict[str, Any]] = {
    kind: {name: value for name, value in ALL[kind].items() if name not in names}
    for kind, names in FIXED_NAMES.items()
}
kinds = pytest.mark.parametrize("kind", OTHERS)


def made(kind: Kind, **settings: Any) -> Any:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    needed = {"gamma": 4.0, "epsilon": 0.1, "tau0": 0.05} if kind is AnalyticAutoDrop else {}
    return kind(optimizer, **(needed | settings))


def train(scheduler: Any, steps: int, per_call: int = 1) -> None:
    """Steps in random directions, from the same seed in every call."""
    random = torch.Generator().manual_seed(0)
    (parameter,) = scheduler.optimizer.param_groups[0]["params"]
    for _ in range(steps):
        for _ in range(per_call):
            parameter.grad = torch.randn(3, generator=random)
            scheduler.optimizer.step()
        scheduler.step()


@kinds
def test_kept_settings_stay_and_the_warning_leaves_them_out(kind: Kind) -> None:
    state = made(kind, **FIXED[kind]).state_dict()
    for name, value in OTHERS[kind].items():
        others = {k: v for k, v in OTHERS[kind].items() if k != name}
        scheduler = made(kind, **OTHERS[kind])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scheduler.load_state_dict(state, keep=(name,))
        assert getattr(scheduler, name) == value
        for replaced in (*others, *FIXED[kind]):
            assert getattr(scheduler, replaced) == state[replaced]
        (message,) = [m for m in (str(w.message) for w in caught) if "replace those" in m]
        listed = set(re.findall(r"(\w+)=", message))
        assert listed == {*others, *FIXED[kind]}, message


@kinds
def test_a_state_of_version_1_and_a_single_name(kind: Kind) -> None:
    state = made(kind).state_dict()
    names = [*OTHERS[kind], *FIXED[kind]]
    old = {key: value for key, value in state.items() if key not in names}
    old |= {"version": 1, "settings": {name: state[name] for name in names}}
    name, value = next(iter(OTHERS[kind].items()))
    scheduler = made(kind, **{name: value})
    scheduler.load_state_dict(old, keep=name)  # no warning: nothing else differs
    assert getattr(scheduler, name) == value


@kinds
def test_other_names_are_refused_and_nothing_changes(kind: Kind) -> None:
    scheduler = made(kind, **OTHERS[kind])
    before = copy.deepcopy(scheduler.state_dict())
    for name in ("lr", *FIXED[kind], *(["buckets"] if kind is not AnalyticAutoDrop else [])):
        with pytest.raises(ValueError, match=r"^keep: expected '.*' or '.*', got ") as caught:
            scheduler.load_state_dict(made(kind).state_dict(), keep=(*OTHERS[kind], name))
        assert str(caught.value).endswith(f"got {name!r}")
        assert set(re.findall(r"'(\w+)'", str(caught.value))) == {*OTHERS[kind], name}
        # What names depend on is said where they are documented.
        assert name in ("lr", "buckets") or f"``{name}``" in kind.load_state_dict.__doc__
    assert_equal(scheduler.state_dict(), before)


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_a_kept_bound_holds_from_then_on() -> None:
    fast = {"window": 1, "factor": 0.5, "min_samples": 1, "threshold": 200.0}
    scheduler = made(AutoDrop, **fast)
    train(scheduler, 5)  # one angle a step from the third on, a drop at every second
    assert scheduler.get_last_lr() == [0.05]
    state, rates = scheduler.state_dict(), scheduler.optimizer.state_dict()
    resumed = {}
    for keep in ((), ("min_lr",)):
        again = made(AutoDrop, **fast, min_lr=0.04)
        again.optimizer.load_state_dict(rates)
        if keep:
            again.load_state_dict(state, keep=keep)
        else:
            with pytest.warns(RuntimeWarning, match=r"given: min_lr=\[0.0\] \(was \[0.04\]\)$"):
                again.load_state_dict(state)
        train(again, 8)
        resumed[keep] = again.get_last_lr()[0]
    assert resumed["min_lr",] == 0.04
    assert resumed[()] < 0.02


def test_kept_bounds_and_groups_that_came_later() -> None:
    state = made(AutoDrop).state_dict()
    again = made(AutoDrop, min_lr=0.02)
    again.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    again.load_state_dict(state, keep=("min_lr",))
    assert again.min_lr == [0.02]
    optimizer = torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.ones(3))], "lr": lr} for lr in (0.1, 0.2)]
    )
    two = AutoDrop(optimizer, min_lr=[0.02, 0.03])
    two.load_state_dict(state, keep=("min_lr",))
    assert two.min_lr == [0.02, 0.03]
    one = made(AutoDrop, min_lr=0.02)
    with pytest.raises(ValueError, match=r"^state_dict\['min_lr'\]: expected a value for each of"):
        one.load_state_dict(AutoDrop(optimizer).state_dict(), keep=("min_lr",))


@pytest.mark.parametrize(
    ("kind", "settings", "kept", "message"),
    [
        (AutoDrop, {"window": 1}, {"buffer_size": 2}, "buffer_size=2 and samples=4 angles, got 4"),
        (
            EpochAutoDrop,
            {"threshold": 200.0, "max_threshold": 200.0, "delay": 9},
            {"delay": 2},
            r"\['waited'\]: expected at most delay=2, got 3",
        ),
        (
            EpochAutoDrop,
            {"threshold": 0.75},
            {"max_threshold": 0.5, "threshold": 0.25},
            r"\['max_threshold'\]: expected at least threshold=0.75, got 0.5",
        ),
    ],
)
def test_what_contradicts_the_state_is_refused(
    kind: Kind, settings: dict[str, Any], kept: dict[str, Any], message: str
) -> None:
    scheduler = made(kind, **settings)
    train(scheduler, 6, per_call=2 if kind is EpochAutoDrop else 1)
    again = made(kind, **(settings | kept))
    before = copy.deepcopy(again.state_dict())
    with pytest.raises(ValueError, match=message):
        again.load_state_dict(scheduler.state_dict(), keep=list(kept)[:1])
    assert_equal(again.state_dict(), before)


def test_a_kept_threshold_is_theta_until_the_first_drop() -> None:
    scheduler = made(EpochAutoDrop, threshold=0.5)
    again = made(EpochAutoDrop, threshold=0.25)
    again.load_state_dict(scheduler.state_dict(), keep=("threshold",))
    assert again.current_threshold == 0.25
    scheduler = made(EpochAutoDrop, threshold=200.0, max_threshold=900.0, delay=0, factor=0.5)
    train(scheduler, 3, per_call=2)
    assert scheduler.num_drops == 1 and scheduler.current_threshold == 400.0
    again = made(EpochAutoDrop, threshold=0.25, max_threshold=900.0, delay=0, factor=0.5)
    again.load_state_dict(scheduler.state_dict(), keep=("threshold",))
    assert again.current_threshold == 400.0


def test_the_meters_settings_are_in_the_warning() -> None:
    scheduler = made(AutoDrop)
    with pytest.warns(RuntimeWarning, match=r"those given: snapshots=8 \(was None\)$"):
        scheduler.load_state_dict(made(AutoDrop, snapshots=8).state_dict())
    assert scheduler.meter.snapshots == 8


def test_an_average_that_the_state_lacks_begins() -> None:
    scheduler = made(AutoDrop, window=1)
    train(scheduler, 5)
    again = made(AutoDrop, window=1, average=True)
    with pytest.warns(RuntimeWarning, match=r"average over the run starts over \(none was saved"):
        again.load_state_dict(scheduler.state_dict(), keep=("average",))
    train(again, 2)
    with again.averaged_parameters() as held:
        assert held
