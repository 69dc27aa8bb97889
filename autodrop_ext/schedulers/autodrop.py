"""AutoDrop, UAI 2024, Algorithm 1."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from ..reading import Decision, Reading
from ..velocity import HISTORY, AngularVelocity
from .base import OptimizerStepScheduler, as_floats, check_optimizer
from .saturation import Kernel, SaturationDetector

if TYPE_CHECKING:
    import matplotlib.figure

_SETTINGS = (
    "window",
    "factor",
    "threshold",
    "buffer_size",
    "min_samples",
    "kernel",
    "min_lr",
    "warmup_steps",
)


class AutoDrop(OptimizerStepScheduler):
    """Drops the learning rate whenever the angular velocity of the parameters saturates.

    Once per window of optimizer steps the angle between the last two displacements of the mean
    parameters is measured and smoothed. While training makes headway the angle rises; where the
    smoothed angle rises by less than ``threshold``, every param group's learning rate is multiplied
    by ``factor``, right at the :meth:`step` that closes the window (Wang, Teng, Choromanska, UAI
    2024, Algorithm 1). A drop never raises a rate.

    Args:
        optimizer: any ``torch.optim.Optimizer``; learning rates may be floats or tensors.
        window: ``k``, optimizer steps per window. The rate can fall by ``factor`` once in 11
            windows, so that short runs need short windows; the paper takes 64 for CIFAR and 640 for
            ImageNet.
        factor: ``rho``, in (0, 1).
        threshold: degrees per window.
        buffer_size: ``m``, angles that are smoothed over.
        min_samples: angles since the last drop before smoothing starts.
        kernel: "value" or "time", what the Gaussian filter takes its distances between; see
            :func:`~autodrop_ext.schedulers.saturation.gaussian_filter`.
        min_lr: lower bound of the rate, one for all param groups or one for each.
        warmup_steps: optimizer steps of linear warm-up, during which nothing is measured.
        params: what is measured instead of the optimizer's trainable parameters, such as float32
            master weights; forms as in :class:`AngularVelocity`.
        sample: None; reading a random part of the parameters is not in this version.
        backend: "auto", or the name of one (``autodrop doctor`` lists them).
        process_group: None; sharded parameters are not in this version.
        on_reading: called with every :class:`Decision`, such as a :class:`JsonLinesLog`.
        on_drop: called with those decisions that lowered a rate.
        last_epoch: as in torch's schedulers.

    Raises:
        ValueError, TypeError: an argument is wrong; the message gives it, what was expected and
            what came.

    Attributes:
        history: the last 10,000 :class:`Decision` objects.
        num_drops: how often a learning rate was lowered.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        window: int = 64,
        factor: float = 0.95,
        *,
        threshold: float = 0.1,
        buffer_size: int = 10,
        min_samples: int = 10,
        kernel: Kernel = "value",
        min_lr: float | Iterable[float] = 0.0,
        warmup_steps: int = 0,
        params: Any = None,
        sample: float | None = None,
        backend: str = "auto",
        process_group: Any = None,
        on_reading: Callable[[Decision], object] | None = None,
        on_drop: Callable[[Decision], object] | None = None,
        last_epoch: int = -1,
    ) -> None:
        _check_number("factor", factor, "a number between 0 and 1", lambda x: 0 < x < 1)
        _check_number("threshold", threshold, "a finite number of degrees", math.isfinite)
        _check_count("buffer_size", buffer_size, 1)
        _check_count("min_samples", min_samples, 1)
        _check_count("warmup_steps", warmup_steps, 0)
        if kernel not in ("value", "time"):
            raise ValueError(f"kernel: expected 'value' or 'time', got {kernel!r}")
        for name, callback in (("on_reading", on_reading), ("on_drop", on_drop)):
            if callback is not None and not callable(callback):
                raise TypeError(f"{name}: expected a function or None, got {callback!r}")
        check_optimizer(optimizer)
        self.window = window
        self.factor = float(factor)
        self.min_lrs = _min_lrs(min_lr, len(optimizer.param_groups))
        self.num_drops = 0
        self.history: list[Decision] = []
        self.on_reading = on_reading
        self.on_drop = on_drop
        self._detector = SaturationDetector(float(threshold), buffer_size, min_samples, kernel)
        self._meter = AngularVelocity(
            optimizer if params is None else params,
            window,
            sample=sample,
            backend=backend,
            process_group=process_group,
        )
        super().__init__(optimizer, warmup_steps=warmup_steps, last_epoch=last_epoch)

    # ---- deciding ---------------------------------------------------------------------------

    def _on_optimizer_step(self) -> None:
        reading = self._meter.observe()
        if reading is not None:
            self._decide(reading)

    def _decide(self, reading: Reading) -> None:
        smoothed = rise = None
        dropped = False
        if reading.angle is not None:
            verdict = self._detector.update(reading.angle)
            smoothed, rise = verdict.smoothed, verdict.rise
            dropped = verdict.saturated and self._drop_lrs(self.factor, self.min_lrs)
        self.num_drops += dropped
        decision = Decision(
            **vars(reading),
            smoothed=smoothed,
            rise=rise,
            lr=tuple(as_floats(self.get_lr())),
            dropped=dropped,
        )
        self.history.append(decision)
        del self.history[:-HISTORY]
        if self.on_reading is not None:
            self.on_reading(decision)
        if dropped and self.on_drop is not None:
            self.on_drop(decision)

    def _get_closed_form_lr(self) -> list[float]:
        """Base rates after all drops so far: what ``SequentialLR`` asks for at a milestone."""
        lrs = self._warmed(self.base_lrs)
        for _ in range(self.num_drops):
            floors = self.min_lrs + [0.0] * (len(lrs) - len(self.min_lrs))
            lrs = [
                min(lr, max(floor, self.factor * lr))
                for lr, floor in zip(lrs, floors, strict=False)
            ]
        return lrs

    # ---- looking ----------------------------------------------------------------------------

    def get_metrics(self) -> dict[str, float]:
        """The newest values for a logger: plain floats, those that are undefined left out.

        ``lr`` (of the first param group), ``num_drops``, and from the last reading
        ``angular_velocity``, ``angular_velocity_smoothed``, ``angular_velocity_rise`` and
        ``rounding_error`` [degrees], and ``displacement``, the length ``|s_i|``.
        """
        metrics: dict[str, float | None] = {
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "num_drops": self.num_drops,
        }
        if self.history:
            last = self.history[-1]
            metrics |= {
                "angular_velocity": last.angle,
                "angular_velocity_smoothed": last.smoothed,
                "angular_velocity_rise": last.rise,
                "rounding_error": last.rounding_error,
                "displacement": last.norm,
            }
        return {k: float(v) for k, v in metrics.items() if v is not None and math.isfinite(v)}

    def plot(self, path: Any = None) -> matplotlib.figure.Figure:
        """Draw angular velocity, its rise and the learning rate over the steps, drops marked.

        Args:
            path: where to save the picture, if anywhere.

        Raises:
            ImportError: matplotlib is not installed; it comes with ``autodrop_ext[plot]``.
        """
        from ..plotting import plot_run

        records = [decision.as_dict() for decision in self.history]
        return plot_run(records, threshold=self._detector.threshold, path=path)

    def close(self) -> None:
        """Take the hook off the optimizer and free the arenas. The learning rates stay."""
        super().close()
        self._meter.close()

    # ---- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit: settings, decisions, history and arenas.

        Plain values and tensors only, so that ``torch.load(weights_only=True)`` reads it. Learning
        rates are restored by the *optimizer's* ``load_state_dict``, as with torch's schedulers.
        """
        return {
            "version": 1,
            "scheduler": type(self).__name__,
            "settings": self._settings(),
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "base_lrs": as_floats(self.base_lrs),
            "last_lr": as_floats(self._last_lr),
            "optimizer_steps": self._optimizer_steps,
            "stepped": self._stepped,
            "num_drops": self.num_drops,
            "detector": self._detector.state_dict(),
            "history": [vars(d) | {"lr": list(d.lr)} for d in self.history],
            "meter": self._meter.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken. Settings are restored too, as in torch.

        Raises:
            ValueError: not a state of this class; nothing has been changed then.
        """
        _check_state(state_dict, type(self).__name__)
        self._meter.load_state_dict(state_dict["meter"])
        settings = dict(state_dict["settings"])
        changed = {k: v for k, v in self._settings().items() if settings[k] != v}
        if changed:
            self._warn(
                "the checkpoint's settings replace those given: "
                + ", ".join(f"{k}={settings[k]!r} (was {v!r})" for k, v in changed.items())
            )
        self.window = settings["window"]
        self.factor = settings["factor"]
        self.min_lrs = list(settings["min_lr"])
        self.warmup_steps = settings["warmup_steps"]
        self._detector = SaturationDetector(
            settings["threshold"],
            settings["buffer_size"],
            settings["min_samples"],
            settings["kernel"],
        )
        self._detector.load_state_dict(state_dict["detector"])
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["step_count"]
        self.base_lrs = list(state_dict["base_lrs"])
        self._last_lr = list(state_dict["last_lr"])
        self._optimizer_steps = state_dict["optimizer_steps"]
        self._stepped = state_dict["stepped"]
        self.num_drops = state_dict["num_drops"]
        self.history = [Decision(**(d | {"lr": tuple(d["lr"])})) for d in state_dict["history"]]

    def _settings(self) -> dict[str, Any]:
        return {
            "window": self.window,
            "factor": self.factor,
            "threshold": self._detector.threshold,
            "buffer_size": self._detector.buffer_size,
            "min_samples": self._detector.min_samples,
            "kernel": self._detector.kernel,
            "min_lr": list(self.min_lrs),
            "warmup_steps": self.warmup_steps,
        }


