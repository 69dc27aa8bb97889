"""The doctor's test: a backend's angles against the definition in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..angle import angle_of
from ..meter import AngularVelocity

LIMIT = 0.02  # degrees, what the package promises

_WINDOW = 8  # optimizer steps
_WINDOWS = 7
_SHAPES = (
    ((129, 65), torch.float32),
    ((4, 3, 5, 5), torch.float32),
    ((1,), torch.float32),
    ((1000,), torch.bfloat16),
    ((31, 7), torch.float16),
)


def largest_error(backend: str, device: str) -> float:
    """Largest difference between measured angles and those of the definition.

    Parameters of three dtypes move along a slowly turning random path; both sides see the same
    roundings of half precision, because both read the parameters as they are.

    Args:
        backend: by name.
        device: as in ``torch.device``.

    Returns:
        Degrees; infinity where an angle is missing.
    """
    random = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=random).to(device=device, dtype=dtype))
        for shape, dtype in _SHAPES
    ]
    ahead, aside = (
        [0.02 * torch.randn(p.shape, generator=random).to(device) for p in params] for _ in "ab"
    )
    meter = AngularVelocity(params, _WINDOW, backend=backend)
    means: list[Tensor] = []
    error = 0.0
    for window in range(_WINDOWS):
        total = torch.zeros((), dtype=torch.float64)
        reading = None
        for step in range(_WINDOW):
            turn = math.radians(5 * (window * _WINDOW + step))
            for p, a, b in zip(params, ahead, aside, strict=True):
                p.data.add_((math.cos(turn) * a + math.sin(turn) * b).to(p.dtype))
            reading = meter.observe()
            total = total + torch.cat([p.detach().double().cpu().flatten() for p in params])
        means.append(total / _WINDOW)
        if window >= 2:
            expected = _angle(means[-1] - means[-2], means[-2] - means[-3])
            if reading is None or reading.angle is None:
                return math.inf
            error = max(error, abs(reading.angle - expected))
    return error


def _angle(s: Tensor, previous: Tensor) -> float:
    measured = angle_of(float(s @ previous), float(s @ s), float(previous @ previous))
    return math.nan if measured is None else measured[0]
