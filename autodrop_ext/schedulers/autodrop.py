"""AutoDrop, UAI 2024, Algorithm 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch.optim import Optimizer

from .. import checks
from ..messages import Warnings
from ..reading import Decision, Reading
from ..saved import Form, Later, inside, list_of
from ..settings import AUTODROP, USE_BUCKETS, check_arguments, removed
from .auto_window import LEAST_WINDOW, window_for
from .base import Outcome, as_floats, check_drops, replaced
from .growing import FIRST_WINDOW, GROWN, GROWTH, GrowingScheduler
from .saturation import SEEN, Kernel, SaturationDetector, Seen, Verdict


class AutoDrop(GrowingScheduler):
    """Drops the learning rate whenever the angular velocity of the parameters saturates.

    Once per window of optimizer steps the angle between the last two displacements of the mean
    parameters is measured and smoothed. While training makes headway the angle rises; when the
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
        warmup_steps: optimizer steps of linear warm-up, during which nothing is measured; or
            "auto": the rates that were set are upper bounds, which are approached as long as
            parameters travel, from 1/32 of them, in windows that begin with 2 steps and grow.
            ``window`` holds afterwards.
        params: what is measured instead of the optimizer's trainable parameters, such as float32
            master weights; forms as in :class:`AngularVelocity`.
        snapshots: how many times a window the parameters are read; None for every step.
        buckets: float64 sums in each of the meter's tables, a multiple of 4,096; None for exact
            angles, at 24 bytes for each element of the model. See :class:`AngularVelocity`.
        average: whether an average of the parameters is kept for :meth:`averaged_parameters`, in
            float32: 4 bytes a parameter.
        per_tensor: whether decisions have the angle of each parameter and param group; for exact
            angles only.
        per_group: whether every param group saturates and drops on its own. ``params``, if given,
            must then come in as many groups.
        num_steps: optimizer steps that the run will have, warm-up included; for
            ``window="auto"``.
        total_decay: part of the initial rate that ``window="auto"`` lets the run end at.
        backend: "auto", or the name of one (``autodrop doctor`` lists them).
        process_group: as in :class:`AngularVelocity`.
        on_reading: called with every :class:`Decision`, such as a :class:`JsonLinesLog`.
        on_drop: called with those decisions that lowered a rate.
        last_epoch: as in torch's schedulers; a warm-up that is over is not repeated.

    Raises:
        ValueError, TypeError: an argument is wrong; the message gives it, what was expected and
            what came.

    Attributes:
        history: the last 10,000 :class:`Decision` objects.
        num_drops: how often a learning rate was lowered.
        group_drops: the same of each param group, if they decide for themselves.
    """

    window: int
    factor: float
    threshold: float
    buffer_size: int
    min_samples: int
    kernel: Kernel
    per_group: bool
    average: bool
    group_drops: list[int]
    _seen: list[Seen]  # of each param group, if they decide for themselves
    _settings = AUTODROP
    _gathered: ClassVar[Form] = {
        "detector": inside(SEEN),
        "groups": Later(
            inside(
                {name: list_of(check) for name, check in SEEN.items()}
                | {"drops": list_of(checks.at_least(0))}
            ),
            {"drops": []} | dict.fromkeys(SEEN, ()),
        ),
        "growth": Later(inside(GROWTH), GROWN),
    }

    @removed(sample=USE_BUCKETS, seed=USE_BUCKETS)
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
        warmup_steps: int | Literal["auto"] = 0,
        params: Any = None,
        snapshots: int | None = None,
        buckets: int | None = 2**18,
        average: bool = False,
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
        arguments = dict(locals())
        if window == "auto":
            arguments["window"] = self._window_of_run(arguments)
        elif num_steps is not None:
            raise ValueError(f"num_steps: expected window='auto' with it, got window={window!r}")
        rises = warmup_steps == "auto" and last_epoch <= 0
        super().__init__(optimizer, arguments, window=FIRST_WINDOW if rises else None)
        groups = len(self.optimizer.param_groups)
        if per_group and params is not None and self.meter.num_groups != groups:
            raise ValueError(
                f"params: expected {groups} param groups for per_group=True, as the optimizer has, "
                f"got {self.meter.num_groups}"
            )

    def _at_start(self) -> dict[str, Any]:
        return {**super()._at_start(), "group_drops": [], "_seen": [Seen()]}

    def _usual_window(self) -> int:
        return self.window

    def _window_of_run(self, arguments: Mapping[str, Any]) -> int:
        """Return the window for ``window="auto"``."""
        settings = tuple(s for s in self._settings if s.name != "window")
        checked, num_steps = check_arguments(settings, arguments), arguments["num_steps"]
        if num_steps is None:
            raise ValueError("num_steps: expected the length of the run for window='auto'")
        warmup = 0 if checked["warmup_steps"] == "auto" else checked["warmup_steps"]
        window = window_for(
            checks.count("num_steps", num_steps, warmup + 1) - warmup,
            factor=checked["factor"],
            min_samples=checked["min_samples"],
            total_decay=arguments["total_decay"],
        )
        if window < LEAST_WINDOW:
            Warnings(type(self).__name__).warn(
                f"window='auto' would take {window} of num_steps={num_steps} for a window; "
                "that is shorter than a few times the optimizer's memory, and angles would be "
                f"noise. It takes {LEAST_WINDOW}, and this run is too short for the rate to "
                "fall far; AnytimeAutoDrop needs no window"
            )
        return max(window, LEAST_WINDOW)

    # ---- deciding ---------------------------------------------------------------------------

    def _outcome(
        self, reading: Reading, lrs: Sequence[float | None], state: dict[str, Any], **fields: Any
    ) -> Outcome:
        lr = tuple(replaced(as_floats(self._rates()), lrs))
        decision = Decision(**vars(reading), lr=lr, threshold=self.threshold, **fields)
        if not state.get("_rising", True):
            state = {**state, "_next_window": self.window, "_doubled": False}
        return Outcome(decision, lrs, state)

    def _decide_risen(self, reading: Reading) -> Outcome:
        parts = (reading.per_group or ()) if self.per_group else (reading,)
        angles = [part.angle for part in parts]
        detector = self._detector(vars(self))
        seen = self._seen + [Seen()] * (len(angles) - len(self._seen))
        verdicts = [Verdict()] * len(angles)
        for g, angle in enumerate(angles):
            if angle is not None:
                verdicts[g], seen[g] = detector.judge(seen[g], angle)
        saturated = [g for g, verdict in enumerate(verdicts) if verdict.saturated]
        lrs = self._dropped(self.factor, saturated if self.per_group or not saturated else None)
        lowered = [g for g, lr in enumerate(lrs) if lr is not None]
        of_groups: dict[str, Any] = {}
        drops: list[int] = []
        if self.per_group:
            of_groups = {
                "dropped_groups": tuple(lowered),
                "group_angles": tuple(angles),
                "group_smoothed": tuple(verdict.smoothed for verdict in verdicts),
                "group_rises": tuple(verdict.rise for verdict in verdicts),
            }
            drops = self.group_drops + [0] * (len(angles) - len(self.group_drops))
            drops = [n + (g in lowered) for g, n in enumerate(drops)]
        elif verdicts:
            of_groups = {"smoothed": verdicts[0].smoothed, "rise": verdicts[0].rise}
        state = {
            "num_drops": self.num_drops + bool(lowered),
            "group_drops": drops,
            "_seen": seen,
            "_decided": reading.window,
        }
        return self._outcome(reading, lrs, state, dropped=bool(lowered), **of_groups)

    @staticmethod
    def _detector(settings: Mapping[str, Any]) -> SaturationDetector:
        names = ("threshold", "buffer_size", "min_samples", "kernel")
        return SaturationDetector(*(settings[name] for name in names))

    def _get_closed_form_lr(self) -> list[float]:
        return self._closed_form(self.factor, self._drops_of, self._share)

    def _drops_of(self, group: int) -> int:
        """Return how often the rate of a param group was lowered."""
        if not self.per_group:
            return self.num_drops
        return self.group_drops[group] if group < len(self.group_drops) else 0

    # ---- looking ----------------------------------------------------------------------------

    def get_metrics(self) -> dict[str, float]:
        """The newest values for a logger: plain floats, those that are undefined left out.

        ``lr`` (of the first param group), ``num_drops``, and from the last reading
        ``angular_velocity``, ``angular_velocity_smoothed``, ``angular_velocity_rise``,
        ``standard_error`` [degrees], and ``displacement``, the length ``|s_i|``. If param groups
        decide for themselves, also ``angular_velocity/0``, ``angular_velocity_smoothed/0``,
        ``angular_velocity_rise/0``, ``num_drops/0`` and so on.
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
            displacement=last.norm,
        )

    # ---- state ------------------------------------------------------------------------------

    def _saved_gathered(self) -> dict[str, Any]:
        # Lists of plain values: torch.distributed.checkpoint would take dicts in them apart.
        of_groups = [seen.state_dict() for seen in self._seen[: len(self.group_drops)]]
        first = Seen() if self.per_group else self._seen[0]
        columns = {name: [state[name] for state in of_groups] for name in SEEN}
        return {
            "detector": first.state_dict(),
            "groups": {**columns, "drops": list(self.group_drops)},
            "growth": self._saved(GROWTH),
        }

    def _restored(self, loaded: Mapping[str, Any]) -> dict[str, Any]:
        watched, of_optimizer = self.meter.num_groups, len(self.optimizer.param_groups)
        if loaded["per_group"] and watched != of_optimizer:
            raise ValueError(
                f"state_dict['per_group']: expected False, because params= has {watched} "
                f"param groups and the optimizer {of_optimizer}, got True"
            )
        detector = self._detector(loaded)
        seen = [detector.check_seen(loaded["detector"], "state_dict['detector']")]
        grown = self._grown_attributes(loaded["growth"], loaded)
        if not loaded["per_group"]:
            return {"_seen": seen, "group_drops": [], **grown}
        columns, name = loaded["groups"], "state_dict['groups']"
        drops = columns["drops"]
        for key, column in columns.items():
            if len(column) != len(drops):
                raise ValueError(
                    f"{name}[{key!r}]: expected {len(drops)} values, one for each of 'drops', "
                    f"got {len(column)}"
                )
        for number in drops:
            check_drops(loaded, "groups", number)
        rows = [{key: columns[key][g] for key in SEEN} for g in range(len(drops))]
        seen = [detector.check_seen(row, name) for row in rows] or seen
        return {"_seen": seen, "group_drops": drops, **grown}

    def _possible_windows(self, loaded: Mapping[str, Any]) -> Sequence[int]:
        if loaded["growth"]["rising"]:
            return self._windows_until(loaded["optimizer_steps"], loaded)
        return super()._possible_windows(loaded)

    def _take_over(self, loaded: dict[str, Any]) -> None:
        super()._take_over(loaded)
        self.meter.per_group = self.per_group
