"""AutoDrop once per epoch, with averaged parameters: 2021, Algorithm 1."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.optim import Optimizer

from .. import checks
from ..average import ParameterAverage, checked_average
from ..checks import none_or
from ..reading import Decision, Reading
from ..saved import Form, load
from ..settings import EPOCH, degrees_above_0
from .base import Outcome, as_floats, check_optimizer, replaced
from .metered import MeteredScheduler


@dataclass(frozen=True)
class EpochDecision(Decision):
    """What :class:`EpochAutoDrop` made of one epoch.

    ``step`` counts the optimizer steps so far, ``window`` is the epoch ``t``, counted from 1;
    ``smoothed`` and ``rise`` stay None.

    Attributes:
        change: ``|w_t - w_{t-1}|``, degrees; None if one of the two angles is undefined.
        threshold: ``theta`` that the change is compared with, degrees.
        waited: epochs since the one that met the condition, which has 0; None if no drop is
            pending.
        averaged: whether the parameters were set to their average at the end of this epoch.
    """

    change: float | None = None
    threshold: float = math.nan
    waited: int | None = None
    averaged: bool = False


class EpochAutoDrop(MeteredScheduler):
    """Drops the learning rate some epochs after the angular velocity has stopped changing.

    Call :meth:`step` once per epoch. The displacement ``s_t`` of epoch ``t`` runs from the
    parameters before its first update to those after its last one, and ``w_t`` is the angle between
    ``s_t`` and ``s_{t-1}``. When ``|w_t - w_{t-1}| < theta`` and ``t > 2``, training goes on for
    another ``delay`` epochs at the same rate, the parameters are set to their average over these
    epochs with the weights 1, 2, ..., ``delay``, and then every param group's learning rate is
    multiplied by ``factor`` and ``theta`` divided by it (Teng, Wang, Choromanska 2021, Algorithm
    1). A drop never raises a rate. When all rates are at ``min_lr``, averages are still taken, as
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

    Memory: 24 bytes per parameter, during a delay 28 (float64 parameters: 32).

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
        buckets: as in :class:`AngularVelocity`. The threshold of 0.01 degrees needs exact angles,
            so that None is the default.
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

    factor: float
    threshold: float
    max_threshold: float
    delay: int
    average: bool
    _current_threshold: float
    _last_angle: float | None
    _waited: int | None  # epochs of a pending drop's delay
    _settings = EPOCH
    _gathered: ClassVar[Form] = {
        "current_threshold": degrees_above_0,
        "last_angle": none_or(checks.at_least_zero),
        "waited": none_or(checks.at_least(0)),
    }
    _record_type = EpochDecision
    _averages_run = False
    _once_an_epoch = True

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
        buckets: int | None = None,
        backend: str = "auto",
        process_group: Any = None,
        on_reading: Callable[[EpochDecision], object] | None = None,
        on_drop: Callable[[EpochDecision], object] | None = None,
        on_average: Callable[[EpochDecision], object] | None = None,
        last_epoch: int = -1,
    ) -> None:
        arguments = dict(locals())
        optimizer = check_optimizer(optimizer)
        checks.callback("on_average", on_average)
        self.on_average = on_average
        super().__init__(optimizer, arguments, window=1)
        self._delayed = ParameterAverage(self.meter.named_parameters)

    def _at_start(self) -> dict[str, Any]:
        return {
            **super()._at_start(),
            "_current_threshold": self.threshold,
            "_last_angle": None,
            "_waited": None,
        }

    def reset(self) -> None:
        """As :meth:`AutoDrop.reset`; a pending drop is forgotten."""
        self._delayed.reset()
        self._hook.real_steps = 0
        super().reset()

    @property
    def current_threshold(self) -> float:
        """``theta``, degrees."""
        return self._current_threshold

    # ---- deciding ---------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer) -> None:
        super()._before_step(optimizer)
        # The reference point x_0 of the first epoch, or of the first one after NaN.
        if not self.meter.started and self._hook.moves(optimizer):
            self.meter.rebase()

    def _observe(self) -> Reading:
        reading = super()._observe()
        if reading is None:  # the first epoch, or the parameters are others than at its start
            reading = Reading(0, 0, None, None, math.nan, math.nan)
        elif not self.meter.started and self._waited is not None:
            # It starts over after NaN. No rate drops on that; the next angles decide.
            self._waited = None
            self._delayed.reset()
        if self._waited is not None:
            self._waited += 1
            if self.average:
                self._add_to_average(self._waited)
        steps, epoch = self._hook.real_steps, self._optimizer_steps
        return dataclasses.replace(reading, step=steps, window=epoch)

    def _add_to_average(self, n: int) -> None:
        """Take the parameters into the average, with the weight ``n`` of the n-th epoch."""
        k = min(self._delayed.updates, n - 1)  # epochs in it; all of them unless it started over
        problem = self._delayed.add(2 * n / ((k + 1) * (2 * n - k)))  # n / ((n - k) + ... + n)
        if problem is not None:
            self._warnings.once("average", problem)

    @contextlib.contextmanager
    def averaged_parameters(self) -> Iterator[bool]:
        """Raise RuntimeError: the parameters themselves are set to their average at each drop."""
        raise RuntimeError(
            "averaged_parameters: expected AutoDrop or AnytimeAutoDrop with average=True; "
            "EpochAutoDrop sets the parameters to their average at each drop"
        )
        yield  # type: ignore[unreachable]  # makes this a generator

    def _decide(self, reading: Reading) -> Outcome:
        change = None
        if reading.angle is not None and self._last_angle is not None:
            change = abs(reading.angle - self._last_angle)
        waited, threshold = self._waited, self._current_threshold
        if waited is None and change is not None and change < threshold:
            waited = 0
        ends = waited == self.delay
        # Parameters alone are changed here: whether they could be is part of the decision.
        averaged = ends and self._write_average()
        lrs = self._dropped(self.factor, None if ends else ())
        lowered = any(lr is not None for lr in lrs)
        decision = EpochDecision(
            **vars(reading),
            lr=tuple(replaced(as_floats(self._rates()), lrs)),
            dropped=lowered,
            change=change,
            threshold=threshold,
            waited=waited,
            averaged=averaged,
        )
        state: dict[str, Any] = {"_last_angle": reading.angle, "_waited": waited}
        if ends:
            state = {
                "num_drops": self.num_drops + lowered,
                "_current_threshold": min(self.max_threshold, threshold / self.factor),
                "_last_angle": reading.angle,
                "_waited": None,
            }
        return Outcome(decision, lrs, state)

    def _write_average(self) -> bool:
        written = self._delayed.write_back()
        if written:
            self.meter.rebase()
        return written

    def _get_closed_form_lr(self) -> list[float]:
        return self._closed_form(self.factor, lambda group: self.num_drops)

    def _report(self, record: Any) -> None:
        try:
            if record.averaged and self.on_average is not None:
                self.on_average(record)
        finally:
            super()._report(record)

    def _make_whole(self) -> None:
        # How much of an epoch the average has seen is not known: nothing more is decided.
        self._carry_out()
        self._last_whole = None
        self.meter.discard()
        self._start_over()

    def _start_over(self) -> None:
        """Make the epoch that begins now the first one."""
        self._last_angle = self._waited = None
        self._delayed.reset()
        self.meter.close()

    def _update_lr(self, epoch: int | None = None) -> None:
        # SequentialLR calls this in place of step() when it hands over: the epoch that begins now
        # is the first one, and what the meter saw of the epochs before must not be measured.
        super()._update_lr(epoch)
        self._hook.marked = False
        self._start_over()

    # ---- looking ----------------------------------------------------------------------------

    def get_metrics(self) -> dict[str, float]:
        """The newest values for a logger: plain floats, those that are undefined left out.

        ``lr`` (of the first param group), ``num_drops``, and from the last epoch
        ``angular_velocity``, ``angular_velocity_change``, ``threshold`` [degrees], and
        ``displacement``, the length ``|s_t|``.
        """
        if not self.history:
            return self._metrics()
        last = self.history[-1]
        return self._metrics(
            angular_velocity=last.angle,
            angular_velocity_change=last.change,
            threshold=last.threshold,
            displacement=last.norm,
        )

    def close(self) -> None:
        """Take the hooks off the optimizer and free the tables. The learning rates stay."""
        super().close()
        self._delayed.reset()
        self._waited = None

    # ---- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit: settings, decisions, history, sums and average.

        As :meth:`AutoDrop.state_dict`.
        """
        with self._lock:
            steps, mean = self._hook.real_steps, self._delayed.state_dict()
            return {**super().state_dict(), "real_steps": steps, "mean": mean}

    def _read(self, state: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
        form: Form = {"real_steps": checks.at_least(0), "mean": checked_average}
        loaded = {**super()._read(state, kept), **load(state, form)}
        if "threshold" in kept and loaded["num_drops"] == 0:  # until then it is theta
            loaded["attributes"]["_current_threshold"] = loaded["threshold"]
        return loaded

    def _restored(self, loaded: Mapping[str, Any]) -> dict[str, Any]:
        waited, delay = loaded["waited"], loaded["delay"]
        if waited is not None and waited > delay:
            raise ValueError(f"state_dict['waited']: expected at most delay={delay}, got {waited}")
        return super()._restored(loaded)

    def _take_over(self, loaded: dict[str, Any]) -> None:
        super()._take_over(loaded)
        self._hook.real_steps = loaded["real_steps"]
        problem = self._delayed.restore_state(loaded["mean"])
        if problem is not None:
            self._warnings.once("average", f"the average of the delay starts over ({problem})")
