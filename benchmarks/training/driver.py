"""An optimizer together with what changes its learning rate, behind one face."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch.optim import Optimizer

When = Literal["step", "epoch", "loss"]


class Driver:
    """What the training loop calls, whatever the schedule.

    Args:
        optimizer: takes the steps.
        scheduler: anything with ``step()`` and a state; None: the optimizer does it alone.
        when: the scheduler is stepped after every step, after every epoch, or after every epoch
            with the epoch's training loss.
        lr: reads the learning rate where it is not the first group's ``lr``.
        averages: evaluate other parameters than the trained ones, by the optimizer's ``eval()`` and
            ``train()`` (schedule-free); batch-norm statistics are then measured again.
        warmup_steps: over these first steps the rate of the schedule is multiplied by a factor that
            rises linearly to 1. A schedule that is stepped after every step begins after them; one
            that is stepped after every epoch counts from the start of the run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scheduler: Any = None,
        when: When = "step",
        *,
        lr: Callable[[], float] | None = None,
        averages: bool = False,
        warmup_steps: int = 0,
    ) -> None:
        self.optimizer = optimizer
        self.averages = averages
        self.warmup_steps = warmup_steps
        self.steps = 0
        self._scheduler, self._when, self._lr = scheduler, when, lr

    def step(self) -> None:
        """The optimizer's step, and the scheduler's."""
        if self.steps < self.warmup_steps:
            self._warm_step()
            return
        self.optimizer.step()
        self.steps += 1
        if self._scheduler is not None and self._when == "step":
            self._scheduler.step()

    def _warm_step(self) -> None:
        groups = self.optimizer.param_groups
        scheduled = [group["lr"] for group in groups]
        share = (self.steps + 1) / self.warmup_steps
        for group, lr in zip(groups, scheduled, strict=True):
            group["lr"] = lr * share
        self.optimizer.step()
        for group, lr in zip(groups, scheduled, strict=True):
            # An optimizer that moves its own rate (HD) has moved it by this much.
            group["lr"] = lr + (group["lr"] - lr * share)
        self.steps += 1
        if self.steps == self.warmup_steps and hasattr(self._scheduler, "begin"):
            self._scheduler.begin()

    def end_epoch(self, loss: float) -> None:
        """Call with the mean training loss of the epoch."""
        if self._scheduler is not None and self._when == "epoch":
            self._scheduler.step()
        elif self._scheduler is not None and self._when == "loss":
            self._scheduler.step(loss)

    def train(self) -> None:
        """Before training goes on."""
        if self.averages:
            self.optimizer.train()  # type: ignore[attr-defined]

    def eval(self) -> None:
        """Before the model is evaluated or saved."""
        if self.averages:
            self.optimizer.eval()  # type: ignore[attr-defined]

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        lr = float(self.optimizer.param_groups[0]["lr"]) if self._lr is None else self._lr()
        return lr * min(1.0, (self.steps + 1) / self.warmup_steps) if self.warmup_steps else lr

    @property
    def drops(self) -> int | None:
        """How often the rate was dropped; None where the schedule does not drop by itself."""
        return getattr(self._scheduler, "num_drops", None)

    def state_dict(self) -> dict[str, Any]:
        """Of both."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])

    def close(self) -> None:
        """Free what the scheduler holds."""
        if hasattr(self._scheduler, "close"):
            self._scheduler.close()
