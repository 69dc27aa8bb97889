"""The meter's warnings: each kind of trouble is recognised here and reported once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .distributed.group import Alone, Group
from .messages import Warnings
from .ops.device_sums import DeviceSums
from .ops.interface import Sums
from .ops.window_sums import WindowSums
from .reading import Reading

_STILL_WINDOWS = 5  # windows without displacement before a warning
_UNKNOWN_ERRORS = 5  # angles in a row whose error a sample cannot tell, before a warning


def _too_large(tensor: Tensor) -> bool:
    """Return whether all values are finite but float32 cannot hold the sums of a long window."""
    return tensor.numel() > 0 and 1e33 < float(tensor.abs().max()) < float("inf")


class Faults:
    """Reports each kind of trouble of a meter once.

    Attributes:
        warnings: how it does that.
        still_windows: how many windows in a row had no displacement at all.
    """

    def __init__(self) -> None:
        self.warnings = Warnings("AngularVelocity")
        self.still_windows = 0
        self._unknown_errors = 0

    def parameters_changed(self, windows: int) -> None:
        """Warn that the parameters were changed."""
        self.warnings.once(
            "changed",
            "the watched parameters were moved, replaced, added or frozen; the window is discarded "
            f"and the next angle comes after {windows} windows",
        )

    def interrupted(self, windows: int) -> None:
        """Warn that an observation was interrupted."""
        self.warnings.once(
            "interrupted",
            "the last observation was interrupted (by Ctrl-C or an error); the window is discarded "
            f"and the next angle comes after {windows} windows",
        )

    def cannot_continue(self, reason: str, windows: int) -> None:
        """Warn that saved sums do not fit."""
        self.warnings.once(
            "rewarm",
            f"the saved sums cannot be continued ({reason}); the meter warms up again and the next "
            f"angle comes after {windows} windows",
        )

    def not_finite(
        self,
        sums: WindowSums,
        window: int,
        windows: int,
        group: Group,
        guilty: Sequence[int],
    ) -> None:
        """The sums of ``window`` are not finite: name the first tensor to blame, or the rank.

        Args:
            guilty: ranks whose sums are not finite. Those warn, and the first of all ranks.
        """
        consequence = (
            f"held NaN or infinity during window {window}; the angle is undefined and no learning "
            f"rate is dropped until {windows} windows are finite again"
        )
        if group.rank not in guilty:
            if group.rank == 0:
                ranks = ", ".join(map(str, guilty))
                self.warnings.once("nonfinite", f"rank {ranks} {consequence}")
            return
        where = "" if isinstance(group, Alone) else f" on rank {group.rank}"
        for device in sums.devices:
            finite = torch.from_numpy(device.per_tensor()).isfinite().all(dim=1).tolist()
            for segment, good in zip(device.plan.segments, finite, strict=True):
                if not good and _too_large(segment.alias):
                    self.warnings.once(
                        "nonfinite",
                        f"{segment.name}{where} held values during window {window} whose float32 "
                        "sums overflow (beyond 3.4e38); the angle is undefined and no learning "
                        "rate is dropped",
                    )
                    return
                if not good:
                    self.warnings.once("nonfinite", f"{segment.name}{where} {consequence}")
                    return

    def watch_displacement(self, totals: Sums, sums: WindowSums, *, first: bool) -> None:
        """Look at a window's displacement for parameters that do not move.

        Args:
            first: whether there is no displacement before it.
        """
        # A displacement of denormal numbers may be lost where it becomes the previous one.
        still = totals.norm == 0 or (totals.previous_norm == 0 and not first)
        self.still_windows = self.still_windows + 1 if still else 0
        if self.still_windows == _STILL_WINDOWS and sums.fraction < 1:
            self.warnings.once(
                "still",
                f"no parameter of the sample moved during the last {_STILL_WINDOWS} windows, so "
                "the angle is undefined and no learning rate is dropped; a larger sample= may hold "
                "some that move",
            )
        elif self.still_windows == _STILL_WINDOWS and (totals.mean_norm == 0 or totals.norm > 0):
            self.warnings.once(
                "still",
                f"the parameters were zero during the last {_STILL_WINDOWS} windows, or smaller "
                "than float32 sums can hold (1.4e-45), so the angle is undefined and no learning "
                "rate is dropped",
            )
        elif self.still_windows == _STILL_WINDOWS:
            self.warnings.once(
                "still",
                f"no parameter moved during the last {_STILL_WINDOWS} windows, so the angle is "
                "undefined and no learning rate is dropped; is this the optimizer that trains the "
                "watched parameters, and is its learning rate above zero?",
            )
        if not self.warnings.has_warned("half"):
            self._watch_half_precision(sums.devices)

    def watch_certainty(self, reading: Reading) -> None:
        """Look for a sample that holds too few moving parameters to know the angle's error."""
        unknown = reading.angle is not None and math.isnan(reading.standard_error)
        self._unknown_errors = self._unknown_errors + 1 if unknown else 0
        if self._unknown_errors == _UNKNOWN_ERRORS:
            self.warnings.once(
                "certainty",
                f"the standard error of the last {_UNKNOWN_ERRORS} angles is unknown, because too "
                "few parameters of the sample moved; no learning rate is dropped on such an angle. "
                "A larger sample= holds more of them, and sample=None all",
            )

    def _watch_half_precision(self, devices: Sequence[DeviceSums]) -> None:
        lost = total = 0
        for device in devices:
            half = device.plan.half_precision
            if not half:
                continue
            table = device.per_tensor()
            for i in half:
                segment, sums = device.plan.segments[i], Sums(*table[i])
                # An element that moves at all moves by about eps / 2 of itself, and on average
                # half of the window has passed by then: 0.003 eps^2 is one element in twenty.
                eps = torch.finfo(segment.alias.dtype).eps
                total += segment.flat.numel()
                if sums.norm < 0.003 * eps**2 * sums.mean_norm:
                    lost += segment.flat.numel()
        if lost > total / 2:
            self.warnings.once(
                "half",
                f"{lost:,} of {total:,} half-precision parameters hardly moved during a window: "
                "their updates are smaller than the format can resolve, so the angle shows "
                "rounding and not training; pass the float32 master weights as params=",
            )
