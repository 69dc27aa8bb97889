"""What is trained: a model, its batches, its measure, and the recipe that all schedules share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from autodrop_ext.cli.demo.digits import Digits
from autodrop_ext.cli.demo.text import Bytes

from .cifar import SIDE, Cifar10, load_cifar10
from .models import resnet, wide_resnet

_MEAN = (0.4914, 0.4822, 0.4465)  # of CIFAR-10's training pixels, per channel
_STD = (0.2470, 0.2435, 0.2616)
_PADDING = 4  # pixels by which an image may move, He et al. 2016
_EVALUATED = 1000  # images at a time
_VALIDATION = 5  # one part in five of the training data is held out to choose settings


@dataclass(frozen=True)
class Recipe:
    """What every schedule of a task shares.

    Attributes:
        optimizer: "sgd" or "adamw".
        lr: initial rate where none is chosen.
        rates: grid of initial rates that settings are chosen from.
        epochs: of a run.
        window: AutoDrop's ``k``; None: the rule of :func:`~training.schedules.window_for`.
        momentum, nesterov: of SGD.
        weight_decay: as the optimizer takes it.
    """

    optimizer: Literal["sgd", "adamw"]
    lr: float
    rates: tuple[float, ...]
    epochs: int
    window: int | None = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0


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

    def quality(self, model: nn.Module) -> float:
        """Error on data that was not trained on; lower is better."""

    def inputs(self, random: Generator) -> Iterator[Tensor]:
        """Some batches of inputs, to measure batch-norm statistics with."""


class DigitsConvnet(Digits):
    """The demo's convolutional network on handwritten digits."""

    measure = "test error, %"
    evaluate_every = 1
    recipe = Recipe("sgd", lr=0.04, rates=(0.01, 0.02, 0.04, 0.08), epochs=20)

    def __init__(self, *, validation: bool = False) -> None:
        super().__init__()
        if validation:
            held = slice(None, None, _VALIDATION)
            kept = torch.ones(len(self._labels), dtype=torch.bool)
            kept[held] = False
            self._test_images = self._images[held, 1:-1, 1:-1][:, None]
            self._test_labels = self._labels[held]
            self._images, self._labels = self._images[kept], self._labels[kept]
        self.steps_per_epoch = len(self._labels) // self.batch

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
            cut = len(self._train) * (_VALIDATION - 1) // _VALIDATION
            self._train, self._held_out = self._train[:cut], self._train[cut:]

    def start_epoch(self, random: Generator) -> None:
        """Batches are drawn at random places: there is no order."""

    def inputs(self, random: Generator) -> Iterator[Tensor]:
        """None: there is no batch norm."""
        return iter(())


