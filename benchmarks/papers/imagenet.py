"""ImageNet from folders of images: the usual crops, decoded in worker processes, several GPUs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from training.ranks import Ranks
from training.task import VALIDATION, Scores

from .recipe import PaperRecipe

SIDE = 224
_SHORTER = 256  # side to which test images are scaled before their centre is cut out
_AREA = (0.08, 1.0)  # of a training image that a crop may cover, Szegedy et al. 2015
_RATIO = (3 / 4, 4 / 3)  # of its width and height
_TRIES = 10
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_ENDINGS = (".jpeg", ".jpg", ".png")

Item = tuple[int, int]  # seed of the crop and index of the image


class Folder(Dataset[tuple[Tensor, int]]):
    """Images below one folder for each class, decoded and cropped when they are read.

    Args:
        root: holds ``CLASS/*.JPEG``; the classes are numbered in alphabetical order.
        classes: how many there must be.
        train: cut a random part out and mirror at random; otherwise cut out the centre.

    Raises:
        FileNotFoundError: the folder is not there or holds no images.
        ValueError: there is another number of classes.
    """

    def __init__(self, root: Path, classes: int, *, train: bool) -> None:
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: expected a folder of CLASS/*.JPEG, found none")
        places = sorted(p for p in root.iterdir() if p.is_dir())
        self.files = [
            (str(path), label)
            for label, place in enumerate(places)
            for path in sorted(place.iterdir())
            if path.suffix.lower() in _ENDINGS
        ]
        if not self.files:
            raise FileNotFoundError(f"{root}: expected CLASS/*.JPEG, found no image")
        if len(places) != classes:
            raise ValueError(
                f"{root}: expected {classes} folders, one for each class, got {len(places)}"
            )
        self.train = train

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: Item) -> tuple[Tensor, int]:
        """uint8 ``[3, 224, 224]`` and the label."""
        from PIL import Image

        seed, index = item
        path, label = self.files[index]
        with Image.open(path) as image:
            pixels = image.convert("RGB")
        if self.train:
            # By image and epoch: the same crops with any number of workers and ranks.
            random = np.random.default_rng((seed, index))
            pixels = pixels.resize(
                (SIDE, SIDE), Image.Resampling.BILINEAR, box=_random_box(pixels.size, random)
            )
            if random.random() < 0.5:
                pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        else:
            scale = _SHORTER / min(pixels.size)
            width, height = (max(SIDE, round(side * scale)) for side in pixels.size)
            pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
            left, top = (width - SIDE) // 2, (height - SIDE) // 2
            pixels = pixels.crop((left, top, left + SIDE, top + SIDE))
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1), label


def _random_box(size: tuple[int, int], random: Any) -> tuple[float, float, float, float]:
    """Left, upper, right and lower edge of a crop, in pixels."""
    width, height = size
    for _ in range(_TRIES):
        area = width * height * random.uniform(*_AREA)
        ratio = math.exp(random.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.integers(0, width - w + 1), random.integers(0, height - h + 1)
            return float(left), float(top), float(left + w), float(top + h)
    # A very long image: its centre, as near to the whole as the ratios allow.
    w = min(width, round(height * _RATIO[1]))
    h = min(height, round(width / _RATIO[0]))
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


class ImageNetModel:
    """An image model on folders ``train`` and ``val`` of images.

    With several ranks each one reads its part of every batch, and ``batch`` is that of all ranks
    together.

    Args:
        paper: the model's recipe.
        data: folder that holds ``train/CLASS`` and ``val/CLASS``.
        device: where the model trains.
        batch: images a step, of all ranks together.
        subset: images to train on, and at most as many to test on; None: all.
        workers: processes of each rank that decode images; 0: this one does.
        validation: test on a fifth of the training images, and train on the others.

    Raises:
        FileNotFoundError, ValueError: see :class:`Folder`; or the ranks cannot share a batch.
    """

    measure = "test error, %"
    evaluate_every = 1

    def __init__(
        self,
        paper: PaperRecipe,
        data: str | Path,
        *,
        device: torch.device,
        batch: int | None = None,
        subset: int | None = None,
        workers: int = 0,
        validation: bool = False,
    ) -> None:
        if paper.build is None or paper.classes is None or batch is None:
            raise ValueError(f"{paper.name}: expected a recipe with a model, classes and a batch")
        self._build, self.recipe, self._classes = paper.build, paper.recipe, paper.classes
        self._device, self._workers, self._ranks = device, workers, Ranks()
        if batch % self._ranks.size:
            raise ValueError(f"batch: expected a multiple of {self._ranks.size} ranks, got {batch}")
        root = Path(data)
        train = Folder(root / "train", self._classes, train=True)
        order = torch.randperm(len(train), generator=Generator().manual_seed(0))[:subset]
        if validation:
            cut = len(order) // VALIDATION
            test = Folder(root / "train", self._classes, train=False)
            self._test_items, order = order[:cut], order[cut:]
        else:
            test = Folder(root / "val", self._classes, train=False)
            self._test_items = torch.randperm(len(test), generator=Generator().manual_seed(0))
            self._test_items = self._test_items[:subset]
        if not 0 < batch <= len(order):
            raise ValueError(f"batch: expected 1 to {len(order)} images, got {batch}")
        self._train, self._test, self._items, self._batch = train, test, order, batch
        # A last, smaller batch is left out, as PyTorch's reference training with ranks needs it:
        # all of them must have the same number of steps.
        self.steps_per_epoch = len(order) // batch
        self._batches: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._loaders: dict[Folder, tuple[DataLoader[Any], list[list[Item]]]] = {}
        self._mean = torch.tensor(_MEAN, device=device)[:, None, None] * 255
        self._std = torch.tensor(_STD, device=device)[:, None, None] * 255

    def model(self) -> nn.Module:
        """On the device; channels last on a GPU, whose convolutions want it."""
        memory = torch.channels_last if self._device.type == "cuda" else torch.contiguous_format
        return self._build(self._classes).to(self._device, memory_format=memory)

    def start_epoch(self, random: Generator) -> None:
        """Shuffle all images; every rank draws the same order and takes its share of each batch."""
        order, seed = self._drawn(random)
        share = self._batch // self._ranks.size
        first = self._ranks.rank * share
        batches = [
            [(seed, int(i)) for i in order[start + first : start + first + share]]
            for start in range(0, self.steps_per_epoch * self._batch, self._batch)
        ]
        self._batches = self._read(self._train, batches)

    def loss(self, model: nn.Module, random: Generator) -> Tensor:
        """Cross entropy of the next batch, of this rank's share."""
        images, labels = next(self._batches)
        labels = labels.to(self._device, non_blocking=True)
        return functional.cross_entropy(model(self._normalised(images)), labels)

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Scores:
        """Test error (top 1) in percent and test loss, each rank on its share of the images."""
        share = self._test_items[self._ranks.rank :: self._ranks.size]
        size = max(1, self._batch // self._ranks.size)
        batches = [[(0, int(i)) for i in part] for part in share.split(size) if len(part)]
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)  # wrong, loss, images
        for images, labels in self._read(self._test, batches):
            on_device = labels.to(self._device)
            logits = model(self._normalised(images)).float()
            sums[0] += (logits.argmax(dim=1) != on_device).sum()
            sums[1] += functional.cross_entropy(logits, on_device, reduction="sum")
            sums[2] += len(labels)
        wrong, loss, n = self._ranks.sum(sums).tolist()
        return Scores(100 * wrong / n, loss / n)

    def inputs(self, random: Generator) -> Iterator[Tensor]:
        """Up to 50 batches, to measure the statistics of batch norm with."""
        order, seed = self._drawn(random)
        parts = order.split(self._batch // self._ranks.size)[:50]
        batches = [[(seed, int(i)) for i in part] for part in parts]
        for images, _ in self._read(self._train, batches):
            yield self._normalised(images)

    def _drawn(self, random: Generator) -> tuple[Tensor, int]:
        """All training images in a new order, and a seed for their crops."""
        device = random.device
        order = torch.randperm(len(self._items), generator=random, device=device).cpu()
        seed = int(torch.randint(2**31, (), generator=random, device=device))
        return self._items[order], seed

    def _read(self, data: Folder, batches: list[list[Item]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of batches. The workers are started once, and kept from then on."""
        if data not in self._loaders:
            drawn: list[list[Item]] = []
            loader = DataLoader(
                data,
                batch_sampler=drawn,  # type: ignore[arg-type]  # items are pairs, not indices
                num_workers=self._workers,
                pin_memory=self._device.type == "cuda",
                # Forked workers would share locks with CUDA's and the optimizer's threads.
                multiprocessing_context="spawn" if self._workers else None,
                persistent_workers=self._workers > 0,
            )
            self._loaders[data] = loader, drawn
        loader, drawn = self._loaders[data]
        drawn[:] = batches
        return iter(loader)

    def _normalised(self, images: Tensor) -> Tensor:
        x = images.to(self._device, non_blocking=True).float().sub_(self._mean).div_(self._std)
        return x.to(memory_format=torch.channels_last) if x.is_cuda else x
