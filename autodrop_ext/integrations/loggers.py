"""TensorBoard and Weights & Biases as receivers of decisions.

Pass one to a scheduler as ``on_reading=``. As with :class:`~autodrop_ext.JsonLinesLog`, the first
of several ranks writes.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from ..log import is_first_rank
from ..reading import Decision


class TensorBoardLog:
    """Writes every decision as scalars at its optimizer step.

    Args:
        writer: A ``SummaryWriter``, or anything with its ``add_scalar(tag, value, step)``; or a
            folder, for which a ``SummaryWriter`` is made with the first value.
        prefix: Of the tags: ``autodrop/angle``, ``autodrop/lr`` and so on.

    Raises:
        TypeError: ``writer`` is neither.
        ImportError: A folder is given and tensorboard is missing; it comes with
            ``autodrop_ext[loggers]``.
    """

    def __init__(self, writer: Any, prefix: str = "autodrop/") -> None:
        self.prefix = prefix
        self._writer: Any = None
        self._folder: str | None = None
        if isinstance(writer, str | os.PathLike):
            self._folder = os.fspath(writer)
            _tensorboard()  # what is missing is reported here, not at the end of the third window
        elif callable(getattr(writer, "add_scalar", None)):
            self._writer = writer
        else:
            raise TypeError(f"writer: expected a SummaryWriter or a folder, got {writer!r}")

    def __call__(self, decision: Decision) -> None:
        """Write a decision."""
        self.metrics(decision.step, **_with_prefix(self.prefix, decision))

    def metrics(self, step: int, **values: float) -> None:
        """Write other values, such as ``loss``, at an optimizer step; without the prefix."""
        if not is_first_rank():
            return
        if self._writer is None:
            self._writer = _tensorboard().SummaryWriter(self._folder)
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Close the writer if it was made here; a later value makes a new one."""
        if self._folder is not None and self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbLog:
    """Logs every decision to a run of Weights & Biases, with the optimizer step as its x-axis.

    No ``step=`` is passed to ``run.log``: a run's own step may only grow, and values that come in
    another order than yours would be lost.

    Args:
        run: The run that ``wandb.init()`` returned; None for the one that is active at the first
            value.
        prefix: Of the names: ``autodrop/angle``, ``autodrop/lr``, and the axis ``autodrop/step``.

    Raises:
        TypeError: ``run`` is no run.
        ImportError: No run is given and wandb is missing; it comes with ``autodrop_ext[loggers]``.
        RuntimeError: At the first value, no run is given and none is active.
    """

    def __init__(self, run: Any = None, prefix: str = "autodrop/") -> None:
        if run is None:
            _wandb()
        elif not (callable(getattr(run, "log", None)) and hasattr(run, "define_metric")):
            raise TypeError(f"run: expected what wandb.init() returns, got {run!r}")
        self.prefix = prefix
        self._run = run
        self._defined = False

    def __call__(self, decision: Decision) -> None:
        """Log a decision."""
        self.metrics(decision.step, **_with_prefix(self.prefix, decision))

    def metrics(self, step: int, **values: float) -> None:
        """Log other values, such as ``loss``, over the same axis; without the prefix."""
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


def to_scalars(decision: Decision) -> dict[str, float]:
    """Return the numbers of a decision by name, without undefined ones.

    Truth values become 0 and 1. The rate of a single param group is ``lr``; of several,
    ``lr/0``, ``lr/1`` and so on. Angles of param groups that decide for themselves are
    ``group_angles/0`` and so on; those of single tensors are left to
    :class:`~autodrop_ext.JsonLinesLog`.
    """
    scalars: dict[str, float] = {}
    for name, value in decision.as_dict().items():
        if name == "lr" and len(value) == 1:
            scalars[name] = float(value[0])
        elif name == "lr" or name.startswith("group_"):
            scalars |= {f"{name}/{g}": float(v) for g, v in enumerate(value) if v is not None}
        elif isinstance(value, (int, float)) and name != "step":
            scalars[name] = float(value)
    return scalars


def _with_prefix(prefix: str, decision: Decision) -> dict[str, float]:
    return {prefix + name: value for name, value in to_scalars(decision).items()}


def _import(module: str, library: str, logger: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{logger} needs {library}: pip install 'autodrop_ext[loggers]'", name=library
        ) from error


def _tensorboard() -> Any:
    return _import("torch.utils.tensorboard", "tensorboard", "TensorBoardLog")


def _wandb() -> Any:
    return _import("wandb", "wandb", "WandbLog")
