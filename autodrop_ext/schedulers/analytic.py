"""AnalyticAutoDrop, UAI 2024, Algorithm 2 (2021, Algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch.optim import Optimizer

from .. import checks
from ..ranks import check_group, find_group
from ..saved import Form
from ..settings import ANALYTIC, check_arguments
from ..velocity_model import RateSequence, VelocityModel, learning_rate
from .base import NOTHING, Outcome, StepScheduler, as_floats, check_optimizer, in_precision_of

if TYPE_CHECKING:
    import matplotlib.figure


@dataclass(frozen=True)
class AnalyticDrop:
    """One drop of :class:`AnalyticAutoDrop`.

    Attributes:
        step: real optimizer steps until then, the warm-up included.
        index: ``i`` of the rate that was left.
        gap: ``k_i``, steps since the model last started at 0.
        angle: modelled velocity at the drop, degrees.
        lr: learning rate of each param group after it.
    """

    step: int
    index: int
    gap: int
    angle: float
    lr: tuple[float, ...]


class AnalyticAutoDrop(StepScheduler):
    """Drops the learning rate when a *model* of the angular velocity saturates; measures nothing.

    Between drops the model (equation (12)) says how the velocity grows at a constant rate
    ``alpha_i``. When its derivative has fallen to ``min(tau0, gamma alpha_i / 2)``, the next rate
    of a given sequence takes over and the model starts again at 0 (Algorithm 2). The steps at which
    this happens follow from the arguments alone.

    Every param group runs at ``base_lr * r_i / r_0``, with the sequence ``r_i`` below, so that
    training starts at the rates that the optimizer was given. The model's ``alpha_i`` is the first
    group's rate, ``base_lr[0] * r_i / r_0``. With a base rate of 1, or of 1/2 under
    ``rates="proof"``, this is Algorithm 2 as printed. As printed, a step updates first and tests
    afterwards: ``alpha_0`` serves one step more than its gap.

    A rate that something else has changed in the meantime is multiplied by ``r_{i+1} / r_i``.

    Args:
        optimizer: any ``torch.optim.Optimizer``; learning rates may be floats or tensors. The
            papers analyse their unified momentum, which docs/theory.md shows.
        gamma: curvature of the model: ``1 / (gamma alpha)`` steps bring the velocity half way up.
        epsilon: the model's limit is ``90 (1 + epsilon alpha)`` degrees; above 0 and below
            ``1 / (3 alpha_0)``.
        tau0: initial threshold of the derivative, radians per step, in (0, 2).
        rates: ``r_i``: "theorem" for ``(i + 1)^(-2/3)`` of Theorem 5.2, or "proof" for
            ``(i + 2)^(-1)`` of its proof; the two contradict each other.
        warmup_steps: optimizer steps of linear warm-up, before the model's first.
        process_group: the ranks that train the model together, as in :class:`AngularVelocity`. They
            compare their settings once, at the first step.
        on_drop: called with every :class:`AnalyticDrop`.
        last_epoch: as in torch's schedulers; a warm-up that is over is not repeated.

    Raises:
        ValueError, TypeError: an argument is wrong; the message gives it, what was expected and
            what came.
        DisagreementError: ranks have different settings; raised by the first :meth:`step` on all of
            them alike.

    Attributes:
        history: the last 10,000 :class:`AnalyticDrop` objects.
        num_drops: ``i``, how often the rate was lowered.
    """

    gamma: float
    epsilon: float
    tau0: float
    rates: RateSequence
    _since_drop: int  # t - t_i of the last step; Algorithm 2's first step is t = 0
    _settings = ANALYTIC
    _gathered: ClassVar[Form] = {"since_drop": checks.at_least(-1)}
    _record_type = AnalyticDrop

    def __init__(
        self,
        optimizer: Optimizer,
        gamma: float,
        epsilon: float,
        tau0: float,
        *,
        rates: RateSequence = "theorem",
        warmup_steps: int = 0,
        process_group: Any = None,
        on_drop: Callable[[AnalyticDrop], object] | None = None,
        last_epoch: int = -1,
    ) -> None:
        settings = check_arguments(self._settings, locals())
        checks.callback("on_drop", on_drop)
        check_group(process_group)
        self.on_drop = on_drop
        self._process_group = process_group
        self._compared = False
        super().__init__(check_optimizer(optimizer), settings, last_epoch)
        self._gap()  # refuses an epsilon that the rate is too high for

    def _at_start(self) -> dict[str, Any]:
        return {**super()._at_start(), "_since_drop": -1}

    @property
    def model(self) -> VelocityModel:
        """The model of the angular velocity."""
        return VelocityModel(self.gamma, self.epsilon)

    # ---- deciding ---------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        """Return what drops depend on; equal on all ranks."""
        facts = {**self._saved_settings(), "num_drops": self.num_drops}
        return {**facts, "lr": as_floats(self.base_lrs)}

    def _decide_step(self, *, warming_up: bool) -> Outcome:
        if not self._compared:
            find_group(self._process_group, (), type(self).__name__).compare(self._facts())
            self._compared = True
        if warming_up:
            return NOTHING
        since = self._since_drop + 1
        if since < self._gap():
            return Outcome(None, (), {"_since_drop": since})
        before, after = (_scale(self.rates, i) for i in (self.num_drops, self.num_drops + 1))
        lrs = []
        for i, group in enumerate(self.optimizer.param_groups):
            lr = float(group["lr"])
            base = float(self.base_lrs[i]) if i < len(self.base_lrs) else math.nan
            # 1e-6 for float32 tensors. A product of ratios would drift from the printed sequence.
            ours = math.isclose(lr, base * before, rel_tol=1e-6)
            new = base * after if ours else lr * after / before
            lrs.append(in_precision_of(group["lr"], new))
        drop = AnalyticDrop(
            step=self._optimizer_steps,
            index=self.num_drops,
            gap=since,
            angle=self._angle(since),
            lr=tuple(lrs),
        )
        return Outcome(drop, lrs, {"num_drops": self.num_drops + 1, "_since_drop": 0})

    def _report(self, record: Any) -> None:
        if self.on_drop is not None:
            self.on_drop(record)

    def _alpha(self, i: int | None = None) -> float:
        """Return ``alpha_i``, the model's rate after ``i`` drops; by default after those so far."""
        return float(self.base_lrs[0]) * _scale(self.rates, self.num_drops if i is None else i)

    def _gap(self) -> int:
        """Return the steps from the last drop to the next one."""
        return self.model.drop_gap(self._alpha(), self.tau0)

    def _angle(self, since: int) -> float:
        """Return the modelled velocity so many steps after the last drop, degrees."""
        return math.degrees(self.model.velocity(float(since), self._alpha()))

    def _get_closed_form_lr(self) -> list[float]:
        """Return the rates after all drops so far, which ``SequentialLR`` sets at a milestone."""
        scale = _scale(self.rates, self.num_drops)
        return [lr * scale for lr in self._warmed(self.base_lrs)]

    # ---- looking ----------------------------------------------------------------------------

    def get_metrics(self) -> dict[str, float]:
        """Return the newest values for a logger, plain floats.

        ``lr`` (of the first param group), ``num_drops``, ``angular_velocity``, the model's
        [degrees], and ``steps_to_drop``.
        """
        return self._metrics(
            angular_velocity=self._angle(max(self._since_drop, 0)),
            steps_to_drop=self._gap() - self._since_drop,
        )

    def plot(self, path: Any = None) -> matplotlib.figure.Figure:
        """Draw the modelled velocity and its rate over the steps so far, drops marked.

        Args:
            path: where to save the picture, if anywhere.

        Raises:
            ImportError: matplotlib is not installed; it comes with ``autodrop_ext[plot]``.
        """
        from ..plotting.run import plot_run

        since = max(self._since_drop, 0)
        records: list[dict[str, Any]] = []
        phases = [(drop.index, drop.step - drop.gap, drop.gap) for drop in self.history]
        for i, start, gap in (*phases, (self.num_drops, self._optimizer_steps - since, since)):
            for t in sorted({gap * point // 20 for point in range(21)}):
                angle = math.degrees(self.model.velocity(float(t), self._alpha(i)))
                record = {"step": start + t, "modelled": angle, "lr": [self._alpha(i)]}
                records.append({**record, "dropped": i > 0 and t == 0})
        names = {"scheduler": type(self).__name__, **self._saved_settings()}
        return plot_run(records, settings=names, path=path)

    # ---- state ------------------------------------------------------------------------------

    def _restored(self, loaded: Mapping[str, Any]) -> dict[str, Any]:
        if not loaded["base_lrs"]:
            raise ValueError(
                "state_dict['base_lrs']: expected a rate for each param group, got none"
            )
        alpha = loaded["base_lrs"][0] * _scale(loaded["rates"], loaded["num_drops"])
        try:
            model = VelocityModel(loaded["gamma"], loaded["epsilon"])
            model.limit(loaded["base_lrs"][0])  # refuses an epsilon that the rate is too high for
            model.drop_gap(alpha, loaded["tau0"])
        except (ValueError, OverflowError) as error:
            raise ValueError(f"state_dict['base_lrs']: {error}") from error
        return super()._restored(loaded)


def _scale(rates: RateSequence, i: int) -> float:
    """Return ``r_i / r_0``."""
    return learning_rate(i, rates) / learning_rate(0, rates)
