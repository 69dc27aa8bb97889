"""What all schedulers here share: counting real optimizer steps, and changing learning rates."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..distributed import unwrap_optimizer

_STEPS_WITHOUT_CALL = 20  # optimizer steps between two calls that point to a wrong wiring
_KNOWN_LRS = 64  # tensor learning rates whose value is remembered

# Where torch has no _update_lr, SequentialLR calls step(0) at a milestone.
_MILESTONES_CALL_STEP = not hasattr(LRScheduler, "_update_lr")


class OptimizerStepScheduler(LRScheduler):
    """A scheduler that acts once per *real* optimizer step.

    A post-step hook on the optimizer only marks that a step happened; :meth:`step` consumes the
    mark. Calling :meth:`step` twice, or after a step that GradScaler skipped, therefore counts
    nothing twice. Steps at a learning rate of zero, which checkpoint helpers run, are not counted.

    Subclasses implement :meth:`_on_optimizer_step`, which :meth:`step` calls where there is a mark.
    Those with ``_looks_before_steps`` get a pre-step hook too, which calls
    :meth:`_before_optimizer_step` where :meth:`_awaits_step` says so.

    Args:
        optimizer: whose learning rates are changed.
        warmup_steps: optimizer steps over which the rate grows linearly to its initial value: step
            ``t`` of them (from 1) runs at ``t / warmup_steps`` of it. Nothing is measured then.
        last_epoch: as in torch; -1 starts anew.
    """

    _looks_before_steps = False
    _calls_without_step_allowed = 1000  # more micro-batches than anyone accumulates

    def __init__(self, optimizer: Optimizer, *, warmup_steps: int, last_epoch: int) -> None:
        optimizer = check_optimizer(optimizer)
        self.warmup_steps = warmup_steps
        self._optimizer_steps = 0  # consumed marks
        self._stepped = False
        self._real_steps = 0  # marks, consumed or not
        self._steps_since_call = 0
        self._leader: int | None = None  # which parameter comes first in the first of these steps
        self._late_calls = 0
        self._calls_without_step = 0
        self._hook: Any = None
        self._pre_hook: Any = None
        self._lr_versions: dict[int, tuple[Tensor, int, bool]] = {}
        if not hasattr(optimizer.step, "__func__"):
            # optimizer.step was replaced, by torch.compile for example. torch's base class would
            # fail to wrap it; our own hook does not need that wrapper.
            optimizer.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        super().__init__(optimizer, last_epoch)
        self._ensure_hook()

    # ---- the optimizer's steps --------------------------------------------------------------

    def _ensure_hook(self) -> bool:
        """Register the hooks unless they are there; whether they were there.

        Copying or unpickling an optimizer loses its hooks.
        """
        there = True
        if self._hook is None or self._hook.id not in self.optimizer._optimizer_step_post_hooks:
            self._hook = self.optimizer.register_step_post_hook(self._make_hook())
            there = False
        if self._looks_before_steps and (
            self._pre_hook is None
            or self._pre_hook.id not in self.optimizer._optimizer_step_pre_hooks
        ):
            self._pre_hook = self.optimizer.register_step_pre_hook(self._make_pre_hook())
            there = False
        return there

    def _make_hook(self) -> Callable[[Optimizer, Any, Any], None]:
        this = weakref.ref(self)

        def mark(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            scheduler = this()
            if scheduler is not None and optimizer is scheduler.optimizer:
                scheduler._mark(optimizer)

        return _untraced(mark)

    def _make_pre_hook(self) -> Callable[[Optimizer, Any, Any], None]:
        this = weakref.ref(self)

        def look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            scheduler = this()
            if scheduler is None or optimizer is not scheduler.optimizer:
                return
            if scheduler._awaits_step() and scheduler._moves(optimizer):
                scheduler._before_optimizer_step()

        return _untraced(look)

    def _mark(self, optimizer: Optimizer) -> None:
        if self._moves(optimizer):
            self._stepped = True
            # DeepSpeed ZeRO steps the optimizer with one part of its parameters after the other.
            leader = next((id(p) for g in optimizer.param_groups for p in g["params"]), None)
            if self._steps_since_call == 0:
                self._leader = leader
            if leader == self._leader:
                self._real_steps += 1
                self._steps_since_call += 1

    def _awaits_step(self) -> bool:
        """Whether :meth:`_before_optimizer_step` is to be called before the next step."""
        return False

    def _before_optimizer_step(self) -> None:
        """The parameters are about to be moved."""

    def _moves(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer step at hand moves parameters."""
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return False  # a fused optimizer under GradScaler is called but moves nothing
        return not all(self._is_zero(group["lr"]) for group in optimizer.param_groups)

    def _is_zero(self, lr: float | Tensor) -> bool:
        if not isinstance(lr, Tensor):
            return lr == 0
        # Reading a tensor on an accelerator waits for it: only where it has changed.
        known = self._lr_versions.get(id(lr))
        if known is None or known[0] is not lr or known[1] != lr._version:
            if len(self._lr_versions) >= _KNOWN_LRS:
                self._lr_versions.clear()
            known = self._lr_versions[id(lr)] = (lr, lr._version, bool(lr == 0))
        return known[2]

    def step(self, epoch: int | None = None) -> None:
        """Call after every ``optimizer.step()``; of an ``EpochAutoDrop``, at the end of each epoch.

        Args:
            epoch: torch's deprecated argument; sets ``last_epoch`` and has no other effect.
        """
        if epoch == 0 and _MILESTONES_CALL_STEP:
            self._update_lr(0)
            return
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._step_count += 1
        if not self._ensure_hook():
            self._warn(
                "the optimizer had lost its step hook (it was copied or unpickled); the hook is "
                "registered again and this call is not counted"
            )
        self._watch_wiring()
        self._watch_steps_between_calls()
        self._steps_since_call = 0
        if self._stepped:
            self._stepped = False
            self._optimizer_steps += 1
            if self._optimizer_steps < self.warmup_steps:
                self._set_lrs(self._warmed(self.base_lrs))
            if self._optimizer_steps > self.warmup_steps:
                self._on_optimizer_step()
        self._last_lr = self._lrs()

    def _on_optimizer_step(self) -> None:
        raise NotImplementedError

    def _update_lr(self, epoch: int | None = None) -> None:
        # SequentialLR calls this at a milestone. As torch's own, which older versions lack.
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        if epoch is not None:
            self._set_lrs(self._get_closed_form_lr())
        self._last_lr = self._lrs()

    def _get_closed_form_lr(self) -> list[float]:
        """Base rates after all drops so far: what ``SequentialLR`` asks for at a milestone."""
        raise NotImplementedError

    def _watch_wiring(self) -> None:
        self._calls_without_step = 0 if self._stepped else self._calls_without_step + 1
        if self._calls_without_step == self._calls_without_step_allowed:
            self._warn(
                f"step() was called {self._calls_without_step} times without an optimizer step in "
                "between; was this scheduler made for the optimizer that is stepped?"
            )

    def _watch_steps_between_calls(self) -> None:
        # The first call may come late by design: SequentialLR hands over at a milestone.
        self._late_calls += self._steps_since_call >= _STEPS_WITHOUT_CALL
        if self._late_calls == 2 and self._steps_since_call >= _STEPS_WITHOUT_CALL:
            self._warn(
                f"{self._steps_since_call} optimizer steps passed since the last step(); call it "
                "after every optimizer.step(), not once an epoch (Lightning: 'interval': 'step')"
            )

    def _warn(self, message: str) -> None:
        warnings.warn(f"{type(self).__name__}: {message}", RuntimeWarning, stacklevel=4)

    # ---- learning rates ---------------------------------------------------------------------

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
        """Current rates; they change at the end of a window, in place, and not here."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def _lrs(self) -> list[float | Tensor]:
        return [
            lr.clone() if isinstance(lr, Tensor) else lr
            for lr in (group["lr"] for group in self.optimizer.param_groups)
        ]

    def _set_lrs(self, lrs: Iterable[float]) -> None:
        # add_param_group may have brought more groups than there are base rates.
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=False):
            _set_lr(group, lr)

    def _drop_lrs(
        self, factor: float, min_lrs: Sequence[float], groups: Container[int] | None = None
    ) -> list[int]:
        """``lr = max(min_lr, factor * lr)`` but never higher than it was.

        Args:
            factor: below 1.
            min_lrs: of each group.
            groups: indices of those to lower; None for all.

        Returns:
            Indices of the groups whose rate has changed.
        """
        changed = []
        for i, group in enumerate(self.optimizer.param_groups):
            if groups is not None and i not in groups:
                continue
            lr = float(group["lr"])
            floor = min_lrs[i] if i < len(min_lrs) else 0.0
            dropped = max(floor, factor * lr)
            if dropped < lr:
                _set_lr(group, dropped)
                changed.append(i)
        return changed

    def close(self) -> None:
        """Take the hooks off the optimizer. The learning rates stay as they are."""
        for hook in (self._hook, self._pre_hook):
            if hook is not None:
                hook.remove()
        self._hook = self._pre_hook = None

    # ---- copies -----------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hook": None, "_pre_hook": None, "_lr_versions": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._ensure_hook()


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


def _untraced(hook: Callable[[Optimizer, Any, Any], None]) -> Callable[[Optimizer, Any, Any], None]:
    """The hook, run as it is where the optimizer's step is compiled.

    Traced, it would cost seconds, and reading a tensor learning rate would break the graph with a
    page of warnings. What disable() imports has been imported by the optimizer's constructor.
    """
    disable: Callable[..., Callable[[Optimizer, Any, Any], None]] = torch.compiler.disable
    return disable(hook)


def _set_lr(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], Tensor):
        with torch.no_grad():
            group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def as_floats(lrs: Iterable[float | Tensor]) -> list[float]:
    """Learning rates as plain floats, for logs and checkpoints."""
    return [float(lr) for lr in lrs]
