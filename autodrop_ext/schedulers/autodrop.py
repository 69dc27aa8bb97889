"""AutoDrop, UAI 2024, Algorithm 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from ..reading import Decision, Reading
from ..velocity import HISTORY
from .arguments import check_count, check_number
from .base import as_floats
from .measuring import MeasuringScheduler
from .saturation import Kernel, SaturationDetector

if TYPE_CHECKING:
    import matplotlib.figure


class AutoDrop(MeasuringScheduler):
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
        process_group: as in :class:`AngularVelocity`.
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

    _progress_entries = ("detector",)

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
        check_number("threshold", threshold, "a finite number of degrees", math.isfinite)
        check_count("buffer_size", buffer_size, 1)
        check_count("min_samples", min_samples, 1)
        check_count("warmup_steps", warmup_steps, 0)
        if kernel not in ("value", "time"):
            raise ValueError(f"kernel: expected 'value' or 'time', got {kernel!r}")
        self.window = window
        self._detector = SaturationDetector(float(threshold), buffer_size, min_samples, kernel)
        super().__init__(
            optimizer,
            window,
            factor,
            min_lr=min_lr,
            params=params,
            sample=sample,
            backend=backend,
            process_group=process_group,
            form="auto",
            on_reading=on_reading,
            on_drop=on_drop,
            warmup_steps=warmup_steps,
            last_epoch=last_epoch,
        )

    # ---- deciding ---------------------------------------------------------------------------

    def _on_optimizer_step(self) -> None:
        reading = self._meter.observe(calls=self._step_count)
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
        self._keep(decision, HISTORY)

    # ---- looking ----------------------------------------------------------------------------

    def get_metrics(self) -> dict[str, float]:
        """The newest values for a logger: plain floats, those that are undefined left out.

        ``lr`` (of the first param group), ``num_drops``, and from the last reading
        ``angular_velocity``, ``angular_velocity_smoothed``, ``angular_velocity_rise`` and
        ``rounding_error`` [degrees], and ``displacement``, the length ``|s_i|``.
        """
        if not self.history:
            return self._metrics()
        last = self.history[-1]
        return self._metrics(
            angular_velocity=last.angle,
            angular_velocity_smoothed=last.smoothed,
            angular_velocity_rise=last.rise,
            rounding_error=last.rounding_error,
            displacement=last.norm,
        )

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

    # ---- state ------------------------------------------------------------------------------

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

    def _restore_settings(self, settings: Mapping[str, Any]) -> None:
        self.window = settings["window"]
        self.warmup_steps = settings["warmup_steps"]
        self._detector = SaturationDetector(
            settings["threshold"],
            settings["buffer_size"],
            settings["min_samples"],
            settings["kernel"],
        )

    def _progress(self) -> dict[str, Any]:
        return {"detector": self._detector.state_dict()}

    def _restore_progress(self, state: Mapping[str, Any]) -> None:
        self._detector.load_state_dict(state["detector"])
