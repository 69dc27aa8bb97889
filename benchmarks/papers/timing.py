"""Time of one training step under several schedules, which take turns (UAI 2024, Table 3)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from training.schedules import SCHEDULES, Setup

from .recipes import RECIPES

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
    from round to round. A step is the loss, its gradient, the optimizer and the schedule, as in
    training: channels last and cuDNN's choice of kernels on a GPU. What happens less often than
    once a round, AutoDrop's closing of a window and TLR's change of the rate, is made to happen
    once in each: their window and gap are ``steps`` where the paper's are longer. So the times of
    these two are bounds from above.

    Args:
        model: of :data:`papers.recipes.RECIPES`, an image model.
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
    kind = torch.device(device).type
    memory = torch.channels_last if kind == "cuda" else torch.contiguous_format
    random = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, side, side, generator=random).to(device, memory_format=memory)
    labels = torch.randint(paper.classes or 1, (batch,), generator=random).to(device)
    drivers: dict[str, Any] = {}
    models: dict[str, torch.nn.Module] = {}
    for name in schedules:
        torch.manual_seed(0)
        models[name] = paper.build(paper.classes).to(device, memory_format=memory)
        schedule = SCHEDULES[name]
        setup = Setup(
            models[name],
            paper.recipe,
            paper.recipe.lr,
            paper.recipe.epochs,
            _EXAMPLES[paper.kind] // batch,
            schedule.settings_with(paper.recipe.settings.get(name, {})),
        )
        setup.settings.update(_once_a_round(setup, name, steps))
        drivers[name] = schedule.driver(setup)
    seconds: dict[str, list[float]] = {name: [] for name in schedules}
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = kind == "cuda"
    try:
        for turn in range(rounds + 1):
            for name in order(schedules, turn):
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
    finally:
        torch.backends.cudnn.benchmark = benchmark
        for driver in drivers.values():
            driver.close()
    return seconds


def order(schedules: Sequence[str], turn: int) -> list[str]:
    """The order of a round: the schedules turned by one from round to round."""
    first = turn % len(schedules)
    return [*schedules[first:], *schedules[:first]]


def _once_a_round(setup: Setup, name: str, steps: int) -> dict[str, Any]:
    """Settings with which a schedule does all that it does within so many steps."""
    settings = setup.settings
    if name == "autodrop":
        return {"window": min(setup.window, steps)}
    if name == "tlr":
        part = steps / setup.steps_per_epoch
        return {
            "gap_epochs": min(settings["gap_epochs"], part),
            "least_gap": min(settings["least_gap"], steps),
        }
    return {}


def describe(seconds: Sequence[float]) -> str:
    """Mean, lowest and highest round: ``0.201 (0.199 to 0.204)``."""
    return f"{statistics.fmean(seconds):.3g} ({min(seconds):.3g} to {max(seconds):.3g})"


def _wait(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()
