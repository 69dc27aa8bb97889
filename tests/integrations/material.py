"""What the integrations train on: the source text of Python's standard library, and digits."""

from __future__ import annotations

import functools
import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autodrop_ext import AutoDrop

# Windows end at steps that no other number here divides, and a rate can fall every 20 steps.
SETTINGS: dict[str, Any] = {"window": 5, "factor": 0.9, "buffer_size": 3, "min_samples": 3}


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed")


@functools.cache
def text() -> Tensor:
    """The first 200,000 bytes of some modules of the standard library, as integers [200000]."""
    library = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse.py", "ast.py", "inspect.py", "subprocess.py", "typing.py", "tarfile.py")
    source = b"".join((library / name).read_bytes() for name in names)[:200_000]
    return torch.frombuffer(bytearray(source), dtype=torch.uint8).long()


def passages(count: int, length: int, seed: int = 0) -> Tensor:
    """Bytes [count, length] from random places of :func:`text`."""
    random = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text()) - length, (count,), generator=random)
    return text()[starts[:, None] + torch.arange(length)]


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 64] in [0, 1] and labels [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def digit_batches(count: int, size: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    images, labels = digits()
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(labels), (count, size), generator=random)
    return [(images[rows], labels[rows]) for rows in chosen]


def digit_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def angles(scheduler: AutoDrop) -> list[float | None]:
    return [decision.angle for decision in scheduler.history]


def assert_same_decisions(ours: AutoDrop, by_hand: AutoDrop) -> None:
    """Bit for bit: the same parameters after the same steps, and so the same decisions."""
    assert ours.num_drops >= 1
    assert len(ours.history) >= 35  # of 210 steps in windows of 5, some of them warm-up
    assert ours.history == by_hand.history


def assert_same_parameters(ours: nn.Module, other: nn.Module) -> None:
    pairs = list(zip(ours.parameters(), other.parameters(), strict=True))
    assert pairs
    for a, b in pairs:
        assert torch.equal(a, b)
