"""The end of a window on all ranks: one row and the numbers beside it, one collective."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..ops import Sums
from ..ops.window_sums import Reader
from ..parts import Added
from . import Agreement, DisagreementError, Ranks, Row, add_in_order, agree


class Counts(NamedTuple):
    """Where a rank is: entries of :class:`Row` of the same names."""

    steps: int
    windows: int
    window: int
    calls: int
    usable: int


class Exchange:
    """Brings this rank's sums together with those of the others.

    Attributes:
        ranks: who decides together; None where this process trains alone.
    """

    def __init__(self) -> None:
        self.ranks: Ranks | None = None
        self._numbers: int | None = None  # that all ranks send beside their rows, once agreed

    def restart(self) -> None:
        """Begin as a new one: with the rows alone."""
        self._numbers = None

    def agree(self, reader: Reader, counts: Counts, sums: Sums) -> tuple[Agreement, Added | None]:
        """Sums over all ranks, and the numbers beside them unless some rank could not send them.

        Rows must be of one length, also where a rank has just found other parameters than the
        others. So every rank sends as many numbers beside its row as the rows of the last window
        have shown all of them to have. The first window, and the first after a start over, gathers
        the rows alone; then, if they agree, the numbers.

        Args:
            reader: that was closed.
            counts: of this rank.
            sums: of this rank, weighted.

        Raises:
            DisagreementError: ranks did not measure the same; raised on all of them alike.
            RuntimeError: a rank is dead or late.
        """
        holding, details = reader.holding, reader.details
        numbers = details.gather()
        if self.ranks is None:
            bad = [] if all(map(math.isfinite, sums)) else [0]
            agreement = Agreement(sums, holding.elements, counts.usable < 0, bad)
            return agreement, details.added(numbers)
        row = Row(
            **counts._asdict(),
            layout=holding.layout,
            held=holding.held,
            stage=self.ranks.stage,
            num_stages=self.ranks.num_stages,
            numbers=details.size,
            elements=holding.elements,
            model_elements=holding.model_elements,
            replicated=holding.replicated([a.per_tensor for a in reader.arenas]),
            **sums._asdict(),
        )
        sent, self._numbers = self._numbers, None
        beside = numbers if len(numbers) == sent else [math.nan] * (sent or 0)
        try:
            gathered = self.ranks.gather([*row, *beside])
            agreement = agree([Row(*values[: len(row)]) for values in gathered])
            every = [values[len(row) :] for values in gathered]
            if sent is None and not agreement.start_over and numbers:
                every = self.ranks.gather(numbers)
        except DisagreementError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"AngularVelocity: window {counts.windows} ended on rank {self.ranks.rank} after "
                f"{counts.steps} optimizer steps, but its sums could not be exchanged with the "
                f"other {self.ranks.size - 1} ranks: one of them is dead, late, or counts fewer "
                "steps; no learning rate was changed"
            ) from error
        if agreement.start_over:
            return agreement, None
        self._numbers = details.size
        if len(every[0]) != details.size:
            return agreement, None
        return agreement, details.added(add_in_order(every))
