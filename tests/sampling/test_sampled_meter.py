"""Sampled meters: their angles, errors, memory, switches and checkpoints."""

from __future__ import annotations

import logging
import math
import pathlib
import pickle
import subprocess
import sys
import textwrap
from typing import Any

import independent
import numpy as np
import pytest
import torch
from cases import BACKENDS

import autodrop_ext.ops
from autodrop_ext import AngularVelocity, Reading
from autodrop_ext.sampling.auto import PILOT_FRACTION
from autodrop_ext.sampling.draw import chunk_starts

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks" / "speed"
SHAPES = [(90, 500), (500,), (130, 1000), (3,), (40, 40)]


class Walk:
    """Parameters that drift and wobble, some rows of them far more than others."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors = [torch.randn(s, generator=self.generator) for s in SHAPES]
        self.drifts = [torch.randn(s, generator=self.generator) for s in SHAPES]
        self.scales = [
            torch.exp(1.5 * torch.randn(s[0], *(1 for _ in s[1:]), generator=self.generator))
            for s in SHAPES
        ]

    @property
    def named(self) -> list[tuple[str, torch.Tensor]]:
        return [(f"t{i}", t) for i, t in enumerate(self.tensors)]

    def step(self) -> None:
        for x, drift, scale in zip(self.tensors, self.drifts, self.scales, strict=True):
            x += 1e-3 * scale * (drift + torch.randn(x.shape, generator=self.generator))


def watch(meters: list[AngularVelocity], walk: Walk, steps: int) -> list[list[Reading]]:
    readings: list[list[Reading]] = [[] for _ in meters]
    for _ in range(steps):
        walk.step()
        for meter, kept in zip(meters, readings, strict=True):
            reading = meter.observe()
            if reading is not None:
                kept.append(reading)
    return readings


@pytest.mark.parametrize("backend", ["reference", "cpu baseline", "cpu widest"])
def test_a_sampled_angle_is_that_of_the_chosen_chunks(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(autodrop_ext.ops.BACKENDS, "cpu", BACKENDS[backend])
    walk = Walk()
    meter = AngularVelocity(walk.named, 2, sample=1 / 4, backend="cpu")
    iterates = []
    for _ in range(12):
        walk.step()
        iterates.append([t.flatten().double().numpy().copy() for t in walk.tensors])
        reading = meter.observe()
    assert reading is not None and reading.angle is not None and meter._arenas is not None
    choice = meter._arenas[0].plan.choice
    assert choice is not None and meter._reader is not None and meter._reader.sizes is not None
    dot = norm = previous = 0.0
    chunks = zip(choice.tensor, choice.start, choice.length, choice.expansion, strict=True)
    for t, start, length, weight in chunks:
        x = np.array([iterate[t][start : start + length] for iterate in iterates[-6:]])
        m = x.reshape(3, 2, -1).mean(axis=1)
        s, s_previous = m[2] - m[1], m[1] - m[0]
        dot += weight * (s @ s_previous)
        norm += weight * (s @ s)
        previous += weight * (s_previous @ s_previous)
    wanted = math.degrees(math.acos(dot / math.sqrt(norm * previous)))
    # Relative updates of 1e-3 a step: the accuracy of float32 sums, a thousandth of the contract.
    assert reading.angle == pytest.approx(wanted, abs=2e-5)
    assert reading.norm == pytest.approx(math.sqrt(norm), rel=1e-5)
    assert 0 < reading.standard_error < reading.margin < 13 * reading.standard_error


def test_estimates_scatter_around_the_exact_angle_as_they_say() -> None:
    """Real training, ``benchmarks/accuracy/sampling.py`` does it at length."""
    from autodrop_ext.cli.demo.digits import Digits

    task = Digits()
    task.width = 64  # 77,000 parameters
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    seeds = 12
    exact = AngularVelocity(optimizer, 2)
    meters = [AngularVelocity(optimizer, 2, sample=1 / 4, seed=s) for s in range(seeds)]
    random = torch.Generator().manual_seed(0)
    errors, margins, z = [], [], []
    for step in range(160):
        loss = task.loss(model, random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        true = exact.observe()
        found = [meter.observe() for meter in meters]
        if true is not None and step >= 12:  # from here on all are drawn by the survey
            errors.append([r.angle - true.angle for r in found])
            margins.append([r.margin for r in found])
            z.append([(r.angle - true.angle) / r.standard_error for r in found])
    inside = np.abs(errors) <= np.array(margins)
    # The 900 readings count as those of 12 independent samples at worst. Then 0.95 is known to 0.06
    # and the mean to 0.3 standard errors; limits are more than twice as far away.
    assert 0.85 <= inside.mean() <= 0.995
    assert abs(np.mean(z)) < 0.7
    assert 0.6 < np.std(z) < 1.5


def test_a_full_sample_is_the_exact_meter() -> None:
    walk = Walk()
    exact, full = watch(
        [AngularVelocity(walk.named, 3), AngularVelocity(walk.named, 3, sample=1.0)], walk, 30
    )
    assert full == exact  # to the bit
    assert {reading.standard_error for reading in full} == {0.0}
    assert {reading.margin for reading in full} == {0.0}


def test_small_tensors_are_read_completely() -> None:
    tensors = [torch.randn(900), torch.randn(2000), torch.randn(7)]
    meters = [AngularVelocity(tensors, 1, form="sum", sample=s) for s in (None, 1 / 64)]
    for _ in range(6):
        for tensor in tensors:
            tensor += 0.1 * torch.randn(tensor.shape)
        exact, sampled = (meter.observe() for meter in meters)
    assert exact is not None and sampled is not None
    # Sums in float64 in another order.
    assert sampled.angle == pytest.approx(exact.angle, abs=1e-9)
    assert sampled.standard_error == 0.0


def test_no_reading_is_lost_when_the_sample_is_drawn_anew() -> None:
    walk = Walk()
    meter = AngularVelocity(walk.named, 2, sample=1 / 8)
    sized, angles = [], []
    for step in range(24):
        walk.step()
        reading = meter.observe()
        if step % 2 and step >= 5:
            assert reading is not None
            angles.append(reading.angle)
            sized.append(meter._reader is not None and meter._reader.sizes is not None)
    assert None not in angles
    # The survey takes one window here; then three windows gather beside the first choice.
    assert sized == [False] + [True] * (len(sized) - 1)


def test_drawing_by_motion_makes_smaller_errors() -> None:
    walk = Walk()
    names = walk.named
    seeds = range(8)
    meters = [AngularVelocity(names, 2, sample=1 / 8, seed=s) for s in seeds]
    exact = AngularVelocity(names, 2)
    (true, *found) = watch([exact, *meters], walk, 60)
    uniform = [abs(f[0].angle - true[0].angle) for f in found]
    later = [abs(f[i].angle - true[i].angle) for f in found for i in range(3, len(true))]
    # Few rows make most of this walk's motion. Measured: a ratio of 0.35.
    assert np.median(later) < 0.7 * np.median(uniform)


def test_half_precision_and_strided_parameters_can_be_sampled() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors: list[torch.Tensor] = [
        torch.randn(300, 100, generator=generator).bfloat16(),
        torch.randn(200, 100, generator=generator)[:, ::2],
        torch.view_as_complex(torch.randn(9000, 2, generator=generator)),
    ]
    exact, sampled = AngularVelocity(tensors, 2), AngularVelocity(tensors, 2, sample=1 / 4)
    for step in range(20):
        for tensor in tensors:
            tensor.mul_(1 + 0.02 * math.sin(step))
        true, found = exact.observe(), sampled.observe()
    assert true is not None and found is not None
    assert found.margin > 0
    # Every element is scaled alike, so that all chunks tell nearly the same angle; what is left is
    # the rounding of bfloat16, 2^-9 of each element.
    assert found.angle == pytest.approx(true.angle, abs=max(0.05, 2 * found.margin))


def test_memory_is_a_quarter_of_a_byte_a_parameter() -> None:
    """Resident memory of a process, 60.8 million parameters, a sixty-fourth of the chunks.

    During the survey and while the sample is drawn anew, half a byte.
    """
    script = textwrap.dedent(
        f"""
        import ctypes, resource, sys, torch
        sys.path.insert(0, {str(BENCHMARKS)!r})
        from autodrop_ext import AngularVelocity
        from shapes import tensors

        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

        def touch(params):
            for p in params[::40]:
                p.mul_(1.001)

        torch.set_num_threads(1)
        params = tensors("transformer60m", torch.float32)
        warm = AngularVelocity([torch.randn(300_000)], 1, sample=1/64)
        for _ in range(8):
            warm.observe()
        n = sum(p.numel() for p in params)
        meter, before = AngularVelocity(params, 1, sample=1/64), resident()
        peak = 0
        for step in range(70):
            touch(params)
            meter.observe()
            peak = max(peak, meter.device_bytes)
        assert meter._reader.sizes is not None
        ctypes.CDLL(None).malloc_trim(0)  # what was freed but kept by the allocator
        print((resident() - before) / n, meter.device_bytes / n, peak / n)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    resident, reported, peak = map(float, done.stdout.split())
    assert reported <= 0.25
    assert peak <= 0.5
    # Tables, the survey's sizes (8 bytes a chunk) and what the allocator keeps come on top.
    assert resident <= 0.35


