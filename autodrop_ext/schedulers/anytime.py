"""AnytimeAutoDrop: a schedule for runs of any length."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch.optim import Optimizer

from .. import checks
from ..checks import cosine, none_or
from ..reading import Decision, Reading
from ..saved import Form, list_of
from ..settings import ANYTIME, USE_BUCKETS, check_arguments, removed
from .base import Outcome, as_floats, check_optimizer, replaced
from .metered import MeteredScheduler

if TYPE_CHECKING:
    import matplotlib.figure

_FIRST_COSINES = 4  # before the first mean of them is trusted


@dataclass(frozen=True)
class AnytimeDecision(Decision):
    """What :class:`AnytimeAutoDrop` made of one window.

    ``step`` counts the optimizer steps so far, the warm-up's included; ``smoothed`` and ``rise``
    stay None.

    Attributes:
        window_steps: length of the window, optimizer steps.
        mean_cosine: mean of the newest cosines, which the exponent follows from; None until there
            are four of them.
        power: exponent ``p``: the rates were multiplied by ``((t - w) / t)^p``. 0 if parameters
            travel; None without a mean cosine, in a cooldown, and if the angle is not known for
            another reason than a doubling of the window. The rates stay as they are then.
    """

    window_steps: int = 0
    mean_cosine: float | None = None
    power: float | None = None


def _check_product(name: str, value: Any) -> float:
    return checks.number(name, value, "a number from 0 to 1", lambda x: 0 <= x <= 1)


class AnytimeAutoDrop(MeteredScheduler):
    """Lowers the learning rate as fast as a power of time, once parameters no longer travel.

    The length of the run need not be known. The meter's windows grow with the run, so that the
    angle between their displacements is that of the time scale the run has reached. Its cosine is
    compared with that of a random walk, which is 1/4 for the means of long windows: above it the
    parameters travel and the rates stay, below it they are confined, and at the end of each window
    of ``w`` steps every rate is multiplied by ``((t - w) / t)^p``, with ``t`` steps since the
    warm-up and ``p = min(max_power, gain * max(0, critical - mean cosine))``. So ``d ln(lr) / d
    ln(t) = -p``: a rate never falls faster than ``t^-max_power``, and it is never raised.

    The rate does not anneal to zero. Evaluate and save with :meth:`averaged_parameters`, which
    averages over the last part of the run, or call :meth:`cooldown` when the end
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
        cosines: how many of the newest cosines of windows of one length are averaged.
        min_lr: lower bound of the rate, one for all param groups or one for each.
        warmup_steps: optimizer steps of linear warm-up, during which nothing is measured.
        params: what is measured instead of the optimizer's trainable parameters, such as float32
            master weights; forms as in :class:`AngularVelocity`.
        buckets: float64 sums in each of the meter's tables, a multiple of 4,096; None for exact
            angles, at 24 bytes for each element of the model. See :class:`AngularVelocity`.
        average: whether an average of the parameters is kept for :meth:`averaged_parameters`, in
            float32: 4 bytes a parameter.
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
    _window_follows_from = (
        " by min_window, windows and warmup_steps of its settings, and optimizer_steps"
    )

    min_window: int
    windows: int
    snapshots: int
    critical: float
    gain: float
    max_power: float
    cosines: int
    average: bool
    _newest_cosines: list[float]  # of windows of one length, once one is known
    _doubled: bool  # whether the window has doubled since the newest cosine
    _mean_cosine: float | None
    _factor: float  # product of all factors so far
    _next_window: int  # length of the window after the last decision's
    _settings = ANYTIME
    _gathered: ClassVar[Form] = {
        "newest_cosines": list_of(cosine),
        "doubled": checks.flag,
        "mean_cosine": none_or(cosine),
        "factor": _check_product,
    }

    @removed(sample=USE_BUCKETS, seed=USE_BUCKETS)
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
        cosines: int = 8,
        min_lr: float | Iterable[float] = 0.0,
        warmup_steps: int = 0,
        params: Any = None,
        buckets: int | None = 2**18,
        average: bool = True,
        backend: str = "auto",
        process_group: Any = None,
        on_reading: Callable[[AnytimeDecision], object] | None = None,
        on_drop: Callable[[AnytimeDecision], object] | None = None,
        last_epoch: int = -1,
    ) -> None:
        arguments = dict(locals())
        optimizer = check_optimizer(optimizer)
        window = min_window
        if last_epoch > 0:
            window = self._windows_until(last_epoch, check_arguments(ANYTIME, arguments))[-1]
        super().__init__(optimizer, arguments, window=window)
        self._next_window = window

    def _at_start(self) -> dict[str, Any]:
        return {
            **super()._at_start(),
            "_newest_cosines": [],
            "_doubled": True,
            "_mean_cosine": None,
            "_factor": 1.0,
            "_next_window": self.min_window,
        }

    def _first_window(self) -> int:
        return self.min_window

    @staticmethod
    def _windows_until(steps: int, settings: Mapping[str, Any]) -> list[int]:
        """Return the lengths that windows may have had after a number of optimizer steps."""
        lengths = [settings["min_window"]]
        while steps - settings["warmup_steps"] >= 2 * settings["windows"] * lengths[-1]:
            lengths.append(2 * lengths[-1])
        return lengths

    @property
    def window(self) -> int:
        """Present length of a window, optimizer steps."""
        return self.meter.window

    # ---- deciding ---------------------------------------------------------------------------

    def _decide(self, reading: Reading) -> Outcome:
        newest, mean = self._newest_cosines, self._mean_cosine
        known = reading.cosine is not None
        if reading.cosine is not None:
            if self._doubled and mean is not None:
                newest = []
            newest = [*newest, reading.cosine][-self.cosines :]
            if mean is not None or len(newest) >= min(_FIRST_COSINES, self.cosines):
                mean = math.fsum(newest) / len(newest)
        t, w = self._optimizer_steps - self.warmup_steps, self.window
        doubles = t >= 2 * self.windows * w and self.meter.windows_since_restart >= 2
        # The first angle of a doubled window is not known yet; any other that is not known lowers
        # nothing: parameters were not finite, did not move, or were replaced.
        last = self.history[-1] if self.history else None
        has_doubled = last is not None and last.window_steps < w and last.cosine is not None
        expected = has_doubled and self.meter.windows_since_restart == 2
        power = factor = None
        if mean is not None and (known or expected) and self._cooldown is None:
            power = min(self.max_power, self.gain * max(0.0, self.critical - mean))
            factor = ((t - w) / t) ** power if t > w else 1.0
        lrs = self._dropped(1.0 if factor is None else factor)
        lowered = any(lr is not None for lr in lrs)
        decision = AnytimeDecision(
            # The meter does not know of the warm-up.
            **vars(dataclasses.replace(reading, step=self._optimizer_steps)),
            lr=tuple(replaced(as_floats(self._rates()), lrs)),
            dropped=lowered,
            window_steps=w,
            mean_cosine=mean,
            power=power,
        )
        state = {
            "num_drops": self.num_drops + lowered,
            "_newest_cosines": newest,
            "_doubled": doubles or (self._doubled and not known),
            "_mean_cosine": mean,
            "_factor": self._factor * (factor or 1.0),
            "_next_window": 2 * w if doubles else w,
            "_decided": reading.window,
        }
        return Outcome(decision, lrs, state)

    def _carry_out(self) -> None:
        if self._unwritten is not None and self.window < self._next_window:
            if self.meter.windows_since_restart >= 2:
                self.meter.double_window()
            else:  # an interrupt has made it start over; other ranks have doubled theirs
                self.meter.start_over(self._next_window)
        super()._carry_out()

    def _get_closed_form_lr(self) -> list[float]:
        return self._closed_form(self._factor, lambda group: 1)

    # ---- looking ----------------------------------------------------------------------------

    def get_metrics(self) -> dict[str, float]:
        """The newest values for a logger: plain floats, those that are undefined left out.

        ``lr`` (of the first param group), ``num_drops``, and from the last window ``window_steps``,
        ``angular_velocity`` [degrees], ``cosine``, ``mean_cosine``, ``power``, ``standard_error``
        [degrees], and ``displacement``, the length ``|s_i|``.
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
            displacement=last.norm,
        )

    def _draw(self, records: list[dict[str, Any]], **options: Any) -> matplotlib.figure.Figure:
        from ..plotting.anytime import plot_anytime

        return plot_anytime(records, critical=self.critical, **options)

    # ---- state ------------------------------------------------------------------------------

    def _read(self, state: Mapping[str, Any]) -> dict[str, Any]:
        settings = state.get("settings") if isinstance(state, Mapping) else None
        if isinstance(settings, Mapping) and "average" in settings and "cosines" not in settings:
            # The name of then, when there was no average of parameters to choose.
            settings = {**settings, "cosines": settings["average"]}
            del settings["average"]
            state = {**state, "settings": settings}
        return super()._read(state)

    def _restored(self, loaded: Mapping[str, Any]) -> dict[str, Any]:
        newest = loaded["newest_cosines"][-loaded["cosines"] :]
        return {**super()._restored(loaded), "_newest_cosines": newest}

    def _possible_windows(self, loaded: Mapping[str, Any]) -> Sequence[int]:
        return self._windows_until(loaded["optimizer_steps"], loaded)

    def _take_over(self, loaded: dict[str, Any]) -> None:
        super()._take_over(loaded)
        self._next_window = self.window
