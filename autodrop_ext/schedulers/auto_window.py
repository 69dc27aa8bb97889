"""The window from the length of the run, for ``window="auto"``."""

from __future__ import annotations

import math

from .. import checks

LEAST_WINDOW = 16
"""What ``window="auto"`` never goes below: half more than the 10 steps that momentum 0.9 remembers.
In shorter windows successive displacements are alike because of the optimizer, and angles are noise
otherwise."""


def window_for(
    num_steps: int, *, factor: float = 0.95, min_samples: int = 10, total_decay: float = 0.01
) -> int:
    """The window with which the rate can fall to ``total_decay`` of the initial one, and no lower.

    A drop takes ``min_samples + 1`` windows at least, and multiplies the rate by ``factor``. So
    ``n`` steps in windows of ``k`` end at ``factor^(n / ((min_samples + 1) k))`` or above; set
    equal to ``total_decay`` and solved for ``k``, rounded up so that the rate falls no lower. UAI
    2024, section 4.1, gives the relation ``alpha_0 rho^O(N/k)`` and tunes ``k`` per data set.

    Args:
        num_steps: ``n``, optimizer steps of the run, without the warm-up.
        factor: ``rho``, in (0, 1).
        min_samples: angles since the last drop before smoothing starts.
        total_decay: in (0, 1).

    This is the package's only rule; the benchmarks use it too, without the floor of
    ``LEAST_WINDOW`` steps that ``AutoDrop(window="auto")`` adds.

    Returns:
        Optimizer steps, at least 1.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
    """
    checks.count("num_steps", num_steps, 1)
    checks.between_0_and_1("total_decay", total_decay)
    drops = math.log(total_decay) / math.log(factor)
    # The small subtraction keeps a quotient whole that is whole but for rounding.
    return max(1, math.ceil(num_steps / ((min_samples + 1) * drops) - 1e-9))
