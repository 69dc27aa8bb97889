"""AutoDrop, UAI 2024, Algorithm 1."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch.optim import Optimizer

from ..checks import check_count, check_factor, check_number
from ..meter import HISTORY
from ..reading import Decision, Reading
from .auto_window import window_for
from .base import as_floats
from .measuring import MeasuringScheduler
from .saturation import Kernel, SaturationDetector, Verdict

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
            ImageNet. "auto": from ``num_steps``, see
            :func:`~autodrop_ext.schedulers.auto_window.window_for`.
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
        sample: part of the parameters that is read, in (0, 1]; None for all. "auto": as much as
            keeps the standard error of the angle within a tenth of ``threshold``, chosen once. As
            in :class:`AngularVelocity`.
        seed: of the sample.
        per_tensor: whether decisions tell the angle of each parameter and param group.
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

    _progress_entries = ("detector", "groups")

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
        sample: float | Literal["auto"] | None = None,
        seed: int = 0,
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
        check_number("threshold", threshold, "a finite number of degrees", math.isfinite)
        check_count("buffer_size", buffer_size, 1)
        check_count("min_samples", min_samples, 1)
        check_count("warmup_steps", warmup_steps, 0)
        if kernel not in ("value", "time"):
            raise ValueError(f"kernel: expected 'value' or 'time', got {kernel!r}")
        if sample == "auto" and threshold <= 0:
            raise ValueError(
                f"sample: expected a number, 'auto' needs threshold > 0, got {sample!r}"
            )
        if window == "auto":
            check_factor(factor)
            if num_steps is None:
                raise ValueError("num_steps: expected the length of the run for window='auto'")
            check_count("num_steps", num_steps, warmup_steps + 1)
            window = window_for(
                num_steps - warmup_steps,
                factor=factor,
                min_samples=min_samples,
                total_decay=total_decay,
            )
        elif num_steps is not None:
            raise ValueError(f"num_steps: expected window='auto' beside it, got window={window!r}")
        self.window = window
        self.per_group = per_group
        self._detector = SaturationDetector(float(threshold), buffer_size, min_samples, kernel)
        self._of_groups: list[SaturationDetector] = []
        self._choices = 0  # of the meter's samples, that angles so far come from
        self.group_drops: list[int] = []
        super().__init__(
            optimizer,
            window,
            factor,
            min_lr=min_lr,
            params=params,
            sample=sample,
            seed=seed,
            tolerance=_tolerance(threshold),
            per_tensor=per_tensor,
            per_group=per_group,
            backend=backend,
            process_group=process_group,
            form="auto",
            on_reading=on_reading,
            on_drop=on_drop,
            warmup_steps=warmup_steps,
            last_epoch=last_epoch,
        )
        groups = len(self.optimizer.param_groups)
        if per_group and params is not None and self._meter.num_groups != groups:
            raise ValueError(
                f"params: expected {groups} param groups for per_group=True, as the optimizer has, "
                f"got {self._meter.num_groups}"
            )

    # ---- deciding ---------------------------------------------------------------------------

    def _on_optimizer_step(self) -> None:
        reading = self._meter.observe(calls=self._step_count)
        if reading is not None:
            if self._meter.choices != self._choices:
                self._choices = self._meter.choices
                self._compare_samples(reading)
            # The meter does not know of the warm-up.
            self._decide(dataclasses.replace(reading, step=self._optimizer_steps))

    def _compare_samples(self, reading: Reading) -> None:
        """At the first reading of another sample: a fall that only that explains is no drop's."""
        before = self.history[-1] if self.history else reading
        if reading.angle is not None:
            self._detector.leave(reading.angle, reading.margin + before.margin)
        parts = reading.per_group or ()
        for g, (part, detector) in enumerate(zip(parts, self._of_groups, strict=False)):
            error = part.standard_error
            if before.per_group is not None and g < len(before.per_group):
                error += before.per_group[g].standard_error
            if part.angle is not None:
                detector.leave(part.angle, 2 * error)  # about 95 %

    def _decide(self, reading: Reading) -> None:
        if self.per_group:
            decision = self._decide_by_groups(reading)
        else:
            verdict, dropped = Verdict(), False
            if reading.angle is not None:
                verdict = self._detector.update(reading.angle)
                dropped = verdict.saturated and bool(self._drop_lrs(self.factor, self.min_lrs))
            decision = Decision(
                **vars(reading),
                smoothed=verdict.smoothed,
                rise=verdict.rise,
                lr=tuple(as_floats(self.get_lr())),
                dropped=dropped,
            )
        self.num_drops += decision.dropped
        self._keep(decision, HISTORY)

    def _decide_by_groups(self, reading: Reading) -> Decision:
        angles = [part.angle for part in reading.per_group or ()]
        self._follow_groups(len(angles))
        verdicts = [
            Verdict() if angle is None else detector.update(angle)
            for angle, detector in zip(angles, self._of_groups, strict=False)
        ]
        saturated = {g for g, verdict in enumerate(verdicts) if verdict.saturated}
        lowered = self._drop_lrs(self.factor, self.min_lrs, saturated)
        for g in lowered:
            self.group_drops[g] += 1
        return Decision(
            **vars(reading),
            lr=tuple(as_floats(self.get_lr())),
            dropped=bool(lowered),
            dropped_groups=tuple(lowered),
            group_angles=tuple(angles),
            group_smoothed=tuple(verdict.smoothed for verdict in verdicts),
            group_rises=tuple(verdict.rise for verdict in verdicts),
        )

    def _follow_groups(self, groups: int) -> None:
        """A detector for every param group, also those that were added since."""
        while len(self._of_groups) < groups:
            self._of_groups.append(self._detector.fresh())
            self.group_drops.append(0)

    def _drops_of(self, group: int) -> int:
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

    def plot(self, path: Any = None) -> matplotlib.figure.Figure:
        """Draw angular velocity, its rise and the learning rate over the steps, drops marked.

        Args:
            path: where to save the picture, if anywhere.

        Raises:
            ImportError: matplotlib is not installed; it comes with ``autodrop_ext[plot]``.
        """
        from ..plotting.run import plot_run

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
            "per_group": self.per_group,
        }

    def _restore_settings(self, settings: Mapping[str, Any]) -> None:
        self.window = settings["window"]
        self.warmup_steps = settings["warmup_steps"]
        self.per_group = self._meter.per_group = settings["per_group"]
        self._meter.tolerance = _tolerance(settings["threshold"])
        self._detector = SaturationDetector(
            settings["threshold"],
            settings["buffer_size"],
            settings["min_samples"],
            settings["kernel"],
        )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken. Settings are restored too, as in torch.

        Raises:
            ValueError: not a state of this class; nothing has been changed then.
        """
        if isinstance(state_dict, Mapping) and isinstance(state_dict.get("settings"), Mapping):
            # States from before param groups could decide for themselves.
            settings = {"per_group": False, **state_dict["settings"]}
            nothing: dict[str, Any] = {"drops": []}
            state_dict = {"groups": nothing, **state_dict, "settings": settings}
        super().load_state_dict(state_dict)

    def _progress(self) -> dict[str, Any]:
        of_groups = [detector.state_dict() for detector in self._of_groups]
        # Lists of plain values: torch.distributed.checkpoint would take dicts in them apart.
        columns = {key: [state[key] for state in of_groups] for key in self._detector.state_dict()}
        return {
            "detector": self._detector.state_dict(),
            "groups": {**columns, "drops": list(self.group_drops)},
        }

    def _restore_progress(self, state: Mapping[str, Any]) -> None:
        self._detector.load_state_dict(state["detector"])
        self._of_groups, self.group_drops = [], []
        groups = state["groups"]
        self._follow_groups(len(groups["drops"]))
        for g, detector in enumerate(self._of_groups):
            detector.load_state_dict({key: groups[key][g] for key in self._detector.state_dict()})
        self.group_drops = list(groups["drops"])


def _tolerance(threshold: float) -> float:
    """Standard error, degrees, that ``sample="auto"`` aims at."""
    return threshold / 10 if threshold > 0 else 0.01