class CifarModel:
    """An image model on CIFAR-10, images moved by up to four pixels and mirrored at random.

    The data lies on the device as uint8, and batches are cut and mirrored there.

    Args:
        build: makes the model.
        recipe: of the model's papers.
        data: as :func:`~training.cifar.load_cifar10` returns it.
        device: where the data lies and the model trains.
        batch: images a step.
        subset: images to train on, and at most as many to test on; None: all.
        validation: test on a fifth of the training images, and train on the others.
    """

    measure = "test error, %"
    evaluate_every = 1

    def __init__(
        self,
        build: Callable[[], nn.Module],
        recipe: Recipe,
        data: Cifar10,
        *,
        device: torch.device,
        batch: int = 128,
        subset: int | None = None,
        validation: bool = False,
    ) -> None:
        self._build, self.recipe = build, recipe
        train, train_labels, test, test_labels = data
        # Files come in the order of their classes; the same shuffle for every run.
        order = torch.randperm(len(train), generator=Generator().manual_seed(0))[:subset]
        test_order = torch.randperm(len(test), generator=Generator().manual_seed(0))[:subset]
        train, train_labels = train[order], train_labels[order]
        test, test_labels = test[test_order], test_labels[test_order]
        if validation:
            cut = len(train) // _VALIDATION
            test, test_labels = train[:cut], train_labels[:cut]
            train, train_labels = train[cut:], train_labels[cut:]
        if not 0 < batch <= len(train):
            raise ValueError(f"batch: expected 1 to {len(train)} images, got {batch}")
        self._images = functional.pad(train, (_PADDING,) * 4).to(device)
        self._labels = train_labels.to(device)
        self._test_images, self._test_labels = test.to(device), test_labels.to(device)
        self._mean = torch.tensor(_MEAN, device=device)[:, None, None] * 255
        self._std = torch.tensor(_STD, device=device)[:, None, None] * 255
        self._order = torch.empty(0, dtype=torch.int64, device=device)
        self._device, self._batch, self._next = device, batch, 0
        # The last, smaller batch is trained on too, as torch's loaders do: 391 steps of 128.
        self.steps_per_epoch = -(-len(train) // batch)

    def model(self) -> nn.Module:
        """On the device; channels last on a GPU, whose convolutions want it."""
        memory = torch.channels_last if self._device.type == "cuda" else torch.contiguous_format
        return self._build().to(self._device, memory_format=memory)

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
    def quality(self, model: nn.Module) -> float:
        """Test error in percent."""
        wrong = torch.zeros((), dtype=torch.int64, device=self._device)
        for start in range(0, len(self._test_labels), _EVALUATED):
            images = self._normalised(self._test_images[start : start + _EVALUATED])
            labels = self._test_labels[start : start + _EVALUATED]
            wrong += (model(images).argmax(dim=1) != labels).sum()
        return 100 * int(wrong) / len(self._test_labels)

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


# Batch 128, momentum 0.9, weight decay 5e-4 and 200 epochs: the setting that both papers take from
# Lookahead (ResNets, where 0.05 is the better of the rates of 2021, Table 2) and from Wide ResNets.
# k = 64 is the best of UAI 2024, Table 15.
_RESNET = Recipe("sgd", 0.05, (0.025, 0.05, 0.1, 0.2), epochs=200, window=64, weight_decay=5e-4)
_WIDE = Recipe(
    "sgd", 0.1, (0.025, 0.05, 0.1, 0.2), epochs=200, window=64, nesterov=True, weight_decay=5e-4
)
IMAGE_MODELS: dict[str, tuple[Callable[[], nn.Module], Recipe]] = {
    "resnet18": (lambda: resnet((2, 2, 2, 2)), _RESNET),
    "resnet34": (lambda: resnet((3, 4, 6, 3)), _RESNET),
    "wrn28-10": (lambda: wide_resnet(28, 10), _WIDE),
}
MODELS = ("digits-convnet", "byte-transformer", *IMAGE_MODELS)


def make_task(
    model: str,
    *,
    device: str = "cpu",
    data: str | Path | None = None,
    cache: str | Path | None = None,
    batch: int | None = None,
    subset: int | None = None,
    validation: bool = False,
) -> Task:
    """The task of one of :data:`MODELS`.

    Raises:
        ValueError: the model is unknown, CIFAR-10's folder is missing, or an option does not go
            with the model.
    """
    if model in IMAGE_MODELS:
        if data is None:
            raise ValueError(f"data: {model} needs the folder of CIFAR-10, got none")
        build, recipe = IMAGE_MODELS[model]
        return CifarModel(
            build,
            recipe,
            load_cifar10(data, cache),
            device=torch.device(device),
            batch=batch or 128,
            subset=subset,
            validation=validation,
        )
    if model not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {model!r}")
    if device != "cpu" or batch is not None or subset is not None:
        raise ValueError(
            f"device, batch, subset: {model} is a small task of fixed batches for the CPU, "
            f"got {device}, {batch}, {subset}"
        )
    small: type[DigitsConvnet] | type[ByteTransformer] = (
        DigitsConvnet if model == "digits-convnet" else ByteTransformer
    )
    return small(validation=validation)
