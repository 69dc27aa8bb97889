"""The papers' image models: ResNets for CIFAR and ImageNet, wide ResNets for CIFAR.

ResNets for CIFAR as in He et al. 2016 with the stem that 32 x 32 pixels need: one 3 x 3 convolution
of stride 1 and no pooling. Those for ImageNet are the models of torchvision, which both papers
take: a 7 x 7 stem, pooling, and in ResNet-50 bottlenecks that stride in their 3 x 3 convolution.
Wide ResNets as in Zagoruyko and Komodakis 2016, pre-activation, without dropout, as both AutoDrop
papers train them.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions, each with its norm, next to a shortcut: ``[n, inputs, h, w]``."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3(inputs, outputs, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3(outputs, outputs, 1)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``[n, outputs, h / stride, w / stride]``."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions next to a shortcut: ``[n, inputs, h, w]``."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3(width, width, stride)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 4 width, h / stride, w / stride]``."""
        y = functional.relu(self.norm1(self.conv1(x)))
        y = functional.relu(self.norm2(self.conv2(y)))
        return functional.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class WideBlock(nn.Module):
    """Norm and ReLU before each of two 3 x 3 convolutions: ``[n, inputs, h, w]``."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv3(inputs, outputs, stride)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3(outputs, outputs, 1)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, outputs, h / stride, w / stride]``."""
        active = functional.relu(self.norm1(x))
        y = self.conv2(functional.relu(self.norm2(self.conv1(active))))
        # The projection sees the activated input, the identity the raw one.
        return y + (x if self.shortcut is None else self.shortcut(active))


def resnet(blocks: tuple[int, int, int, int], classes: int = 10) -> nn.Module:
    """Images ``[n, 3, 32, 32]`` to logits ``[n, classes]``; widths 64, 128, 256, 512."""
    layers: list[nn.Module] = [_conv3(3, 64, 1), nn.BatchNorm2d(64), nn.ReLU()]
    inputs = 64
    for stage, count in enumerate(blocks):
        outputs = 64 << stage
        for block in range(count):
            layers.append(BasicBlock(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return _initialised(nn.Sequential(*layers))


def imagenet_resnet18(classes: int = 1000) -> nn.Module:
    """Images ``[n, 3, 224, 224]`` to logits ``[n, classes]``; 11.7 million parameters."""
    return _imagenet_resnet(BasicBlock, 1, (2, 2, 2, 2), classes)


def imagenet_resnet50(classes: int = 1000) -> nn.Module:
    """Images ``[n, 3, 224, 224]`` to logits ``[n, classes]``; 25.6 million parameters."""
    return _imagenet_resnet(Bottleneck, 4, (3, 4, 6, 3), classes)


def _imagenet_resnet(
    block: type[BasicBlock] | type[Bottleneck],
    expansion: int,
    blocks: tuple[int, int, int, int],
    classes: int,
) -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
    ]
    inputs = 64
    for stage, count in enumerate(blocks):
        for index in range(count):
            layers.append(block(inputs, 64 << stage, 2 if stage and not index else 1))
            inputs = (64 << stage) * expansion
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return _initialised(nn.Sequential(*layers))


def wide_resnet(depth: int, width: int, classes: int = 10) -> nn.Module:
    """Images ``[n, 3, 32, 32]`` to logits ``[n, classes]``; widths ``16, 32, 64`` times ``width``.

    Raises:
        ValueError: ``depth`` is not 6 n + 4.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth: expected 6 n + 4 layers, at least 10, got {depth}")
    layers: list[nn.Module] = [_conv3(3, 16, 1)]
    inputs = 16
    for stage in range(3):
        outputs = (16 << stage) * width
        for block in range((depth - 4) // 6):
            layers.append(WideBlock(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    layers += [nn.BatchNorm2d(inputs), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return _initialised(nn.Sequential(*layers))


def _conv3(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def _initialised(model: nn.Module) -> nn.Module:
    """He's initialisation, fan out, as both papers' reference models use."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
