"""The form of a saved state: its entries by name, each with the check that it must pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .checks import Check


@dataclass(frozen=True)
class Later:
    """An entry that states of earlier releases lack.

    Attributes:
        check: of the entry.
        value: what takes its place in a state without it.
    """

    check: Check
    value: Any


Form = Mapping[str, "Check | Later"]


def load(state: Any, form: Form, name: str = "state_dict") -> dict[str, Any]:
    """Return the entries of a state, checked one after the other; changes nothing.

    Args:
        state: what was loaded. Entries that are not in the form are passed over.
        form: a check for each entry.
        name: of the state, for messages.

    Raises:
        ValueError: the state is no dict, or an entry is missing or wrong; the message names it.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"{name}: expected a dict, got {type(state).__name__}")
    return {key: _entry(state, key, check, name) for key, check in form.items()}


def _entry(state: Mapping[str, Any], key: str, check: Check | Later, name: str) -> Any:
    if key not in state:
        if isinstance(check, Later):
            return check.value
        raise ValueError(f"{name}: no entry {key!r}")
    entry = f"{name}[{key!r}]"
    try:
        return (check.check if isinstance(check, Later) else check)(entry, state[key])
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        message = str(error)
        raise ValueError(message if entry in message else f"{entry}: {message}") from error


def exactly(*expected: int | str) -> Check:
    """Return the check of an entry that must be one of these values."""

    def check(name: str, value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in expected):
            reads = ", which this release reads" if name.endswith("['version']") else ""
            ones = " or ".join(map(repr, expected))
            raise ValueError(f"{name}: expected {ones}{reads}, got {value!r}")
        return value

    return check


def list_of(check: Check, length: int | None = None) -> Check:
    """Return the check of a list whose values all pass another one."""

    def check_list(name: str, value: Any) -> list[Any]:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(f"{name}: expected a list, got {value!r}")
        if length is not None and len(value) != length:
            raise ValueError(f"{name}: expected {length} values, got {len(value)}")
        return [check(f"{name}[{i}]", item) for i, item in enumerate(value)]

    return check_list


def dict_of(check: Check) -> Check:
    """Return the check of a dict whose values, under whatever keys, all pass another one."""

    def check_dict(name: str, value: Any) -> dict[str, Any]:
        return load(value, dict.fromkeys(value, check) if isinstance(value, Mapping) else {}, name)

    return check_dict


def inside(form: Form) -> Check:
    """Return the check of a dict of this form."""
    return lambda name, value: load(value, form, name)
