"""The meter after parameters were set by hand: what EpochAutoDrop needs of it."""

from __future__ import annotations

import math

import pytest
import torch

from autodrop_ext import AngularVelocity


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
def test_a_rebased_meter_measures_from_where_the_parameters_were_put(
    dtype: torch.dtype, strided: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 60, generator=generator).to(dtype)
    x = x[:, ::2] if strided else x
    meter = AngularVelocity([x], 1)
    meter.rebase()  # the reference point
    displacements = []
    for t in range(8):
        before = x.double().clone()
        x += (0.05 * torch.randn(x.shape, generator=generator)).to(dtype)
        displacements.append((x.double() - before).flatten())
        reading = meter.observe()
        x += torch.randn(x.shape, generator=generator).to(dtype)  # a jump that is no displacement
        meter.rebase()
        if t >= 1:
            s, s_last = displacements[-1], displacements[-2]
            cosine = float(s @ s_last / s.norm() / s_last.norm())
            assert reading is not None and reading.angle is not None
            # One bucket an element: float64 differences of the same numbers.
            assert reading.angle == pytest.approx(math.degrees(math.acos(cosine)), abs=1e-9)
            assert reading.norm == pytest.approx(float(s.norm()), rel=1e-12)


def test_rebasing_loses_nothing_of_tiny_steps_of_float64() -> None:
    # Steps of 1e-9 next to 1: a base rounded to float32 would be off by 3e-8.
    x = torch.ones(3, dtype=torch.float64) / 3
    meter = AngularVelocity([x], 1)
    meter.rebase()
    for step in (torch.tensor([1e-9, 0, 0]), torch.tensor([0, 1e-9, 0])):
        x += step.double()
        reading = meter.observe()
        x += 0.1
        meter.rebase()
    # Numbers near 0.5 are apart by 2^-53 = 1.1e-16, 1.1e-7 of the step.
    assert reading is not None and reading.norm == pytest.approx(1e-9, rel=3e-7)


def test_rebasing_needs_the_end_of_a_window() -> None:
    x = torch.ones(3)
    meter = AngularVelocity([x], 2)
    meter.observe()
    with pytest.raises(RuntimeError, match="at a window's end, got one after 1 of 2 steps"):
        meter.rebase()
