"""What the schedulers that decide from a meter share: drops by a factor, history and state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

from torch.optim import Optimizer

from ..checks import check_callback, check_factor, floors
from ..distributed.checkpoint import ArenaState
from ..meter import HISTORY, AngularVelocity
from ..reading import Decision, from_columns, remember, to_columns
from .base import OptimizerStepScheduler, as_floats, check_optimizer


class MeasuringScheduler(OptimizerStepScheduler):
    """A scheduler that multiplies all rates by ``factor`` whenever its meter's readings say so.

    Subclasses implement :meth:`_on_optimizer_step` and, for checkpoints, :meth:`_settings`,
    :meth:`_restore_settings`, :meth:`_progress` and :meth:`_restore_progress`.

    Attributes:
        history: the last 10,000 decisions.
        num_drops: how often a learning rate was lowered.
    """

    _decision_type: ClassVar[type[Decision]] = Decision
    _progress_entries: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        optimizer: Optimizer,
        window: int,
        factor: float,
        *,
        min_lr: float | Iterable[float],
        params: Any,
        sample: float | Literal["auto"] | None,
        seed: int = 0,
        tolerance: float = 0.01,
        per_tensor: bool = False,
        per_group: bool = False,
        backend: str,
        process_group: Any,
        form: Literal["auto", "sum", "delta"],
        on_reading: Callable[[Any], object] | None,
        on_drop: Callable[[Any], object] | None,
        warmup_steps: int,
        last_epoch: int,
    ) -> None:
        check_factor(factor)
        check_callback("on_reading", on_reading)
        check_callback("on_drop", on_drop)
        optimizer = check_optimizer(optimizer)
        self.factor = float(factor)
        self.min_lrs = floors(min_lr, len(optimizer.param_groups))
        self.num_drops = 0
        self.history: list[Any] = []
        self.on_reading = on_reading
        self.on_drop = on_drop
        self._meter = AngularVelocity(
            optimizer if params is None else params,
            window,
            sample=sample,
            seed=seed,
            tolerance=tolerance,
            per_tensor=per_tensor,
            per_group=per_group,
            backend=backend,
            process_group=process_group,
            form=form,
        )
        super().__init__(optimizer, warmup_steps=warmup_steps, last_epoch=last_epoch)

    def _keep(self, decision: Decision, bound: int = HISTORY) -> None:
        """Take a decision that has been carried out into the history, and tell of it."""
        remember(self.history, decision, bound)
        if self.on_reading is not None:
            self.on_reading(decision)
        if decision.dropped and self.on_drop is not None:
            self.on_drop(decision)

    def _get_closed_form_lr(self) -> list[float]:
        """Base rates after all drops so far: what ``SequentialLR`` asks for at a milestone."""
        lrs = self._warmed(self.base_lrs)
        least = self.min_lrs + [0.0] * (len(lrs) - len(self.min_lrs))
        for g, floor in zip(range(len(lrs)), least, strict=False):
            for _ in range(self._drops_of(g)):
                lrs[g] = min(lrs[g], max(floor, self.factor * lrs[g]))
        return lrs

    def _drops_of(self, group: int) -> int:
        """How often the rate of a param group was lowered."""
        return self.num_drops

    def _metrics(self, **values: float | None) -> dict[str, float]:
        """``lr`` of the first param group, ``num_drops`` and those ``values`` that are defined."""
        lr, drops = float(self.optimizer.param_groups[0]["lr"]), float(self.num_drops)
        defined = {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}
        return {"lr": lr, "num_drops": drops} | defined

    def close(self) -> None:
        """Take the hooks off the optimizer and free the arenas. The learning rates stay."""
        super().close()
        self._meter.close()

    # ---- state ------------------------------------------------------------------------------

    @property
    def arena_state(self) -> ArenaState:
        """The meter's sums of sharded parameters, for ``torch.distributed.checkpoint``.

        Save and load it beside the state: ``dcp.save({"scheduler": scheduler, "arenas":
        scheduler.arena_state, ...})``. Without it the meter warms up again after a restart.
        """
        return self._meter.arena_state

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit: settings, decisions, history and arenas.

        Plain values and tensors only, so that ``torch.load(weights_only=True)`` reads it. Learning
        rates are restored by the *optimizer's* ``load_state_dict``, as with torch's schedulers.
        """
        return {
            "version": 1,
            "scheduler": type(self).__name__,
            "settings": self._settings(),
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "base_lrs": as_floats(self.base_lrs),
            "last_lr": as_floats(self._last_lr),
            "optimizer_steps": self._optimizer_steps,
            "stepped": self._stepped,
            "num_drops": self.num_drops,
            **self._progress(),
            "history": to_columns(self.history, self._decision_type),
            "meter": self._meter.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken. Settings are restored too, as in torch.

        Raises:
            ValueError: not a state of this class; nothing has been changed then.
        """
        problem = self._problem_of(state_dict)
        if problem is not None:
            raise ValueError(
                f"state_dict: expected a state of {type(self).__name__}, version 1, got {problem}"
            )
        self._meter.load_state_dict(state_dict["meter"])
        settings = dict(state_dict["settings"])
        changed = {k: v for k, v in self._settings().items() if settings[k] != v}
        if changed:
            self._warn(
                "the checkpoint's settings replace those given: "
                + ", ".join(f"{k}={settings[k]!r} (was {v!r})" for k, v in changed.items())
            )
        self.factor = settings["factor"]
        self.min_lrs = list(settings["min_lr"])
        self._restore_settings(settings)
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["step_count"]
        self.base_lrs = list(state_dict["base_lrs"])
        self._last_lr = list(state_dict["last_lr"])
        self._optimizer_steps = state_dict["optimizer_steps"]
        self._stepped = state_dict["stepped"]
        self.num_drops = state_dict["num_drops"]
        self.history = from_columns(state_dict["history"], self._decision_type)
        self._restore_progress(state_dict)

    def _settings(self) -> dict[str, Any]:
        """What the scheduler was made with, as plain values; with "factor" and "min_lr"."""
        raise NotImplementedError

    def _restore_settings(self, settings: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _progress(self) -> dict[str, Any]:
        """The :attr:`_progress_entries`: what has been gathered towards the next drop."""
        raise NotImplementedError

    def _restore_progress(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _problem_of(self, state: Any) -> str | None:
        """Why a state cannot be loaded, or None."""
        if not isinstance(state, Mapping):
            return type(state).__name__
        if state.get("version") != 1 or state.get("scheduler") != type(self).__name__:
            return f"version {state.get('version')!r} of {state.get('scheduler')!r}"
        expected = {"settings", "last_epoch", "step_count", "base_lrs", "last_lr", "meter"}
        expected |= {"optimizer_steps", "stepped", "num_drops", "history", *self._progress_entries}
        missing = sorted(expected - set(state))
        given = state.get("settings", ())
        missing += [f"settings[{name!r}]" for name in self._settings() if name not in given]
        return f"no entry {', '.join(missing)}" if missing else None