def _check_number(name: str, value: Any, expected: str, accepted: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not accepted(float(value)):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _check_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _min_lrs(min_lr: float | Iterable[float], groups: int) -> list[float]:
    values = list(min_lr) if isinstance(min_lr, Iterable) else [min_lr] * groups
    if len(values) != groups:
        raise ValueError(
            f"min_lr: expected one number or {groups}, one per param group, got {len(values)}"
        )
    for value in values:
        _check_number("min_lr", value, "a finite number of at least 0", lambda x: 0 <= x < math.inf)
    return [float(value) for value in values]


def _check_state(state: Any, name: str) -> None:
    problem = None
    if not isinstance(state, Mapping):
        problem = type(state).__name__
    elif state.get("version") != 1 or state.get("scheduler") != name:
        problem = f"version {state.get('version')!r} of {state.get('scheduler')!r}"
    else:
        expected = {"settings", "last_epoch", "step_count", "base_lrs", "last_lr", "meter"}
        expected |= {"optimizer_steps", "stepped", "num_drops", "detector", "history"}
        missing = sorted(expected - set(state))
        missing += [f"settings[{s!r}]" for s in _SETTINGS if s not in state.get("settings", ())]
        if missing:
            problem = f"no entry {', '.join(missing)}"
    if problem is not None:
        raise ValueError(f"state_dict: expected a state of {name}, version 1, got {problem}")
