"""The tasks on which schedules are compared at many lengths: rates, lengths and seeds."""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

# Run as a file, these folders are not on the path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from demo.digits import Digits
from demo.text import Bytes

from training.cifar import load_cifar

AUTO = "anytime, auto"
OPEN = (
    "anytime",
    AUTO,
    "constant+average",
    "sqrt100+average",
    "sqrt300+average",
    "schedule-free",
)
"""Schedules that need no length."""
WARM_UP = ", warm-up"
WARMED = tuple(name + WARM_UP for name in OPEN if name != AUTO)
"""Those with a plain linear warm-up, of as many steps for all."""
NAMES = {
    "anytime": "AnytimeAutoDrop",
    "anytime, last": "AnytimeAutoDrop, last parameters",
    "anytime, auto": 'AnytimeAutoDrop, warmup_steps="auto"',
    "constant+average": "constant, averaged",
    "sqrt100+average": "sqrt(100 / (t + 100)), averaged",
    "sqrt300+average": "sqrt(300 / (t + 300)), averaged",
    "schedule-free": "schedule-free",
    "cosine": "cosine, set for each",
    "cosine+average": "cosine, set for each, averaged",
    "linear": "linear, set for each",
    "linear+average": "linear, set for each, averaged",
    "anytime, warm-up": "AnytimeAutoDrop, warm-up",
    "constant+average, warm-up": "constant, averaged, warm-up",
    "sqrt100+average, warm-up": "sqrt(100 / (t + 100)), averaged, warm-up",
    "sqrt300+average, warm-up": "sqrt(300 / (t + 300)), averaged, warm-up",
    "schedule-free, warm-up": "schedule-free, warm-up",
    "cosine, warm-up": "cosine, set for each, warm-up",
    "cosine+average, warm-up": "cosine, set for each, averaged, warm-up",
    "autodrop": "AutoDrop (k = 64)",
    "exponential": "exponential to 1/100, set for each",
    "exponential, 1/1000": "exponential to 1/1,000, set for each",
    "exponential, 1/10000": "exponential to 1/10,000, set for each",
    "wsd": "warmup-stable-decay, set for each",
}
"""What reports call the rows."""


class Quadratic:
    """The noisy quadratic of 200 curvatures from 0.1 to 20, gradients ``a (x - z)``, plain SGD."""

    name = "quadratic"
    measure = "loss"
    momentum = 0.0

    def __init__(self) -> None:
        self._curvature = torch.arange(1, 201, dtype=torch.float32) / 10

    def model(self) -> nn.Module:
        """The parameters, which start at 10."""
        model = nn.Module()
        model.register_parameter("x", nn.Parameter(torch.full((200,), 10.0)))
        return model

    def loss(self, model: nn.Module, random: Generator) -> Tensor:
        """Half of ``a (x - z)^2``, with standard normal ``z``."""
        noise = torch.randn(200, generator=random)
        return 0.5 * (self._curvature * (model.x - noise).square()).sum()

    @torch.no_grad()
    def quality(self, model: nn.Module) -> float:
        """The loss without noise."""
        return 0.5 * float((self._curvature * model.x.square()).sum())


