"""Entries of saved states: each is checked, and an error names it once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from autodrop_ext import checks
from autodrop_ext.saved import Entries

STATE: dict[str, Any] = {
    "steps": 3,
    "rate": 0.5,
    "stepped": True,
    "angle": None,
    "lrs": [0.1, 0.2],
    "meter": {"window": "4", "form": "sum"},
}


def test_entries_are_read() -> None:
    state = Entries(STATE)
    assert state.count("steps") == 3
    assert state.number("rate") == 0.5
    assert state.flag("stepped") is True
    assert state.maybe("angle", checks.finite) is None
    assert state.list("lrs", checks.at_least_zero, 2) == [0.1, 0.2]
    assert state.inner("meter").value("form") == "sum"
    assert "steps" in state and "windows" not in state
    assert list(state) == list(STATE) and len(state) == len(STATE)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda s: s.count("windows"), "saved: no entry 'windows'"),
        (lambda s: s.value("windows"), "saved: no entry 'windows'"),
        (lambda s: s.count("rate"), "saved['rate']: expected an int, got 0.5"),
        (lambda s: s.count("steps", 4), "saved['steps']: expected at least 4, got 3"),
        (lambda s: s.flag("steps"), "saved['steps']: expected a bool, got 3"),
        (lambda s: s.number("lrs"), "saved['lrs']: expected a finite number, got [0.1, 0.2]"),
        (lambda s: s.inner("steps"), "saved['steps']: expected a dict, got int"),
        (lambda s: s.list("rate", checks.finite), "saved['rate']: expected a list, got 0.5"),
        (lambda s: s.list("lrs", checks.finite, 3), "saved['lrs']: expected 3 values, got 2"),
        (
            lambda s: s.list("lrs", lambda name, value: checks.count(name, value, 0)),
            "saved['lrs'][0]: expected an int, got 0.1",
        ),
        (
            lambda s: s.inner("meter").count("window"),
            "saved['meter']['window']: expected an int, got '4'",
        ),
        (lambda s: s.inner("meter").count("steps"), "saved['meter']: no entry 'steps'"),
        # A check that knows nothing of states: the entry is put in front of its message.
        (lambda s: s.read("rate", lambda name, value: {}[value]), "saved['rate']: 0.5"),
    ],
)
def test_errors_are_value_errors_that_name_the_entry(
    read: Callable[[Entries], object], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read(Entries(STATE, "saved"))


def test_other_errors_of_a_check_pass() -> None:
    with pytest.raises(ZeroDivisionError):
        Entries(STATE).read("steps", lambda name, value: value / 0)


def test_a_state_is_a_dict() -> None:
    with pytest.raises(ValueError, match=r"^state_dict: expected a dict, got list"):
        Entries([1])
