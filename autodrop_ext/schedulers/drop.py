"""What the schedulers that decide from a meter share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from torch.optim import Optimizer

from .. import checks
from ..distributed.checkpoint import ArenaState
from ..meter import AngularVelocity
from ..reading import Decision, Reading
from ..saved import Entries
from .base import Changes, StepScheduler
from .rates import as_floats, dropped, lower_bounds

if TYPE_CHECKING:
    import matplotlib.figure

Shape = Literal["linear", "sqrt", "cosine"]
SHAPES = ("linear", "sqrt", "cosine")


class DropScheduler(StepScheduler):
    """A scheduler that lowers rates where the readings of its meter say so.

    Subclasses implement :meth:`_decide`, which turns a reading into :class:`Changes` and changes
    nothing itself.

    Args:
        optimizer: whose learning rates are changed.
        meter: what decisions are made from; made for this scheduler.
        min_lr: lower bound of the rate, one for all param groups or one for each.
        on_reading: called with every decision.
        on_drop: called with those decisions that lowered a rate.
        warmup_steps: optimizer steps of linear warm-up, during which nothing is measured.
        last_epoch: as in torch's schedulers.

    Attributes:
        meter: the meter.
        min_lrs: lower bound of each param group's rate.
    """

    _record_type: ClassVar[type[Decision]] = Decision
    _window_follows_from: ClassVar[str] = ""
    """For messages: entries of a saved state, if the window follows from several."""
    averaged_windows: ClassVar[Literal["last", "all"]] = "last"
    """What :meth:`averaged_parameters` takes the mean of: the last whole window, or both whole
    windows that the sums hold and the open one, weighted by their steps."""

    def __init__(
        self,
        optimizer: Optimizer,
        meter: AngularVelocity,
        *,
        min_lr: float | Iterable[float],
        on_reading: Callable[[Any], object] | None,
        on_drop: Callable[[Any], object] | None,
        warmup_steps: int,
        last_epoch: int,
    ) -> None:
        checks.callback("on_reading", on_reading)
        checks.callback("on_drop", on_drop)
        self.meter = meter
        self.on_reading = on_reading
        self.on_drop = on_drop
        self._decided: int | None = None  # window of the newest reading that was decided on
        self._cooldown: Cooldown | None = None
        super().__init__(optimizer, warmup_steps=warmup_steps, last_epoch=last_epoch)
        self.min_lrs = checks.floors(min_lr, len(self.optimizer.param_groups))
        meter.warn_through(self._warnings)

    # ---- deciding ---------------------------------------------------------------------------

    def _on_marked_step(self) -> None:
        # At the first step of all, where every rank is: one with another warm-up would not come.
        self.meter.compare(self._facts)
        if self._optimizer_steps == 1:
            self._begin_log()

    def _on_optimizer_step(self) -> None:
        reading = self.meter.observe(calls=self._step_count, facts=self._facts)
        self._cool()  # first, so that a decision holds the rates after this step
        if reading is not None:
            self._take(reading)

    def _take(self, reading: Reading) -> None:
        """Decide on a reading, carry the decision out and report it."""
        changes = self._decide(reading)
        changes.attributes["_decided"] = reading.window
        self._carry_out(changes)
        self._report(changes.record)

    def _begin_log(self) -> None:
        """Give the settings and a cooldown to a log, as ``JsonLinesLog`` is one."""
        begin = getattr(self.on_reading, "begin", None)
        if begin is not None:
            begin(self._described())

    def _described(self) -> dict[str, Any]:
        """What this scheduler was made with, for logs and titles of pictures."""
        of_meter = ("snapshots", "sample", "seed", "per_tensor")
        settings = {
            "scheduler": type(self).__name__,
            **{name: getattr(self.meter, name) for name in of_meter},
            **self._settings(),
            "lr": as_floats(self.base_lrs),
        }
        if self._cooldown is not None:
            begins, steps, shape, _ = self._cooldown
            settings["cooldown"] = {"begin": begins, "num_steps": steps, "shape": shape}
        return settings

    def _decide(self, reading: Reading) -> Changes:
        raise NotImplementedError

    def _report(self, decision: Decision) -> None:
        if self.on_reading is not None:
            self.on_reading(decision)
        if decision.dropped and self.on_drop is not None:
            self.on_drop(decision)

    def _recover(self) -> None:
        super()._recover()
        newest = self.meter.history[-1] if self.meter.history else None
        try:
            if newest is not None and newest.window != self._decided:
                # Other ranks may have decided on it.
                self._take(newest)
        finally:
            self.meter.interrupted()

    def _dropped_lrs(self, factor: float, groups: Iterable[int]) -> list[float | None]:
        """Rates after a drop of some param groups; None for those that stay as they are.

        During a cooldown all of them do.
        """
        lrs = self._rates()
        bounds = lower_bounds(self.min_lrs, len(lrs))
        chosen = set(groups) if self._cooldown is None else set()
        return [
            dropped(lr, factor, floor) if i in chosen else None
            for i, (lr, floor) in enumerate(zip(lrs, bounds, strict=True))
        ]

    def _lrs_after(self, lower: Iterable[float | None]) -> tuple[float, ...]:
        """Rates of all param groups once some are lowered."""
        pairs = zip(as_floats(self._rates()), lower, strict=True)
        return tuple(lr if new is None else new for lr, new in pairs)

    def _facts(self) -> dict[str, Any]:
        """What decisions depend on; equal on all ranks."""
        cooldown = Cooldown.saved(self._cooldown)
        lr = as_floats(self._rates())
        return {**self._settings(), **self._decision_state(), "cooldown": cooldown, "lr": lr}

    def _decision_state(self) -> dict[str, Any]:
        """What has been gathered towards the next decision, as plain values by name."""
        return {"num_drops": self.num_drops}

    def _closed_form(self, factor: float, drops: Callable[[int], int]) -> list[float]:
        """Base rates after ``drops`` of each group; the warm-up's share of them while it lasts."""
        lrs = self._warmed(self.base_lrs)
        for g, floor in enumerate(lower_bounds(self.min_lrs, len(lrs))):
            for _ in range(drops(g)):
                before, lrs[g] = lrs[g], min(lrs[g], max(floor, factor * lrs[g]))
                if lrs[g] == before:  # it stays at its floor
                    break
        return lrs

    # ---- looking ----------------------------------------------------------------------------

    def plot(self, path: Any = None) -> matplotlib.figure.Figure:
        """Draw what was measured, why rates were lowered or kept, and the learning rates.

        Args:
            path: where to save the picture, if anywhere.

        Raises:
            ImportError: matplotlib is not installed; it comes with ``autodrop_ext[plot]``.
            ValueError: nothing has been measured yet.
        """
        from ..plotting.titles import title_of

        records = [decision.as_dict() for decision in self.history]
        title = title_of(self._described(), records) if records else None
        return self._draw(records, path=path, title=title)

    def _draw(self, records: list[dict[str, Any]], **options: Any) -> matplotlib.figure.Figure:
        raise NotImplementedError

    # ---- averages and cooldown --------------------------------------------------------------

    @contextlib.contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Within the block the parameters hold a mean of window means, :attr:`averaged_windows`.

        For evaluation, and for saving a model that is to be used::

            with scheduler.averaged_parameters():
                evaluate(model)

        Save what a run is to be resumed from outside of the block.

        Afterwards the parameters have their bits back, also after an exception. The meter's sums
        hold the mean already, so that the average costs no memory; within the block there is a copy
        of the parameters. Where the meter has just started (over), the block changes nothing.
        Statistics of batch normalisation belong to the parameters of the last step: measure them
        again within the block with ``torch.optim.swa_utils.update_bn(loader, model)``, and keep
        copies of them if training goes on.

        Raises:
            RuntimeError: only a sample of the parameters is read, so that the sums have no mean of
                the others.
        """
        with self.meter.averaged(self.averaged_windows):
            yield

    def cooldown(self, num_steps: int, shape: Shape = "linear") -> None:
        """Let the rates fall to ``min_lr`` over the next ``num_steps`` steps, whatever is measured.

        For someone who now knows when the run ends. A second call starts from the present rates.
        Checkpoints hold the cooldown, and readings go on.

        Args:
            num_steps: calls of :meth:`step` that follow an optimizer step.
            shape: "linear", "sqrt" (``1 - sqrt(x)``) or "cosine", over the part ``x`` that is done.

        Raises:
            ValueError, TypeError: an argument is wrong.
            RuntimeError: the warm-up is not over.
        """
        if self._optimizer_steps < self.warmup_steps:
            raise RuntimeError(
                f"cooldown: expected a call after the warm-up of {self.warmup_steps} steps, got "
                f"one after {self._optimizer_steps}"
            )
        self._cooldown = Cooldown(
            self._optimizer_steps,
            checks.count("num_steps", num_steps, 1),
            checks.one_of("shape", shape, SHAPES),
            as_floats(self._rates()),
        )
        self._begin_log()

    def _cool(self) -> None:
        if self._cooldown is not None:
            now = as_floats(self._rates())
            lower = self._cooldown.lrs_at(self._optimizer_steps, self.min_lrs)
            self._set_lrs(map(min, now, lower))
            self._note_lowered(now)

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
            self._warnings.release()
        if self.meter.averaging:
            self._warnings.warn(
                "state_dict() was called within averaged_parameters(), where the parameters are "
                "not those of the run; to resume, save everything outside of the block"
            )
        cooldown = Cooldown.saved(self._cooldown)
        meter = self.meter.state_dict()
        return {**super().state_dict(), "cooldown": cooldown, "meter": meter}

    def _load_meter(self, state: Entries) -> None:
        meter, possible = state.inner("meter"), self._saved_windows(state)
        if (window := meter.count("window", 1)) not in possible:
            raise ValueError(
                f"{meter.name('window')}: expected this scheduler's window="
                f"{' or '.join(map(str, possible))}{self._window_follows_from}, got {window}"
            )
        self.meter.load_state_dict(state.value("meter"), name=state.name("meter"))

    def _saved_windows(self, state: Entries) -> Sequence[int]:
        """Return the windows that the meter in a saved state may have."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken. Settings are restored too, as in torch.

        Raises:
            ValueError: not a state of this class; the message names the entry, and nothing has been
                changed.
        """
        super().load_state_dict(state_dict)
        self._begin_log()

    def _read_settings(self, settings: Entries) -> dict[str, Any]:
        lows = settings.list("min_lr", checks.at_least_zero)
        if len(lows) != len(self.min_lrs):
            raise ValueError(
                f"{settings.name('min_lr')}: expected a value for each of the {len(self.min_lrs)} "
                f"param groups that this scheduler was made for, got {len(lows)}"
            )
        return {"min_lrs": lows}

    def _read_progress(self, state: Entries, settings: Mapping[str, Any]) -> dict[str, Any]:
        newest = self.meter.history[-1].window if self.meter.history else None
        # Older states have no cooldown.
        steps = state.count("optimizer_steps")
        cooldown = Cooldown.read(state.inner("cooldown"), steps) if "cooldown" in state else None
        return {"_decided": newest, "_cooldown": cooldown}


class Cooldown(NamedTuple):
    """A fall of all rates to their lower bounds.

    Attributes:
        begin: steps before it.
        num_steps: steps that it takes.
        shape: form of the fall.
        lrs: rates at its begin.
    """

    begin: int
    num_steps: int
    shape: Shape
    lrs: Sequence[float]

    def lrs_at(self, step: int, min_lrs: Sequence[float]) -> list[float]:
        """Rates after a step; those of groups that were added since are left out."""
        done = min(1.0, (step - self.begin) / self.num_steps)
        left = {
            "linear": 1.0 - done,
            "sqrt": 1.0 - math.sqrt(done),
            "cosine": (1.0 + math.cos(math.pi * done)) / 2,
        }[self.shape]
        bounds = lower_bounds(min_lrs, len(self.lrs))
        floors = (min(floor, lr) for floor, lr in zip(bounds, self.lrs, strict=True))
        return [floor + (lr - floor) * left for floor, lr in zip(floors, self.lrs, strict=True)]

    @staticmethod
    def saved(cooldown: Cooldown | None) -> dict[str, Any]:
        """Plain values, with the same entries where there is none."""
        if cooldown is None:
            return {"begin": 0, "num_steps": 0, "shape": "linear", "lrs": []}
        return {**cooldown._asdict(), "lrs": list(cooldown.lrs)}

    @classmethod
    def read(cls, state: Entries, steps: int) -> Cooldown | None:
        """The inverse of :meth:`saved`, after ``steps``; raises ValueError for a wrong entry."""
        if state.count("num_steps") == 0:
            return None
        begin = state.count("begin")
        if begin > steps:
            raise ValueError(
                f"{state.name('begin')}: expected at most optimizer_steps={steps}, got {begin}"
            )
        return cls(
            begin,
            state.count("num_steps"),
            state.read("shape", lambda name, value: checks.one_of(name, value, SHAPES)),
            state.list("lrs", checks.at_least_zero),
        )
