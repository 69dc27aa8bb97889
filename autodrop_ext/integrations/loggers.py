"""TensorBoard and Weights & Biases as receivers of decisions.

Pass one to a scheduler as ``on_reading=``. As with :class:`~autodrop_ext.JsonLinesLog`, the first
of several ranks writes.
"""

from __future__ import annotations

from typing import Any

from ..log import is_first_rank
from ..reading import Decision


class TensorBoardLog:
    """Writes every decision as scalars at its optimizer step.

    Args:
        writer: A ``SummaryWriter``, or anything with its ``add_scalar(tag, value, step)``.
        prefix: Of the tags: ``autodrop/angle``, ``autodrop/lr`` and so on.

    Raises:
        TypeError: ``writer`` is no writer.
    """

    def __init__(self, writer: Any, prefix: str = "autodrop/") -> None:
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"writer: expected a SummaryWriter, got {writer!r}")
        self.prefix = prefix
        self._writer = writer

    def __call__(self, decision: Decision) -> None:
        """Write a decision."""
        self.metrics(decision.step, **to_scalars(decision, self.prefix))

    def metrics(self, step: int, **values: float) -> None:
        """Write other values, such as ``loss``, at an optimizer step; without the prefix."""
        if is_first_rank():
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)


class WandbLog:
    """Logs every decision to a run of Weights & Biases, with the optimizer step as its x-axis.

    No ``step=`` is passed to ``run.log``: a run's own step may only grow, and values that come in
    another order than yours would be lost.

    Args:
        run: The run that ``wandb.init()`` returned.
        prefix: Of the names: ``autodrop/angle``, ``autodrop/lr``, and the axis ``autodrop/step``.

    Raises:
        TypeError: ``run`` is no run.
    """

    def __init__(self, run: Any, prefix: str = "autodrop/") -> None:
        if not (callable(getattr(run, "log", None)) and hasattr(run, "define_metric")):
            raise TypeError(f"run: expected what wandb.init() returns, got {run!r}")
        self.prefix = prefix
        self._run = run
        if is_first_rank():
            run.define_metric(f"{prefix}step", hidden=True)
            run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")

    def __call__(self, decision: Decision) -> None:
        """Log a decision."""
        self.metrics(decision.step, **to_scalars(decision, self.prefix))

    def metrics(self, step: int, **values: float) -> None:
        """Log other values, such as ``loss``, over the same axis; without the prefix."""
        if is_first_rank():
            self._run.log({f"{self.prefix}step": step, **values})


def to_scalars(decision: Decision, prefix: str = "") -> dict[str, float]:
    """Return the numbers of a decision by name, without undefined ones.

    Truth values become 0 and 1. The rate of a single param group is ``lr``; of several,
    ``lr/0``, ``lr/1`` and so on. Angles of param groups that decide for themselves are
    ``group_angles/0`` and so on; those of single tensors are left to
    :class:`~autodrop_ext.JsonLinesLog`.
    """
    scalars: dict[str, float] = {}
    for name, value in decision.as_dict().items():
        if name == "lr" and len(value) == 1:
            scalars[prefix + name] = float(value[0])
        elif name == "lr" or name.startswith("group_"):
            for g, item in enumerate(value):
                if item is not None:
                    scalars[f"{prefix}{name}/{g}"] = float(item)
        elif isinstance(value, (int, float)) and name != "step":
            scalars[prefix + name] = float(value)
    return scalars
