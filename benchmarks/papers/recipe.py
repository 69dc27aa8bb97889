"""A model and data set of the papers: its settings, and where they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from training.recipe import Recipe


@dataclass(frozen=True)
class PaperRecipe:
    """One model and data set of the papers, as one file of ``papers/recipes`` holds it.

    Attributes:
        name: of the model for all commands.
        title: for people.
        kind: which task trains it: "cifar", "imagenet", "translation" or "glue".
        data: the data set's name; a key of ``papers.sources.SOURCES``.
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