# ---- sample="auto" ------------------------------------------------------------------------------


def test_auto_begins_small_and_settles_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "autodrop_ext")
    walk = Walk()
    meter = AngularVelocity(walk.named, 2, sample="auto", tolerance=0.7)
    exact = AngularVelocity(walk.named, 2)
    fractions, angles = [], []
    for step in range(40):
        walk.step()
        reading, true = meter.observe(), exact.observe()
        if step % 2:
            fractions.append(meter.fraction)
            if reading is not None:
                angles.append((reading.angle, true.angle, reading.standard_error))
    assert fractions[0] == PILOT_FRACTION
    assert len(set(fractions)) == 2
    chosen = fractions[-1]
    assert chosen is not None and 1 / 64 < chosen < 1
    assert fractions == sorted(fractions)
    assert f"a fraction of {chosen:g} is read" in caplog.text
    assert len(angles) == 18 and all(a is not None for a, _, _ in angles)  # none was lost
    late = angles[-6:]
    # Chosen by an estimate of the error from a few chunks, for the coming windows.
    assert all(error < 2 * 0.7 for _, _, error in late)
    assert all(abs(a - true) < 4 * 0.7 for a, true, _ in late)


def test_auto_reads_everything_of_a_small_model(caplog: pytest.LogCaptureFixture) -> None:
    walk = Walk()
    auto, exact = watch(
        [AngularVelocity(walk.named, 3, sample="auto"), AngularVelocity(walk.named, 3)], walk, 24
    )
    assert auto == exact
    assert "sample='auto': all parameters are read" in caplog.text


