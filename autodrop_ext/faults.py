"""The meter's warnings: each kind of trouble is recognised here and reported once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .messages import Warnings
from .ranks import Ranks
from .sketch import Sketch, Totals

_STILL_WINDOWS = 5  # windows without displacement before a warning


class Faults:
    """Reports each kind of trouble of a meter once.

    Args:
        warnings: through which it does that.

    Attributes:
        still_windows: windows in a row without any displacement.
    """

    def __init__(self, warnings: Warnings) -> None:
        self.warnings = warnings
        self.still_windows = 0

    def parameters_changed(self, windows: int) -> None:
        """Warn that the parameters were changed."""
        self.warnings.once(
            "changed",
            "the measured parameters were replaced, added, resized or unfrozen; the window is "
            f"discarded and the next angle comes after {windows} windows",
        )

    def interrupted(self, windows: int) -> None:
        """Warn that an observation was interrupted."""
        self.warnings.once(
            "interrupted",
            "the last observation was interrupted (by Ctrl-C or an error); the window is discarded "
            f"and the next angle comes after {windows} windows",
        )

    def cannot_continue(self, reason: str, windows: int) -> None:
        """Warn that saved tables do not fit."""
        self.warnings.once(
            "rewarm",
            f"the saved tables cannot be continued ({reason}); the meter warms up again and the "
            f"next angle comes after {windows} windows",
        )

    def not_finite(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        window: int,
        windows: int,
        ranks: Ranks,
        bad_ranks: Sequence[int],
    ) -> None:
        """Warn that a table is not finite, and name the first tensor that is not, or the rank.

        Args:
            tensors: names and tensors on this rank.
            window: index of the window.
            windows: that have to be finite before the next angle.
            ranks: which this one belongs to.
            bad_ranks: those whose tables are not finite. They warn, and the first of all ranks.
        """
        consequence = (
            f"held NaN or infinity during window {window}; the angle is undefined and no learning "
            f"rate is dropped until {windows} windows are finite again"
        )
        if ranks.rank not in bad_ranks:
            if ranks.rank == 0:
                listed = ", ".join(map(str, bad_ranks))
                self.warnings.once("nonfinite", f"rank {listed} {consequence}")
            return
        where = f" on rank {ranks.rank}" if ranks.size > 1 else ""
        bad = (name for name, tensor in tensors if not bool(tensor.isfinite().all()))
        # The parameters may be finite again, if they were loaded or clipped since.
        name = next(bad, "a parameter")
        self.warnings.once("nonfinite", f"{name}{where} {consequence}")

    def watch_motion(self, sketch: Sketch, totals: Totals, window: int, windows: int) -> None:
        """Look at a window's displacement for parameters that do not move.

        Args:
            sketch: whose window it is.
            totals: its sums.
            window: steps per window.
            windows: since the meter started; the first displacement comes with the second.
        """
        if windows < 2:
            return
        self.still_windows = 0 if totals.norm.any() else self.still_windows + 1
        if self.still_windows == _STILL_WINDOWS:
            self.warnings.once(
                "still",
                f"no parameter moved during the last {_STILL_WINDOWS} windows, so the angle is "
                "undefined and no learning rate is dropped; is this the optimizer that trains the "
                "measured parameters, and is its learning rate above zero?",
            )
        if sketch.half_precision and not self.warnings.has_warned("half"):
            # Steps of a random walk with this displacement, squared. Below eps, angles are wrong by
            # 3 degrees and more; docs/precision.md has the measurement.
            step = float(totals.norm.sum()) * 3 * window / (2 * window**2 + 1)
            eps = torch.finfo(sketch.half_precision).eps
            if step < eps**2 * sketch.mean_norm():
                self.warnings.once(
                    "half",
                    "the half-precision parameters hardly move: a step changes them by less than "
                    f"{eps:.2g} of their size, a few units in the last place, so the angle shows "
                    "rounding and not training; pass float32 master weights, or parameters plus "
                    "their compensations, as params=",
                )
