"""AutoDrop once per epoch, with averaged parameters: 2021, Algorithm 1."""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from .. import checks
from ..averaging import ParameterAverage
from ..meter import AngularVelocity
from ..reading import Decision, Reading
from ..saved import Entries
from .base import Changes, check_optimizer
from .drop import DropScheduler

if TYPE_CHECKING:
    import matplotlib.figure

_SINGLE_STEP_EPOCHS = 1000  # in a row, before a wrong wiring is pointed out


@dataclass(frozen=True)
class EpochDecision(Decision):
    """What :class:`EpochAutoDrop` made of one epoch.

    ``step`` counts the optimizer steps so far, ``window`` is the epoch ``t``, counted from 1;
    ``smoothed`` and ``rise`` stay None.

    Attributes:
        change: ``|w_t - w_{t-1}|``, degrees; None where one of the two angles is undefined.
        threshold: ``theta`` that the change is compared with, degrees.
        waited: epochs since the one that met the condition, which has 0; None where no drop is
            pending.
        averaged: whether the parameters were set to their average at the end of this epoch.
    """

    change: float | None = None
    threshold: float = math.nan
    waited: int | None = None
    averaged: bool = False


class EpochAutoDrop(DropScheduler):
    """Drops the learning rate some epochs after the angular velocity has stopped changing.

    Call :meth:`step` once per epoch. The displacement ``s_t`` of epoch ``t`` runs from the
    parameters before its first update to those after its last one, and ``w_t`` is the angle between
    ``s_t`` and ``s_{t-1}``. Where ``|w_t - w_{t-1}| < theta`` and ``t > 2``, training goes on for
    another ``delay`` epochs at the same rate, the parameters are set to their average over these
    epochs with the weights 1, 2, ..., ``delay``, and then every param group's learning rate is
    multiplied by ``factor`` and ``theta`` divided by it (Teng, Wang, Choromanska 2021, Algorithm
    1). A drop never raises a rate. Where all rates are at ``min_lr``, averages are still taken, as
    printed.

    Where Algorithm 1 contradicts itself or its text:

    * It adds ``delay + 1`` terms and divides by the weights of ``delay``, so that parameters grow
      by 10 % at a delay of 20. Here the average runs over the ``delay`` epochs after the one that
      met the condition, and its weights add up to one.
    * It checks the condition during the delay too and restarts the average each time it holds,
      so that a drop needs ``delay`` epochs in a row that do not meet it, which a wide ``theta``
      makes next to impossible. Here the condition is not checked while a drop is pending, because
      the text says "another n_d epochs".
    * After the averages are written back, the next displacement is measured from them. The
      difference of two angles across a drop counts like any other.

    After a write-back the statistics of batch normalisation belong to other parameters; torch
    measures them again in one line::

        EpochAutoDrop(optimizer, on_average=lambda decision: update_bn(loader, model))

    with ``torch.optim.swa_utils.update_bn``. Momentum and other state of the optimizer stay as they
    are, as in the paper.

    Memory: 12 bytes per parameter, during a delay 16 (float64 parameters: 20).

    Args:
        optimizer: any ``torch.optim.Optimizer``; learning rates may be floats or tensors.
        factor: ``rho``, in (0, 1).
        threshold: ``theta`` until the first drop, degrees.
        max_threshold: upper bound of ``theta``, degrees.
        delay: ``n_d``, epochs between the condition and the drop; 0 drops at once.
        average: whether the parameters are averaged over the delay.
        min_lr: lower bound of the rate, one for all param groups or one for each. The paper
            recommends 1e-4 for its SGD runs.
        params: what is measured and averaged instead of the optimizer's trainable parameters, such
            as float32 master weights; forms as in :class:`AngularVelocity`. ``on_average`` is the
            place to copy averaged master weights to the model.
        backend: "auto", or the name of one (``autodrop doctor`` lists them).
        process_group: as in :class:`AngularVelocity`.
        on_reading: called with the :class:`EpochDecision` of every epoch, such as a
            :class:`JsonLinesLog`.
        on_drop: called with those that lowered a rate.
        on_average: called, before the two others, with those at which the parameters were set to
            their average.
        last_epoch: as in torch's schedulers.

    Raises:
        ValueError, TypeError: an argument is wrong; the message gives it, what was expected and
            what came.

    Attributes:
        history: the last 10,000 :class:`EpochDecision` objects, one for each epoch.
        num_drops: how often a learning rate was lowered.
        current_threshold: ``theta``, degrees.
    """

    _record_type = EpochDecision
    _calls_without_step_allowed = 10  # epochs

    def __init__(
        self,
        optimizer: Optimizer,
        factor: float = 0.2,
        *,
        threshold: float = 0.01,
        max_threshold: float = 1.0,
        delay: int = 20,
        average: bool = True,
        min_lr: float | Iterable[float] = 0.0,
        params: Any = None,
        backend: str = "auto",
        process_group: Any = None,
        on_reading: Callable[[EpochDecision], object] | None = None,
        on_drop: Callable[[EpochDecision], object] | None = None,
        on_average: Callable[[EpochDecision], object] | None = None,
        last_epoch: int = -1,
    ) -> None:
        optimizer = check_optimizer(optimizer)
        self.threshold = self.current_threshold = _check_threshold("threshold", threshold)
        self.max_threshold = _check_max_threshold(self.threshold, "max_threshold", max_threshold)
        self.delay = checks.count("delay", delay, 0)
        self.average = checks.flag("average", average)
        checks.callback("on_average", on_average)
        if isinstance(params, Iterator):
            params = list(params)  # it is read twice
        self.on_average = on_average
        self._last_angle: float | None = None
        self._waited: int | None = None  # epochs of a pending drop's delay
        self._single_step_epochs = 0
        watched = optimizer if params is None else params
        meter = AngularVelocity(
            watched,
            1,
            backend=backend,
            process_group=process_group,
            form="delta",  # after a write-back only this form can be measured from elsewhere
        )
        self._mean = ParameterAverage(watched, backend)
        self.factor = checks.between_0_and_1("factor", factor)
        super().__init__(
            optimizer,
            meter,
            min_lr=min_lr,
            on_reading=on_reading,
            on_drop=on_drop,
            warmup_steps=0,
            last_epoch=last_epoch,
        )
        self._mean.warn_through(self._warnings)

    # ---- deciding ---------------------------------------------------------------------------

    def _make_before_step(self) -> Callable[[], None]:
        this = weakref.ref(self)

        def measure_from_here() -> None:
            # The reference point x_0 of the first epoch, or of the first one after NaN.
            scheduler = this()
            if scheduler is not None and not scheduler.meter.started:
                scheduler.meter.rebase()

        return measure_from_here

    def _on_optimizer_step(self) -> None:
        reading = self.meter.observe(calls=self._step_count, facts=self._facts)
        if reading is None:  # the first epoch, or the parameters are others than at its start
            reading = Reading(0, 0, None, None, math.nan, math.nan)
            finite = True
        else:
            finite = self.meter.started  # it starts over after NaN
        self._wait(finite)
        self._cool()  # first, so that a decision holds the rates after this epoch
        self._take(
            dataclasses.replace(reading, step=self._hook.real_steps, window=self._optimizer_steps)
        )

    def _wait(self, finite: bool) -> None:
        """Go on with the delay of a pending drop, if there is one."""
        if self._waited is None:
            return
        if not finite:
            # No rate drops on NaN; the next angles decide.
            self._waited = None
            self._mean.reset()
            return
        self._waited += 1
        if self.average:
            self._mean.add(self._waited)

    def _decide(self, reading: Reading) -> Changes:
        change = None
        if reading.angle is not None and self._last_angle is not None:
            change = abs(reading.angle - self._last_angle)
        waited, threshold = self._waited, self.current_threshold
        if waited is None and change is not None and change < threshold:
            waited = 0
        averaged = lowered = False
        lrs: list[float | None] = []
        changes: dict[str, Any] = {"_last_angle": reading.angle, "_waited": waited}
        if waited == self.delay:
            averaged = self._write_average()
            lrs = self._dropped_lrs(self.factor, range(len(self.optimizer.param_groups)))
            lowered = any(lr is not None for lr in lrs)
            changes["_waited"] = None
            changes["num_drops"] = self.num_drops + lowered
            changes["current_threshold"] = min(self.max_threshold, threshold / self.factor)
        decision = EpochDecision(
            **vars(reading),
            lr=self._lrs_after(lrs or [None] * len(self.optimizer.param_groups)),
            dropped=lowered,
            change=change,
            threshold=threshold,
            waited=waited,
            averaged=averaged,
        )
        return Changes(decision, lrs, **changes)

    def _get_closed_form_lr(self) -> list[float]:
        return self._closed_form(self.factor, lambda group: self.num_drops)

    def _report(self, decision: Decision) -> None:
        assert isinstance(decision, EpochDecision)
        try:
            if decision.averaged and self.on_average is not None:
                self.on_average(decision)
        finally:
            super()._report(decision)

    def _write_average(self) -> bool:
        written = self._mean.write_back()
        if written:
            self.meter.rebase()
        return written

    def _recover(self) -> None:
        if self._changes is not None:
            self._carry_out(self._changes)
        # How much of an epoch the average has seen is not known.
        self.meter.interrupted()
        self._last_angle = self._waited = None
        self._mean.reset()
        self.meter.close()

    def _update_lr(self, epoch: int | None = None) -> None:
        # SequentialLR calls this in place of step() where it hands over: the epoch that begins now
        # is the first one, and what the meter saw of the epochs before must not be measured.
        super()._update_lr(epoch)
        self._hook.marked = False
        self._last_angle = self._waited = None
        self._mean.reset()
        self.meter.close()

    def _watch_steps_between_calls(self) -> None:
        single = self._hook.steps_since_call == 1
        self._hook.called_late()
        self._single_step_epochs = self._single_step_epochs + 1 if single else 0
        if self._single_step_epochs == _SINGLE_STEP_EPOCHS:
            self._warnings.warn(
                f"step() was called after every single optimizer step {_SINGLE_STEP_EPOCHS} times; "
                "call it once per epoch (unless an epoch has one batch)"
            )

    # ---- looking ----------------------------------------------------------------------------

    def get_metrics(self) -> dict[str, float]:
        """The newest values for a logger: plain floats, those that are undefined left out.

        ``lr`` (of the first param group), ``num_drops``, and from the last epoch
        ``angular_velocity``, ``angular_velocity_change``, ``threshold`` and ``rounding_error``
        [degrees], and ``displacement``, the length ``|s_t|``.
        """
        if not self.history:
            return self._metrics()
        last = self.history[-1]
        return self._metrics(
            angular_velocity=last.angle,
            angular_velocity_change=last.change,
            threshold=last.threshold,
            rounding_error=last.rounding_error,
            displacement=last.norm,
        )

    def _draw(self, records: list[dict[str, Any]], **options: Any) -> matplotlib.figure.Figure:
        from ..plotting.epochs import plot_epochs

        return plot_epochs(records, **options)

    def close(self) -> None:
        """Take the hooks off the optimizer and free the arenas. The learning rates stay."""
        super().close()
        self._mean.reset()
        self._waited = None

    # ---- state ------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {
            "factor": self.factor,
            "threshold": self.threshold,
            "max_threshold": self.max_threshold,
            "delay": self.delay,
            "average": self.average,
            "min_lr": list(self.min_lrs),
        }

    def _read_settings(self, settings: Entries) -> dict[str, Any]:
        threshold = settings.read("threshold", _check_threshold)
        most = settings.read("max_threshold", functools.partial(_check_max_threshold, threshold))
        return {
            **super()._read_settings(settings),
            "factor": settings.read("factor", checks.between_0_and_1),
            "threshold": threshold,
            "max_threshold": most,
            "delay": settings.count("delay"),
            "average": settings.flag("average"),
        }

    def _progress(self) -> dict[str, Any]:
        return {
            "real_steps": self._hook.real_steps,
            "current_threshold": self.current_threshold,
            "last_angle": self._last_angle,
            "waited": self._waited,
            "mean": self._mean.state_dict(),
        }

    def _decision_state(self) -> dict[str, Any]:
        return {
            "num_drops": self.num_drops,
            "current_threshold": self.current_threshold,
            "last_angle": self._last_angle,
            "waited": self._waited,
        }

    def _read_progress(self, state: Entries, settings: Mapping[str, Any]) -> dict[str, Any]:
        delay = settings["delay"]
        waited = state.maybe("waited", lambda name, value: checks.count(name, value, 0))
        if waited is not None and waited > delay:
            raise ValueError(
                f"{state.name('waited')}: expected at most delay={delay}, got {waited}"
            )
        mean = ParameterAverage.read(state.inner("mean"))
        return {
            **super()._read_progress(state, settings),
            "current_threshold": state.read("current_threshold", _check_threshold),
            "_last_angle": state.maybe("last_angle", checks.at_least_zero),
            "_waited": waited,
            "_saved_mean": mean,
            "_saved_real_steps": state.count("real_steps"),
        }

    def _saved_windows(self, state: Entries) -> Sequence[int]:
        return [1]

    def _take_over(self, attributes: dict[str, Any]) -> None:
        mean = attributes.pop("_saved_mean")
        self._hook.real_steps = attributes.pop("_saved_real_steps")
        super()._take_over(attributes)
        self._mean.restore(mean)  # last, because it may warn


def _check_threshold(name: str, value: Any) -> float:
    degrees = "a finite number of degrees above 0"
    return checks.number(name, value, degrees, lambda x: 0 < x < math.inf)


def _check_max_threshold(threshold: float, name: str, value: Any) -> float:
    degrees = f"a finite number of degrees, at least threshold={threshold!r}"
    return checks.number(name, value, degrees, lambda x: threshold <= x < math.inf)
