"""Parameter lists of real models, by shape only: nothing is downloaded."""

from __future__ import annotations

import torch
from torch import Tensor


def resnet50() -> list[tuple[int, ...]]:
    """ResNet-50 for ImageNet: 161 tensors, 25.6 million parameters."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            out = 4 * width
            for shape in ((width, channels, 1, 1), (width, width, 3, 3), (out, width, 1, 1)):
                shapes += [shape, (shape[0],), (shape[0],)]
            if block == 0:
                shapes += [(out, channels, 1, 1), (out,), (out,)]
            channels = out
    return [*shapes, (1000, 2048), (1000,)]


def transformer(
    width: int = 512, layers: int = 14, vocabulary: int = 32_000
) -> list[tuple[int, ...]]:
    """A decoder-only transformer; by default 172 tensors, 60.8 million parameters."""
    shapes: list[tuple[int, ...]] = [(vocabulary, width), (512, width)]
    for _ in range(layers):
        shapes += [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
        shapes += [
            (width,),
            (width,),
            (4 * width, width),
            (4 * width,),
            (width, 4 * width),
            (width,),
        ]
    return [*shapes, (width,), (width,)]


def tiny() -> list[tuple[int, ...]]:
    """2,000 tensors of 64 elements."""
    return [(64,)] * 2000


SHAPES = {"resnet50": resnet50, "transformer60m": transformer, "tiny2000": tiny}


def tensors(name: str, dtype: torch.dtype) -> list[Tensor]:
    """Random parameters of a model in a dtype, the same for every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES[name]()]
