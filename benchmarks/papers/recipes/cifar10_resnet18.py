"""ResNet-18 on CIFAR-10."""

from __future__ import annotations

from training.recipe import Recipe

from ..models import resnet
from ..recipe import PaperRecipe
from .searched import IMAGE_SEARCH

RECIPE = PaperRecipe(
    name="cifar10-resnet18",
    title="ResNet-18, CIFAR-10",
    kind="cifar",
    data="cifar10",
    classes=10,
    build=lambda classes: resnet((2, 2, 2, 2), classes),
    recipe=Recipe(
        "sgd",
        lr=0.05,
        rates=(0.025, 0.05, 0.1, 0.2),
        epochs=200,
        window=64,
        weight_decay=5e-4,
        batch=128,
        settings={"step": {"milestones": (0.3, 0.6, 0.8), "factor": 0.2}},
        search=IMAGE_SEARCH,
    ),
    seeds=(0, 1, 2, 3),
    paper="2021: Tables 1 and 2, Figures 2, 7, 8; UAI 2024: Tables 1, 2, 6, 7, 8, 15, 16, "
    "Figures 3, 6",
    sources="Both papers take the setting from Lookahead (Zhang et al. 2019): heavy-ball momentum "
    "0.9, 200 epochs of batches of 128, rate times 0.2 after 60, 120 and 160 epochs. Rate 0.05 is "
    "the one of 2021, Table 2, whose numbers are those of its Table 1. Neither paper prints the "
    "weight decay; 5e-4 is the one of the 2021 authors' program for this model, as is the rate "
    "(resnet_cifar.sh: wd=0.0005, lr=0.05). That program trains CIFAR's ResNets with Nesterov "
    "momentum; the recipe follows the papers.",
)
