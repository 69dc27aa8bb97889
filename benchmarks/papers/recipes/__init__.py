"""The papers' models and data sets, one small file each."""

from __future__ import annotations

from ..recipe import PaperRecipe
from . import (
    cifar10_resnet18,
    cifar10_wrn28_10,
    cifar100_resnet34,
    cifar100_wrn40_10,
    glue_bert,
    imagenet_resnet18,
    imagenet_resnet50,
    wmt14_transformer,
)

RECIPES: dict[str, PaperRecipe] = {
    recipe.name: recipe
    for recipe in (
        cifar10_resnet18.RECIPE,
        cifar10_wrn28_10.RECIPE,
        cifar100_resnet34.RECIPE,
        cifar100_wrn40_10.RECIPE,
        imagenet_resnet18.RECIPE,
        imagenet_resnet50.RECIPE,
        wmt14_transformer.RECIPE,
        *glue_bert.RECIPES,
    )
}
