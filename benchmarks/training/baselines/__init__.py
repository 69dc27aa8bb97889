"""Automatic learning rates that the papers compare with and that no package offers."""

from .hypergradient import HypergradientAdamW, HypergradientSGD
from .trainable import TrainableLearningRate

__all__ = ["HypergradientAdamW", "HypergradientSGD", "TrainableLearningRate"]
