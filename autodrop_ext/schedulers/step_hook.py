"""The real steps of an optimizer: hooks that mark them, and calls of ``step()`` that miss them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_IDLE_CALLS = 1000  # in a row before a warning; more micro-batches than anyone accumulates
_IDLE_CALLS_AT_FIRST = 100  # more likely the wrong optimizer than many micro-batches
_IDLE_EPOCHS = 10
_SINGLE_STEP_EPOCHS = 1000  # in a row before a wrong wiring is pointed out
_LATE_STEPS = 2  # optimizer steps between two calls that point to a wrong wiring
_LATE_CALLS = 3  # in a row warn: SequentialLR causes one late call, and GradScaler skips some steps
_KNOWN_LRS = 64  # tensor learning rates whose value is remembered

_hooks: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[StepHook]]
_hooks = weakref.WeakKeyDictionary()


class StepHook:
    """Marks every real step of an optimizer, for one scheduler.

    The hook only sets a mark, and the scheduler's ``step()`` consumes it. A call of ``step()``
    without a mark, or after a step that GradScaler skipped, therefore counts nothing. Steps at a
    learning rate of zero, which checkpoint helpers run, are not marked, unless the scheduler itself
    has lowered the rate to it.

    Args:
        once_an_epoch: whether the scheduler's ``step()`` is to be called once an epoch, and not
            after every optimizer step.

    Attributes:
        marked: whether a real step has happened since the last mark was consumed.
        consumed: whether the newest mark was consumed.
        real_steps: real steps, consumed or not.
        steps_since_call: those since the scheduler's last call.
        before_step: called before each real step, or None.
        entered: whether a step has begun whose end has not been looked at.
        at_zero: whether steps at a learning rate of zero are marked too.
    """

    def __init__(self, *, once_an_epoch: bool = False) -> None:
        self.once_an_epoch = once_an_epoch
        self.marked = False
        self.real_steps = 0
        self.before_step: Callable[[], None] | None = None
        self.consumed = False
        self._leader: int | None = None  # first parameter of the first step since the last call
        self.steps_since_call = 0
        self.entered = False
        self.at_zero = False
        self._wrong_calls = 0  # in a row: late ones, or of epochs of a single step
        self._idle_calls = 0  # in a row: without a mark
        self._handles: dict[int, Any] = {}  # by their ids, which all optimizers share
        self._lr_versions: dict[int, tuple[Tensor, int, bool]] = {}

    def attach(self, optimizer: Optimizer) -> bool:
        """Register the hooks if they are missing, and return whether they were already there.

        Copying or unpickling an optimizer loses its hooks. They are removed with this object.
        """
        present = {*optimizer._optimizer_step_post_hooks, *optimizer._optimizer_step_pre_hooks}
        if self._handles and self._handles.keys() <= present:
            return True
        self.remove()
        this = weakref.ref(self)
        of = weakref.ref(optimizer)

        def mark(stepped: Optimizer, args: Any, kwargs: Any) -> None:
            hook = this()
            if hook is None or stepped is not of() or not hook.entered:
                return
            # torch runs the hooks once more at the end of a step that calls super().step().
            hook.entered = False
            hook.mark_step(stepped)

        def look(stepped: Optimizer, args: Any, kwargs: Any) -> None:
            hook = this()
            if hook is None or stepped is not of():
                return
            hook.entered = True
            if hook.before_step is not None and hook.moves(stepped):
                hook.before_step()

        handles: list[Any] = [
            optimizer.register_step_post_hook(_untraced(mark)),
            optimizer.register_step_pre_hook(_untraced(look)),
        ]
        self._handles = {handle.id: handle for handle in handles}
        for handle in handles:
            weakref.finalize(self, handle.remove)
        _hooks.setdefault(optimizer, weakref.WeakSet()).add(self)
        return False

    @property
    def attached(self) -> bool:
        """``True`` while the hooks are registered."""
        return bool(self._handles)

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    def consume(self) -> bool:
        """Consume the mark, and return whether there was one."""
        marked, self.marked = self.marked, False
        self.consumed = self.consumed or marked
        return marked

    def problems(self, optimizer: Optimizer, steps_so_far: int) -> Iterator[tuple[str | None, str]]:
        """Look at a call of the scheduler's ``step()``, before the mark is consumed.

        Args:
            optimizer: the scheduler's.
            steps_so_far: optimizer steps that the scheduler has counted.

        Yields:
            Messages of what looks like a wrong wiring, with their kinds if once is enough.
        """
        if not self.attach(optimizer):
            yield (
                None,
                "the optimizer had lost its step hook (it was copied or unpickled); the hook is "
                "registered again and this call is not counted",
            )
        self._idle_calls = 0 if self.marked else self._idle_calls + 1
        allowed = _IDLE_EPOCHS if self.once_an_epoch else _IDLE_CALLS
        if steps_so_far == 0:
            allowed = min(allowed, _IDLE_CALLS_AT_FIRST)
        if self._idle_calls == allowed:
            yield (
                None,
                f"step() was called {allowed} times without an optimizer step in between; was this "
                "scheduler made for the optimizer that is stepped?",
            )
        if self.marked and self._is_shared(optimizer):
            yield (
                "shared",
                "another scheduler of this package is stepped for the same optimizer, and each "
                "lowers the rate that the other has lowered; keep one and close() the other",
            )
        steps, self.steps_since_call = self.steps_since_call, 0
        wrong = steps == 1 if self.once_an_epoch else steps >= _LATE_STEPS
        self._wrong_calls = self._wrong_calls + 1 if wrong else 0
        if self.once_an_epoch and self._wrong_calls == _SINGLE_STEP_EPOCHS:
            yield (
                None,
                f"step() was called after every single optimizer step {_SINGLE_STEP_EPOCHS} times; "
                "call it once per epoch (unless an epoch has one batch)",
            )
        if not self.once_an_epoch and self._wrong_calls == _LATE_CALLS:
            yield (
                "late",
                f"{steps} optimizer steps passed since the last step(); call it after every "
                "optimizer.step(), not once an epoch (Lightning: 'interval': 'step')",
            )

    def _is_shared(self, optimizer: Optimizer) -> bool:
        """Return whether another scheduler has consumed the mark of the same step."""
        others = {*_hooks.get(optimizer, ())} - {self}
        return any(hook.consumed and hook.attached for hook in others)

    def mark_step(self, optimizer: Optimizer) -> None:
        """Mark a step that the optimizer has taken, if it has moved parameters."""
        if not self.moves(optimizer):
            return
        self.marked, self.consumed = True, False
        # DeepSpeed ZeRO steps the optimizer with one part of its parameters after the other.
        leader = next((id(p) for g in optimizer.param_groups for p in g["params"]), None)
        if self.steps_since_call == 0:
            self._leader = leader
        if leader == self._leader:
            self.real_steps += 1
            self.steps_since_call += 1

    def moves(self, optimizer: Optimizer) -> bool:
        """Return whether the optimizer step at hand moves parameters."""
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return False  # a fused optimizer under GradScaler is called but moves nothing
        return self.at_zero or not all(self._is_zero(g["lr"]) for g in optimizer.param_groups)

    def _is_zero(self, lr: float | Tensor) -> bool:
        if not isinstance(lr, Tensor):
            return lr == 0
        # Reading a tensor on an accelerator waits for it: only if it has changed, or is known to be
        # zero, because writing to ``lr.data`` changes no version.
        known = self._lr_versions.get(id(lr))
        if known is None or known[0] is not lr or known[1] != lr._version or known[2]:
            if len(self._lr_versions) >= _KNOWN_LRS:
                self._lr_versions.clear()
            known = self._lr_versions[id(lr)] = (lr, lr._version, bool(lr == 0))
        return known[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}, "_lr_versions": {}, "before_step": None}


def _untraced(hook: Callable[[Optimizer, Any, Any], None]) -> Callable[[Optimizer, Any, Any], None]:
    """Return the hook, to be run as it is if the optimizer's step is compiled.

    Traced, it would cost seconds, and reading a tensor learning rate would break the graph with a
    page of warnings. What disable() imports has been imported by the optimizer's constructor.
    """
    disable: Callable[..., Callable[[Optimizer, Any, Any], None]] = torch.compiler.disable
    return disable(hook)
