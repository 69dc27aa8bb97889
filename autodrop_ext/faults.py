"""Trouble that the meter meets: recognised here, and said once in words."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from .distributed import Ranks
from .ops import Sums
from .ops.device_sums import Arenas

_STILL_WINDOWS = 5  # windows without displacement before a warning
_HALF_DTYPES = (torch.float16, torch.bfloat16)


class Faults:
    """Says each kind of trouble once per meter.

    Attributes:
        still_windows: how many windows in a row had no displacement at all.
    """

    def __init__(self) -> None:
        self.still_windows = 0
        self._said: set[str] = set()

    def parameters_changed(self, windows: int) -> None:
        """The tensors are not those that the plan was made of."""
        self._say(
            "changed",
            "the watched parameters were moved, replaced, added or frozen; the window is discarded "
            f"and the next angle comes after {windows} windows",
        )

    def cannot_continue(self, reason: str, windows: int) -> None:
        """A checkpoint's arenas do not fit."""
        self._say(
            "rewarm",
            f"the saved sums cannot be continued ({reason}); the meter warms up again and the next "
            f"angle comes after {windows} windows",
        )

    def not_finite(
        self,
        all_arenas: Sequence[Arenas],
        window: int,
        windows: int,
        ranks: Ranks | None,
        guilty: Sequence[int],
    ) -> None:
        """The sums of ``window`` are not finite: name the first tensor to blame, or the rank.

        Args:
            guilty: ranks whose sums are not finite. Said on those, and on the first of all ranks.
        """
        consequence = (
            f"held NaN or infinity during window {window}; the angle is undefined and no learning "
            f"rate is dropped until {windows} windows are finite again"
        )
        if ranks is not None and ranks.rank not in guilty:
            if ranks.rank == 0:
                self._say("nonfinite", f"rank {', '.join(map(str, guilty))} {consequence}")
            return
        where = "" if ranks is None else f" on rank {ranks.rank}"
        for arenas in all_arenas:
            finite = arenas.per_tensor.isfinite().all(dim=1).tolist()
            for segment, good in zip(arenas.plan.segments, finite, strict=True):
                if not good:
                    self._say("nonfinite", f"{segment.name}{where} {consequence}")
                    return

    def no_memory_for_more(self, error: RuntimeError) -> None:
        """A sample could not take the place of another."""
        self._say("memory", f"{error}; the meter goes on with the part that it reads")

    def watch_displacement(
        self, sums: Sums, all_arenas: Sequence[Arenas], *, sampled: bool
    ) -> None:
        """Look at a window's displacement for parameters that do not move."""
        self.still_windows = self.still_windows + 1 if sums.norm == 0 else 0
        if self.still_windows == _STILL_WINDOWS and sampled:
            self._say(
                "still",
                f"no parameter of the sample moved during the last {_STILL_WINDOWS} windows, so "
                "the angle is undefined and no learning rate is dropped; a larger sample= may hold "
                "some that move",
            )
        elif self.still_windows == _STILL_WINDOWS:
            self._say(
                "still",
                f"no parameter moved during the last {_STILL_WINDOWS} windows, so the angle is "
                "undefined and no learning rate is dropped; is this the optimizer that trains the "
                "watched parameters, and is its learning rate above zero?",
            )
        if "half" not in self._said:
            self._watch_half_precision(all_arenas)

    def _watch_half_precision(self, all_arenas: Sequence[Arenas]) -> None:
        lost = total = 0
        for arenas in all_arenas:
            half = [s.alias.dtype in _HALF_DTYPES for s in arenas.plan.segments]
            if not any(half):
                continue
            per_tensor = map(Sums._make, arenas.per_tensor.tolist())
            for segment, sums, is_half in zip(arenas.plan.segments, per_tensor, half, strict=True):
                if is_half:
                    # An element that moves at all moves by about eps / 2 of itself, and on average
                    # half of the window has passed by then: 0.003 eps^2 is one element in twenty.
                    eps = torch.finfo(segment.alias.dtype).eps
                    total += segment.flat.numel()
                    if sums.norm < 0.003 * eps**2 * sums.mean_norm:
                        lost += segment.flat.numel()
        if lost > total / 2:
            self._say(
                "half",
                f"{lost:,} of {total:,} half-precision parameters hardly moved during a window: "
                "their steps are smaller than the format resolves, and the angle is that of "
                "roundings; pass the float32 master weights as params=",
            )

    def _say(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(f"AngularVelocity: {message}", RuntimeWarning, stacklevel=4)
