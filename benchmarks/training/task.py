"""What a task is: a model with its data, and what an evaluation of it measures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from torch import Generator, Tensor, nn

from .recipe import Recipe

VALIDATION = 5  # one part in five of the training data is held out to choose settings


class Scores(NamedTuple):
    """What an evaluation measures; None where it was left out.

    Attributes:
        error: in the task's measure, lower is better.
        test_loss: mean over the test data.
    """

    error: float | None
    test_loss: float | None


class Task(Protocol):
    """A model and its data."""

    recipe: Recipe
    measure: str
    """Of the error, with its unit."""
    steps_per_epoch: int
    evaluate_every: int
    """Epochs."""

    def model(self) -> nn.Module:
        """A new model, from torch's global random state."""

    def start_epoch(self, random: Generator) -> None:
        """Draw the order of the next epoch."""

    def loss(self, model: nn.Module, random: Generator) -> Tensor:
        """Loss of the next batch."""

    def scores(self, model: nn.Module) -> Scores:
        """Error and loss on data that was not trained on."""

    def inputs(self, random: Generator) -> Iterator[Tensor]:
        """Some batches of inputs, to measure batch-norm statistics with."""
