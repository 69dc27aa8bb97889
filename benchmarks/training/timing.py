"""Time of one training step under several schedules, which take turns (UAI 2024, Table 3)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from .recipes import RECIPES
from .schedules import SCHEDULES, Setup

MODELS = ("cifar10-wrn28-10", "cifar100-wrn40-10", "imagenet-resnet50")
SCHEDULES_TIMED = ("hd", "tlr", "step", "autodrop")
PRINTED = {
    "cifar10-wrn28-10": ("0.21", "0.23", "0.20", "0.20"),
    "cifar100-wrn40-10": ("0.31", "0.31", "0.29", "0.30"),
    "imagenet-resnet50": ("0.42", "0.43", "0.38", "0.40"),
}
BATCH = 64  # UAI 2024, section 6.1
_EXAMPLES = {"cifar": 50_000, "imagenet": 1_281_167}
_SIDES = {"cifar": 32, "imagenet": 224}


def time_steps(
    model: str,
    schedules: Sequence[str],
    *,
    device: str,
    bf16: bool,
    rounds: int,
    steps: int,
    batch: int = BATCH,
    side: int | None = None,
) -> dict[str, list[float]]:
    """Seconds of a step, for each schedule and round.

    Every schedule has a model, an optimizer and the same random images of its own. In each round
    all of them take ``steps`` steps, one schedule after the other, in an order that turns by one
    from round to round. A step is the loss, its gradient, the optimizer and the schedule. What
    happens less often than once a step, such as AutoDrop's closing of a window or TLR's change of
    the rate, is in those rounds in which it happens, so that the mean over rounds is what counts.

    Args:
        model: of :data:`training.recipes.RECIPES`, an image model.
        schedules: keys of ``training.schedules.SCHEDULES``.
        device, bf16: where, and whether under bf16 autocast.
        rounds, steps: how many, after one round that is not counted.
        batch: images a step.
        side: of the images, pixels; None: the data set's.

    Raises:
        ValueError: the model is none of the image models.
    """
    paper = RECIPES[model]
    if paper.build is None or paper.classes is None:
        raise ValueError(f"model: expected an image model, got {model!r}")
    side = side or _SIDES[paper.kind]
    random = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, side, side, generator=random).to(device)
    labels = torch.randint(paper.classes or 1, (batch,), generator=random).to(device)
    drivers: dict[str, Any] = {}
    models: dict[str, torch.nn.Module] = {}
    for name in schedules:
        torch.manual_seed(0)
        models[name] = paper.build(paper.classes).to(device)
        schedule = SCHEDULES[name]
        drivers[name] = schedule.driver(
            Setup(
                models[name],
                paper.recipe,
                paper.recipe.lr,
                paper.recipe.epochs,
                _EXAMPLES[paper.kind] // batch,
                schedule.settings_with(paper.recipe.settings.get(name, {})),
            )
        )
    seconds: dict[str, list[float]] = {name: [] for name in schedules}
    kind = torch.device(device).type
    for turn in range(rounds + 1):
        for i in range(len(schedules)):
            name = schedules[(turn + i) % len(schedules)]
            net, driver = models[name], drivers[name]
            _wait(kind)
            start = time.perf_counter()
            for _ in range(steps):
                with torch.autocast(kind, torch.bfloat16, enabled=bf16):
                    loss = functional.cross_entropy(net(images), labels)
                driver.optimizer.zero_grad()
                loss.backward()
                driver.step()
            _wait(kind)
            if turn:
                seconds[name].append((time.perf_counter() - start) / steps)
    for driver in drivers.values():
        driver.close()
    return seconds


def describe(seconds: Sequence[float]) -> str:
    """Mean, lowest and highest round: ``0.201 (0.199 to 0.204)``."""
    return f"{statistics.fmean(seconds):.3g} ({min(seconds):.3g} to {max(seconds):.3g})"


def _wait(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()
