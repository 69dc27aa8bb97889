"""ResNet-34 on CIFAR-100."""

from __future__ import annotations

from dataclasses import replace

from ..models import resnet
from . import cifar10_resnet18

RECIPE = replace(
    cifar10_resnet18.RECIPE,
    name="cifar100-resnet34",
    title="ResNet-34, CIFAR-100",
    data="cifar100",
    classes=100,
    build=lambda classes: resnet((3, 4, 6, 3), classes),
    paper="2021: Table 1, Figures 7, 10; UAI 2024: Tables 1, 2, 11, 12, 15, Figure 8",
    sources="As ResNet-18 on CIFAR-10, from Lookahead (Zhang et al. 2019), heavy-ball momentum. "
    "Neither paper prints the initial rate of this model or its weight decay: 0.05 and 5e-4 "
    "are those of the 2021 authors' program for ResNets on CIFAR (resnet_cifar.sh: wd=0.0005, "
    "lr=0.05). That program trains them with Nesterov momentum; the recipe follows the papers.",
)
