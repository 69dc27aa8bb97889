"""The meter: angles against float64, exact and hashed, and what it keeps."""

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
import torch
from cases import BACKENDS, every_backend
from trajectories import noisy_walk, process, turning

import autodrop_ext
import autodrop_ext.ops
from autodrop_ext import AngularVelocity, Reading

BENCHMARKS = Path(__file__).parents[1] / "benchmarks" / "speed"


def readings(
    iterates: np.ndarray, window: int, dtype: torch.dtype = torch.float64, **options: Any
) -> list[Reading | None]:
    x = torch.zeros(iterates.shape[1], dtype=dtype)
    meter = AngularVelocity([x], window, **options)
    result = []
    for iterate in iterates:
        x.copy_(torch.from_numpy(iterate))
        result.append(meter.observe())
    return result


# ---- every element has its own bucket -------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 5])
def test_angles_are_those_the_trajectory_was_made_of(window: int) -> None:
    turns = [10.0, 90.0, 179.0, 120.0, 1.0, 60.0]
    got = readings(turning(turns, window), window)
    at_ends = got[3 * window - 1 :: window]
    assert all(r is None for i, r in enumerate(got) if (i + 1) % window or i < 3 * window - 1)
    assert [r.window for r in at_ends] == list(range(2, 8))
    assert [r.step for r in at_ends] == [window * (i + 1) for i in range(2, 8)]
    # Float64 sums of numbers below 10: 1e-15 in the cosine, 60 times as many degrees at 1 and 179.
    assert [r.angle for r in at_ends] == pytest.approx(turns, abs=1e-9)
    assert [r.norm for r in at_ends] == pytest.approx([1.0] * 6, rel=1e-12)
    assert [r.standard_error for r in at_ends] == [0.0] * 6


@every_backend
def test_backends_agree_to_1e_9_degrees(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of their float64 sums alone."""
    iterates = noisy_walk(60, 3000, 0)
    monkeypatch.setitem(autodrop_ext.ops.BACKENDS, "cpu", BACKENDS[backend])
    got = readings(iterates, 4, torch.float32, backend="cpu")
    wanted = readings(iterates, 4, torch.float32, backend="reference")
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.angle == pytest.approx(b.angle, abs=1e-9)


@pytest.mark.parametrize("buckets", [2**18, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_angles_match_float64(dtype: torch.dtype, buckets: int | None) -> None:
    iterates = noisy_walk(80, 400, 3).astype(np.float32)
    if dtype.is_complex:
        iterates = iterates.view(np.complex64)
    got = [r.angle for r in readings(iterates, 8, dtype, buckets=buckets) if r is not None]
    wanted = independent.angles(iterates.view(np.float32), 8)
    assert got == pytest.approx(wanted, abs=1e-9)  # the same numbers in another order


@pytest.mark.parametrize("drift", [0.5, 0.05])
@pytest.mark.parametrize("update", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("window", [16, 64, 1000])
def test_angles_of_small_steps_are_exact(window: int, update: float, drift: float) -> None:
    """Float32 parameters near 1 cannot move by less than 6e-8, so float64 sums lose nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1_000, generator=generator)
    direction = drift * torch.randn(1_000, generator=generator)
    meter = AngularVelocity([x], window)
    iterates, got = [], []
    for _ in range(5 * window):
        x += update * (direction + torch.randn(1_000, generator=generator))
        iterates.append(x.numpy().copy())
        reading = meter.observe()
        if reading is not None:
            got.append(reading.angle)
    wanted = independent.angles(np.array(iterates), window)
    # Sums of 1,000 numbers near 1 have errors of 1e-13 at most, next to displacements of 1e-6:
    # 1e-7 of each element, and on average over 1,000 elements 3e-9, or 2e-7 degrees.
    assert got == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("window", [4, 10])
