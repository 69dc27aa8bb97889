"""AnytimeAutoDrop: a schedule for runs of any length."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from .. import checks
from ..meter import AngularVelocity
from ..reading import Decision, Reading
from ..saved import Entries
from .base import Changes, check_optimizer
from .drop import DropScheduler
from .rates import as_floats, dropped, lower_bounds

if TYPE_CHECKING:
    import matplotlib.figure

_FIRST_COSINES = 4  # before the first mean of them is trusted
_LEAST_WINDOWS = 2  # with 1 the window would double before it has had an angle


@dataclass(frozen=True)
class AnytimeDecision(Decision):
    """What :class:`AnytimeAutoDrop` made of one window.

    ``step`` counts the optimizer steps so far, the warm-up's included; ``smoothed`` and ``rise``
    stay None.

    Attributes:
        window_steps: length of the window, optimizer steps.
        mean_cosine: mean of the newest cosines, which the exponent follows from; None where there
            have not been four of them.
        power: exponent ``p``: the rates were multiplied by ``((t - w) / t)^p``. 0 where parameters
            travel, None where there is no mean cosine, in a cooldown, and where the angle is not
            known for another reason than a doubling of the window; the rates stay as they are then.
    """

    window_steps: int = 0
    mean_cosine: float | None = None
    power: float | None = None


class AnytimeAutoDrop(DropScheduler):
    """Lowers the learning rate as fast as a power of time, where parameters no longer travel.

    The length of the run need not be known. The meter's windows grow with the run, so that the
    angle between their displacements is that of the time scale the run has reached. Its cosine is
    compared with that of a random walk, which is 1/4 for the means of long windows: above it the
    parameters travel and the rates stay, below it they are confined, and at the end of each window
    of ``w`` steps every rate is multiplied by ``((t - w) / t)^p``, with ``t`` steps since the
    warm-up and ``p = min(max_power, gain * max(0, critical - mean cosine))``. So ``d ln(lr) / d
    ln(t) = -p``: a rate never falls faster than ``t^-max_power``, and it is never raised.

    The rate does not anneal to zero. Evaluate and save with :meth:`averaged_parameters`, which
    averages over the last 1/8 to 0.3 of the run at no cost, or call :meth:`cooldown` when the end
    of the run is known.

    The rule is ours and is in neither paper. ``docs/anytime.md`` explains it and compares it with
    other schedules: schedule-free training is better on some tasks, and an initial rate at which
    training diverges is not rescued.

    Args:
        optimizer: any ``torch.optim.Optimizer``; learning rates may be floats or tensors.
        min_window: length of the first windows, optimizer steps.
        windows: ``N``, at least 2: the window doubles once ``t`` has reached ``2 N`` windows, so
            that a run has seen ``N`` to ``2 N`` windows of the present length.
        snapshots: how many times a window the parameters are read, evenly spaced.
        critical: cosine below which rates fall; 1/4 is a random walk's.
        gain: exponent for each unit of cosine below ``critical``.
        max_power: largest exponent.
        average: how many of the newest cosines of windows of one length are averaged.
        min_lr: lower bound of the rate, one for all param groups or one for each.
        warmup_steps: optimizer steps of linear warm-up, during which nothing is measured.
        params: what is measured instead of the optimizer's trainable parameters, such as float32
            master weights; forms as in :class:`AngularVelocity`.
        sample: part of the parameters that is read, in (0, 1]; None for all.
        seed: seed of the sample.
        backend: "auto", or the name of one (``autodrop doctor`` lists them).
        process_group: as in :class:`AngularVelocity`.
        on_reading: called with the :class:`AnytimeDecision` of every window, such as a
            :class:`JsonLinesLog`.
        on_drop: called with those that lowered a rate.
        last_epoch: as in torch's schedulers. A scheduler that joins a run without its checkpoint
            takes it for the optimizer steps so far, and begins with the window of that length.

    Raises:
        ValueError, TypeError: an argument is wrong; the message gives it, what was expected and
            what came.

    Attributes:
        history: the last 10,000 :class:`AnytimeDecision` objects.
        num_drops: how often a learning rate was lowered.
        window: present length of a window, optimizer steps.
    """

    _record_type = AnytimeDecision
    averaged_windows = "all"
    _window_follows_from = (
        " by min_window, windows and warmup_steps of its settings, and optimizer_steps"
    )

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        min_window: int = 16,
        windows: int = 8,
        snapshots: int = 32,
        critical: float = 0.25,
        gain: float = 5.0,
        max_power: float = 0.5,
        average: int = 8,
        min_lr: float | Iterable[float] = 0.0,
        warmup_steps: int = 0,
        params: Any = None,
        sample: float | None = None,
        seed: int = 0,
        backend: str = "auto",
        process_group: Any = None,
        on_reading: Callable[[AnytimeDecision], object] | None = None,
        on_drop: Callable[[AnytimeDecision], object] | None = None,
        last_epoch: int = -1,
    ) -> None:
        optimizer = check_optimizer(optimizer)
        self.min_window = checks.count("min_window", min_window, 1)
        self.windows = checks.count("windows", windows, _LEAST_WINDOWS)
        self.snapshots = checks.count("snapshots", snapshots, 1)
        self.critical = _check_cosine("critical", critical)
        self.gain = checks.number("gain", gain)
        self.max_power = checks.number("max_power", max_power)
        self.average = checks.count("average", average, 1)
        self._cosines: list[float] = []  # of windows of one length, but for the first after it grew
        self._fresh = True  # whether the window has grown since the newest cosine
        self._mean_cosine: float | None = None
        self._factor = 1.0  # product of all factors so far
        self._next_window = self.min_window  # length of the window after the last decision's
        lrs = as_floats(group["lr"] for group in optimizer.param_groups)
        meter = AngularVelocity(
            optimizer if params is None else params,
            self.min_window,
            sample=sample,
            seed=seed,
            snapshots=self.snapshots,
            backend=backend,
            process_group=process_group,
        )
        super().__init__(
            optimizer,
            meter,
            min_lr=min_lr,
            on_reading=on_reading,
            on_drop=on_drop,
            warmup_steps=warmup_steps,
            last_epoch=last_epoch,
        )
        if last_epoch > 0:
            self._join(last_epoch, lrs)

    @property
    def window(self) -> int:
        """Present length of a window, optimizer steps."""
        return self.meter.window

    def _time(self) -> int:
        """``t``, optimizer steps since the warm-up."""
        return self._optimizer_steps - self.warmup_steps

    def _join(self, steps: int, lrs: Sequence[float]) -> None:
        """Take part in a run after so many optimizer steps, with the rates that it had."""
        self._optimizer_steps = steps
        self._set_lrs(self._warmed(self.base_lrs) if steps < self.warmup_steps else lrs)
        self._last_lr = self._lrs()
        self.meter.window = _windows_until(self._time(), self.min_window, self.windows)[-1]

    # ---- deciding ---------------------------------------------------------------------------

    def _carry_out(self, changes: Changes) -> None:
        # Before the callbacks, which may raise, and so that it is repeated after an interrupt.
        self._changes = changes
        if self.window < changes.attributes["_next_window"]:
            if self.meter.windows_since_restart >= 2:
                self.meter.double_window()
            else:  # it has started over since; other ranks have doubled theirs
                self.meter.window = changes.attributes["_next_window"]
        super()._carry_out(changes)

    def _decide(self, reading: Reading) -> Changes:
        cosines, mean = self._cosines, self._mean_cosine
        known = reading.cosine is not None and not math.isnan(reading.standard_error)
        if reading.cosine is not None and known:
            if self._fresh and mean is not None:
                cosines = []
            cosines = [*cosines, reading.cosine][-self.average :]
            if mean is not None or len(cosines) >= min(_FIRST_COSINES, self.average):
                mean = math.fsum(cosines) / len(cosines)
        t, w = self._time(), self.window
        grows = t >= 2 * self.windows * w and self.meter.windows_since_restart >= 2
        # The first angle of a doubled window is not known yet; any other that is not known lowers
        # nothing: parameters were not finite, did not move, or were replaced.
        doubled = bool(self.history) and self.history[-1].window_steps < w
        expected = doubled and self.meter.windows_since_restart == 2
        power = factor = None
        if mean is not None and (known or expected) and self._cooldown is None:
            power = min(self.max_power, self.gain * max(0.0, self.critical - mean))
            factor = ((t - w) / t) ** power if t > w else 1.0
        everything = range(len(self.optimizer.param_groups))
        lrs = self._dropped_lrs(1.0 if factor is None else factor, everything)
        lowered = any(lr is not None for lr in lrs)
        decision = AnytimeDecision(
            # The meter does not know of the warm-up.
            **vars(dataclasses.replace(reading, step=self._optimizer_steps)),
            lr=self._lrs_after(lrs),
            dropped=lowered,
            window_steps=w,
            mean_cosine=mean,
            power=power,
        )
        return Changes(
            decision,
            lrs,
            num_drops=self.num_drops + lowered,
            _cosines=cosines,
            _fresh=grows or (self._fresh and not known),
            _next_window=2 * w if grows else w,
            _mean_cosine=mean,
            _factor=self._factor * (factor or 1.0),
        )

    def _get_closed_form_lr(self) -> list[float]:
        lrs = self._warmed(self.base_lrs)
        for g, floor in enumerate(lower_bounds(self.min_lrs, len(lrs))):
            lower = dropped(lrs[g], self._factor, floor)
            lrs[g] = lrs[g] if lower is None else lower
        return lrs

    # ---- looking ----------------------------------------------------------------------------

    def get_metrics(self) -> dict[str, float]:
        """The newest values for a logger: plain floats, those that are undefined left out.

        ``lr`` (of the first param group), ``num_drops``, and from the last window ``window_steps``,
        ``angular_velocity`` [degrees], ``cosine``, ``mean_cosine``, ``power``, ``standard_error``
        and ``rounding_error`` [degrees], and ``displacement``, the length ``|s_i|``.
        """
        if not self.history:
            return self._metrics()
        last = self.history[-1]
        return self._metrics(
            window_steps=last.window_steps,
            angular_velocity=last.angle,
            cosine=last.cosine,
            mean_cosine=last.mean_cosine,
            power=last.power,
            standard_error=last.standard_error,
            rounding_error=last.rounding_error,
            displacement=last.norm,
        )

    def _draw(self, records: list[dict[str, Any]], **options: Any) -> matplotlib.figure.Figure:
        from ..plotting.anytime import plot_anytime

        return plot_anytime(records, critical=self.critical, **options)

    # ---- state ------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {
            "min_window": self.min_window,
            "windows": self.windows,
            "snapshots": self.snapshots,
            "critical": self.critical,
            "gain": self.gain,
            "max_power": self.max_power,
            "average": self.average,
            "min_lr": list(self.min_lrs),
            "warmup_steps": self.warmup_steps,
        }

    def _read_settings(self, settings: Entries) -> dict[str, Any]:
        return {
            **super()._read_settings(settings),
            "min_window": settings.count("min_window", 1),
            "windows": settings.count("windows", _LEAST_WINDOWS),
            "snapshots": settings.count("snapshots", 1),
            "critical": settings.read("critical", _check_cosine),
            "gain": settings.read("gain", checks.number),
            "max_power": settings.read("max_power", checks.number),
            "average": settings.count("average", 1),
            "warmup_steps": settings.count("warmup_steps"),
        }

    def _saved_windows(self, state: Entries) -> Sequence[int]:
        settings = state.inner("settings")
        t = state.count("optimizer_steps") - settings.count("warmup_steps")
        return _windows_until(
            t, settings.count("min_window", 1), settings.count("windows", _LEAST_WINDOWS)
        )

    def _progress(self) -> dict[str, Any]:
        return {
            "cosines": list(self._cosines),
            "fresh": self._fresh,
            "mean_cosine": self._mean_cosine,
            "factor": self._factor,
        }

    def _decision_state(self) -> dict[str, Any]:
        return {"num_drops": self.num_drops, **self._progress()}

    def _read_progress(self, state: Entries, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **super()._read_progress(state, settings),
            "_cosines": state.list("cosines", _check_cosine)[-settings["average"] :],
            "_fresh": state.flag("fresh"),
            "_mean_cosine": state.maybe("mean_cosine", _check_cosine),
            "_factor": state.read("factor", _check_product),
        }


def _windows_until(t: int, min_window: int, windows: int) -> list[int]:
    """The lengths that windows may have had after ``t`` steps since the warm-up."""
    lengths = [min_window]
    while t >= 2 * windows * lengths[-1]:
        lengths.append(2 * lengths[-1])
    return lengths


def _check_cosine(name: str, value: Any) -> float:
    return checks.number(name, value, "a number from -1 to 1", lambda x: -1 <= x <= 1)


def _check_product(name: str, value: Any) -> float:
    return checks.number(name, value, "a number from 0 to 1", lambda x: 0 <= x <= 1)
