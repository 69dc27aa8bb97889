"""The papers' theory as code: models, limits, bounds. Stands alone; docs/theory.md has the map."""

from .bounds import Problem, bound_after_drops, bound_after_iterations, schedule_bound
from .momentum import UnifiedMomentum
from .quadratic import AutomaticDrop, Limits, NoisyQuadratic, Trajectory
from .velocity_model import (
    Phase,
    RateSequence,
    VelocityModel,
    algorithm_2,
    drop_count_bounds,
    gap_bounds,
    iteration_count_bounds,
    kappa_1,
    kappa_2,
    learning_rate,
)

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
