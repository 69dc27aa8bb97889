"""The meter: angles against float64, the two forms and the bound on their rounding error."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from typing import Any

import independent
import numpy as np
import pytest
import rounding
import torch
from cases import BACKENDS, every_backend
from trajectories import noisy_walk, turning

import autodrop_ext.ops
from autodrop_ext import AngularVelocity, Reading

BENCHMARKS = Path(__file__).parents[1] / "benchmarks" / "speed"


def readings(
    iterates: np.ndarray, window: int, dtype: torch.dtype = torch.float64, **options
) -> list[Reading | None]:  # type: ignore[no-untyped-def]
    x = torch.zeros(iterates.shape[1], dtype=dtype)
    meter = AngularVelocity([x], window, **options)
    result = []
    for iterate in iterates:
        x.copy_(torch.from_numpy(iterate))
        result.append(meter.observe())
    return result


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("form", ["auto", "sum", "delta"])
def test_angles_are_those_the_trajectory_was_made_of(window: int, form: str) -> None:
    turns = [10.0, 90.0, 179.0, 120.0, 1.0, 60.0]
    got = readings(turning(turns, window), window, form=form)
    at_ends = got[3 * window - 1 :: window]
    assert all(r is None for i, r in enumerate(got) if (i + 1) % window or i < 3 * window - 1)
    assert [r.window for r in at_ends] == list(range(2, 8))
    assert [r.step for r in at_ends] == [window * (i + 1) for i in range(2, 8)]
    # Two elements of size 1 in float32: 2^-24 of a right angle is 3e-6 degrees; 2^-17 of it, which
    # delta form leaves to the previous displacement, 4e-4.
    assert [r.angle for r in at_ends] == pytest.approx(turns, abs=1e-3)
    assert [r.norm for r in at_ends] == pytest.approx([1.0] * 6, rel=1e-5)
    assert [r.standard_error for r in at_ends] == [0.0] * 6


@every_backend
@pytest.mark.parametrize("form", ["auto", "sum", "delta"])
def test_backends_agree_to_1e_9_degrees(
    backend: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterates = noisy_walk(60, 3000, 0)
    monkeypatch.setitem(autodrop_ext.ops.BACKENDS, "cpu", BACKENDS[backend])
    got = readings(iterates, 4, torch.float32, backend="cpu", form=form)
    wanted = readings(iterates, 4, torch.float32, backend="reference", form=form)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.angle == pytest.approx(b.angle, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_angles_match_float64(dtype: torch.dtype) -> None:
    iterates = noisy_walk(80, 400, 3).astype(np.float32)
    if dtype.is_complex:
        iterates = iterates.view(np.complex64)
    got = [r.angle for r in readings(iterates, 8, dtype) if r is not None]
    wanted = independent.angles(iterates.view(np.float32), 8)
    assert got == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("drift", [0.5, 0.05])
@pytest.mark.parametrize("update", [1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("window", [16, 64])
def test_accuracy_contract(window: int, update: float, drift: float) -> None:
    """Part of benchmarks/accuracy/rounding.py, which measures up to k = 1000."""
    row = rounding.measure(window, update, elements=5_000, drift=drift, seed=0)
    assert row["auto"] <= 0.02
    assert row["reported_over_true"] >= 0.5
    if window == 64 and update >= 1e-4:
        assert row["form"] == "sum"
    if update <= 1e-6:
        assert row["form"] == "delta"


def test_contract_at_a_thousand_steps() -> None:
    row = rounding.measure(1000, 1e-7, elements=2_000, drift=0.5, seed=0)
    assert row["auto"] <= 0.02
    assert row["reported_over_true"] >= 0.5


def test_shrinking_steps_convert_to_delta_form_without_losing_a_window() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=generator)
    direction = torch.randn(20_000, generator=generator)
    meter = AngularVelocity([x], 16)
    forms, got, iterates = [], [], []
    for window in range(30):
        for _ in range(16):
            size = 1e-3 * 0.7**window
            x += size * (0.3 * direction + torch.randn(20_000, generator=generator))
            iterates.append(x.numpy().copy())
            reading = meter.observe()
        forms.append(meter.form)
        got.append(reading)
    assert "sum" in forms and forms[-1] == "delta"
    assert forms == sorted(forms[:2]) + forms[2:]
    wanted = independent.angles(np.array(iterates), 16)
    assert all(r is not None for r in got[2:])
    for reading, angle in zip(got[2:], wanted, strict=True):
        assert abs(reading.angle - angle) <= 0.02
        assert reading.rounding_error >= abs(reading.angle - angle) / 2


def test_growing_steps_convert_back_to_sum_form() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=generator)
    meter = AngularVelocity([x], 8)
    forms = []
    for window in range(24):
        for _ in range(8):
            x += 1e-7 * 2.0**window * torch.randn(20_000, generator=generator)
            meter.observe()
        forms.append(meter.form)
    assert forms[5] == "delta"
    assert forms[-1] == "sum"


def test_memory_is_twelve_bytes_a_parameter() -> None:
    """Resident memory of a process before and after the first windows, 25.6 million parameters."""
    script = textwrap.dedent(
        f"""
        import resource, sys, torch
        sys.path.insert(0, {str(BENCHMARKS)!r})
        from autodrop_ext import AngularVelocity
        from shapes import tensors

        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

        def watch(params):
            meter = AngularVelocity(params, 2)
            for step in range(8):
                torch._foreach_mul_(params, 1.001)
                meter.observe()
            return meter

        watch([torch.randn(100_000)])  # code and threads
        params = tensors("resnet50", torch.float32)
        before = resident()
        meter = watch(params)
        n = sum(p.numel() for p in params)
        print((resident() - before) / n, meter.device_bytes / n)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    resident, reported = map(float, done.stdout.split())
    assert 12 <= reported <= 12 * 1.01
    assert 11.9 <= resident <= 12 * 1.01  # tables and partial sums included


