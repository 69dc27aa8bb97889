"""Reading saved states: every entry is checked, and an error names the entry."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from . import checks


class Entries:
    """The entries of a saved state, read by name.

    Args:
        state: what was loaded.
        name: how error messages call it.

    Raises:
        ValueError: it is no mapping; and in every method, where an entry is missing or is not what
            was expected.
    """

    def __init__(self, state: Any, name: str = "state_dict") -> None:
        if not isinstance(state, Mapping):
            raise ValueError(f"{name}: expected a dict, got {type(state).__name__}")
        self._state = state
        self._name = name

    def __contains__(self, key: str) -> bool:
        return key in self._state

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def name(self, key: str) -> str:
        """How error messages call an entry."""
        return f"{self._name}[{key!r}]"

    def value(self, key: str) -> Any:
        """An entry without any check."""
        if key not in self._state:
            raise ValueError(f"{self._name}: no entry {key!r}")
        return self._state[key]

    def read(self, key: str, check: Callable[[str, Any], Any]) -> Any:
        """An entry, converted by one of the functions of ``checks`` or one like them."""
        value = self.value(key)
        with problems_named(self.name(key)):
            return check(self.name(key), value)

    def expect(self, key: str, expected: int | str) -> None:
        """Check that an entry is what this release reads."""
        value = self.value(key)
        if type(value) is not type(expected) or value != expected:
            reads = ", which this release reads" if key == "version" else ""
            raise ValueError(f"{self.name(key)}: expected {expected!r}{reads}, got {value!r}")

    def count(self, key: str, least: int = 0) -> int:
        """An int of at least ``least``."""
        return int(self.read(key, lambda name, value: checks.count(name, value, least)))

    def number(self, key: str) -> float:
        """A finite number."""
        return float(self.read(key, checks.finite))

    def flag(self, key: str) -> bool:
        """A bool."""
        return bool(self.read(key, checks.flag))

    def maybe(self, key: str, check: Callable[[str, Any], Any]) -> Any:
        """None, or as :meth:`read`."""
        return None if self.value(key) is None else self.read(key, check)

    def list(self, key: str, check: Callable[[str, Any], Any], length: int | None = None) -> Any:
        """A list whose items are checked one by one."""
        values = self.value(key)
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise ValueError(f"{self.name(key)}: expected a list, got {values!r}")
        if length is not None and len(values) != length:
            raise ValueError(f"{self.name(key)}: expected {length} values, got {len(values)}")
        with problems_named(self.name(key)):
            return [check(f"{self.name(key)}[{i}]", value) for i, value in enumerate(values)]

    def inner(self, key: str) -> Entries:
        """The entries of a dict within this one."""
        return Entries(self.value(key), self.name(key))


@contextlib.contextmanager
def problems_named(name: str) -> Iterator[None]:
    """Turn what a check raises into a ValueError that names the entry."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        message = str(error)
        raise ValueError(message if name in message else f"{name}: {message}") from error
