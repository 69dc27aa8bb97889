"""ResNet-50 on ImageNet."""

from __future__ import annotations

from dataclasses import replace

from ..models import imagenet_resnet50
from . import imagenet_resnet18

RECIPE = replace(
    imagenet_resnet18.RECIPE,
    name="imagenet-resnet50",
    title="ResNet-50, ImageNet",
    build=imagenet_resnet50,
    paper="UAI 2024: Tables 2 and 3, Figure 11",
    sources="As ResNet-18 on ImageNet.",
)