# ---- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [1 / 8, "auto"])
@pytest.mark.parametrize("steps", [21, 24])
def test_resume_is_bit_exact(sample: Any, steps: int, tmp_path: pathlib.Path) -> None:
    walk = Walk()
    options: dict[str, Any] = {"sample": sample, "seed": 3, "tolerance": 2.0}
    meter = AngularVelocity(walk.named, 2, **options)
    watch([meter], walk, steps)
    torch.save(meter.state_dict(), tmp_path / "state.pt")
    again = AngularVelocity(walk.named, 2, **options)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    first, second = watch([meter, again], walk, 12)
    assert first == second and len(first) >= 6
    assert {reading.angle is None for reading in first} == {False}


@pytest.mark.parametrize(
    ("saved", "loaded", "words"),
    [
        ({"sample": 1 / 8}, {"sample": 1 / 4}, "sample=0.125 and seed=0, not 0.25 and 0"),
        ({"sample": 1 / 8, "seed": 1}, {"sample": 1 / 8}, "seed=1, not 0.125 and 0"),
        ({"sample": 1 / 8}, {}, "sample=0.125 and seed=0, not 1 and 0"),
        ({}, {"sample": 1 / 8}, "sample=1 and seed=0, not 0.125 and 0"),
    ],
)
def test_another_sample_warms_up_again(
    saved: dict[str, Any], loaded: dict[str, Any], words: str
) -> None:
    walk = Walk()
    meter = AngularVelocity(walk.named, 2, **saved)
    watch([meter], walk, 20)
    other = AngularVelocity(walk.named, 2, **loaded)
    other.load_state_dict(meter.state_dict())
    walk.step()
    with pytest.warns(RuntimeWarning, match=f"cannot be continued .*{words}"):
        other.observe()
    (readings,) = watch([other], walk, 9)
    assert [r.angle is None for r in readings] == [True, True, False, False, False]
    assert readings[-1].step == 30


def test_states_from_before_sampling_can_be_loaded() -> None:
    walk = Walk()
    meter = AngularVelocity(walk.named, 2)
    watch([meter], walk, 8)
    state = meter.state_dict()
    del state["sample"]
    again = AngularVelocity(walk.named, 2)
    again.load_state_dict(state)
    first, second = watch([meter, again], walk, 6)
    assert first == second


# ---- faults -------------------------------------------------------------------------------------


