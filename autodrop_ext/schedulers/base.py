"""What all schedulers here share: one action per real optimizer step, learning rates, state."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .. import checks
from ..distributed import unwrap_optimizer
from ..faults import Warnings
from ..reading import HISTORY, from_columns, remember, to_columns
from ..saved import Entries
from .rates import as_floats, write
from .step_hook import StepHook

# Where torch has no _update_lr, SequentialLR calls step(0) at a milestone.
_MILESTONES_CALL_STEP = not hasattr(LRScheduler, "_update_lr")


class StepScheduler(LRScheduler):
    """A scheduler that acts once per *real* optimizer step.

    Subclasses implement :meth:`_on_optimizer_step`, which :meth:`step` calls where
    :class:`StepHook` has marked a step, and for checkpoints :meth:`_settings`,
    :meth:`_read_settings`, :meth:`_progress` and :meth:`_read_progress`. What a step changes goes
    through :meth:`_carry_out`, so that an interrupted call leaves nothing half done.

    Args:
        optimizer: whose learning rates are changed.
        warmup_steps: optimizer steps over which the rate grows linearly to its initial value: step
            ``t`` of them (from 1) runs at ``t / warmup_steps`` of it. Nothing is measured then.
        last_epoch: as in torch; -1 for a new run.

    Attributes:
        history: the last 10,000 records of what was decided.
        num_drops: how often a learning rate was lowered.
    """

    _record_type: ClassVar[type]
    _calls_without_step_allowed = 1000  # more micro-batches than anyone accumulates

    def __init__(self, optimizer: Optimizer, *, warmup_steps: int, last_epoch: int) -> None:
        optimizer = check_optimizer(optimizer)
        self.warmup_steps = checks.count("warmup_steps", warmup_steps, 0)
        self.num_drops = 0
        self.history: list[Any] = []
        self._warnings = Warnings(type(self).__name__)
        self._hook = StepHook()
        self._hook.before_step = self._make_before_step()
        self._optimizer_steps = 0  # consumed marks
        self._calls_without_step = 0
        self._stepping = False  # stays True where a call of step() was interrupted
        self._changes: Changes | None = None  # being carried out
        self._dropped_from: list[tuple[float, float]] = []  # rates before and after the last drop
        self._lrs_of_checkpoint: list[float] | None = None  # until the first step after loading
        if not hasattr(optimizer.step, "__func__"):
            # optimizer.step was replaced, by torch.compile for example. torch's base class would
            # fail to wrap it; our own hook does not need that wrapper.
            optimizer.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        super().__init__(optimizer, last_epoch)
        self._hook.attach(self.optimizer)

    def _make_before_step(self) -> Callable[[], None] | None:
        """What the hook calls before each real optimizer step, if anything."""
        return None

    # ---- a step -----------------------------------------------------------------------------

    def step(self, epoch: int | None = None) -> None:
        """Call after every ``optimizer.step()``; of an ``EpochAutoDrop``, at the end of each epoch.

        Args:
            epoch: torch's deprecated argument. It sets ``last_epoch``, has no other effect, and
                warns.
        """
        if epoch == 0 and _MILESTONES_CALL_STEP:
            self._update_lr(0)
            return
        if epoch is not None:
            self._warnings.once(
                "epoch",
                f"step(epoch={epoch}) sets last_epoch and has no other effect on a schedule that "
                "is measured; call step() without an argument (torch's own schedulers deprecate "
                "it)",
            )
        # A warning may be an error, and must not leave this half done.
        self._warnings.hold()
        if self._stepping:
            self._recover()
        self._stepping = True
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._step_count += 1
        if not self._hook.attach(self.optimizer):
            self._warnings.warn(
                "the optimizer had lost its step hook (it was copied or unpickled); the hook is "
                "registered again and this call is not counted"
            )
        self._watch_wiring()
        self._watch_rates()
        if self._hook.consume():
            self._optimizer_steps += 1
            self._on_marked_step()
            if self._optimizer_steps < self.warmup_steps:
                self._set_lrs(self._warmed(self.base_lrs))
            if self._optimizer_steps > self.warmup_steps:
                self._on_optimizer_step()
        self._last_lr = self._lrs()
        self._stepping = False
        self._warnings.release()

    def _on_marked_step(self) -> None:
        """Called at every real step, also during the warm-up."""

    def _on_optimizer_step(self) -> None:
        raise NotImplementedError

    def _recover(self) -> None:
        """Finish what a call that was interrupted had decided."""
        if self._optimizer_steps < self.warmup_steps:
            self._set_lrs(self._warmed(self.base_lrs))
        if self._changes is not None:
            self._carry_out(self._changes)

    def _carry_out(self, changes: Changes) -> None:
        """Change rates and attributes and keep the record; repeating it changes nothing more.

        Rates and attributes change in one call that no signal can divide. An interrupt before the
        end leaves the changes to be repeated at the next call.
        """
        self._changes = changes
        before = as_floats(self._rates())
        pairs = zip(self.optimizer.param_groups, changes.lrs, strict=False)
        writes = [write(group, lr) for group, lr in pairs if lr is not None]
        writes.append(functools.partial(self.__dict__.update, changes.attributes))
        with torch.no_grad():
            # Python looks for signals between its own instructions, and here there are none.
            collections.deque(map(functools.partial.__call__, writes), maxlen=0)
        self._last_lr = self._lrs()
        self._note_lowered(before)
        if not (self.history and self.history[-1] is changes.record):
            remember(self.history, changes.record, HISTORY)
        self._changes = None
        # Only callbacks follow: what they raise leaves nothing to recover.
        self._stepping = False

    # ---- wrong wirings ----------------------------------------------------------------------

    def _watch_wiring(self) -> None:
        self._calls_without_step = 0 if self._hook.marked else self._calls_without_step + 1
        allowed = self._calls_without_step_allowed
        if self._optimizer_steps == 0:  # more likely the wrong optimizer than many micro-batches
            allowed = min(allowed, 100)
        if self._calls_without_step == allowed:
            self._warnings.warn(
                f"step() was called {self._calls_without_step} times without an optimizer step in "
                "between; was this scheduler made for the optimizer that is stepped?"
            )
        if self._hook.marked and self._hook.shared(self.optimizer):
            self._warnings.once(
                "shared",
                "another scheduler of this package is stepped for the same optimizer, and each "
                "lowers the rate that the other has lowered; keep one and close() the other",
            )
        self._watch_steps_between_calls()

    def _watch_steps_between_calls(self) -> None:
        steps = self._hook.called_late()
        if steps is not None:
            self._warnings.once(
                "late",
                f"{steps} optimizer steps passed since the last step(); call it after every "
                "optimizer.step(), not once an epoch (Lightning: 'interval': 'step')",
            )

    def _note_lowered(self, before: Sequence[float]) -> None:
        """Remember what lowered rates were, for :meth:`_watch_rates`."""
        now = as_floats(self._rates())
        if any(lr < old for lr, old in zip(now, before, strict=True)):
            self._dropped_from = list(zip(before, now, strict=True))

    def _watch_rates(self) -> None:
        """Notice a script that sets the rate by itself, and so undoes a drop at the next step."""
        saved, self._lrs_of_checkpoint = self._lrs_of_checkpoint, None
        if saved is not None:  # only once, because reading a rate may wait for a GPU
            now = as_floats(self._rates())[: len(saved)]
            if saved[: len(now)] != now:
                self._warnings.warn(
                    f"the learning rates are {_listed(now)}, those of the checkpoint were "
                    f"{_listed(saved)}; to resume, make the scheduler first, and then load the "
                    "optimizer's state and the scheduler's"
                )
        dropped, self._dropped_from = self._dropped_from, []
        for i, (before, after) in enumerate(dropped[: len(self.optimizer.param_groups)]):
            lr = float(self.optimizer.param_groups[i]["lr"]) if after < before else 0.0
            # Nearer to the rate before the drop than to the one after it.
            if lr * lr > before * after:
                self._warnings.once(
                    "undone",
                    f"the learning rate of param group {i} was lowered from {before:g} to "
                    f"{after:g}, and something has set it to {lr:g} since; drops have no effect "
                    "where a script or another scheduler sets the rate at every step",
                )

    # ---- learning rates ---------------------------------------------------------------------

    def _update_lr(self, epoch: int | None = None) -> None:
        # SequentialLR calls this at a milestone. As torch's own, which older versions lack.
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        if epoch is not None:
            self._set_lrs(self._get_closed_form_lr())
        self._last_lr = self._lrs()

    def _get_closed_form_lr(self) -> list[float]:
        """Base rates after all drops so far: what ``SequentialLR`` asks for at a milestone."""
        raise NotImplementedError

    def _initial_step(self) -> None:
        self._step_count = 1
        self.last_epoch += 1
        if self.warmup_steps and self._optimizer_steps == 0:
            self._set_lrs(self._warmed(self.base_lrs))
        self._last_lr = self._lrs()

    def _warmed(self, lrs: Iterable[float | Tensor]) -> list[float]:
        """Rates for the next optimizer step, if it belongs to the warm-up."""
        t = min(self._optimizer_steps + 1, self.warmup_steps)
        share = t / self.warmup_steps if self.warmup_steps else 1.0
        return [float(lr) * share for lr in lrs]

    def get_lr(self) -> list[float | Tensor]:
        """Copies of the present rates. Use ``get_last_lr()``: as in torch, this method warns.

        torch calls this method within ``step()`` to compute new rates. Here rates change in place
        at the end of a window, and nothing calls it.
        """
        self._warnings.once(
            "get_lr",
            "get_lr() computes nothing outside of step(); to get the last learning rate computed "
            "by the scheduler, use get_last_lr()",
        )
        return self._lrs()

    def _rates(self) -> list[float | Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def _lrs(self) -> list[float | Tensor]:
        return [lr.clone() if isinstance(lr, Tensor) else lr for lr in self._rates()]

    def _set_lrs(self, lrs: Iterable[float]) -> None:
        # add_param_group may have brought more groups than there are base rates.
        with torch.no_grad():
            for group, lr in zip(self.optimizer.param_groups, lrs, strict=False):
                write(group, lr)()

    def _metrics(self, **values: float | None) -> dict[str, float]:
        """``lr`` of the first param group, ``num_drops`` and those ``values`` that are defined."""
        lr, drops = float(self.optimizer.param_groups[0]["lr"]), float(self.num_drops)
        given = {name: float(value) for name, value in values.items() if value is not None}
        defined = {name: value for name, value in given.items() if abs(value) < float("inf")}
        return {"lr": lr, "num_drops": drops} | defined

    def close(self) -> None:
        """Take the hooks off the optimizer. The learning rates stay as they are."""
        self._hook.remove()

    # ---- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit: settings, decisions, history.

        Plain values and tensors only, so that ``torch.load(weights_only=True)`` reads it. Learning
        rates are restored by the *optimizer's* ``load_state_dict``, as with torch's schedulers.
        """
        if self._stepping and self._changes is not None:
            self._recover()
        return {
            "version": 1,
            "scheduler": type(self).__name__,
            "settings": self._settings(),
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "base_lrs": as_floats(self.base_lrs),
            "last_lr": as_floats(self._last_lr),
            "lrs": as_floats(self._rates()),
            "optimizer_steps": self._optimizer_steps,
            "stepped": self._hook.marked,
            "num_drops": self.num_drops,
            **self._progress(),
            "history": to_columns(self.history, self._record_type),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken. Settings are restored too, as in torch.

        Raises:
            ValueError: not a state of this class; the message names the entry, and nothing has been
                changed.
        """
        state = Entries(state_dict)
        if "version" not in state:
            raise ValueError(
                f"state_dict: expected what state_dict() of {type(self).__name__} returns, got a "
                "dict without 'version'"
            )
        state.expect("version", 1)
        state.expect("scheduler", type(self).__name__)
        settings = self._read_settings(state.inner("settings"))
        attributes = {
            **settings,
            "last_epoch": state.read("last_epoch", lambda n, v: checks.count(n, v, -1)),
            "_step_count": state.count("step_count"),
            "base_lrs": state.list("base_lrs", checks.at_least_zero),
            "_last_lr": state.list("last_lr", checks.at_least_zero),
            "_optimizer_steps": state.count("optimizer_steps"),
            "num_drops": state.read("num_drops", functools.partial(count_of_drops, state)),
            "history": from_columns(state.inner("history"), self._record_type),
            **self._read_progress(state, settings),
        }
        # Older states do not have them.
        lrs = state.list("lrs", checks.at_least_zero) if "lrs" in state else None
        marked = state.flag("stepped")
        before = self._settings()
        self._load_meter(state)
        self._take_over(attributes)
        self._hook.marked = marked
        self._stepping, self._changes, self._dropped_from = False, None, []
        self._lrs_of_checkpoint = lrs
        changed = {k: v for k, v in self._settings().items() if before[k] != v}
        if changed:
            self._warnings.warn(
                "the checkpoint's settings replace those given: "
                + ", ".join(f"{k}={v!r} (was {before[k]!r})" for k, v in changed.items())
            )

    def _take_over(self, attributes: dict[str, Any]) -> None:
        """Set attributes that were read from a state; nothing here can fail."""
        self.__dict__.update(attributes)

    def _load_meter(self, state: Entries) -> None:
        """Load what the state holds for a meter, the last thing that can fail."""

    def _settings(self) -> dict[str, Any]:
        """What the scheduler was made with, as plain values."""
        raise NotImplementedError

    def _read_settings(self, settings: Entries) -> dict[str, Any]:
        """Attributes by name from saved :meth:`_settings`; raises ValueError where one is wrong."""
        raise NotImplementedError

    def _progress(self) -> dict[str, Any]:
        """What has been gathered towards the next drop, as plain values."""
        raise NotImplementedError

    def _read_progress(self, state: Entries, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Attributes by name from saved :meth:`_progress`; raises ValueError where one is wrong.

        Args:
            state: with the entries of :meth:`_progress`.
            settings: attributes that :meth:`_read_settings` has found.
        """
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._hook.before_step = self._make_before_step()
        self._hook.attach(self.optimizer)


class Changes:
    """What a decision changes.

    Args:
        record: for the history.
        lrs: new rate of each param group, None for those that stay.
        attributes: new values of the scheduler's attributes by name.
    """

    def __init__(self, record: Any, lrs: Sequence[float | None] = (), **attributes: Any) -> None:
        self.record = record
        self.lrs = list(lrs)
        self.attributes = attributes


def check_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer itself, taken out of accelerate's and DeepSpeed's wrappers.

    Raises:
        TypeError, ValueError: it has no learning rates to change.
    """
    optimizer = unwrap_optimizer(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    for i, group in enumerate(optimizer.param_groups):
        if "lr" not in group:
            raise ValueError(f"optimizer: param_groups[{i}] has no 'lr' to change")
    return optimizer


def _listed(lrs: Iterable[float]) -> str:
    return ", ".join(f"{lr:g}" for lr in lrs)


def count_of_drops(state: Entries, name: str, value: Any) -> int:
    """A saved number of drops, each of which took an optimizer step at least."""
    drops, steps = checks.count(name, value, 0), state.count("optimizer_steps")
    if drops > steps:
        raise ValueError(f"{name}: expected at most optimizer_steps={steps}, got {drops}")
    return drops
