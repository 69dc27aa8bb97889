"""AutoDrop in the Trainer of Lightning."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import checks
from ..messages import Warnings
from ..schedulers import EpochAutoDrop
from .averages import averaged, check_averages, write_averages
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

    With ``evaluate_average=True``, validation within ``fit`` and checkpoints of weights alone use
    the schedulers' averages of the parameters, and after ``fit`` the module holds them. Other
    checkpoints hold the parameters of the run and the averages apart from them, so that they
    resume exactly; ``test``, ``validate`` and ``predict`` with such a checkpoint use its average,
    if they follow the ``fit`` of the same trainer and module. Statistics of batch normalisation
    stay those of the run.

    Args:
        evaluate_average: whether models are evaluated and saved with their average over the run,
            for schedulers with ``average=True``.
        prefix: Of the names; of several schedulers, each one's number follows it.

    Raises:
        ValueError: When training begins, a scheduler keeps no average that could be evaluated.
    """

    def __init__(self, *, evaluate_average: bool = False, prefix: str = "autodrop/") -> None:
        self.evaluate_average = checks.flag("evaluate_average", evaluate_average)
        self.prefix = prefix
        self._logged: list[Any] = []  # the newest decision of each scheduler
        self._validation = contextlib.ExitStack()  # within it the parameters hold the averages
        self._trainer: Any = None
        self._training = False  # whether the averages are apart from the parameters

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lightning calls this: check when the schedulers will be stepped."""
        self._logged = _newest(_schedulers(trainer))
        if not _schedulers(trainer):
            Warnings("AutoDropMonitor").warn(
                "configure_optimizers returned no scheduler of this package"
            )
        if self.evaluate_average:
            check_averages(_schedulers(trainer))
            self._training = True
            if self._trainer is not trainer:
                self._trainer = trainer
                trainer.save_checkpoint = self._with_average(trainer.save_checkpoint)
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

    # ---- averages ---------------------------------------------------------------------------

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Lightning calls this."""
        if self.evaluate_average and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validation.enter_context(averaged(_schedulers(trainer)))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Lightning calls this before ``ModelCheckpoint`` saves."""
        self._validation.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lightning calls this, and saves a checkpoint afterwards if it is to."""
        self._validation.close()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Lightning calls this, after the last checkpoint."""
        if self._training:
            self._training = False
            write_averages(_schedulers(trainer))

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Lightning calls this, after it has loaded the parameters."""
        if not self.evaluate_average or trainer.state.fn == "fit":
            return
        schedulers, own = _schedulers(trainer), set(map(id, pl_module.parameters()))
        named = [p for scheduler in schedulers for _, p in scheduler.meter.named_parameters()]
        if named and own.issuperset(map(id, named)):
            write_averages(schedulers, checkpoint["lr_schedulers"])
        else:
            Warnings("AutoDropMonitor").warn(
                "the checkpoint's parameters are evaluated and not their average, because this "
                "trainer has not fitted the module, and does not know which parameter is which"
            )

    def _with_average(self, save: Callable[..., None]) -> Callable[..., None]:
        """Return ``save_checkpoint`` with averages in weights alone, which has no hook for them."""

        @functools.wraps(save)
        def save_checkpoint(
            filepath: Any, weights_only: bool | None = None, *args: Any, **kwargs: Any
        ) -> None:
            with averaged(_schedulers(self._trainer) if weights_only and self._training else []):
                save(filepath, weights_only, *args, **kwargs)

        return save_checkpoint

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
