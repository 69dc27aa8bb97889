"""The tasks of the papers' models, which this module adds to the models of all commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from training.cifar import SIDE, Cifar, load_cifar
from training.ranks import Ranks
from training.recipe import Recipe
from training.task import VALIDATION, Scores, Task
from training.tasks import MODELS, Model

from .glue import train_glue
from .imagenet import ImageNetModel
from .recipes import RECIPES
from .translation import Translation

# Of the training pixels, per channel, by the number of classes.
_MEAN = {10: (0.4914, 0.4822, 0.4465), 100: (0.5071, 0.4865, 0.4409)}
_STD = {10: (0.2470, 0.2435, 0.2616), 100: (0.2673, 0.2564, 0.2762)}
_PADDING = 4  # pixels by which an image may move, He et al. 2016
_EVALUATED = 1000  # images at a time


class CifarModel:
    """An image model on CIFAR, images moved by up to four pixels and mirrored at random.

    The data are on the device as uint8, and batches are cut and mirrored there.

    Args:
        build: makes the model for the data's number of classes.
        recipe: of the model's papers.
        data: as :func:`~training.cifar.load_cifar` returns it.
        device: where the data are and the model trains.
        batch: images a step.
        subset: images to train on, and at most as many to test on; None: all.
        validation: test on a fifth of the training images, and train on the others.
    """

    measure = "test error, %"
    evaluate_every = 1

    def __init__(
        self,
        build: Callable[[int], nn.Module],
        recipe: Recipe,
        data: Cifar,
        *,
        device: torch.device,
        batch: int = 128,
        subset: int | None = None,
        validation: bool = False,
    ) -> None:
        self._build, self.recipe = build, recipe
        train, train_labels, test, test_labels, self._classes = data
        # Files come in the order of their classes; the same shuffle for every run.
        order = torch.randperm(len(train), generator=Generator().manual_seed(0))[:subset]
        test_order = torch.randperm(len(test), generator=Generator().manual_seed(0))[:subset]
        train, train_labels = train[order], train_labels[order]
        test, test_labels = test[test_order], test_labels[test_order]
        if validation:
            cut = len(train) // VALIDATION
            test, test_labels = train[:cut], train_labels[:cut]
            train, train_labels = train[cut:], train_labels[cut:]
        if not 0 < batch <= len(train):
            raise ValueError(f"batch: expected 1 to {len(train)} images, got {batch}")
        self._images = functional.pad(train, (_PADDING,) * 4).to(device)
        self._labels = train_labels.to(device)
        self._test_images, self._test_labels = test.to(device), test_labels.to(device)
        self._mean = torch.tensor(_MEAN[self._classes], device=device)[:, None, None] * 255
        self._std = torch.tensor(_STD[self._classes], device=device)[:, None, None] * 255
        self._order = torch.empty(0, dtype=torch.int64, device=device)
        self._device, self._batch, self._next = device, batch, 0
        # The last, smaller batch is trained on too, as torch's loaders do: 391 steps of 128.
        self.steps_per_epoch = -(-len(train) // batch)

    def model(self) -> nn.Module:
        """On the device; channels last on a GPU, whose convolutions want it."""
        memory = torch.channels_last if self._device.type == "cuda" else torch.contiguous_format
        return self._build(self._classes).to(self._device, memory_format=memory)

    def start_epoch(self, random: Generator) -> None:
        """Shuffle all images."""
        self._order = torch.randperm(len(self._labels), generator=random, device=self._device)
        self._next = 0

    def loss(self, model: nn.Module, random: Generator) -> Tensor:
        """Cross entropy of the next batch."""
        chosen = self._order[self._next : self._next + self._batch]
        self._next += self._batch
        return functional.cross_entropy(
            model(self._augmented(chosen, random)), self._labels[chosen]
        )

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Scores:
        """Test error in percent and test loss."""
        wrong = torch.zeros((), dtype=torch.int64, device=self._device)
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        for start in range(0, len(self._test_labels), _EVALUATED):
            images = self._normalised(self._test_images[start : start + _EVALUATED])
            labels = self._test_labels[start : start + _EVALUATED]
            logits = model(images).float()
            wrong += (logits.argmax(dim=1) != labels).sum()
            loss += functional.cross_entropy(logits, labels, reduction="sum")
        n = len(self._test_labels)
        return Scores(100 * int(wrong) / n, float(loss) / n)

    def inputs(self, random: Generator) -> Iterator[Tensor]:
        """Up to 50 batches: 6,400 images settle the statistics of a channel to 1 %."""
        order = torch.randperm(len(self._labels), generator=random, device=self._device)
        for chosen in order.split(self._batch)[:50]:
            yield self._augmented(chosen, random)

    def _augmented(self, chosen: Tensor, random: Generator) -> Tensor:
        """``[n, 3, 32, 32]`` normalised images, cut out of the padded ones by one gather."""
        n, d = len(chosen), self._device
        pixels = torch.arange(SIDE, device=d)
        down, right = torch.randint(2 * _PADDING + 1, (2, n, 1), generator=random, device=d)
        mirror = torch.randint(2, (n, 1), generator=random, device=d).bool()
        rows = down + pixels
        columns = right + torch.where(mirror, SIDE - 1 - pixels, pixels)
        channels = torch.arange(3, device=d)[None, :, None, None]
        return self._normalised(
            self._images[
                chosen[:, None, None, None],
                channels,
                rows[:, None, :, None],
                columns[:, None, None],
            ]
        )

    def _normalised(self, images: Tensor) -> Tensor:
        x = images.float().sub_(self._mean).div_(self._std)
        return x.to(memory_format=torch.channels_last) if x.is_cuda else x


def _recipe(model: str) -> Recipe:
    return RECIPES[model].recipe


def _task(
    model: str,
    *,
    device: str,
    data: str | Path | None,
    cache: str | Path | None,
    batch: int | None,
    subset: int | None,
    workers: int,
    validation: bool,
) -> Task:
    """Return the task of one of the papers' models; see :func:`training.tasks.make_task`."""
    chosen = RECIPES[model]
    if data is None:
        raise ValueError(f"data: {model} needs the folder of {chosen.data}, got none")
    options: dict[str, Any] = {
        "device": torch.device(device),
        "batch": batch or chosen.recipe.batch,
        "subset": subset,
        "validation": validation,
    }
    if chosen.kind == "imagenet":
        return ImageNetModel(chosen, data, workers=workers, **options)
    if chosen.kind == "translation":
        return Translation(chosen, data, cache=cache, **options)
    if chosen.kind != "cifar" or chosen.build is None or chosen.classes is None:
        raise ValueError(f"model: {model} is trained by transformers, not by this loop")
    if Ranks().size > 1:
        raise ValueError(
            f"{model}: expected one process, because the whole data set is on its device, got "
            f"{Ranks().size}; ImageNet, WMT14 and GLUE take several"
        )
    return CifarModel(
        chosen.build, chosen.recipe, load_cifar(data, chosen.classes, cache), **options
    )


# Of AutoDrop, UAI 2024, Table 15.
_WINDOWS = {"imagenet": (64, 256, 512, 640)}

MODELS.update(
    {
        name: Model(
            partial(_recipe, name),
            partial(_task, name),
            _WINDOWS.get(paper.kind, (32, 64, 128, 256)),
            data=paper.data,
            train=train_glue if paper.kind == "glue" else None,
        )
        for name, paper in RECIPES.items()
    }
)
