"""AutoDrop in the Trainer of transformers."""

from __future__ import annotations

from typing import Any

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "autodrop_ext.integrations.transformers needs transformers: "
        "pip install 'autodrop_ext[transformers]'",
        name="transformers",
    ) from error

from ..schedulers import AutoDrop
from .lookup import find_schedulers, prefixed


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

    Args:
        prefix: Of the names in the logs.
        **settings: Arguments of :class:`~autodrop_ext.AutoDrop` except the optimizer.

    Raises:
        TypeError: When training begins, a setting is not an argument of AutoDrop.
    """

    def __init__(self, *, prefix: str = "autodrop/", **settings: Any) -> None:
        self.prefix = prefix
        self.settings = settings
        self._trainer: Any = None

    def attach(self, trainer: Any) -> AutoDropCallback:
        """Become the first of a Trainer's callbacks, and its maker of schedulers.

        Returns:
            This callback.

        Raises:
            TypeError: ``trainer`` is no Trainer.
            ValueError: The Trainer was given a scheduler, and there are settings for another; or
                this callback is attached already.
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
        self._trainer = trainer
        handler = trainer.callback_handler
        handler.callbacks = [self, *(c for c in handler.callbacks if c is not self)]
        return self

    def _create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """In place of ``Trainer.create_scheduler``."""
        trainer = self._trainer
        if trainer.lr_scheduler is None:
            # Trainer's arguments know their warm-up; a ratio needs the number of steps.
            warmup = {"warmup_steps": trainer.args.get_warmup_steps(num_training_steps)}
            trainer.lr_scheduler = AutoDrop(
                trainer.optimizer if optimizer is None else optimizer, **(warmup | self.settings)
            )
            trainer._created_lr_scheduler = True  # train() called again starts with a new one
        return trainer.lr_scheduler

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer calls this.

        Raises:
            RuntimeError: The callback was not attached.
        """
        if self._trainer is None:
            raise RuntimeError(
                "AutoDropCallback: expected attach(trainer) before train(), got a callback without "
                "a Trainer; it would make no scheduler and its values would reach no reporter"
            )

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer calls this: add to the logs of training steps, and to ``state.log_history``."""
        logs = kwargs.get("logs") or {}
        if "learning_rate" not in logs:
            return
        values = prefixed(self.prefix, find_schedulers(kwargs.get("lr_scheduler")))
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)
