"""Settings are declared once: signatures, docstrings, attributes, states and titles follow."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from other_settings import OTHERS

from autodrop_ext import (
    AnalyticAutoDrop,
    AngularVelocity,
    AnytimeAutoDrop,
    AutoDrop,
    EpochAutoDrop,
)
from autodrop_ext.plotting.titles import describe
from autodrop_ext.settings import ANALYTIC, ANYTIME, AUTODROP, EPOCH, METER, REQUIRED, Settings

DECLARED: dict[type[Any], Settings] = {
    AutoDrop: AUTODROP,
    AnytimeAutoDrop: ANYTIME,
    EpochAutoDrop: EPOCH,
    AnalyticAutoDrop: ANALYTIC,
    AngularVelocity: METER,
}
NO_SETTINGS = {  # what is measured and where; what a run is told; calls
    *("optimizer", "params", "backend", "process_group", "last_epoch", "form"),
    *("num_steps", "total_decay"),  # window="auto" is resolved when the scheduler is made
    *("on_reading", "on_drop", "on_average"),
}

each = pytest.mark.parametrize("kind", DECLARED)
schedulers = pytest.mark.parametrize("kind", [kind for kind in DECLARED if kind != AngularVelocity])


def made(kind: type[Any], **settings: Any) -> Any:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    needed = {"gamma": 4.0, "epsilon": 0.1, "tau0": 0.05} if kind is AnalyticAutoDrop else {}
    return kind(optimizer, **(needed | settings))


@each
def test_signatures_have_the_declared_settings_and_defaults(kind: type[Any]) -> None:
    parameters = inspect.signature(kind).parameters
    arguments = {name: p.default for name, p in parameters.items() if name not in NO_SETTINGS}
    assert arguments == {setting.name: setting.default for setting in DECLARED[kind]}


@each
def test_docstrings_explain_every_setting(kind: type[Any]) -> None:
    for setting in DECLARED[kind]:
        assert re.search(rf"^ +{setting.name}: ", inspect.getdoc(kind) or "", re.MULTILINE)
        assert setting.help and "\n" not in setting.help


@schedulers
def test_a_state_has_the_saved_settings_under_the_names_of_arguments(kind: type[Any]) -> None:
    """Frameworks make a scheduler again from entries with the names of arguments."""
    scheduler = made(kind)
    state = scheduler.state_dict()
    arguments = set(inspect.signature(kind).parameters)
    names = {setting.name for setting in DECLARED[kind] if setting.saved}
    assert names | {"last_epoch"} == arguments & set(state)
    for name in names:
        assert state[name] == getattr(scheduler, name)
    given = {name: state[name] for name in names}
    again, tensors = made(kind, **given).state_dict(), ("meter", "mean")
    assert {k: v for k, v in again.items() if k not in tensors} == {
        k: v for k, v in state.items() if k not in tensors
    }


@schedulers
def test_loading_replaces_every_saved_setting_and_says_so(kind: type[Any]) -> None:
    others = OTHERS[kind]
    assert set(others) == {setting.name for setting in DECLARED[kind] if setting.saved}
    state = made(kind, **others).state_dict()
    scheduler = made(kind)
    with pytest.warns(RuntimeWarning, match="settings replace those given") as caught:
        scheduler.load_state_dict(state)
    (message,) = [str(w.message) for w in caught]
    for name, value in others.items():
        assert getattr(scheduler, name) == value
        assert f"{name}={value!r} (was" in message
    # A lower bound is the state's own no longer.
    if "min_lr" in others:
        assert scheduler.min_lr is not state["min_lr"]


@schedulers
def test_a_state_of_version_1_has_its_settings_in_a_dict(kind: type[Any]) -> None:
    state = made(kind, **OTHERS[kind]).state_dict()
    names = {setting.name for setting in DECLARED[kind] if setting.saved}
    old = {key: value for key, value in state.items() if key not in names}
    old |= {"version": 1, "settings": {name: state[name] for name in names}}
    scheduler = made(kind)
    with pytest.warns(RuntimeWarning, match="settings replace those given"):
        scheduler.load_state_dict(old)
    assert {name: getattr(scheduler, name) for name in names} == OTHERS[kind]
    del old["settings"]
    with pytest.raises(ValueError, match=r"^state_dict: no entry 'settings'"):
        scheduler.load_state_dict(old)


def test_titles_leave_usual_settings_out() -> None:
    usual = {s.name: s.default for s in (*AUTODROP, *ANYTIME, *EPOCH) if not s.always}
    assert describe({"scheduler": "AutoDrop", **usual}) == "AutoDrop"
    always = {s.name: s.default for s in AUTODROP if s.always}
    assert describe(always) == "window 64, factor 0.95, threshold 0.1°"
    assert describe({"kernel": "time", "cosines": 4}) == "kernel time, cosines 4"
    assert REQUIRED not in [s.default for s in (*AUTODROP, *ANYTIME, *EPOCH)]
