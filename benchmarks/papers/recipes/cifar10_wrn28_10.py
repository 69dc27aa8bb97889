"""WRN-28-10 on CIFAR-10."""

from __future__ import annotations

from dataclasses import replace

from ..models import wide_resnet
from . import cifar10_resnet18

RECIPE = replace(
    cifar10_resnet18.RECIPE,
    name="cifar10-wrn28-10",
    title="WRN-28-10, CIFAR-10",
    build=lambda classes: wide_resnet(28, 10, classes),
    recipe=replace(cifar10_resnet18.RECIPE.recipe, lr=0.1, nesterov=True),
    paper="2021: Table 1, Figures 6, 7, 9; UAI 2024: Tables 1, 2, 3, 9, 10, 15, Figure 7",
    sources="Zagoruyko and Komodakis 2016: Nesterov momentum 0.9, weight decay 5e-4, rate 0.1 "
    "times 0.2 after 60, 120 and 160 of 200 epochs, batches of 128; without dropout, as both "
    "papers say. The 2021 authors' program trains WRNs without Nesterov; the recipe follows the "
    "papers.",
)