def test_nan_and_moved_parameters_start_the_sample_over() -> None:
    walk = Walk()
    meter = AngularVelocity(walk.named, 2, sample=1 / 8)
    watch([meter], walk, 20)
    kept = walk.tensors[2][0, 0].clone()
    walk.tensors[2].fill_(math.nan)
    with pytest.warns(RuntimeWarning, match="t2 held NaN or infinity"):
        (readings,) = watch([meter], walk, 2)
    assert readings[0].angle is None and math.isnan(readings[0].standard_error)
    walk.tensors[2].copy_(torch.full(SHAPES[2], float(kept)))
    (readings,) = watch([meter], walk, 12)
    assert [r.angle is None for r in readings] == [True, True] + [False] * 4
    walk.tensors[0].data = walk.tensors[0].clone()
    with pytest.warns(RuntimeWarning, match="were moved, replaced"):
        (readings,) = watch([meter], walk, 14)
    assert readings[-1].angle is not None and readings[-1].standard_error > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sample": 0.0}, ValueError, "sample: expected None, 'auto' or a number above 0"),
        ({"sample": 1.5}, ValueError, "at most 1, got 1.5"),
        ({"sample": "half"}, ValueError, "got 'half'"),
        ({"sample": True}, TypeError, "sample: .* got True"),
        ({"sample": [0.5]}, TypeError, r"sample: .* got \[0.5\]"),
        ({"sample": math.nan}, ValueError, "got nan"),
        ({"seed": 0.5}, TypeError, "seed: expected an int, got 0.5"),
        ({"tolerance": 0.0}, ValueError, "tolerance: expected degrees above 0, got 0.0"),
        ({"tolerance": "x"}, TypeError, "tolerance: expected a number of degrees, got 'x'"),
        ({"per_tensor": 1}, TypeError, "per_tensor: expected a bool, got 1"),
        ({"per_group": None}, TypeError, "per_group: expected a bool, got None"),
    ],
)
def test_wrong_arguments_say_what_was_expected(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AngularVelocity([torch.randn(3)], 2, **arguments)


def test_seeds_read_different_chunks_and_equal_seeds_the_same() -> None:
    walk = Walk()
    options: dict[str, Any] = {"sample": 1 / 8}
    a, b, c = watch(
        [AngularVelocity(walk.named, 2, seed=s, **options) for s in (0, 0, 1)], walk, 20
    )
    assert a == b
    assert all(x.angle != y.angle for x, y in zip(a, c, strict=True))


def test_the_sample_of_a_tensor_does_not_depend_on_the_others() -> None:
    """Frozen or added layers leave the choice of the rest as it is, until the survey is over."""
    tensors = [torch.randn(100_000), torch.randn(50_000)]
    meters = [
        AngularVelocity([("b", tensors[1])], 2, sample=1 / 8),
        AngularVelocity([("a", tensors[0]), ("b", tensors[1])], 2, sample=1 / 8),
    ]
    starts = []
    for meter, index in zip(meters, (0, 1), strict=True):
        meter.observe()
        assert meter._arenas is not None
        choice = meter._arenas[0].plan.choice
        assert choice is not None
        starts.append(choice.start[choice.tensor == index].tolist())
    assert starts[0] == starts[1]
    assert len(starts[0]) == round((len(chunk_starts(50_000)) - 1) / 8)


def test_exact_readings_do_not_change_beside_sampled_ones() -> None:
    """``independent.py`` in float64 and the meter without a sample, as ever."""
    walk = Walk()
    meter = AngularVelocity(walk.named, 4)
    iterates, angles = [], []
    for _ in range(24):
        walk.step()
        iterates.append(torch.cat([t.flatten() for t in walk.tensors]).numpy().copy())
        reading = meter.observe()
        if reading is not None:
            angles.append(reading.angle)
    assert angles == pytest.approx(independent.angles(np.array(iterates), 4), abs=1e-3)


def test_sampled_sums_are_left_out_of_what_reshards() -> None:
    walk = Walk()
    meters = [AngularVelocity(walk.named, 2, sample=s) for s in (None, 1 / 8, "auto")]
    watch(meters, walk, 20)
    held = [list(meter.arena_state.state_dict()["arenas"]) for meter in meters]
    names = [name for name, _ in walk.named]
    # The last one reads everything of so small a model.
    assert held == [names, [], names]


def test_copies_go_on_exactly() -> None:
    walk = Walk()
    meter = AngularVelocity(walk.named, 2, sample=1 / 8)
    watch([meter], walk, 23)
    state = pickle.loads(pickle.dumps({"meter": meter, "walk": walk}))
    again, other = state["meter"], state["walk"]
    again = AngularVelocity(other.named, 2, sample=1 / 8)
    again.load_state_dict(state["meter"].state_dict())
    (first,), (second,) = watch([meter], walk, 10), watch([again], other, 10)
    assert first == second
