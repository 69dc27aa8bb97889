"""WRN-28-10 on CIFAR-10."""

from __future__ import annotations

from training.recipe import Recipe

from ..models import wide_resnet
from ..recipe import PaperRecipe
from .searched import IMAGE_SEARCH

RECIPE = PaperRecipe(
    name="cifar10-wrn28-10",
    title="WRN-28-10, CIFAR-10",
    kind="cifar",
    data="cifar10",
    classes=10,
    build=lambda classes: wide_resnet(28, 10, classes),
    recipe=Recipe(
        "sgd",
        lr=0.1,
        rates=(0.025, 0.05, 0.1, 0.2),
        epochs=200,
        window=64,
        nesterov=True,
        weight_decay=5e-4,
        batch=128,
        settings={"step": {"milestones": (0.3, 0.6, 0.8), "factor": 0.2}},
        search=IMAGE_SEARCH,
    ),
    seeds=(0, 1, 2, 3),
    paper="2021: Table 1, Figures 6, 7, 9; UAI 2024: Tables 1, 2, 3, 9, 10, 15, Figure 7",
    sources="Zagoruyko and Komodakis 2016: Nesterov momentum 0.9, weight decay 5e-4, rate 0.1 "
    "times 0.2 after 60, 120 and 160 of 200 epochs, batches of 128; without dropout, as both "
    "papers say. The 2021 authors' program trains WRNs without Nesterov; the recipe follows the "
    "papers.",
)
