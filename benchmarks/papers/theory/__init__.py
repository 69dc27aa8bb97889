"""The papers' theory as code: models, limits, bounds; docs/theory.md has the map."""

from autodrop_ext.velocity_model import (
    RateSequence,
    VelocityModel,
    learning_rate,
)

from .algorithm_2 import (
    Phase,
    algorithm_2,
    drop_count_bounds,
    gap_bounds,
    iteration_count_bounds,
    kappa_1,
    kappa_2,
)
from .bounds import Problem, bound_after_drops, bound_after_iterations, schedule_bound
from .momentum import UnifiedMomentum
from .quadratic import AutomaticDrop, Limits, NoisyQuadratic, Trajectory

__all__ = [
    "AutomaticDrop",
    "Limits",
    "NoisyQuadratic",
    "Phase",
    "Problem",
    "RateSequence",
    "Trajectory",
    "UnifiedMomentum",
    "VelocityModel",
    "algorithm_2",
    "bound_after_drops",
    "bound_after_iterations",
    "drop_count_bounds",
    "gap_bounds",
    "iteration_count_bounds",
    "kappa_1",
    "kappa_2",
    "learning_rate",
    "schedule_bound",
]