def test_given_parameters_need_no_gradients_but_frozen_ones_are_left_out() -> None:
    plain = torch.randn(3)
    frozen = torch.nn.Parameter(torch.randn(4), requires_grad=False)
    meter = AngularVelocity([("plain", plain), ("frozen", frozen)], 1)
    meter.observe()
    assert list(meter.state_dict()["arenas"]) == ["plain"]


def test_parameters_may_be_a_function_groups_or_an_optimizer() -> None:
    model = torch.nn.Linear(2, 3)
    named = torch.optim.SGD(model.named_parameters(), lr=1.0)
    unnamed = torch.optim.SGD(model.parameters(), lr=1.0)
    for params, names in (
        (named, ["weight", "bias"]),
        (unnamed, ["param_groups[0]['params'][0]", "param_groups[0]['params'][1]"]),
        (unnamed.param_groups, ["param_groups[0]['params'][0]", "param_groups[0]['params'][1]"]),
        (model.parameters(), ["params[0]", "params[1]"]),
        (model.parameters, ["params[0]", "params[1]"]),
        (model.named_parameters(), ["weight", "bias"]),
    ):
        meter = AngularVelocity(params, 1)
        meter.observe()
        assert list(meter.state_dict()["arenas"]) == names


def test_close_frees_and_starts_over() -> None:
    meter = AngularVelocity([torch.randn(10)], 1)
    for _ in range(5):
        meter.observe()
    meter.close()
    assert meter.device_bytes == 0
    assert meter.form is None
    reading = meter.observe()
    assert reading is not None and reading.angle is None and math.isnan(reading.norm)


def test_element_types_may_be_mixed() -> None:
    tensors = [torch.randn(5).to(d) for d in (torch.float32, torch.bfloat16, torch.float64)]
    meter = AngularVelocity(tensors, 1)
    for _ in range(3):
        for t in tensors:
            t += torch.randn(5).to(t.dtype)
        reading = meter.observe()
    assert reading is not None and reading.angle is not None


@pytest.mark.parametrize("source", [list, lambda params: lambda: params, torch.optim.SGD])
def test_parameters_are_freed_with_their_meter(source: Any) -> None:
    """What the compiled core keeps must lead back to no Python object that keeps it."""
    parameter = torch.nn.Parameter(torch.randn(8))
    meter = AngularVelocity(source([parameter]), window=2)
    for _ in range(5):
        with torch.no_grad():
            parameter.add_(torch.randn(8))
        meter.observe()
    gone = weakref.ref(parameter)
    del parameter, meter
    gc.collect()
    assert gone() is None


def test_a_meter_is_freed_without_the_garbage_collector() -> None:
    """It holds 12 bytes a parameter, which must not wait for a collection."""
    parameter = torch.randn(8)
    meter = AngularVelocity([parameter], window=2)
    for _ in range(5):
        parameter.add_(torch.randn(8))
        meter.observe()
    gone = weakref.ref(meter)
    gc.collect()
    gc.disable()
    try:
        del meter
        assert gone() is None
    finally:
        gc.enable()
