"""Refuses a torch that is too old, before anything fails in words that do not say so."""

from __future__ import annotations

import torch

OLDEST_TORCH = (2, 6)


def check_torch(version: str) -> None:
    """Raises ImportError unless a version such as "2.13.0+cpu" will do."""
    oldest = ".".join(map(str, OLDEST_TORCH))
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
        raise ImportError(
            f"autodrop_ext needs torch {oldest} or newer, got torch {version}: "
            f"pip install --upgrade 'torch>={oldest}'"
        )


check_torch(torch.__version__)
