"""AutoDrop, UAI 2024, Algorithm 1."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch.optim import Optimizer

from .. import checks
from ..faults import Warnings
from ..meter import AngularVelocity
from ..reading import Decision, Reading
from ..saved import Entries
from .auto_window import LEAST_WINDOW, window_for
from .base import Changes, check_optimizer, count_of_drops
from .drop import DropScheduler
from .saturation import Kernel, SaturationDetector, Verdict, check_kernel

if TYPE_CHECKING:
    import matplotlib.figure


class AutoDrop(DropScheduler):
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
            ImageNet. "auto": from ``num_steps``, see
            :func:`~autodrop_ext.schedulers.auto_window.window_for`, and at least 16.
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
        sample: part of the parameters that is read, in (0, 1]; None for all.
        seed: seed of the sample.
        snapshots: how many times a window the parameters are read; None for every step.
        per_tensor: whether decisions have the angle of each parameter and param group.
        per_group: whether every param group saturates and drops on its own. ``params``, if given,
            must then come in as many groups.
        num_steps: optimizer steps that the run will have, warm-up included; for
            ``window="auto"``.
        total_decay: part of the initial rate that ``window="auto"`` lets the run end at.
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
        group_drops: the same of each param group, where they decide for themselves.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        window: int | Literal["auto"] = 64,
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
        seed: int = 0,
        snapshots: int | None = None,
        per_tensor: bool = False,
        per_group: bool = False,
        num_steps: int | None = None,
        total_decay: float = 0.01,
        backend: str = "auto",
        process_group: Any = None,
        on_reading: Callable[[Decision], object] | None = None,
        on_drop: Callable[[Decision], object] | None = None,
        last_epoch: int = -1,
    ) -> None:
        optimizer = check_optimizer(optimizer)
        detector = SaturationDetector(
            checks.finite("threshold", threshold, "a finite number of degrees"),
            checks.count("buffer_size", buffer_size, 1),
            checks.count("min_samples", min_samples, 1),
            check_kernel("kernel", kernel),
        )
        warmup_steps = checks.count("warmup_steps", warmup_steps, 0)
        if window == "auto":
            factor = checks.between_0_and_1("factor", factor)
            if num_steps is None:
                raise ValueError("num_steps: expected the length of the run for window='auto'")
            checks.count("num_steps", num_steps, warmup_steps + 1)
            window = window_for(
                num_steps - warmup_steps,
                factor=factor,
                min_samples=min_samples,
                total_decay=total_decay,
            )
            if window < LEAST_WINDOW:
                Warnings(type(self).__name__).warn(
                    f"window='auto' would take {window} of num_steps={num_steps} for a window; "
                    "that is shorter than a few times the optimizer's memory, and angles would be "
                    f"noise. It takes {LEAST_WINDOW}, and this run is too short for the rate to "
                    "fall far; AnytimeAutoDrop needs no window"
                )
                window = LEAST_WINDOW
        elif num_steps is not None:
            raise ValueError(f"num_steps: expected window='auto' with it, got window={window!r}")
        meter = AngularVelocity(
            optimizer if params is None else params,
            window,
            sample=sample,
            seed=seed,
            snapshots=snapshots,
            per_tensor=per_tensor,
            per_group=per_group,
            backend=backend,
            process_group=process_group,
        )
        self.window = meter.window
        self.per_group = meter.per_group
        self.group_drops: list[int] = []
        self._detectors = [detector]
        self.factor = checks.between_0_and_1("factor", factor)
        super().__init__(
            optimizer,
            meter,
            min_lr=min_lr,
            on_reading=on_reading,
            on_drop=on_drop,
            warmup_steps=warmup_steps,
            last_epoch=last_epoch,
        )
        groups = len(self.optimizer.param_groups)
        if per_group and params is not None and meter.num_groups != groups:
            raise ValueError(
                f"params: expected {groups} param groups for per_group=True, as the optimizer has, "
                f"got {meter.num_groups}"
            )

    # ---- deciding ---------------------------------------------------------------------------

    def _decide(self, reading: Reading) -> Changes:
        # The meter does not know of the warm-up.
        reading = dataclasses.replace(reading, step=self._optimizer_steps)
        parts = (reading.per_group or ()) if self.per_group else (reading,)
        # The error of a sample in which too few chunks move is not known.
        angles = [None if math.isnan(p.standard_error) else p.angle for p in parts]
        detectors = [detector.copy() for detector in self._detectors]
        detectors += [detectors[0].fresh() for _ in range(len(angles) - len(detectors))]
        verdicts = [
            Verdict() if angle is None else detector.update(angle)
            for angle, detector in zip(angles, detectors, strict=False)
        ]
        saturated = [i for i, verdict in enumerate(verdicts) if verdict.saturated]
        everything = range(len(self.optimizer.param_groups)) if saturated else ()
        lrs = self._dropped_lrs(self.factor, saturated if self.per_group else everything)
        lowered = [g for g, lr in enumerate(lrs) if lr is not None]
        of_groups: dict[str, Any] = {}
        if self.per_group:
            of_groups = {
                "dropped_groups": tuple(lowered),
                "group_angles": tuple(angles),
                "group_smoothed": tuple(verdict.smoothed for verdict in verdicts),
                "group_rises": tuple(verdict.rise for verdict in verdicts),
            }
        elif verdicts:
            of_groups = {"smoothed": verdicts[0].smoothed, "rise": verdicts[0].rise}
        decision = Decision(
            **vars(reading),
            lr=self._lrs_after(lrs),
            dropped=bool(lowered),
            threshold=detectors[0].threshold,
            **of_groups,
        )
        group_drops = self.group_drops + [0] * (len(angles) - len(self.group_drops))
        if self.per_group:
            group_drops = [n + (g in lowered) for g, n in enumerate(group_drops)]
        return Changes(
            decision,
            lrs,
            num_drops=self.num_drops + decision.dropped,
            group_drops=group_drops if self.per_group else [],
            _detectors=detectors,
        )

    def _get_closed_form_lr(self) -> list[float]:
        return self._closed_form(self.factor, self._drops_of)

    def _drops_of(self, group: int) -> int:
        """How often the rate of a param group was lowered."""
        if not self.per_group:
            return self.num_drops
        return self.group_drops[group] if group < len(self.group_drops) else 0

    # ---- looking ----------------------------------------------------------------------------

    def get_metrics(self) -> dict[str, float]:
        """The newest values for a logger: plain floats, those that are undefined left out.

        ``lr`` (of the first param group), ``num_drops``, and from the last reading
        ``angular_velocity``, ``angular_velocity_smoothed``, ``angular_velocity_rise``,
        ``standard_error`` and ``rounding_error`` [degrees], and ``displacement``, the length
        ``|s_i|``. Where param groups decide for themselves, ``angular_velocity/0``,
        ``angular_velocity_smoothed/0``, ``angular_velocity_rise/0``, ``num_drops/0`` and so on.
        """
        if not self.history:
            return self._metrics()
        last = self.history[-1]
        of_groups: dict[str, float | None] = {}
        for g in range(len(last.group_angles)):
            of_groups |= {
                f"angular_velocity/{g}": last.group_angles[g],
                f"angular_velocity_smoothed/{g}": last.group_smoothed[g],
                f"angular_velocity_rise/{g}": last.group_rises[g],
                f"num_drops/{g}": self._drops_of(g),
            }
        return self._metrics(
            **of_groups,
            angular_velocity=last.angle,
            angular_velocity_smoothed=last.smoothed,
            angular_velocity_rise=last.rise,
            standard_error=last.standard_error,
            rounding_error=last.rounding_error,
            displacement=last.norm,
        )

    def _draw(self, records: list[dict[str, Any]], **options: Any) -> matplotlib.figure.Figure:
        from ..plotting.run import plot_run

        return plot_run(records, threshold=self._detectors[0].threshold, **options)

    # ---- state ------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {
            "window": self.window,
            "factor": self.factor,
            **self._detectors[0].settings(),
            "min_lr": list(self.min_lrs),
            "warmup_steps": self.warmup_steps,
            "per_group": self.per_group,
        }

    def _read_settings(self, settings: Entries) -> dict[str, Any]:
        # States from before param groups could decide for themselves have no "per_group".
        return {
            **super()._read_settings(settings),
            "factor": settings.read("factor", checks.between_0_and_1),
            "window": settings.count("window", 1),
            "warmup_steps": settings.count("warmup_steps"),
            "per_group": "per_group" in settings and settings.flag("per_group"),
            "_detectors": [
                SaturationDetector(
                    settings.number("threshold"),
                    settings.count("buffer_size", 1),
                    settings.count("min_samples", 1),
                    settings.read("kernel", check_kernel),
                )
            ],
        }

    def _progress(self) -> dict[str, Any]:
        # Lists of plain values: torch.distributed.checkpoint would take dicts in them apart.
        of_groups = [d.state_dict() for d in self._detectors[: len(self.group_drops)]]
        first = self._detectors[0].fresh() if self.per_group else self._detectors[0]
        columns = {key: [state[key] for state in of_groups] for key in first.state_dict()}
        return {
            "detector": first.state_dict(),
            "groups": {**columns, "drops": list(self.group_drops)},
        }

    def _decision_state(self) -> dict[str, Any]:
        return {"num_drops": self.num_drops, **self._progress()}

    def _read_progress(self, state: Entries, settings: Mapping[str, Any]) -> dict[str, Any]:
        (detector,) = settings["_detectors"]
        detectors, drops = [detector.restored(state.inner("detector"))], []
        if settings["per_group"]:
            groups = state.inner("groups")
            drops = groups.list("drops", functools.partial(count_of_drops, state))
            detectors = [detector.restored(groups, of=g) for g in range(len(drops))] or [detector]
        return {
            **super()._read_progress(state, settings),
            "_detectors": detectors,
            "group_drops": drops,
        }

    def _saved_windows(self, state: Entries) -> Sequence[int]:
        return [state.inner("settings").count("window", 1)]

    def _load_meter(self, state: Entries) -> None:
        settings = state.inner("settings")
        per_group = "per_group" in settings and settings.flag("per_group")
        watched, groups = self.meter.num_groups, len(self.optimizer.param_groups)
        if per_group and watched != groups:
            raise ValueError(
                f"{settings.name('per_group')}: expected False, because params= has {watched} "
                f"param groups and the optimizer {groups}, got True"
            )
        super()._load_meter(state)
        self.meter.per_group = per_group