def test_steps_whose_size_changes_by_orders_of_magnitude_lose_no_window(window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2_000, generator=generator)
    direction = torch.randn(2_000, generator=generator)
    meter = AngularVelocity([x], window)
    iterates, got = [], []
    for i in range(40):
        size = 1e-3 * 0.6 ** min(i, 40 - i)  # down to 4e-8, and up again
        for _ in range(window):
            x += size * (0.3 * direction + torch.randn(2_000, generator=generator))
            iterates.append(x.numpy().copy())
            reading = meter.observe()
        got.append(reading)
    assert got[:2] == [None, None]
    wanted = independent.angles(np.array(iterates), window)
    angles = [r.angle for r in got[2:] if r is not None]
    assert angles == pytest.approx(wanted, abs=1e-6)  # as above


# ---- elements share buckets -----------------------------------------------------------------


def wide(seed: int, *, size: int = 300_000) -> tuple[dict[str, torch.Tensor], Any]:
    """More elements than buckets, and a step that returns the new iterate in float64."""
    generator = torch.Generator().manual_seed(seed)
    named = {
        "matrix": torch.randn(size // 1_000, 600, generator=generator),
        "bias": torch.randn(size // 3, generator=generator),
        "rest": torch.randn(size - size // 1_000 * 600 - size // 3, generator=generator),
    }

    def step() -> np.ndarray:
        for tensor in named.values():
            tensor += 0.01 * torch.randn(tensor.shape, generator=generator) - 0.3 * tensor
        return np.concatenate([t.flatten().double().numpy() for t in named.values()])

    return named, step


def test_a_hashed_angle_is_within_four_standard_errors_of_float64() -> None:
    named, step = wide(0)
    meter = AngularVelocity(named.items(), 1)
    got, iterates = [], []
    for _ in range(14):
        iterates.append(step())
        got.append(meter.observe())
    wanted = independent.angles(np.array(iterates), 1)
    errors = []
    for reading, angle in zip(got[2:], wanted, strict=True):
        assert reading is not None and reading.angle is not None and angle is not None
        law = math.degrees(math.sin(math.radians(reading.angle)) / math.sqrt(2**18))
        assert reading.standard_error == pytest.approx(law, rel=1e-12)
        errors.append((reading.angle - angle) / law)
    assert all(abs(error) < 4 for error in errors)
    # The errors of 12 windows in one hash: their root mean square is 1 within a few fifths.
    assert 0.3 < math.sqrt(sum(e * e for e in errors) / len(errors)) < 2.0


@every_backend
def test_backends_agree_on_a_hashed_angle(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They put the same elements into the same buckets; float64 sums differ in their order."""
    iterates = noisy_walk(8, 5_000, 0)
    monkeypatch.setitem(autodrop_ext.ops.BACKENDS, "cpu", BACKENDS[backend])
    got = readings(iterates, 2, torch.float32, backend="cpu", buckets=4096)
    wanted = readings(iterates, 2, torch.float32, backend="reference", buckets=4096)
    pairs = [(a, b) for a, b in zip(got, wanted, strict=True) if a is not None and b is not None]
    assert len(pairs) == 2
    for a, b in pairs:
        assert a.angle == pytest.approx(b.angle, abs=1e-9)
        assert a.standard_error > 0


@pytest.mark.parametrize("elements", [4_095, 4_096, 4_097])
def test_angles_are_exact_up_to_as_many_elements_as_buckets(elements: int) -> None:
    iterates = process("walk", 6, n=elements)
    got = [r for r in readings(iterates, 1, buckets=4096) if r is not None]
    wanted = independent.angles(iterates, 1)
    if elements <= 4_096:
        assert [r.standard_error for r in got] == [0.0] * 4
        assert [r.angle for r in got] == pytest.approx(wanted, abs=1e-9)
    else:
        # 0.9 degrees at 4,096 buckets and 90 degrees.
        assert [r.standard_error for r in got] == pytest.approx([0.895] * 4, rel=0.01)
        assert [r.angle for r in got] == pytest.approx(wanted, abs=4 * 0.9)
        assert [r.angle for r in got] != pytest.approx(wanted, abs=1e-9)


def test_groups_have_their_own_tables() -> None:
    named, step = wide(1)
    groups = [
        {"params": [named["matrix"]], "param_names": ["matrix"]},
        {"params": [named["bias"], named["rest"]], "param_names": ["bias", "rest"]},
    ]
    together = AngularVelocity(groups, 1, per_group=True, buckets=2**14)
    apart = [AngularVelocity([group], 1, buckets=2**14) for group in groups]
    plain = AngularVelocity(named.items(), 1, buckets=None)
    for _ in range(6):
        step()
        reading, exact = together.observe(), plain.observe()
        separate = [meter.observe() for meter in apart]
    assert reading is not None and reading.per_group is not None and exact is not None
    assert reading.angle is not None
    for part, alone in zip(reading.per_group, separate, strict=True):
        assert alone is not None
        # The same elements in the same buckets of another table.
        assert part.angle == pytest.approx(alone.angle, abs=1e-9)
        assert part.norm == pytest.approx(alone.norm, rel=1e-12)
        assert part.standard_error == pytest.approx(alone.standard_error, rel=1e-9) != 0
    assert abs(reading.angle - (exact.angle or 0)) < 4 * reading.standard_error
    assert together.device_bytes > 2 * 3 * 8 * 2**14


def test_single_tensors_need_exact_angles() -> None:
    """Which is known once the parameters are, at the first step."""
    meter = AngularVelocity([torch.zeros(5_000)], 1, per_tensor=True, buckets=4096)
    message = r"per_tensor: .* own bucket, got buckets=4096 for 5,000 elements; use buckets=None"
    with pytest.raises(ValueError, match=message):
        meter.observe()
    exact = AngularVelocity([torch.zeros(5_000)], 1, per_tensor=True, buckets=None)
    assert exact.observe() is None


@pytest.mark.parametrize("buckets", [2**12, None])
def test_a_doubled_window_is_one_of_twice_the_length(buckets: int | None) -> None:
    k = 4
    iterates = noisy_walk(10 * k, 6_000, 0)
    x = torch.zeros(6_000)
    meter = AngularVelocity([x], k, buckets=buckets)
    whole = AngularVelocity([x], 2 * k, buckets=buckets)
    compared = 0
    for t, iterate in enumerate(iterates, 1):
        x.copy_(torch.from_numpy(iterate))
        reading, other = meter.observe(), whole.observe()
        if t == 4 * k:
            meter.double_window()
        if t == 6 * k:
            assert reading is not None and reading.angle is None  # one displacement until here
        if t > 6 * k and reading is not None:
            assert other is not None
            # Linear tables: means of means are means, but for rounding of float64.
            assert reading.angle == pytest.approx(other.angle, abs=1e-9)
            assert reading.norm == pytest.approx(other.norm, rel=1e-12)
            assert reading.standard_error == pytest.approx(other.standard_error, rel=1e-9)
            compared += 1
    assert compared == 2


@pytest.mark.parametrize("elements", [100, 300_000])
def test_parameters_that_stand_still_across_a_doubling_have_no_angle(elements: int) -> None:
    """A merged mean is rounded, and what rounding leaves is no displacement."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(elements, generator=generator)
    meter = AngularVelocity([x], 3, snapshots=3)
    for t in range(1, 31):
        if t <= 9:
            x += 0.01 * torch.randn(elements, generator=generator)
        reading = meter.observe()
        if t == 12:
            meter.double_window()
    assert reading is not None and meter.window == 6
    assert reading.angle is None and reading.norm == 0.0


# ---- what is kept ---------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_model() -> None:
    """Resident memory of a process before and after the first windows, 25.6 million parameters."""
    script = textwrap.dedent(
        f"""
        import resource, sys, torch
        sys.path.insert(0, {str(BENCHMARKS)!r})
        from autodrop_ext import AngularVelocity
        from shapes import tensors

        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

        def watch(params, **settings):
            meter = AngularVelocity(params, 2, **settings)
            for step in range(8):
                torch._foreach_mul_(params, 1.001)
                meter.observe()
            return meter

        watch([torch.randn(100_000)])  # code and threads
        params = tensors("resnet50", torch.float32)
        torch._foreach_mul_(params, 1.001)
        before = resident()
        meter = watch(params)
        print(resident() - before, meter.device_bytes)
        before = resident()
        exact = watch(params, buckets=None)
        n = sum(p.numel() for p in params)
        print((resident() - before) / n, exact.device_bytes / n)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    hashed, exact = (line.split() for line in done.stdout.decode().splitlines())
    tables = 3 * 8 * 2**18
    assert tables <= int(hashed[1]) <= 1.1 * tables
    assert 0.9 * tables <= int(hashed[0]) <= 2 * tables  # the plan's making, and what malloc keeps
    assert 24 <= float(exact[1]) <= 24 * 1.01
    assert 23.8 <= float(exact[0]) <= 24 * 1.02  # partial sums included


def names_of(meter: AngularVelocity) -> list[str]:
    return [name for name, _ in meter.named_parameters()]


def test_given_parameters_need_no_gradients_but_frozen_ones_are_left_out() -> None:
    plain = torch.randn(3)
    frozen = torch.nn.Parameter(torch.randn(4), requires_grad=False)
    meter = AngularVelocity([("plain", plain), ("frozen", frozen)], 1)
    meter.observe()
    assert names_of(meter) == ["plain"]
    assert meter.state_dict()["tables"]["running"].numel() == 3


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
        assert names_of(meter) == names


def test_close_frees_and_starts_over() -> None:
    meter = AngularVelocity([torch.randn(10)], 1)
    for _ in range(5):
        meter.observe()
    meter.close()
    assert meter.device_bytes == 0
    assert not meter.started
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
    """It holds 6 MiB of tables, which must not wait for a collection."""
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


# ---- arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("buckets", "error", "message"),
    [
        (0, ValueError, "expected at least 4096, got 0"),
        (-4096, ValueError, "expected at least 4096, got -4096"),
        (4095, ValueError, "expected at least 4096, got 4095"),
        (6144, ValueError, "expected None or a multiple of 4,096, got 6144"),
        (4096.0, TypeError, "expected an int, got 4096.0"),
        ("auto", TypeError, "expected an int, got 'auto'"),
        (True, TypeError, "expected an int, got True"),
    ],
)
def test_wrong_buckets_say_what_was_expected(
    buckets: Any, error: type[Exception], message: str
) -> None:
    expected = f"^buckets: {message}$"
    with pytest.raises(error, match=expected):
        AngularVelocity([torch.zeros(3)], buckets=buckets)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    for kind in (autodrop_ext.AutoDrop, autodrop_ext.EpochAutoDrop, autodrop_ext.AnytimeAutoDrop):
        with pytest.raises(error, match=expected):
            kind(optimizer, buckets=buckets)


READ_ALL = "every parameter is read now, and added to a table of constant size; buckets="


@pytest.mark.parametrize(
    ("kind", "argument", "advice"),
    [
        ("AngularVelocity", "sample", READ_ALL),
        ("AngularVelocity", "seed", READ_ALL),
        ("AngularVelocity", "form", "every angle is resolved without it"),
        ("AutoDrop", "sample", READ_ALL),
        ("AutoDrop", "seed", READ_ALL),
        ("AnytimeAutoDrop", "sample", READ_ALL),
        ("AnytimeAutoDrop", "seed", READ_ALL),
    ],
)
def test_arguments_of_earlier_releases_say_what_to_use(
    kind: str, argument: str, advice: str
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    message = f"^{argument}: expected no such argument; {advice}"
    with pytest.raises(TypeError, match=message):
        getattr(autodrop_ext, kind)(optimizer, **{argument: None})


def test_attributes_of_earlier_releases_are_gone() -> None:
    meter = AngularVelocity([torch.zeros(3)], 1)
    gone = ("form", "sample", "seed", "fraction", "averaged", "averaged_windows", "arena_state")
    assert not [name for name in gone if hasattr(meter, name)]
    assert not {"margin", "rounding_error"} & set(Reading.__dataclass_fields__)
