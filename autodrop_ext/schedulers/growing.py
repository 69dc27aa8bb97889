"""GrowingScheduler: a scheduler on windows that grow with the run, and its automatic warm-up."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch.optim import Optimizer

from .. import checks
from ..checks import cosine, none_or
from ..reading import Reading
from ..saved import Form, Later, list_of
from .base import Outcome, in_precision_of
from .metered import MeteredScheduler

_FIRST_COSINES = 4  # before the first mean of them is trusted
FIRST_WINDOW = 2  # of the automatic warm-up, optimizer steps
_FIRST_SHARE = 16 / 512  # of the rates that were set
_STILL_STEPS = 16  # at its start, in which rates stay
_TRUSTED_WINDOW = 8  # the shortest that may end it
_ALL = 1 - 1e-5  # of a rate is all of it: products of float32 rates are rounded


@functools.lru_cache(maxsize=4)  # asked for at each end of a window
def walk_cosine(readings: int, window: int) -> float:
    """Return the cosine between the displacements of a random walk's window means.

    A mean contains the share ``f`` of a step that readings after it have. The step adds
    ``f (1 - f)`` to the dot product of neighbouring displacements, and ``f^2 + (1 - f)^2`` to the
    square of each. If ``k`` readings are evenly spaced, the quotient of the sums is
    ``(k^2 - 1) / (2 (2 k^2 + 1))``, which is 0 for one reading and 1/4 for many.

    Args:
        readings: ``k``, readings of each window, as evenly spaced as its steps allow.
        window: its steps, at least ``k``.
    """
    steps = readings if window % readings == 0 else window  # even ones are as if all were read
    after = [readings - step * readings // steps for step in range(steps)]
    dot = sum(n * (readings - n) for n in after)
    return dot / sum(n * n + (readings - n) ** 2 for n in after)


def _check_share(name: str, value: Any) -> float:
    return checks.number(name, value, "a number from 0 to 1", lambda x: 0 <= x <= 1)


GROWTH: Form = {
    "newest_cosines": list_of(cosine),
    "doubled": checks.flag,
    "mean_cosine": none_or(cosine),
    "share": _check_share,
    "rising": Later(checks.flag, False),
}
GROWN = {"newest_cosines": [], "doubled": True, "mean_cosine": None, "share": 1.0, "rising": False}
"""Values at the start of a run without an automatic warm-up."""


class GrowingScheduler(MeteredScheduler):
    """A scheduler whose windows double as the run goes on, always or in its automatic warm-up.

    In the automatic warm-up (``warmup_steps="auto"``) windows begin with 2 optimizer steps, and
    every rate with 1/32 of the one that was set. At the end of each window of ``w`` steps after
    step 16, rates are multiplied by ``(t / (t - w))^q`` with ``q = 2 (mean cosine - critical)``,
    from 0 to 1: they rise at most in proportion to the steps, and only as far as parameters still
    travel. A rate never passes the one that was set. The rise ends for good when that is reached,
    or with the first mean cosine of windows of 8 steps or more that is below ``critical``.

    Subclasses implement :meth:`_decide_risen`.
    """

    windows: int = 8
    critical: float = 0.25
    cosines: int = 8
    warmup_steps: int | Literal["auto"]

    _newest_cosines: list[float]  # of windows of one length, once one is known
    _doubled: bool  # whether the window has doubled since the newest cosine
    _mean_cosine: float | None
    _rising: bool
    _share: float  # of the rates that were set
    _next_window: int  # length of the window after the last decision's

    def __init__(
        self, optimizer: Optimizer, arguments: Mapping[str, Any], window: int | None
    ) -> None:
        meter = {} if window is None else {"window": window}
        super().__init__(optimizer, arguments, **meter)
        self._next_window = self.meter.window

    def _at_start(self) -> dict[str, Any]:
        start = {f"_{name}": value for name, value in GROWN.items()}
        if self.warmup_steps == "auto":
            start |= {"_rising": True, "_share": _FIRST_SHARE}
        return {**super()._at_start(), **start, "_next_window": self._first_window()}

    def _first_window(self) -> int:
        return FIRST_WINDOW if self.warmup_steps == "auto" else self._usual_window()

    def _usual_window(self) -> int:
        """Return the length of the first window without an automatic warm-up."""
        raise NotImplementedError

    def _before_step(self, optimizer: Optimizer) -> None:
        super()._before_step(optimizer)
        known = len(self.base_lrs)
        if self._rising and len(optimizer.param_groups) > known and self._hook.moves(optimizer):
            vars(self).update(self._of_added_groups())
            later = [self._share * float(lr) for lr in self.base_lrs[known:]]
            self._set_lrs([*[None] * known, *later])

    @staticmethod
    def _windows_until(steps: int, settings: Mapping[str, Any]) -> list[int]:
        """Return the lengths that windows may have had after a number of optimizer steps."""
        warmup, windows = settings["warmup_steps"], settings.get("windows", 8)
        automatic = warmup == "auto"
        lengths = [FIRST_WINDOW if automatic else settings["min_window"]]
        while steps - (0 if automatic else warmup) >= 2 * windows * lengths[-1]:
            lengths.append(2 * lengths[-1])
        return lengths

    def _initial_step(self) -> None:
        super()._initial_step()
        if self._optimizer_steps:  # it joins a run, with the rates that it had
            self._rising, self._share = False, 1.0
        elif self._rising:
            self._set_lrs(float(lr) * self._share for lr in self.base_lrs)
            self._last_lr = self._lrs()

    # ---- deciding ---------------------------------------------------------------------------

    def _decide(self, reading: Reading) -> Outcome:
        # The meter does not know of the warm-up.
        reading = dataclasses.replace(reading, step=self._optimizer_steps)
        return self._decide_rise(reading) if self._rising else self._decide_risen(reading)

    def _decide_risen(self, reading: Reading) -> Outcome:
        """Return what follows from a reading after an automatic warm-up, or without one."""
        raise NotImplementedError

    def _decide_rise(self, reading: Reading) -> Outcome:
        state = self._grown(reading)
        mean = self._usable_mean(reading, state)
        t, w, critical = self._optimizer_steps, self.meter.window, self._critical_for(reading)
        rise, share, warmup = 1.0, self._share, "rising"
        if mean is not None and t > _STILL_STEPS:
            if mean < critical and w >= _TRUSTED_WINDOW:
                warmup = "confined"
            else:
                rise = (t / (t - w)) ** min(1.0, max(0.0, 2 * (mean - critical)))
                share *= rise
                if share >= _ALL:
                    share, warmup = 1.0, "reached"
        state |= {"_share": share, "_rising": warmup == "rising"}
        return self._outcome(reading, self._raised(rise), state, warmup=warmup)

    def _outcome(
        self, reading: Reading, lrs: Sequence[float | None], state: dict[str, Any], **fields: Any
    ) -> Outcome:
        """Return an outcome with the subclass's record of the reading."""
        raise NotImplementedError

    def _raised(self, rise: float) -> list[float | None]:
        """Return the rates times ``rise``, up to those that were set; None for those that stay."""
        raised: list[float | None] = []
        for lr, base in zip(self._rates(), self.base_lrs, strict=False):
            new = rise * float(lr)
            new = in_precision_of(lr, float(base) if new >= _ALL * float(base) else new)
            raised.append(new if new > float(lr) else None)
        return raised

    def _grown(self, reading: Reading) -> dict[str, Any]:
        """Return the state of cosines and windows after a reading."""
        newest, mean = self._newest_cosines, self._mean_cosine
        if reading.cosine is not None:
            if self._doubled and mean is not None:
                newest = []
            newest = [*newest, reading.cosine][-self.cosines :]
            if mean is not None or len(newest) >= min(_FIRST_COSINES, self.cosines):
                mean = math.fsum(newest) / len(newest)
        t, w = self._optimizer_steps - self._linear_warmup, self.meter.window
        doubles = t >= 2 * self.windows * w and self.meter.windows_since_restart >= 2
        return {
            "_newest_cosines": newest,
            "_doubled": doubles or (self._doubled and reading.cosine is None),
            "_mean_cosine": mean,
            "_next_window": 2 * w if doubles else w,
            "_decided": reading.window,
        }

    def _usable_mean(self, reading: Reading, state: Mapping[str, Any]) -> float | None:
        """Return the mean cosine if rates may follow it now.

        The first angle of a doubled window is not known yet, and the mean stays in use. With any
        other that is not known nothing follows: parameters were not finite, did not move, or were
        replaced.
        """
        last = self.history[-1] if self.history else None
        has_doubled = self._doubled and last is not None and last.cosine is not None
        expected = has_doubled and self.meter.windows_since_restart == 2
        known = reading.cosine is not None or expected
        mean: float | None = state["_mean_cosine"]
        return mean if known and self._cooldown is None else None

    def _critical_for(self, reading: Reading) -> float:
        """Return ``critical`` for as many readings as windows of the mean's length have."""
        window = self.meter.window if reading.cosine is not None else self.meter.window // 2
        snapshots = self.meter.snapshots
        readings = window if snapshots is None else min(snapshots, window)
        return self.critical * walk_cosine(readings, window) / 0.25

    def _carry_out(self) -> None:
        if self._unwritten is not None and self.meter.window != self._next_window:
            if self._doubled and self.meter.windows_since_restart >= 2:
                self.meter.double_window()
            else:  # the warm-up has ended; or an interrupt, where other ranks have doubled theirs
                self.meter.start_over(self._next_window)
        super()._carry_out()

    # ---- state ------------------------------------------------------------------------------

    def _grown_attributes(
        self, growth: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return attributes from saved ones; raise ValueError if the settings forbid them."""
        if growth["rising"] and settings["warmup_steps"] != "auto":
            raise ValueError(
                "state_dict['rising']: expected False with warmup_steps="
                f"{settings['warmup_steps']}, got True"
            )
        newest = growth["newest_cosines"][-settings.get("cosines", self.cosines) :]
        return {f"_{name}": growth[name] for name in GROWTH} | {"_newest_cosines": newest}

    def _take_over(self, loaded: dict[str, Any]) -> None:
        super()._take_over(loaded)
        self._next_window = self.meter.window
