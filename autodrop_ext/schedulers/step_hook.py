"""The real steps of an optimizer: hooks that mark them, and calls of ``step()`` that miss them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..sharding import stepped_optimizers

_IDLE_CALLS = 1000  # in a row before a warning; more micro-batches than anyone accumulates
_IDLE_CALLS_AT_FIRST = 100  # more likely the wrong optimizer than many micro-batches
_IDLE_EPOCHS = 10
_SINGLE_STEP_EPOCHS = 1000  # in a row before a wrong wiring is pointed out
_LATE_STEPS = 2  # optimizer steps between two calls that point to a wrong wiring
_LATE_CALLS = 2  # in a row warn: SequentialLR causes one late call, and GradScaler skips some steps
_NEVER_CALLED = 1000  # optimizer steps without any call before a warning
_NEVER_CALLED_EPOCH = 100_000  # an epoch of ImageNet has 80,000 batches of 16
_KNOWN_LRS = 64  # tensor learning rates whose value is remembered

_hooks: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[StepHook]]
_hooks = weakref.WeakKeyDictionary()


class _Hooked(NamedTuple):
    """The hooks of one optimizer."""

    optimizer: weakref.ref[Optimizer]
    before: Any
    after: Any

    def is_registered(self) -> bool:
        optimizer: Any = self.optimizer()
        if optimizer is None:
            return False
        before, after = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
        return self.before.id in before and self.after.id in after


class StepHook:
    """Marks every real step of an optimizer, for one scheduler.

    The hook only sets a mark, and the scheduler's ``step()`` consumes it. A call of ``step()``
    without a mark, or after a step that GradScaler skipped, therefore counts nothing. Steps at a
    learning rate of zero, which checkpoint helpers run, are not marked, unless the scheduler itself
    has lowered the rate to it.

    Optimizers that share the param groups, inside of a wrapper, are hooked as well. One step ends
    with the outermost of them that has begun, however often the others are stepped within it.

    Args:
        once_an_epoch: whether the scheduler's ``step()`` is to be called once an epoch, and not
            after every optimizer step.

    Attributes:
        marked: whether a real step has happened since the last mark was consumed.
        consumed: whether the newest mark was consumed.
        real_steps: real steps, consumed or not.
        steps_since_call: those since the scheduler's last call.
        at_zero: whether steps at a learning rate of zero are marked too.
    """

    def __init__(self, *, once_an_epoch: bool = False) -> None:
        self.once_an_epoch = once_an_epoch
        self.marked = False
        self.real_steps = 0
        self.consumed = False
        self.steps_since_call = 0
        self._leader: int | None = None  # first parameter of the first step since the last call
        self._begun: list[int] = []  # ids of optimizers that are being stepped, outermost first
        self._called = False
        self.at_zero = False
        self._wrong_calls = 0  # in a row: late ones, or of epochs of a single step
        self._idle_calls = 0  # in a row: without a mark
        self._root: weakref.ref[Optimizer] | None = None  # the scheduler's optimizer
        self._hooked: list[_Hooked] = []
        self._lr_versions: dict[int, tuple[Tensor, int, bool]] = {}
        self._before_step: weakref.WeakMethod[Callable[[Optimizer], None]] | None = None
        self._never_called: weakref.WeakMethod[Callable[[int], None]] | None = None

    def call(
        self, before_step: Callable[[Optimizer], None], never_called: Callable[[int], None]
    ) -> None:
        """Call these methods of the scheduler, which is not kept alive.

        Args:
            before_step: called before each step with the optimizer.
            never_called: called once, with the steps so far, if nothing calls ``step()``.
        """
        self._before_step = weakref.WeakMethod(before_step)
        self._never_called = weakref.WeakMethod(never_called)

    def attach(self, optimizer: Optimizer) -> bool:
        """Register the hooks if they are missing, and return whether they were already there.

        Copying or unpickling an optimizer loses its hooks. They are removed with this object.
        """
        if self._is_attached_to(optimizer):
            return True
        self.remove()
        self._root = weakref.ref(optimizer)
        for one in stepped_optimizers(optimizer):
            hooked = self._register(one)
            self._hooked.append(hooked)
            for handle in (hooked.before, hooked.after):
                weakref.finalize(self, handle.remove)
            _hooks.setdefault(one, weakref.WeakSet()).add(self)
        return False

    def _is_attached_to(self, optimizer: Optimizer) -> bool:
        if self._root is None or self._root() is not optimizer:
            return False
        return all(hooked.is_registered() for hooked in self._hooked)

    def _register(self, optimizer: Optimizer) -> _Hooked:
        this, of = weakref.ref(self), weakref.ref(optimizer)

        def begin(stepped: Optimizer, args: Any, kwargs: Any) -> None:
            hook = this()
            if hook is not None and stepped is of():
                hook.begin_step(stepped)

        def end(stepped: Optimizer, args: Any, kwargs: Any) -> None:
            hook = this()
            if hook is not None and stepped is of():
                hook.end_step(stepped)

        before = optimizer.register_step_pre_hook(_untraced(begin))
        return _Hooked(of, before, optimizer.register_step_post_hook(_untraced(end)))

    @property
    def attached(self) -> bool:
        """``True`` while the hooks are registered."""
        return bool(self._hooked)

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for hooked in self._hooked:
            hooked.before.remove()
            hooked.after.remove()
        self._hooked, self._root = [], None
        self._begun = []

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
        self._called = True
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
        if self.marked and self._is_shared():
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

    def _is_shared(self) -> bool:
        """Return whether another scheduler has consumed the mark of the same step."""
        optimizers = (hooked.optimizer() for hooked in self._hooked)
        of_each = (_hooks.get(one, ()) for one in optimizers if one is not None)
        others = (hook for hooks in of_each if len(hooks) > 1 for hook in hooks if hook is not self)
        return any(hook.consumed and hook.attached for hook in others)

    def begin_step(self, optimizer: Optimizer) -> None:
        """Note that an optimizer is being stepped, within a step of another one or not."""
        if self._begun:  # an error may have ended its last step, or this is super().step()
            self._leave(optimizer)
        self._begun.append(id(optimizer))
        if self._before_step is not None and (before_step := self._before_step()) is not None:
            before_step(optimizer)

    def end_step(self, optimizer: Optimizer) -> None:
        """Mark a step, unless it is a part of one that goes on or has ended."""
        # torch runs the hooks once more at the end of a step that calls super().step().
        if self._leave(optimizer) and not self._begun and self.moves(optimizer):
            self._mark_step(optimizer)

    def _leave(self, optimizer: Optimizer) -> bool:
        """Forget an optimizer that is being stepped, and those within; return if it was."""
        begun, one = self._begun, id(optimizer)
        if one not in begun:
            return False
        while begun.pop() != one:
            pass
        return True

    def _mark_step(self, optimizer: Optimizer) -> None:
        self.marked, self.consumed = True, False
        # DeepSpeed ZeRO steps the optimizer with one part of its parameters after the other.
        leader = next((id(p) for g in optimizer.param_groups for p in g["params"]), None)
        if self.steps_since_call == 0:
            self._leader = leader
        if leader != self._leader:
            return
        self.real_steps += 1
        self.steps_since_call += 1
        limit = _NEVER_CALLED_EPOCH if self.once_an_epoch else _NEVER_CALLED
        if self._called or self.steps_since_call != limit or self._never_called is None:
            return
        if (never_called := self._never_called()) is not None:
            never_called(limit)

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
        # Weak references and torch's hooks can be neither copied nor pickled.
        names = ("_root", "_before_step", "_never_called")
        fresh: dict[str, Any] = {"_hooked": [], "_begun": [], "_lr_versions": {}}
        return self.__dict__ | fresh | dict.fromkeys(names)


def _untraced(hook: Callable[[Optimizer, Any, Any], None]) -> Callable[[Optimizer, Any, Any], None]:
    """Return the hook, to be run as it is if the optimizer's step is compiled.

    Traced, it would cost seconds, and reading a tensor learning rate would break the graph with a
    page of warnings. What disable() imports has been imported by the optimizer's constructor.
    """
    disable: Callable[..., Callable[[Optimizer, Any, Any], None]] = torch.compiler.disable
    return disable(hook)
