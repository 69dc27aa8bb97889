"""ResNet-50 on ImageNet."""

from __future__ import annotations

from training.recipe import Recipe

from ..models import imagenet_resnet50
from ..recipe import PaperRecipe
from .imagenet_resnet18 import MILESTONES
from .searched import IMAGE_SEARCH

RECIPE = PaperRecipe(
    name="imagenet-resnet50",
    title="ResNet-50, ImageNet",
    kind="imagenet",
    data="imagenet",
    classes=1000,
    build=imagenet_resnet50,
    recipe=Recipe(
        "sgd",
        lr=0.1,
        rates=(0.05, 0.1, 0.2),
        epochs=100,
        window=640,
        weight_decay=1e-4,
        batch=256,
        settings={
            "step": {"milestones": MILESTONES, "factor": 0.1},
            "epoch-autodrop": {"factor": 0.1, "delay": 20},
        },
        search=IMAGE_SEARCH,
    ),
    seeds=(0,),
    paper="UAI 2024: Tables 2 and 3, Figure 11",
    sources="As ResNet-18 on ImageNet.",
)
