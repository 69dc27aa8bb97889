"""What all schedules of one model and data share, and where the papers have it from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True)
class Recipe:
    """Optimizer, length and grids of a task.

    Attributes:
        optimizer: "sgd", "adam" or "adamw".
        lr: initial rate where none is chosen.
        rates: grid of initial rates that settings are chosen from.
        epochs: of a run.
        window: AutoDrop's ``k``; None: the rule of
            :func:`~autodrop_ext.schedulers.auto_window.window_for`, which has no floor, where
            ``window="auto"`` of the package never goes below 16.
        momentum, nesterov: of SGD.
        weight_decay: as the optimizer takes it.
        betas, eps: of Adam and AdamW.
        batch: examples a step, or tokens of each language of a translation task; None: the
            task's own.
        settings: of schedules, by the schedule's name, where they differ from its usual ones.
        search: values of settings that are tried before a schedule's runs count, by the schedule's
            name; they come on top of what the schedule itself searches.
        warmup_steps: of those schedules in ``warmed``; the rate rises linearly from nearly zero.
        warmup_share: of the run, instead of a number of steps.
        warmed: names of schedules.
    """

    optimizer: Literal["sgd", "adam", "adamw"]
    lr: float
    rates: tuple[float, ...]
    epochs: int
    window: int | None = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    batch: int | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    search: Mapping[str, Mapping[str, tuple[Any, ...]]] = field(default_factory=dict)
    warmup_steps: int = 0
    warmup_share: float = 0.0
    warmed: tuple[str, ...] = ()


@dataclass(frozen=True)
class PaperRecipe:
    """One model and data set of the papers, as one file of ``training/recipes`` holds it.

    Attributes:
        name: of the model for all commands.
        title: for people.
        kind: which task trains it: "cifar", "imagenet", "translation" or "glue".
        data: the data set's name; a key of ``training.sources.SOURCES``.
        recipe: what all schedules share.
        seeds: of the paper's runs.
        paper: which paper and which tables and figures it belongs to.
        sources: where each setting comes from, and what neither paper prints.
        classes: of the data set; None where the data are not sorted into classes.
        build: makes the model for a number of classes; None where the task makes it.
    """

    name: str
    title: str
    kind: Literal["cifar", "imagenet", "translation", "glue"]
    data: str
    recipe: Recipe
    seeds: tuple[int, ...]
    paper: str
    sources: str
    classes: int | None = None
    build: Callable[[int], nn.Module] | None = None
