"""AutoDrop in the Trainer of transformers."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, Literal

import torch

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "autodrop_ext.integrations.transformers needs transformers: "
        "pip install 'autodrop_ext[transformers]'",
        name="transformers",
    ) from error

from .. import checks
from ..schedulers import AnytimeAutoDrop, AutoDrop
from .averages import averaged, check_averages, write_averages
from .lookup import find_schedulers, prefixed

_SCHEDULERS = {"autodrop": AutoDrop, "anytime": AnytimeAutoDrop}


class AutoDropCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not there for mypy
    """Gives a ``Trainer`` its AutoDrop scheduler, and puts angle, drops and rate into its logs.

    ::

        trainer = Trainer(model, args, train_dataset=data)
        AutoDropCallback(window=64).attach(trainer)
        trainer.train()

    The scheduler is made when Trainer would make its own, for the optimizer that Trainer made and
    wrapped (also under FSDP, for which Trainer refuses ``optimizers=``), and Trainer saves and
    restores it with its checkpoints. ``lr_scheduler_type`` of the arguments has no effect; their
    warm-up steps or ratio become the scheduler's ``warmup_steps``, unless these are given here.

    With ``Trainer(optimizers=(optimizer, AutoDrop(optimizer)))`` there is a scheduler already, and
    ``AutoDropCallback().attach(trainer)`` only logs.

    Logs of training get the values of the scheduler's ``get_metrics``, such as
    ``autodrop/angular_velocity``; ``autodrop/lr`` is the rate of the *next* optimizer step, and
    Trainer's ``learning_rate`` that of the last. Trainer calls callbacks in order, those that
    report to TensorBoard and others before the user's, so that values added by a later one reach no
    reporter: :meth:`attach` puts this one at the front, which ``callbacks=[...]`` cannot.

    With ``evaluate_average=True``, ``evaluate``, ``predict`` and ``save_model`` of the Trainer use
    the scheduler's average of the parameters while training goes on, and after ``train()`` the
    model holds it: the last one, or with ``load_best_model_at_end`` that of the best checkpoint.
    Checkpoints hold the parameters of the run and the average apart from them, so that they
    resume exactly; with ``save_only_model`` they hold the average in place of the parameters.
    Statistics of batch normalisation stay those of the run.

    Args:
        scheduler: "autodrop" for :class:`~autodrop_ext.AutoDrop`, "anytime" for
            :class:`~autodrop_ext.AnytimeAutoDrop`.
        evaluate_average: whether models are evaluated and saved with the average over the run. The
            scheduler is then made with ``average=True``.
        prefix: Of the names in the logs.
        **settings: Arguments of the scheduler except the optimizer.

    Raises:
        ValueError: ``scheduler`` is neither, or ``average=False`` is given with
            ``evaluate_average=True``.
        TypeError: When training begins, a setting is not an argument of the scheduler.
    """

    def __init__(
        self,
        *,
        scheduler: Literal["autodrop", "anytime"] = "autodrop",
        evaluate_average: bool = False,
        prefix: str = "autodrop/",
        **settings: Any,
    ) -> None:
        self.scheduler = checks.choice(*_SCHEDULERS)("scheduler", scheduler)
        self.evaluate_average = checks.flag("evaluate_average", evaluate_average)
        if evaluate_average and not settings.get("average", True):
            raise ValueError("average: expected True with evaluate_average=True, got False")
        self.prefix = prefix
        self.settings = settings
        self._trainer: Any = None
        self._training = False  # whether the average is apart from the parameters

    def attach(self, trainer: Any) -> AutoDropCallback:
        """Become the first of a Trainer's callbacks, and its maker of schedulers.

        Returns:
            This callback.

        Raises:
            TypeError: ``trainer`` is no Trainer.
            ValueError: The Trainer was given a scheduler, and there are settings for another, or it
                keeps no average that could be evaluated; or this callback is attached already.
        """
        if not (hasattr(trainer, "callback_handler") and hasattr(trainer, "create_scheduler")):
            raise TypeError(
                f"trainer: expected a transformers.Trainer, got {type(trainer).__name__}"
            )
        if self._trainer is not None:
            raise ValueError("trainer: expected a callback not yet attached, got one that is")
        given = trainer.lr_scheduler
        if given is None:
            trainer.create_scheduler = self._create_scheduler
        elif self.settings:
            raise ValueError(
                f"{', '.join(self.settings)}: expected no settings, because the Trainer was "
                f"given its scheduler ({type(given).__name__}); set them there"
            )
        elif not find_schedulers(given):
            raise ValueError(
                "trainer: expected one whose scheduler is of this package or is not yet made, "
                f"got one with {type(given).__name__}"
            )
        elif self.evaluate_average:
            check_averages(find_schedulers(given))
        self._trainer = trainer
        handler = trainer.callback_handler
        handler.callbacks = [self, *(c for c in handler.callbacks if c is not self)]
        if self.evaluate_average:
            for name in ("evaluate", "predict", "save_model"):
                setattr(trainer, name, self._with_average(getattr(trainer, name)))
        return self

    def _create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """In place of ``Trainer.create_scheduler``."""
        trainer = self._trainer
        if trainer.lr_scheduler is None:
            # Trainer's arguments know their warm-up; a ratio needs the number of steps.
            warmup = trainer.args.get_warmup_steps(num_training_steps)
            settings = {"warmup_steps": warmup} if warmup else {}
            if self.evaluate_average:
                settings["average"] = True
            trainer.lr_scheduler = _SCHEDULERS[self.scheduler](
                trainer.optimizer if optimizer is None else optimizer, **(settings | self.settings)
            )
            trainer._created_lr_scheduler = True  # train() called again starts with a new one
        return trainer.lr_scheduler

    def _with_average(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method of the Trainer that finds the average in the parameters."""

        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            trainer = self._trainer
            # Trainer's own calls of save_model say so; they are those of its checkpoints.
            resumable = kwargs.get("_internal_call") and not trainer.args.save_only_model
            if not self._training or resumable:
                return method(*args, **kwargs)
            with averaged(find_schedulers(trainer.lr_scheduler)):
                return method(*args, **kwargs)

        return wrapped

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer calls this.

        Raises:
            RuntimeError: The callback was not attached.
            ValueError: A checkpoint without an average was loaded, which was to be evaluated.
        """
        if self._trainer is None:
            raise RuntimeError(
                "AutoDropCallback: expected attach(trainer) before train(), got a callback without "
                "a Trainer; it would make no scheduler and its values would reach no reporter"
            )
        if self.evaluate_average:
            check_averages(find_schedulers(self._trainer.lr_scheduler))
            self._training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer calls this, after it has loaded the best model and saved the last checkpoint."""
        if not self._training:
            return
        self._training = False
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None and args.save_only_model:
            return  # it was saved with its average
        saved = None
        if best is not None:
            path = os.path.join(best, "scheduler.pt")
            saved = torch.load(path, map_location="cpu", weights_only=True)
        write_averages(find_schedulers(self._trainer.lr_scheduler), saved)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer calls this: add to the logs of training steps, and to ``state.log_history``."""
        logs = kwargs.get("logs") or {}
        if "learning_rate" not in logs:
            return
        values = prefixed(self.prefix, find_schedulers(kwargs.get("lr_scheduler")))
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)
