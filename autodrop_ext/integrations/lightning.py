"""AutoDrop in the Trainer of Lightning."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from ..messages import Warnings
from ..schedulers import EpochAutoDrop
from .lookup import find_schedulers, prefixed

if TYPE_CHECKING:
    Callback = Any
else:
    # Two packages have the same classes, and a Trainer only takes callbacks of its own package:
    # take the one that the program has imported, otherwise the one that is installed.
    _packages = ("lightning.pytorch", "pytorch_lightning")
    for _name in sorted(_packages, key=lambda name: name not in sys.modules):
        try:
            Callback = importlib.import_module(_name).Callback
            break
        except ImportError:
            continue
    else:
        raise ImportError(
            "autodrop_ext.integrations.lightning needs lightning: "
            "pip install 'autodrop_ext[lightning]'",
            name="lightning",
        )


class AutoDropMonitor(Callback):  # type: ignore[misc]
    """Logs angle, drops and rate, and warns if Lightning steps a scheduler at the wrong time.

    ``configure_optimizers`` makes the scheduler::

        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": AutoDrop(optimizer), "interval": "step"},
        }

    Without ``"interval": "step"`` Lightning steps it once per epoch, without a warning. The values
    of the scheduler's ``get_metrics``, such as ``autodrop/angular_velocity``, go to all of the
    Trainer's loggers at the end of each window.

    Args:
        prefix: Of the names; of several schedulers, each one's number follows it.
    """

    def __init__(self, *, prefix: str = "autodrop/") -> None:
        self.prefix = prefix
        self._logged: list[Any] = []  # the newest decision of each scheduler

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lightning calls this: check when the schedulers will be stepped."""
        self._logged = _newest(_schedulers(trainer))
        if not _schedulers(trainer):
            Warnings("AutoDropMonitor").warn(
                "configure_optimizers returned no scheduler of this package"
            )
        if not trainer.lightning_module.automatic_optimization:
            return  # the module steps them
        for config in trainer.lr_scheduler_configs:
            for scheduler in find_schedulers(config.scheduler):
                expected = "epoch" if isinstance(scheduler, EpochAutoDrop) else "step"
                if config.interval != expected or config.frequency != 1:
                    Warnings(type(scheduler).__name__).warn(
                        f"expected 'interval': '{expected}' and 'frequency': 1 in "
                        f"configure_optimizers, got {config.interval!r} and {config.frequency}"
                    )

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning calls this."""
        self._log(trainer)

    def on_train_epoch_start(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning calls this, the first hook after the step of an epoch's schedulers."""
        self._log(trainer)

    def on_train_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning calls this: log the last epoch's values."""
        self._log(trainer)

    def _log(self, trainer: Any) -> None:
        schedulers = _schedulers(trainer)
        newest = _newest(schedulers)
        if [id(decision) for decision in newest] != [id(decision) for decision in self._logged]:
            self._logged = newest
            for logger in trainer.loggers:
                logger.log_metrics(prefixed(self.prefix, schedulers), step=trainer.global_step)


def _schedulers(trainer: Any) -> list[Any]:
    return [s for c in trainer.lr_scheduler_configs for s in find_schedulers(c.scheduler)]


def _newest(schedulers: list[Any]) -> list[Any]:
    return [s.history[-1] if s.history else None for s in schedulers]
