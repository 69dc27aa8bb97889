"""AnytimeAutoDrop: a schedule for runs of any length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch.optim import Optimizer

from ..reading import Decision, Reading
from ..saved import Form
from ..settings import ANYTIME, USE_BUCKETS, check_arguments, removed
from .base import Outcome, as_floats, check_optimizer, replaced
from .growing import GROWTH, GrowingScheduler


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
            another reason than a doubling of the window, or during an automatic warm-up. It lowers
            no rate then.
    """

    window_steps: int = 0
    mean_cosine: float | None = None
    power: float | None = None


class AnytimeAutoDrop(GrowingScheduler):
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
        critical: cosine below which rates fall; 1/4 is that of a random walk with many readings in
            a window. For ``k`` evenly spaced ones it is ``(k^2 - 1) / (2 (2 k^2 + 1))``, and
            ``critical`` is taken in proportion.
        gain: exponent for each unit of cosine below ``critical``.
        max_power: largest exponent.
        cosines: how many of the newest cosines of windows of one length are averaged.
        min_lr: lower bound of the rate, one for all param groups or one for each.
        warmup_steps: optimizer steps of linear warm-up, during which nothing is measured; or
            "auto": the rates that were set are upper bounds, which are approached as long as
            parameters travel, from 1/32 of them. Windows then begin with 2 steps, whatever
            ``min_window``.
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
    _settings = ANYTIME
    _gathered: ClassVar[Form] = GROWTH

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
        warmup_steps: int | Literal["auto"] = 0,
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
        settings = check_arguments(ANYTIME, arguments)
        window = self._windows_until(max(0, last_epoch), settings)[-1]
        super().__init__(optimizer, arguments, window=window)

    def _usual_window(self) -> int:
        return self.min_window

    @property
    def window(self) -> int:
        """Present length of a window, optimizer steps."""
        return self.meter.window

    # ---- deciding ---------------------------------------------------------------------------

    def _decide_risen(self, reading: Reading) -> Outcome:
        state = self._grown(reading)
        mean = self._usable_mean(reading, state)
        t, w = self._optimizer_steps - self._linear_warmup, self.window
        power, factor = None, 1.0
        if mean is not None:
            power = min(self.max_power, self.gain * max(0.0, self._critical_for(reading) - mean))
            factor = ((t - w) / t) ** power if t > w else 1.0
        state["_share"] = self._share * factor
        return self._outcome(reading, self._dropped(factor), state, power=power)

    def _outcome(
        self, reading: Reading, lrs: Sequence[float | None], state: dict[str, Any], **fields: Any
    ) -> Outcome:
        now = as_floats(self._rates())
        lowered = any(lr is not None and lr < old for lr, old in zip(lrs, now, strict=False))
        decision = AnytimeDecision(
            **vars(reading),
            lr=tuple(replaced(now, lrs)),
            dropped=lowered,
            window_steps=self.window,
            mean_cosine=state["_mean_cosine"],
            **fields,
        )
        return Outcome(decision, lrs, {**state, "num_drops": self.num_drops + lowered})

    def _get_closed_form_lr(self) -> list[float]:
        return self._closed_form(self._share, lambda group: 1)

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

    # ---- state ------------------------------------------------------------------------------

    def _read(self, state: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
        settings = state.get("settings") if isinstance(state, Mapping) else None
        if isinstance(settings, Mapping) and "average" in settings and "cosines" not in settings:
            # The name of then, when there was no average of parameters to choose.
            settings = {**settings, "cosines": settings["average"]}
            del settings["average"]
            state = {**state, "settings": settings}
        if isinstance(state, Mapping) and "factor" in state:
            state = {**state, "share": state["factor"]}  # the name of then
        return super()._read(state, kept)

    def _restored(self, loaded: Mapping[str, Any]) -> dict[str, Any]:
        return self._grown_attributes(loaded, loaded)

    def _possible_windows(self, loaded: Mapping[str, Any]) -> Sequence[int]:
        return self._windows_until(loaded["optimizer_steps"], loaded)
