"""What ranks exchange at the end of a window: one row and some numbers, in one collective."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..ops.interface import Sums
from ..ops.window_sums import Extra, WindowSums
from .agreement import (
    Agreement,
    Row,
    add_in_order,
    agree,
    check_facts,
    effective_elements,
    facts_differ,
)
from .group import Alone, Group
from .layout import Layout, digest

Facts = Callable[[], Mapping[str, Any]]
"""Returns what decisions depend on, plain values by name; "lr" holds the learning rates."""


class Counts(NamedTuple):
    """The counts of a rank, which its :class:`Row` has under the same names."""

    steps: int
    windows: int
    window: int
    calls: int
    windows_since_restart: int
    restart: bool


class Exchange:
    """Brings this rank's sums together with those of the others.

    Args:
        owner: class that the user made, for messages.

    Attributes:
        owner: the argument.
        group: who decides together.
        compared: whether the ranks have compared their settings.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.group: Group = Alone()
        self.compared = False
        self._numbers: int | None = None  # sent by all ranks next to their rows, once agreed

    def compare_once(self, facts: Facts) -> None:
        """Compare facts unless that was done; two collectives, none where alone.

        Raises:
            DisagreementError: a value differs; raised on all ranks alike.
        """
        if not self.compared:
            self._compare(facts)
            self.compared = True

    def _compare(self, facts: Facts) -> None:
        if isinstance(self.group, Alone):
            return
        here = json.dumps([self.group.stage, dict(facts())])
        with self._waiting("its settings could not be compared"):
            gathered = [json.loads(text) for text in self.group.gather_text(here)]
        check_facts([values for _, values in gathered], [stage for stage, _ in gathered])

    @contextlib.contextmanager
    def _waiting(self, problem: str) -> Iterator[None]:
        """Add to the error of a failed collective what it means."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.owner} on rank {self.group.rank}: {problem} with the other "
                f"{self.group.size - 1} ranks: one of them is dead, late, or counts fewer steps; "
                "no learning rate was changed"
            ) from error

    def close(
        self,
        counts: Counts,
        layout: Layout,
        sums: WindowSums,
        totals: Sums,
        extras: Sequence[Extra],
        facts: Facts,
    ) -> tuple[Agreement, list[float] | None]:
        """Totals over all ranks, and the numbers next to them unless some rank has none.

        Rows must be of one length, also where a rank has just found other parameters than the
        others. So every rank sends as many numbers next to its row as the rows of the last window
        have shown all of them to have. The first window, and the first after a start over, gathers
        the rows alone; then, if they agree, the numbers.

        Args:
            counts: counts of this rank.
            layout: what this rank holds.
            sums: the sums that were closed.
            totals: their weighted totals on this rank.
            extras: what is added to the totals.
            facts: what decisions depend on.

        Raises:
            DisagreementError: ranks did not measure the same; raised on all of them alike.
            RuntimeError: a rank is dead or late.
        """
        numbers = [number for extra in extras for number in extra.local(sums)]
        if isinstance(self.group, Alone):
            elements = layout.elements
            effective = effective_elements(elements, totals, self._concentration(sums, counts))
            bad = [] if all(map(math.isfinite, totals)) else [0]
            return Agreement(totals, elements, effective, counts.restart, bad), numbers
        row = self._row(counts, layout, sums, totals, facts, len(numbers))
        sent, self._numbers = self._numbers, None
        sent_numbers = numbers if len(numbers) == sent else [math.nan] * (sent or 0)
        ended = f"window {counts.windows} ended after {counts.steps} optimizer steps"
        with self._waiting(f"{ended}, but its sums could not be exchanged"):
            gathered = self.group.gather([*row, *sent_numbers])
        rows = [Row(*values[: len(row)]) for values in gathered]
        every = [values[len(row) :] for values in gathered]
        agreement = agree(rows)
        if facts_differ(rows):
            self._compare(facts)
        if sent is None and not agreement.restart and numbers:
            with self._waiting(f"{ended}, but its numbers could not be exchanged"):
                every = self.group.gather(numbers)
        if agreement.restart:
            return agreement, None
        self._numbers = len(numbers)
        return agreement, add_in_order(every) if len(every[0]) == len(numbers) else None

    def _concentration(self, sums: WindowSums, counts: Counts) -> float:
        """Return the sums' concentration, or 0 where the window was not closed."""
        return 0.0 if counts.restart or counts.windows_since_restart == 0 else sums.concentration()

    def _row(
        self,
        counts: Counts,
        layout: Layout,
        sums: WindowSums,
        totals: Sums,
        facts: Facts,
        numbers: int,
    ) -> Row:
        values = dict(facts())
        rates = values.pop("lr", None)
        return Row(
            **counts._asdict(),
            settings=digest([json.dumps(values)]),
            rates=digest([json.dumps(rates)]),
            layout=layout.layout,
            held=layout.held(sums.digests),
            stage=self.group.stage,
            num_stages=self.group.num_stages,
            numbers=numbers,
            elements=layout.elements,
            concentration=self._concentration(sums, counts),
            model_elements=layout.model_elements,
            replicated=layout.replicated(sums),
            **totals._asdict(),
        )
