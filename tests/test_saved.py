"""Saved states: every entry is checked, and an error names it once."""

from __future__ import annotations

import re
from typing import Any

import pytest

from autodrop_ext import checks
from autodrop_ext.saved import Form, Later, dict_of, exactly, inside, list_of, load

STATE: dict[str, Any] = {
    "version": 2,
    "steps": 3,
    "rate": 0.5,
    "angle": None,
    "lrs": [0.1, 0.2],
    "meter": {"window": "4", "form": "sum"},
}


def test_entries_are_checked_and_converted() -> None:
    form: Form = {
        "version": exactly(1, 2),
        "steps": checks.at_least(3),
        "angle": checks.none_or(checks.finite),
        "lrs": list_of(checks.at_least_zero, 2),
        "meter": inside({"form": checks.choice("sum", "delta")}),
        "cooldown": Later(checks.flag, "no such entry then"),
    }
    assert load(STATE, form) == {
        "version": 2,
        "steps": 3,
        "angle": None,
        "lrs": [0.1, 0.2],
        "meter": {"form": "sum"},
        "cooldown": "no such entry then",
    }
    named = {"meter": dict_of(lambda name, value: (name, value))}
    assert load(STATE, named, "saved") == {
        "meter": {
            "window": ("saved['meter']['window']", "4"),
            "form": ("saved['meter']['form']", "sum"),
        }
    }


count, finite = checks.at_least(0), checks.finite


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"windows": count}, "saved: no entry 'windows'"),
        ({"rate": count}, "saved['rate']: expected an int, got 0.5"),
        ({"steps": checks.at_least(4)}, "saved['steps']: expected at least 4, got 3"),
        ({"steps": checks.flag}, "saved['steps']: expected a bool, got 3"),
        ({"lrs": finite}, "saved['lrs']: expected a finite number, got [0.1, 0.2]"),
        ({"steps": inside({})}, "saved['steps']: expected a dict, got int"),
        ({"steps": dict_of(finite)}, "saved['steps']: expected a dict, got int"),
        ({"rate": list_of(finite)}, "saved['rate']: expected a list, got 0.5"),
        ({"lrs": list_of(finite, 3)}, "saved['lrs']: expected 3 values, got 2"),
        ({"lrs": list_of(count)}, "saved['lrs'][0]: expected an int, got 0.1"),
        ({"steps": Later(checks.flag, True)}, "saved['steps']: expected a bool, got 3"),
        (
            {"version": exactly(1)},
            "saved['version']: expected 1, which this release reads, got 2",
        ),
        ({"steps": exactly(True, "x")}, "saved['steps']: expected True or 'x', got 3"),
        (
            {"meter": inside({"window": count})},
            "saved['meter']['window']: expected an int, got '4'",
        ),
        ({"meter": inside({"steps": count})}, "saved['meter']: no entry 'steps'"),
        # A check that knows nothing of states: the entry is put in front of its message.
        ({"rate": lambda name, value: {}[value]}, "saved['rate']: 0.5"),
    ],
)
def test_errors_are_value_errors_that_name_the_entry(form: Form, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load(STATE, form, "saved")


def test_other_errors_of_a_check_pass() -> None:
    with pytest.raises(ZeroDivisionError):
        load(STATE, {"steps": lambda name, value: value / 0})


def test_a_state_is_a_dict() -> None:
    with pytest.raises(ValueError, match=r"^state_dict: expected a dict, got list"):
        load([1], {})
