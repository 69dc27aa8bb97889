"""The end of a window on all ranks: one row and the numbers beside it, one collective."""

from __future__ import annotations

import math
from typing import NamedTuple

from .backends import Sums
from .details import Added
from .distributed import Agreement, DisagreementError, Ranks, Row, add_in_order, agree
from .reader import Reader


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
        self._numbers = 0  # beside the row, that all ranks send next

    def agree(
        self, reader: Reader, counts: Counts, sums: Sums, next_numbers: int
    ) -> tuple[Agreement, Added | None]:
        """Sums over all ranks, and the numbers beside them unless some rank could not send them.

        Rows must be of one length, also where a rank has just found other parameters than the
        others. So every rank sends as many numbers beside its row as all of them had at the last
        window, whose rows have shown that they are alike; the first window goes without.

        Args:
            reader: that was closed.
            counts: of this rank.
            sums: of this rank, weighted.
            next_numbers: how many there will be beside the next row.

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
            elements=holding.elements,
            model_elements=holding.model_elements,
            replicated=holding.replicated([a.per_tensor for a in reader.arenas]),
            **sums._asdict(),
        )
        sent, self._numbers = self._numbers, 0
        if len(numbers) != sent:
            numbers = [math.nan] * sent
        try:
            rows = self.ranks.gather([*row, *numbers])
            agreement = agree([Row(*values[: len(row)]) for values in rows])
        except DisagreementError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"AngularVelocity: window {counts.windows} ended on rank {self.ranks.rank} after "
                f"{counts.steps} optimizer steps, but its sums could not be exchanged with the "
                f"other {self.ranks.size - 1} ranks: one of them is dead, late, or counts fewer "
                "steps; no learning rate was changed"
            ) from error
        self._numbers = next_numbers
        if agreement.start_over or sent != details.size:
            return agreement, None
        return agreement, details.added(add_in_order([values[len(row) :] for values in rows]))
