"""Schedulers: they decide from readings and change learning rates."""

from .autodrop import AutoDrop

__all__ = ["AutoDrop"]
