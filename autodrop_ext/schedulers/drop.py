"""What the schedulers that decide from a meter share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from torch.optim import Optimizer

from .. import checks
from ..distributed.checkpoint import ArenaState
from ..meter import AngularVelocity
from ..reading import Decision, Reading
from ..saved import Entries
from .base import Changes, StepScheduler, as_floats, dropped, lower_bounds


class DropScheduler(StepScheduler):
    """A scheduler that lowers rates where the readings of its meter say so.

    Subclasses implement :meth:`_decide`, which turns a reading into :class:`Changes` and changes
    nothing itself.

    Args:
        optimizer: whose learning rates are changed.
        meter: what decisions are made from; made for this scheduler.
        factor: what a drop multiplies rates by, in (0, 1).
        min_lr: lower bound of the rate, one for all param groups or one for each.
        on_reading: called with every decision.
        on_drop: called with those decisions that lowered a rate.
        warmup_steps: optimizer steps of linear warm-up, during which nothing is measured.
        last_epoch: as in torch's schedulers.

    Attributes:
        meter: the meter.
        factor: what a drop multiplies rates by.
        min_lrs: lower bound of each param group's rate.
    """

    _record_type: ClassVar[type[Decision]] = Decision

    def __init__(
        self,
        optimizer: Optimizer,
        meter: AngularVelocity,
        *,
        factor: float,
        min_lr: float | Iterable[float],
        on_reading: Callable[[Any], object] | None,
        on_drop: Callable[[Any], object] | None,
        warmup_steps: int,
        last_epoch: int,
    ) -> None:
        checks.callback("on_reading", on_reading)
        checks.callback("on_drop", on_drop)
        self.meter = meter
        self.factor = checks.between_0_and_1("factor", factor)
        self.on_reading = on_reading
        self.on_drop = on_drop
        self._decided: int | None = None  # window of the newest reading that was decided on
        super().__init__(optimizer, warmup_steps=warmup_steps, last_epoch=last_epoch)
        self.min_lrs = checks.floors(min_lr, len(self.optimizer.param_groups))
        meter.warn_as(type(self).__name__)

    # ---- deciding ---------------------------------------------------------------------------

    def _on_marked_step(self) -> None:
        # At the first step of all, where every rank is: one with another warm-up would not come.
        self.meter.compare(self._facts)

    def _on_optimizer_step(self) -> None:
        reading = self.meter.observe(calls=self._step_count, facts=self._facts)
        if reading is not None:
            self._take(reading)

    def _take(self, reading: Reading) -> None:
        """Decide on a reading, carry the decision out and report it."""
        changes = self._decide(reading)
        changes.attributes["_decided"] = reading.window
        self._carry_out(changes)
        self._report(changes.record)

    def _decide(self, reading: Reading) -> Changes:
        raise NotImplementedError

    def _report(self, decision: Decision) -> None:
        if self.on_reading is not None:
            self.on_reading(decision)
        if decision.dropped and self.on_drop is not None:
            self.on_drop(decision)

    def _recover(self) -> None:
        super()._recover()
        self.meter.interrupted()
        newest = self.meter.history[-1] if self.meter.history else None
        if newest is not None and newest.window != self._decided:
            # Other ranks may have decided on it.
            self._take(newest)

    def _dropped_lrs(self, groups: Iterable[int]) -> list[float | None]:
        """Rates after a drop of some param groups; None for those that stay as they are."""
        lrs = self.get_lr()
        bounds = lower_bounds(self.min_lrs, len(lrs))
        chosen = set(groups)
        return [
            dropped(lr, self.factor, floor) if i in chosen else None
            for i, (lr, floor) in enumerate(zip(lrs, bounds, strict=True))
        ]

    def _lrs_after(self, lower: Iterable[float | None]) -> tuple[float, ...]:
        """Rates of all param groups once some are lowered."""
        pairs = zip(as_floats(self.get_lr()), lower, strict=True)
        return tuple(lr if new is None else new for lr, new in pairs)

    def _carry_out(self, changes: Changes) -> None:
        before = as_floats(self.get_lr())
        super()._carry_out(changes)
        if any(lr is not None for lr in changes.lrs):
            self._dropped_from = list(zip(before, as_floats(self.get_lr()), strict=True))

    def _facts(self) -> dict[str, Any]:
        """What decisions depend on; equal on all ranks."""
        return {**self._settings(), **self._decision_state(), "lr": as_floats(self.get_lr())}

    def _decision_state(self) -> dict[str, Any]:
        """What has been gathered towards the next decision, as plain values by name."""
        return {"num_drops": self.num_drops}

    def _get_closed_form_lr(self) -> list[float]:
        """Base rates after all drops so far: what ``SequentialLR`` asks for at a milestone."""
        lrs = self._warmed(self.base_lrs)
        for g, floor in enumerate(lower_bounds(self.min_lrs, len(lrs))):
            for _ in range(self._drops_of(g)):
                lrs[g] = min(lrs[g], max(floor, self.factor * lrs[g]))
        return lrs

    def _drops_of(self, group: int) -> int:
        """How often the rate of a param group was lowered."""
        return self.num_drops

    def close(self) -> None:
        """Take the hooks off the optimizer and free the sums. The learning rates stay."""
        super().close()
        self.meter.close()

    # ---- state ------------------------------------------------------------------------------

    @property
    def arena_state(self) -> ArenaState:
        """The meter's sums of sharded parameters, for ``torch.distributed.checkpoint``.

        Save and load it next to the state: ``dcp.save({"scheduler": scheduler, "arenas":
        scheduler.arena_state, ...})``. Without it the meter warms up again after a restart.
        """
        return self.meter.arena_state

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit: settings, decisions, history and sums.

        Plain values and tensors only, so that ``torch.load(weights_only=True)`` reads it. Learning
        rates are restored by the *optimizer's* ``load_state_dict``, as with torch's schedulers.
        """
        if self._stepping:
            self._recover()
            self._stepping = False
        return {**super().state_dict(), "meter": self.meter.state_dict()}

    def _load_meter(self, state: Entries) -> None:
        self.meter.load_state_dict(state.value("meter"), name=state.name("meter"))

    def _read_settings(self, settings: Entries) -> dict[str, Any]:
        return {
            "factor": settings.read("factor", checks.between_0_and_1),
            "min_lrs": settings.list("min_lr", checks.at_least_zero),
        }

    def _read_progress(self, state: Entries, settings: Mapping[str, Any]) -> dict[str, Any]:
        newest = self.meter.history[-1].window if self.meter.history else None
        return {"_decided": newest}
