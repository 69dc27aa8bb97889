"""What is trained: a model, its batches, its measure, and the recipe that all schedules share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from demo.digits import Digits
from demo.text import Bytes
from torch import Generator, Tensor, nn
from torch.nn import functional

from .recipe import Recipe
from .task import VALIDATION, Scores, Task


class DigitsConvnet(Digits):
    """The demo's convolutional network on handwritten digits."""

    measure = "test error, %"
    evaluate_every = 1
    recipe = Recipe("sgd", lr=0.04, rates=(0.01, 0.02, 0.04, 0.08), epochs=20)

    def __init__(self, *, validation: bool = False) -> None:
        super().__init__()
        if validation:
            held = slice(None, None, VALIDATION)
            kept = torch.ones(len(self._labels), dtype=torch.bool)
            kept[held] = False
            self._test_images = self._images[held, 1:-1, 1:-1][:, None]
            self._test_labels = self._labels[held]
            self._images, self._labels = self._images[kept], self._labels[kept]
        self.steps_per_epoch = len(self._labels) // self.batch

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Scores:
        """Test error in percent and test loss."""
        loss = functional.cross_entropy(model(self._test_images), self._test_labels)
        return Scores(self.quality(model), float(loss))

    def start_epoch(self, random: Generator) -> None:
        """Forget what is left of the last order; the next batch draws a new one."""
        self._order = self._order[:0]

    def inputs(self, random: Generator) -> Iterator[Tensor]:
        """None: there is no batch norm."""
        return iter(())


class ByteTransformer(Bytes):
    """The demo's byte-level transformer on Python's standard library.

    An epoch is 32 batches, by name only: the text is never read once in full.
    """

    measure = "bits per byte"
    evaluate_every = 2  # costs as much as a dozen steps
    steps_per_epoch = 32
    recipe = Recipe("adamw", lr=0.006, rates=(0.0015, 0.003, 0.006), epochs=20, weight_decay=0.01)

    def __init__(self, *, validation: bool = False) -> None:
        super().__init__()
        if validation:
            cut = len(self._train) * (VALIDATION - 1) // VALIDATION
            self._train, self._held_out = self._train[:cut], self._train[cut:]

    def scores(self, model: nn.Module) -> Scores:
        """Bits per held-out byte, and the same in nats, which is the loss."""
        bits = self.quality(model)
        return Scores(bits, bits * math.log(2))

    def start_epoch(self, random: Generator) -> None:
        """Batches are drawn at random places: there is no order."""

    def inputs(self, random: Generator) -> Iterator[Tensor]:
        """None: there is no batch norm."""
        return iter(())


@dataclass(frozen=True)
class Model:
    """What the commands know under a model's name. It is pickled for other processes.

    Attributes:
        recipe: returns what all schedules share, without reading the data.
        task: makes the task from the arguments of :func:`make_task` after the name.
        windows: AutoDrop's windows that an ablation tries.
        data: the data set whose folder the model needs; None for a small task that brings its own.
        train: trains a run in place of :func:`training.loop.train`; None: the loop trains it.
    """

    recipe: Callable[[], Recipe]
    task: Callable[..., Task]
    windows: tuple[int, ...]
    data: str | None = None
    train: Callable[..., dict[str, Any]] | None = None


def make_task(
    model: str,
    *,
    device: str = "cpu",
    data: str | Path | None = None,
    cache: str | Path | None = None,
    batch: int | None = None,
    subset: int | None = None,
    workers: int = 0,
    validation: bool = False,
) -> Task:
    """Return the task of one of :data:`MODELS`.

    Args:
        model: its name.
        device: where it trains.
        data: folder of the data set.
        cache: file of what is decoded once, next to the data unless given.
        batch: examples a step (tokens of each language of a translation task); None: the
            recipe's.
        subset: examples to train on, and at most as many to test on; None: all.
        workers: processes that decode images (ImageNet).
        validation: test on a fifth of the training data, and train on the rest.

    Raises:
        ValueError: the model is unknown, its folder is missing, or an option does not go with the
            model.
    """
    if model not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {model!r}")
    return MODELS[model].task(
        device=device,
        data=data,
        cache=cache,
        batch=batch,
        subset=subset,
        workers=workers,
        validation=validation,
    )


def recipe_of(model: str) -> Recipe:
    """Return a model's recipe without reading its data."""
    return MODELS[model].recipe()


_SMALL: Mapping[str, type[DigitsConvnet] | type[ByteTransformer]] = {
    "digits-convnet": DigitsConvnet,
    "byte-transformer": ByteTransformer,
}


def _small_recipe(model: str) -> Recipe:
    return _SMALL[model].recipe


def _small_task(
    model: str,
    *,
    device: str,
    batch: int | None,
    subset: int | None,
    validation: bool,
    **unused: Any,
) -> Task:
    if device != "cpu" or batch is not None or subset is not None:
        raise ValueError(
            f"device, batch, subset: {model} is a small task of fixed batches for the CPU, "
            f"got {device}, {batch}, {subset}"
        )
    return _SMALL[model](validation=validation)


# The papers' windows of Table 15 are too long for the short tasks.
_WINDOWS = {"digits-convnet": (1, 2, 3, 4, 6, 12, 64), "byte-transformer": (1, 2, 4, 8, 64)}

MODELS: dict[str, Model] = {
    name: Model(partial(_small_recipe, name), partial(_small_task, name), _WINDOWS[name])
    for name in _SMALL
}
"""By name. ``papers.tasks`` adds the papers' models when it is imported."""
