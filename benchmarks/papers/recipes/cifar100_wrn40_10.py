"""WRN-40-10 on CIFAR-100."""

from __future__ import annotations

from training.recipe import Recipe

from ..models import wide_resnet
from ..recipe import PaperRecipe
from .searched import IMAGE_SEARCH

RECIPE = PaperRecipe(
    name="cifar100-wrn40-10",
    title="WRN-40-10, CIFAR-100",
    kind="cifar",
    data="cifar100",
    classes=100,
    build=lambda classes: wide_resnet(40, 10, classes),
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
    paper="2021: Table 1, Figures 7, 11; UAI 2024: Tables 1, 2, 3, 13, 14, 15, Figure 9",
    sources="Zagoruyko and Komodakis 2016, as WRN-28-10 on CIFAR-10. The 2021 authors' program "
    "trains WRNs without Nesterov; the recipe follows the papers.",
)
