"""Sinks for decisions: TensorBoard and Weights & Biases.

Give one to a scheduler as ``on_reading=``, several through :class:`~autodrop_ext.TeeLog`. As with
:class:`~autodrop_ext.JsonLinesLog`, the first of several ranks writes.
"""

from __future__ import annotations

import os
from typing import Any

from ..log import is_first_rank, to_scalars
from ..reading import Decision


class TensorBoardLog:
    """Writes every decision as scalars at its optimizer step.

    Args:
        writer: a ``SummaryWriter``, or anything with its ``add_scalar(tag, value, step)``; or a
            folder, for which a ``SummaryWriter`` is made with the first value.
        prefix: of the tags: ``autodrop/angle``, ``autodrop/lr`` and so on.

    Raises:
        TypeError: ``writer`` is neither.
        ImportError: a folder is given and tensorboard is missing; it comes with
            ``autodrop_ext[loggers]``.
    """

    def __init__(self, writer: Any, prefix: str = "autodrop/") -> None:
        self.prefix = prefix
        self._writer: Any = None
        self._folder: str | None = None
        if isinstance(writer, str | os.PathLike):
            self._folder = os.fspath(writer)
            _writer_class()  # what is missing is said here, not at the end of the third window
        elif callable(getattr(writer, "add_scalar", None)):
            self._writer = writer
        else:
            raise TypeError(
                "writer: expected a SummaryWriter or a folder, got an object without add_scalar: "
                f"{writer!r}"
            )

    def __call__(self, decision: Decision) -> None:
        """Write a decision."""
        values = to_scalars(decision)
        self._add(decision.step, {self.prefix + name: value for name, value in values.items()})

    def metrics(self, step: int, **values: float) -> None:
        """Write values of your own, such as ``loss``, at an optimizer step; without the prefix."""
        self._add(step, values)

    def close(self) -> None:
        """Close the writer if it was made here; a later value makes a new one."""
        if self._folder is not None and self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, step: int, values: dict[str, float]) -> None:
        if not is_first_rank():
            return
        if self._writer is None:
            self._writer = _writer_class()(self._folder)
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)


class WandbLog:
    """Logs every decision to a run of Weights & Biases, over the optimizer step as its own x-axis.

    No ``step=`` is passed to ``run.log``: a run's own step may only grow, and values that come in
    another order than yours would be lost.

    Args:
        run: what ``wandb.init()`` returned; None for the run that is active at the first value.
        prefix: of the names: ``autodrop/angle``, ``autodrop/lr``, and the axis ``autodrop/step``.

    Raises:
        TypeError: ``run`` is no run.
        ImportError: no run is given and wandb is missing; it comes with ``autodrop_ext[loggers]``.
        RuntimeError: at the first value, no run is given and none is active.
    """

    def __init__(self, run: Any = None, prefix: str = "autodrop/") -> None:
        if run is None:
            _wandb()
        elif not (callable(getattr(run, "log", None)) and hasattr(run, "define_metric")):
            raise TypeError(
                "run: expected what wandb.init() returns, got an object without log and "
                f"define_metric: {run!r}"
            )
        self.prefix = prefix
        self._run = run
        self._defined = False

    def __call__(self, decision: Decision) -> None:
        """Log a decision."""
        values = to_scalars(decision)
        self._log(decision.step, {self.prefix + name: value for name, value in values.items()})

    def metrics(self, step: int, **values: float) -> None:
        """Log values of your own, such as ``loss``, over the same axis; without the prefix."""
        self._log(step, values)

    def _log(self, step: int, values: dict[str, float]) -> None:
        if not is_first_rank():
            return
        if self._run is None:
            self._run = _wandb().run
            if self._run is None:
                raise RuntimeError(
                    "WandbLog: expected an active run, got none; call wandb.init() first, or give "
                    "its run"
                )
        axis = f"{self.prefix}step"
        if not self._defined:
            self._run.define_metric(axis, hidden=True)
            self._run.define_metric(f"{self.prefix}*", step_metric=axis)
            self._defined = True
        self._run.log({axis: step, **values})


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoardLog needs tensorboard: pip install 'autodrop_ext[loggers]'",
            name="tensorboard",
        ) from error
    return SummaryWriter


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "WandbLog needs wandb: pip install 'autodrop_ext[loggers]'", name="wandb"
        ) from error
    return wandb