class SmallCifar:
    """CIFAR-10 and a convolutional network of 30,000 parameters with batch normalisation.

    Images are moved by up to two pixels, around the edges, and mirrored half of the time. All
    50,000 are trained on in a random order, all 10,000 of the test set measure the error.
    """

    name = "cifar"
    measure = "test error %"
    batch = 32
    weight_decay = 5e-4
    statistics_every = 12  # every 12th training image, as the images may be in order of class
    piece = 100  # images at a time in an evaluation; 500 take twice as long on one core

    def __init__(self) -> None:
        data = load_cifar(os.environ["CIFAR10"], 10)
        mean, std = data.train_images.float().mean(), data.train_images.float().std()
        self._images = (data.train_images - mean) / std
        self._test_images = (data.test_images - mean) / std
        self._labels, self._test_labels = data.train_labels, data.test_labels
        self._order = torch.empty(0, dtype=torch.int64)

    def model(self) -> nn.Module:
        """Three convolutions, each with batch normalisation, and a mean over places."""
        self._order = self._order[:0]  # a new run draws its own order
        layers: list[nn.Module] = []
        for inside, outside in ((3, 16), (16, 32), (32, 64)):
            layers += [
                nn.Conv2d(inside, outside, 3, padding=1, bias=False),
                nn.BatchNorm2d(outside),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
        # 5.2 instead of 8.7 ms a step on one core.
        return nn.Sequential(*layers, *head).to(memory_format=torch.channels_last)

    def loss(self, model: nn.Module, random: Generator) -> Tensor:
        """Cross entropy of the next batch."""
        if len(self._order) < self.batch:
            self._order = torch.randperm(len(self._labels), generator=random)
        chosen, self._order = self._order[: self.batch], self._order[self.batch :]
        down, right = torch.randint(-2, 3, (2,), generator=random).tolist()
        images = self._images[chosen].roll((down, right), (2, 3))
        if torch.rand((), generator=random) < 0.5:
            images = images.flip(3)
        return nn.functional.cross_entropy(model(images), self._labels[chosen])

    @contextlib.contextmanager
    def statistics(self, model: nn.Module) -> Iterator[None]:
        """Statistics of batch normalisation that belong to the present parameters."""
        before = [buffer.clone() for buffer in model.buffers()]
        some = self._images[:: self.statistics_every].split(self.piece)
        torch.optim.swa_utils.update_bn(some, model)
        yield
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)

    @torch.no_grad()
    def quality(self, model: nn.Module) -> float:
        """Percent of the test images that are taken for something else."""
        model.eval()
        pairs = zip(
            self._test_images.split(self.piece), self._test_labels.split(self.piece), strict=True
        )
        wrong = sum(int((model(x).argmax(1) != y).sum()) for x, y in pairs)
        model.train()
        return 100 * wrong / len(self._test_labels)


@dataclass(frozen=True)
class Study:
    """What is trained, at which rates and for how long.

    Attributes:
        make: makes the task.
        good: initial rate that suits most schedules.
        lengths: optimizer steps at which runs are read.
        chance: what a run that diverged counts as in means: the quality of a guess.
        multiples: initial rates over the good one, the most important first.
        short: multiples of which only the lengths to 2,000 are run.
        seeds: number of seeds; those from the fourth on are run later.
        optimizer: "sgd" or "adamw".
        also: more schedules that are set for each length.
        onednn: whether oneDNN computes convolutions.
        logarithm: whether regret is a difference of decimal logarithms.
    """

    make: Callable[[], Any]
    good: float
    lengths: tuple[int, ...]
    chance: float
    multiples: tuple[float, ...] = (1.0, 4.0, 2.0, 0.5)
    short: tuple[float, ...] = ()
    seeds: int = 3
    optimizer: str = "sgd"
    also: tuple[str, ...] = ()
    onednn: bool = True
    logarithm: bool = False

    def lengths_at(self, multiple: float) -> tuple[int, ...]:
        """Lengths at one of the initial rates."""
        short = multiple in self.short
        return tuple(n for n in self.lengths if n <= 2_000 or not short)


STUDIES = {
    "digits": Study(
        Digits,
        0.02,
        (300, 1_000, 3_000, 10_000, 30_000),
        90.0,
        (1.0, 4.0, 8.0, 2.0, 0.5),
        seeds=6,
        onednn=False,  # for a batch of 8 images it takes 0.52 ms a step, torch's own 0.32
    ),
    "quadratic": Study(
        Quadratic,
        0.03,
        (1_000, 3_000, 10_000, 30_000),
        math.inf,
        also=("exponential, 1/1000", "exponential, 1/10000"),
        logarithm=True,
    ),
    "bytes": Study(Bytes, 0.003, (640, 1_920), 8.0, (1.0, 4.0, 8.0, 2.0, 0.5), optimizer="adamw"),
    "cifar": Study(SmallCifar, 0.05, (600, 2_000, 10_000), 90.0, short=(2.0, 0.5)),
}
