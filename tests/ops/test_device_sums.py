"""The sums of one device, between windows."""

from __future__ import annotations

import pytest
import torch

from autodrop_ext.ops import BACKENDS, reference
from autodrop_ext.ops.device_sums import DeviceSums
from autodrop_ext.ops.interface import Form
from autodrop_ext.ops.plan import Plan


def test_rebasing_keeps_the_last_displacement_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, dtype=torch.float64, generator=generator)
    plan = Plan([("x", x)], torch.device("cpu"))
    arenas = DeviceSums(plan, BACKENDS["reference"])
    arenas.begin("delta")
    arenas.close(1)
    x += 0.1 * torch.randn(1000, dtype=torch.float64, generator=generator)
    arenas.add(first=True)
    arenas.close(1)
    kept = reference.displacement(arenas.previous)
    assert bool((arenas.previous != kept).any())  # residuals lie in the low bytes
    x += torch.randn(1000, dtype=torch.float64, generator=generator)
    arenas.rebase(1)
    assert torch.equal(reference.displacement(arenas.previous), kept)
    # The residual of the new base is kept to half of |x| 2^-31.
    base = reference.exact_mean(arenas.before, arenas.previous)[:1000]
    assert bool(((base - x).abs() <= x.abs() * 2.0**-31).all())


@pytest.mark.parametrize("form", ["sum", "delta"])
def test_merged_windows_are_the_last_one_of_twice_the_length(form: Form) -> None:
    """Against float64: two windows of 3 steps become one of 6, and two of 6 follow."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, generator=generator)
    sums = DeviceSums(Plan([("x", x)], torch.device("cpu")), BACKENDS["cpu"])
    iterates = []
    closed = []
    for k in (3, 3, 3, 6, 6):
        if k == 6 and len(closed) == 3:
            sums.merge(3, 6)
        for step in range(k):
            x += 0.01 * torch.randn(1000, generator=generator)
            iterates.append(x.double())
            if len(iterates) == 1:
                sums.begin(form)
            else:
                sums.add(first=step == 0)
        closed.append(sums.close(k))
    means = [torch.stack(iterates[i : i + 6]).mean(dim=0) for i in (3, 9, 15)]
    s, following = means[1] - means[0], means[2] - means[1]
    first, second = closed[3:]
    # Roundings of float32 sums to 2^-24 of parameters a hundred times as long as the steps: 6e-6
    # of each element of a displacement, less for the sum over a thousand of them.
    assert first.norm == pytest.approx(float(s @ s), rel=1e-5)
    # There is no displacement before it, and so its other two sums mean nothing.
    assert second.norm == pytest.approx(float(following @ following), rel=1e-5)
    assert second.previous_norm == pytest.approx(float(s @ s), rel=1e-5)
    scale = float(s.norm() * following.norm())
    assert second.dot == pytest.approx(float(s @ following), abs=1e-5 * scale)
    assert second.mean_norm == pytest.approx(float(means[2] @ means[2]), rel=1e-6)
