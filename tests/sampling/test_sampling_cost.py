"""The cost model behind docs/scaling.md agrees with what meters hold and ranks send."""

from __future__ import annotations

import pytest
import scaling
import torch

from autodrop_ext import AngularVelocity
from autodrop_ext.distributed.agreement import Row
from autodrop_ext.sampling.draw import CHUNK_ELEMENTS
from autodrop_ext.sampling.sums import SamplingError


@pytest.mark.parametrize("fraction", [None, 1 / 4, 1 / 64])
def test_memory(fraction: float | None) -> None:
    shapes = [(300, 500)] * 6 + [(500,)] * 12
    params = [torch.randn(shape) for shape in shapes]
    meter = AngularVelocity(params, 1, sample=fraction)
    for _ in range(8):
        torch._foreach_mul_(params, 1.01)
        meter.observe()
    model = scaling.Model("", sum(p.numel() for p in params), len(params), 1)
    # Short tensors are one chunk of 500 elements, and not two of 1,024 as in the model.
    short = 12 * (2 * CHUNK_ELEMENTS - 512) * 12 if fraction == 1 / 64 else 0
    predicted = scaling.arena_bytes(model, fraction) - short
    assert meter.device_bytes == pytest.approx(predicted, rel=0.1)
    # A row has 21 numbers, and a sample 31 more; docs/scaling.md says so.
    numbers = 0 if fraction is None else SamplingError.size
    assert (len(Row._fields), SamplingError.size) == (21, 31)
    constants = scaling.measure(threads=1, repeats=1)
    assert scaling.row_bytes(constants, fraction) == 8 * (len(Row._fields) + numbers)


def test_a_larger_model_or_part_never_costs_less() -> None:
    constants = {"window_seconds_a_chunk": 1e-7}
    for fraction in (None, 1 / 64):
        costs = [scaling.step_seconds(m, fraction, 4e12, constants) for m in scaling.MODELS]
        here = [m.parameters / m.gpus for m in scaling.MODELS]
        by_size = [c for _, c in sorted(zip(here, costs, strict=True))]
        assert by_size == sorted(by_size)
    for model in scaling.MODELS:
        assert scaling.arena_bytes(model, 1 / 64) < scaling.arena_bytes(model, 1 / 4)
        assert scaling.arena_bytes(model, 1.0) == scaling.arena_bytes(model, None)
        assert scaling.training_seconds(model) > 100 * scaling.step_seconds(
            model, None, 4e12, constants
        )
