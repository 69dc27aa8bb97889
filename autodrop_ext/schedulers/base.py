"""StepScheduler: a scheduler that acts once per real optimizer step."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .. import checks
from ..checks import choice
from ..messages import Warnings
from ..reading import HISTORY, from_columns, remember, to_columns
from ..saved import Form, Later, exactly, inside, list_of, load
from ..settings import Settings, check_together, form_of
from ..sharding import stepped_optimizers, unwrap_optimizer
from .step_hook import StepHook

# If torch has no _update_lr, SequentialLR calls step(0) at a milestone.
_MILESTONES_CALL_STEP = not hasattr(LRScheduler, "_update_lr")


class Outcome(NamedTuple):
    """What a step has decided.

    Attributes:
        record: for the history and the callbacks; None if there is nothing to report.
        lrs: new rate of each param group; None for those that stay as they are.
        state: new values of the scheduler's attributes by name.
    """

    record: Any
    lrs: Sequence[float | None]
    state: Mapping[str, Any]


NOTHING = Outcome(None, (), {})


class StepScheduler(LRScheduler):
    """A scheduler that acts once per *real* optimizer step.

    Subclasses declare their settings and what they have gathered towards the next drop, and
    implement :meth:`_decide_step`, which returns an :class:`Outcome` and changes nothing of it.
    One assignment makes the outcome the scheduler's state; rates and history follow, and writing
    them a second time changes nothing. So an interrupt leaves a whole step, and a ``state_dict()``
    that is called in the middle of one, by a signal handler or a thread, has the last whole step.

    Args:
        optimizer: whose learning rates are changed.
        settings: checked values by name; they become attributes.
        last_epoch: as in torch; -1 for a new run.

    Attributes:
        history: the last 10,000 records of what was decided.
        num_drops: how often a learning rate was lowered.
    """

    warmup_steps: int | Literal["auto"] = 0
    _settings: ClassVar[Settings]
    _gathered: ClassVar[Form]
    """Form of what was gathered towards the next drop; each entry has the name of an attribute
    without its underscore."""
    _record_type: ClassVar[type]
    _once_an_epoch: ClassVar[bool] = False  # whether step() is to be called once an epoch
    num_drops: int
    history: list[Any]
    _last_whole: dict[str, Any] | None  # counts before the step at hand
    _unwritten: Outcome | None  # its rates and its record are being written
    _lowered: list[tuple[float, float]]  # rates before and after the last drop
    _lrs_of_checkpoint: list[float] | None  # until the first step after loading

    def __init__(self, optimizer: Optimizer, settings: Mapping[str, Any], last_epoch: int) -> None:
        vars(self).update(settings)
        vars(self).update(self._at_start())
        self._warnings = Warnings(type(self).__name__)
        self._lock = threading.RLock()  # another thread's state_dict() waits for a whole step
        self._hook = StepHook(once_an_epoch=self._once_an_epoch)
        self._hook.call(self._before_step, self._never_called)
        self._optimizer_steps = max(last_epoch, 0)  # consumed marks
        if not hasattr(optimizer.step, "__func__"):
            # optimizer.step was replaced, by torch.compile for example. torch's base class would
            # fail to wrap it; our own hook does not need that wrapper.
            optimizer.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        super().__init__(optimizer, last_epoch)
        self._first_epoch = self.last_epoch
        self._hook.attach(self.optimizer)

    def _at_start(self) -> dict[str, Any]:
        """Return attributes as they are before the first step of a run."""
        return {
            "num_drops": 0,
            "history": [],
            "_last_whole": None,
            "_unwritten": None,
            "_lowered": [],
            "_lrs_of_checkpoint": None,
        }

    def reset(self) -> None:
        """Begin another run: nothing is known of the last one, and rates are the base rates again.

        Settings, parameters and the optimizer's state stay.
        """
        vars(self).update(self._at_start(), _optimizer_steps=0, last_epoch=-1)
        self._hook.consume()
        self._set_lrs(as_floats(self.base_lrs))
        self._initial_step()

    def _before_step(self, optimizer: Optimizer) -> None:
        """The hook calls this before each step of the optimizer."""
        added = len(optimizer.param_groups) > len(self.base_lrs)
        if added and self._optimizer_steps < self._linear_warmup and self._hook.moves(optimizer):
            vars(self).update(self._of_added_groups())
            self._set_lrs(self._warmed(self.base_lrs))

    # ---- a step -----------------------------------------------------------------------------

    def step(self, epoch: int | None = None) -> None:
        """Call after every ``optimizer.step()``; of an ``EpochAutoDrop``, at the end of each epoch.

        Args:
            epoch: torch's deprecated argument. It sets ``last_epoch`` if it is a whole number, has
                no other effect, and warns.
        """
        if _MILESTONES_CALL_STEP and epoch == 0:
            self._update_lr(0)
            return
        self._warnings.hold()  # a warning may be an error, and must not leave a step half done
        try:
            with self._lock:
                outcome = self._take_step(epoch)
        except BaseException:
            self._make_whole()
            raise
        if outcome.record is not None:
            self._report(outcome.record)
        self._last_lr = self._lrs()
        self._warnings.release()

    def _take_step(self, epoch: int | None) -> Outcome:
        if self._unwritten is not None:  # also the end of a step can be interrupted
            self._carry_out()
        self._last_whole = self._counts()
        self.last_epoch = self.last_epoch + 1 if epoch is None else _whole(epoch, self.last_epoch)
        self._step_count += 1
        self._watch(epoch)
        outcome = NOTHING
        if self._hook.consume():
            self._optimizer_steps += 1
            outcome = self._decide_step(warming_up=self._optimizer_steps <= self._linear_warmup)
            if self._optimizer_steps < self._linear_warmup:
                self._set_lrs(self._warmed(self.base_lrs))
        self._commit(outcome)
        return outcome

    def _decide_step(self, *, warming_up: bool) -> Outcome:
        """Return what follows from the optimizer step that has just been taken.

        Args:
            warming_up: whether it belongs to the warm-up, in which nothing is decided.
        """
        raise NotImplementedError

    def _report(self, record: Any) -> None:
        """Call the user's functions, after everything else: what they raise undoes nothing."""
        raise NotImplementedError

    def _commit(self, outcome: Outcome) -> None:
        """Make the step the last whole one, and carry it out."""
        if outcome.record is None:
            vars(self).update(outcome.state, _last_whole=None)
            return
        before = as_floats(self._rates())
        # Python looks for signals between its own instructions, and within update() there are none.
        vars(self).update(outcome.state, _last_whole=None, _unwritten=outcome)
        self._note_lowered(before, replaced(before, outcome.lrs))
        self._carry_out()

    def _carry_out(self) -> None:
        """Write rates and history; doing it again changes nothing."""
        outcome = self._unwritten
        if outcome is None:
            return
        self._set_lrs(outcome.lrs)
        self._last_lr = self._lrs()
        if outcome.record not in self.history[-1:]:
            remember(self.history, outcome.record, HISTORY)
        self._unwritten = None

    def _make_whole(self) -> None:
        """Finish what a step has decided that ended in an interrupt or an error."""
        if self._optimizer_steps < self._linear_warmup:
            self._set_lrs(self._warmed(self.base_lrs))
        self._carry_out()
        self._last_whole = None

    # ---- wrong wirings ----------------------------------------------------------------------

    def _watch(self, epoch: int | None) -> None:
        """Warn of a call, an optimizer or a rate that is not as it should be."""
        if epoch is not None:
            self._warnings.once(
                "epoch",
                f"step(epoch={epoch}) sets last_epoch and has no other effect on a schedule that "
                "is measured; call step() without an argument (torch's own schedulers deprecate "
                "it)",
            )
        for kind, message in self._hook.problems(self.optimizer, self._optimizer_steps):
            self._warnings.once(kind, message)
        if self._lowered or self._lrs_of_checkpoint is not None:
            self._watch_rates()

    def _never_called(self, steps: int) -> None:
        """The hook calls this if nothing calls :meth:`step`."""
        if self.last_epoch < self._first_epoch:
            return  # SequentialLR has set it back, and will call at a milestone
        when = "once per epoch" if self._once_an_epoch else "after every optimizer.step()"
        self._warnings.once(
            "late",
            f"step() was never called in {steps} optimizer steps, and the learning rate stays as "
            f"it is; call it {when} (a framework that calls get_lr() instead needs a hook: see "
            "'Closed loops' in docs/integrations.md)",
        )

    def _note_lowered(self, before: Sequence[float], after: Sequence[float]) -> None:
        """Keep lowered rates for :meth:`_watch_rates`."""
        if any(lr < old for old, lr in zip(before, after, strict=False)):
            self._lowered = list(zip(before, after, strict=False))

    def _watch_rates(self) -> None:
        """Warn of a script that sets the rate by itself, and so undoes a drop at the next step."""
        saved, self._lrs_of_checkpoint = self._lrs_of_checkpoint, None
        if saved is not None:  # only once, because reading a rate may wait for a GPU
            now = as_floats(self._rates())[: len(saved)]
            if saved[: len(now)] != now:
                self._warnings.warn(
                    f"the learning rates are {_listed(now)}, those of the checkpoint were "
                    f"{_listed(saved)}; to resume, make the scheduler first, and then load the "
                    "optimizer's state and the scheduler's"
                )
        lowered, self._lowered = self._lowered, []
        for i, (before, after) in enumerate(lowered[: len(self.optimizer.param_groups)]):
            lr = float(self.optimizer.param_groups[i]["lr"]) if after < before else 0.0
            # Nearer to the rate before the drop than to the one after it.
            if lr * lr > before * after:
                self._warnings.once(
                    "undone",
                    f"the learning rate of param group {i} was lowered from {before:g} to "
                    f"{after:g}, and something has set it to {lr:g} since; drops have no effect "
                    "if a script or another scheduler sets the rate at every step",
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
        if self._optimizer_steps < self._linear_warmup:
            if self._optimizer_steps and self._is_warm():
                self._optimizer_steps = self._linear_warmup
            else:
                self._set_lrs(self._warmed(self.base_lrs))
        self._last_lr = self._lrs()

    @property
    def _linear_warmup(self) -> int:
        """Optimizer steps of linear warm-up; an automatic one has none."""
        return 0 if self.warmup_steps == "auto" else self.warmup_steps

    def _is_warm(self) -> bool:
        """Return if a rate is between that of the warm-up and its end, so that it was lowered.

        Frameworks may count ``last_epoch`` in epochs, and scripts may pass it one too low.
        """
        share = (self._optimizer_steps + 3) / self._linear_warmup
        columns = zip(self._rates(), self.base_lrs, strict=True)
        return any(share * float(base) < float(lr) < float(base) for lr, base in columns)

    def _warmed(self, lrs: Iterable[float | Tensor]) -> list[float]:
        """Return the rates for the next optimizer step, if it belongs to the warm-up."""
        steps = self._linear_warmup
        share = min(self._optimizer_steps + 1, steps) / steps if steps else 1.0
        return [float(lr) * share for lr in lrs]

    def _of_added_groups(self) -> dict[str, Any]:
        """Return attributes that have a value for each param group, also for those added since.

        Within a warm-up, a group warms up to the rate that it came with.
        """
        lrs, base = self._rates(), list(self.base_lrs)
        # Groups share the tensor that the optimizer was made with, and the others have warmed it.
        shared = {id(lr): low for lr, low in zip(lrs, base, strict=False) if isinstance(lr, Tensor)}
        return {"base_lrs": base + [float(shared.get(id(lr), lr)) for lr in lrs[len(base) :]]}

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
        """Return copies of the rates."""
        lrs = (group["lr"] for group in self.optimizer.param_groups)
        return [lr.clone() if isinstance(lr, Tensor) else lr for lr in lrs]

    def _set_lrs(self, lrs: Iterable[float | None]) -> None:
        """Write the rates of param groups, those that are tensors in place; None leaves one."""
        written: set[int] = set()
        # add_param_group may have brought more groups than there are rates.
        with torch.no_grad():
            for group, lr in zip(self.optimizer.param_groups, lrs, strict=False):
                if lr is not None and isinstance(group["lr"], Tensor):
                    if id(group["lr"]) in written:  # torch gives all groups the tensor that it gets
                        group["lr"] = group["lr"].clone()
                    written.add(id(group["lr"]))
                    group["lr"].fill_(lr)
                elif lr is not None:
                    group["lr"] = lr

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

    def _counts(self) -> dict[str, Any]:
        return {
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "optimizer_steps": self._optimizer_steps,
            "stepped": self._hook.marked,
        }

    def _saved_settings(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        values = {s.name: getattr(self, s.name) for s in self._settings if s.saved}
        return {name: list(v) if isinstance(v, list) else v for name, v in values.items()}

    def _saved_gathered(self) -> dict[str, Any]:
        """Return what was gathered towards the next drop, as plain values."""
        return self._saved(self._gathered)

    def _saved(self, names: Iterable[str]) -> dict[str, Any]:
        """Return attributes by their names without the underscore, as plain values."""
        values = {name: getattr(self, f"_{name}") for name in names}
        return {name: list(v) if isinstance(v, (list, tuple)) else v for name, v in values.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit: settings, decisions, history.

        Plain values and tensors only, so that ``torch.load(weights_only=True)`` reads it. Learning
        rates are restored by the *optimizer's* ``load_state_dict``, as with torch's schedulers.
        """
        counts, unwritten = self._last_whole or self._counts(), self._unwritten
        lrs, last_lr, history = as_floats(self._rates()), as_floats(self._last_lr), self.history
        if unwritten is not None:
            lrs = last_lr = replaced(lrs, unwritten.lrs)
            if unwritten.record not in history[-1:]:
                history = [*history, unwritten.record]
        return {
            "version": 2,
            "scheduler": type(self).__name__,
            **self._saved_settings(),
            **counts,
            "base_lrs": as_floats(self.base_lrs),
            "last_lr": last_lr,
            "lrs": lrs,
            "num_drops": self.num_drops,
            **self._saved_gathered(),
            "history": to_columns(history, self._record_type),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], keep: Iterable[str] = ()) -> None:
        """Continue from a :meth:`state_dict`. Settings are restored too, as in torch.

        One warning lists the settings that the state has changed.

        Args:
            state_dict: the state.
            keep: names of settings that stay as they are, such as ``("min_lr",)``. What was
                gathered so far depends on ``window``, ``min_window``, ``windows``, ``snapshots``,
                ``per_group`` and ``warmup_steps``, so these always come from the state.

        Raises:
            ValueError: not a state of this class, a name in ``keep`` is not that of a setting which
                can be kept, or the kept value contradicts the state. The message names the entry,
                and nothing has been changed.
        """
        possible = tuple(s.name for s in self._settings if s.saved and not s.fixed)
        names = [keep] if isinstance(keep, str) else keep
        kept = {choice(*possible)("keep", name): getattr(self, name) for name in names}
        loaded = self._read(state_dict, kept)
        before = self._all_settings()
        self._warnings.hold()  # a warning may be an error, and must not leave this half done
        try:
            self._take_over(loaded)
            changed = {k: v for k, v in self._all_settings().items() if before[k] != v}
            if changed:
                self._warnings.warn(
                    "the checkpoint's settings replace those given: "
                    + ", ".join(f"{k}={v!r} (was {before[k]!r})" for k, v in changed.items())
                )
        finally:
            self._warnings.release()
        self._begin_log()

    def _begin_log(self) -> None:
        """Begin a log, if there is one."""

    def _all_settings(self) -> dict[str, Any]:
        """Return the settings that a state may replace."""
        return self._saved_settings()

    def _read(self, state: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
        """Return the checked entries of a state, the settings first; change nothing.

        Args:
            state: the state.
            kept: settings that take the place of the state's.
        """
        if isinstance(state, Mapping) and "version" not in state:
            raise ValueError(
                f"state_dict: expected what state_dict() of {type(self).__name__} returns, got a "
                "dict without 'version'"
            )
        head: Form = {"version": exactly(1, 2), "scheduler": exactly(type(self).__name__)}
        if load(state, head)["version"] == 1:  # it has its settings in a dict of their own
            form: Form = {"settings": inside(form_of(self._settings))}
            state = {**state, **load(state, form)["settings"]}
        loaded = load({**state, **kept}, {**form_of(self._settings), **_COUNTS, **self._gathered})
        loaded |= load(state, {"history": from_columns(self._record_type)})
        check_together(self._settings, loaded, "state_dict[{!r}]")
        check_drops(loaded, "num_drops", loaded["num_drops"])
        loaded["attributes"] = self._restored(loaded)
        return loaded

    def _restored(self, loaded: Mapping[str, Any]) -> dict[str, Any]:
        """Return attributes from what was gathered; raise ValueError if settings forbid it."""
        return {f"_{name}": loaded[name] for name in self._gathered}

    def _take_over(self, loaded: dict[str, Any]) -> None:
        """Make the entries of a state this scheduler's."""
        settings = {s.name: loaded[s.name] for s in self._settings if s.saved}
        vars(self).update(
            settings,
            **loaded["attributes"],
            last_epoch=loaded["last_epoch"],
            base_lrs=loaded["base_lrs"],
            num_drops=loaded["num_drops"],
            history=loaded["history"],
            _step_count=loaded["step_count"],
            _last_lr=loaded["last_lr"],
            _optimizer_steps=loaded["optimizer_steps"],
            # If the optimizer's state is loaded later, the rates are compared at the first step.
            _lrs_of_checkpoint=None if loaded["lrs"] == as_floats(self._rates()) else loaded["lrs"],
            _last_whole=None,
            _unwritten=None,
            _lowered=[],
        )
        self._hook.marked = loaded["stepped"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
        self._hook.call(self._before_step, self._never_called)
        self._hook.attach(self.optimizer)


_COUNTS: Form = {
    "last_epoch": checks.at_least(-1),
    "step_count": checks.at_least(0),
    "optimizer_steps": checks.at_least(0),
    "stepped": checks.flag,
    "base_lrs": list_of(checks.at_least_zero),
    "last_lr": list_of(checks.at_least_zero),
    "lrs": Later(list_of(checks.at_least_zero), None),
    "num_drops": checks.at_least(0),
}


def check_optimizer(optimizer: Any) -> Optimizer:
    """Return the optimizer itself, or the one inside of a wrapper.

    Raises:
        TypeError, ValueError: its steps cannot be seen, or it has no learning rates to change.
    """
    wrapper, optimizer = optimizer, unwrap_optimizer(optimizer)
    stepped = stepped_optimizers(optimizer)
    groups = {id(group) for one in stepped for group in one.param_groups}
    if (
        not isinstance(optimizer, Optimizer)
        or not stepped
        or any(id(group) not in groups for group in optimizer.param_groups)
    ):
        kind = type(wrapper)
        module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
        hint = ""
        if hasattr(wrapper, "step"):
            hint = ", whose step() does not run torch's hooks; pass the optimizer that it steps"
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, got {module}{kind.__qualname__}{hint}"
        )
    for i, group in enumerate(optimizer.param_groups):
        if "lr" not in group:
            raise ValueError(f"optimizer: param_groups[{i}] has no 'lr' to change")
        _check_lr(f"optimizer: param_groups[{i}]['lr']", group["lr"])
    return optimizer


def _check_lr(name: str, lr: Any) -> None:
    if isinstance(lr, Tensor):
        if not lr.is_floating_point() or lr.numel() != 1:
            raise TypeError(f"{name}: expected a floating-point tensor of one element, got {lr!r}")
        lr = float(lr)
    checks.at_least_zero(name, lr)


def _whole(epoch: Any, last: int) -> int:
    """Return the epoch if it is whole and not negative, and otherwise the one after the last."""
    try:
        number = operator.index(epoch)
    except TypeError:  # a fraction, or a metric
        return last + 1
    return number if number >= 0 else last + 1


def check_drops(loaded: Mapping[str, Any], name: str, drops: int) -> None:
    """Raise ValueError unless each drop in the entry ``name`` had an optimizer step at least."""
    steps = loaded["optimizer_steps"]
    if drops > steps:
        raise ValueError(
            f"state_dict[{name!r}]: expected at most optimizer_steps={steps}, got {drops}"
        )


def in_precision_of(lr: float | Tensor, value: float) -> float:
    """Return what a learning rate becomes when it is set to a value: a tensor rounds it."""
    if not isinstance(lr, Tensor):
        return value
    return float(torch.tensor(value, dtype=lr.dtype, device="cpu"))


def as_floats(lrs: Iterable[float | Tensor]) -> list[float]:
    """Return learning rates as plain floats, for logs and checkpoints."""
    return [float(lr) for lr in lrs]


def replaced(lrs: Iterable[float], new: Iterable[float | None]) -> list[float]:
    """Return the rates with new ones in their places; None leaves one as it is."""
    return [lr if other is None else other for lr, other in zip(lrs, new, strict=False)]


def _listed(lrs: Iterable[float]) -> str:
    return ", ".join(f"{lr:g}" for lr in lrs)
