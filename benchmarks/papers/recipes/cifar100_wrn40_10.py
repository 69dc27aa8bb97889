"""WRN-40-10 on CIFAR-100."""

from __future__ import annotations

from dataclasses import replace

from ..models import wide_resnet
from . import cifar10_wrn28_10

RECIPE = replace(
    cifar10_wrn28_10.RECIPE,
    name="cifar100-wrn40-10",
    title="WRN-40-10, CIFAR-100",
    data="cifar100",
    classes=100,
    build=lambda classes: wide_resnet(40, 10, classes),
    paper="2021: Table 1, Figures 7, 11; UAI 2024: Tables 1, 2, 3, 13, 14, 15, Figure 9",
    sources="Zagoruyko and Komodakis 2016, as WRN-28-10 on CIFAR-10. The 2021 authors' program "
    "trains WRNs without Nesterov; the recipe follows the papers.",
)
