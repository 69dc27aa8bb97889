"""Sampled meters: their survey, angles, errors, memory and checkpoints."""

from __future__ import annotations

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
from autodrop_ext.sampling.draw import DrawnChunks, Sample, chunk_starts, draw

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


def drawn_by(meter: AngularVelocity, named: list[tuple[str, torch.Tensor]]) -> DrawnChunks:
    """The chunks that a meter reads, drawn again from what its state says of the survey."""
    state = meter.state_dict()["sample"]
    assert state["sized"], "the survey goes on"
    return draw(
        [t.numel() for _, t in named],
        [f"{name}|{tuple(t.shape)} {t.dtype}|()" for name, t in named],
        Sample(state["fraction"], state["seed"]),
        [state["sizes"][name].double().numpy() for name, _ in named],
    )


@pytest.mark.parametrize("backend", ["reference", "cpu baseline", "cpu widest"])
def test_a_sampled_angle_is_that_of_the_drawn_chunks(
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
    assert reading is not None and reading.angle is not None
    drawn = drawn_by(meter, walk.named)
    dot = norm = previous = 0.0
    chunks = zip(drawn.tensor, drawn.start, drawn.length, drawn.expansion, strict=True)
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


# ---- the survey ---------------------------------------------------------------------------------


def test_a_survey_comes_first_and_takes_no_sums() -> None:
    """Three windows here, of a million elements each; then the sample; three windows later, angles.

    In the first window nothing but copies is held: half a byte... a third of the parameters.
    """
    n = (5 << 19) + 7  # two and a half million
    p = torch.zeros(n)
    meter = AngularVelocity([("p", p)], 2, sample=1 / 8)
    generator = torch.Generator().manual_seed(0)
    held, taken, angles = [], [], []
    for _ in range(16):
        p += 1 + torch.randn(n, generator=generator)
        reading = meter.observe()
        held.append(meter.device_bytes / n)
        taken.append(meter.state_dict()["arenas"] != {})
        angles.append(None if reading is None else reading.angle)
    # The sums are there from the first step of the fourth window on: 12 bytes for each element.
    assert taken == [False] * 6 + [True] * 10
    assert held[6:] == [pytest.approx(12 / 8, rel=0.01)] * 10
    # A third of the float32 parameters at a time is copied, at most; in units of 2^20 elements.
    assert max(held[:6]) <= 4 / 3 * 1.3
    # Windows 4, 5 and 6 are gathered, and the sixth ends with the twelfth step.
    assert [angle is not None for angle in angles] == [i in (11, 13, 15) for i in range(16)]
    assert meter.windows == 8 and meter.windows_since_restart == 5


@pytest.mark.parametrize(
    ("elements", "windows"), [(1000, 1), (1 << 20, 1), ((1 << 20) + 1, 2), (9 << 20, 8)]
)
def test_a_survey_takes_a_window_for_each_million_elements(elements: int, windows: int) -> None:
    p = torch.zeros(elements)
    meter = AngularVelocity([p], 1, sample=1 / 16)
    steps = 0
    while not meter.state_dict()["sample"]["sized"]:
        p += 1
        meter.observe()
        steps += 1
    # The first step of the window after the survey draws the sample.
    assert steps == windows + 1


def test_readings_of_a_survey_are_unknown() -> None:
    p = torch.zeros(4 << 20)
    meter = AngularVelocity([p], 1, sample=1 / 64)
    for step in range(7):
        p += 1 + step % 3
        reading = meter.observe()
        assert (reading is None) == (step < 2)
    assert reading is not None and reading.angle is not None
    unknown = meter.history[:-1]
    assert len(unknown) == 4
    assert all(r.angle is None and math.isnan(r.standard_error) for r in unknown)
    assert all(math.isnan(r.margin) for r in unknown)


def test_changed_parameters_are_surveyed_again() -> None:
    walk = Walk()
    meter = AngularVelocity(walk.named, 2, sample=1 / 8)
    watch([meter], walk, 20)
    before = meter.state_dict()["sample"]
    walk.tensors[0].data = walk.tensors[0].clone()
    with pytest.warns(RuntimeWarning, match="were moved, replaced"):
        watch([meter], walk, 2)
    assert not meter.state_dict()["sample"]["sized"]
    (readings,) = watch([meter], walk, 10)
    # The survey took the window before; two that gather are without an angle.
    assert [r.angle is None for r in readings] == [True] * 2 + [False] * 3
    after = meter.state_dict()["sample"]
    assert before["drawn"] != after["drawn"]
    assert any((before["sizes"][n] != after["sizes"][n]).any() for n in before["sizes"])


def test_a_start_over_in_the_survey_lets_it_go_on() -> None:
    """Another rank that surveys lets this one start over at each window's end."""
    p = torch.zeros(3 << 20)
    meter = AngularVelocity([p], 2, sample=1 / 64)
    for step in range(3):
        p += 1
        meter.observe()
        if step == 2:
            with pytest.warns(RuntimeWarning, match="the window is discarded"):
                meter.discard()
    steps = 3
    while not meter.state_dict()["sample"]["sized"]:
        p += 1
        meter.observe()
        steps += 1
    assert steps == 3 * 2 + 1
    assert all((m > 0).all() for m in meter.state_dict()["sample"]["sizes"].values())


# ---- how good readings are ----------------------------------------------------------------------


def test_estimates_scatter_around_the_exact_angle_as_they_say() -> None:
    """Real training, ``benchmarks/accuracy/sampling.py`` does it at length."""
    from demo.digits import Digits

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
        if true is not None and step >= 12:  # after the survey
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


def test_the_sample_is_drawn_by_the_motion() -> None:
    """Few rows make most of this walk's motion: they are read for certain, and errors are small."""
    walk = Walk()
    named = walk.named
    meters = [AngularVelocity(named, 2, sample=1 / 8, seed=s) for s in range(8)]
    exact = AngularVelocity(named, 2)
    (true, *found) = watch([exact, *meters], walk, 40)
    wanted = {r.step: r.angle for r in true}
    errors = [
        abs(r.angle - wanted[r.step]) for readings in found for r in readings if r.angle is not None
    ]
    lengths, labels = [t.numel() for _, t in named], [name for name, _ in named]
    for meter in meters:
        drawn = drawn_by(meter, named)
        uniform = draw(lengths, labels, meter_sample(meter))
        motion = meter.state_dict()["sample"]["sizes"]
        shares = [captured(d, named, motion) for d in (drawn, uniform)]
        assert shares[0] > 1.5 * shares[1]  # measured: 1.7 and more
    # Measured: 1.0; without the survey 2.9.
    assert np.median(errors) < 1.6


def meter_sample(meter: AngularVelocity) -> Sample:
    assert meter.sample is not None
    return Sample(meter.sample, meter.seed)


def captured(drawn: DrawnChunks, named: list[Any], motion: dict[str, torch.Tensor]) -> float:
    """Share of the surveyed motion that is in the chunks which are read."""
    total = sum(float(m.sum()) for m in motion.values())
    read = 0.0
    for t, (name, tensor) in enumerate(named):
        starts = chunk_starts(tensor.numel())
        at = np.searchsorted(starts, drawn.start[drawn.tensor == t])
        read += float(motion[name].double().numpy()[at].sum())
    return read / total


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

    During the survey, of eight windows, half a byte: an eighth of the float32 parameters.
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
        for step in range(14):
            touch(params)
            reading = meter.observe()
            peak = max(peak, meter.device_bytes)
        assert meter.state_dict()["sample"]["sized"] and reading.angle is not None
        ctypes.CDLL(None).malloc_trim(0)  # what was freed but kept by the allocator
        print((resident() - before) / n, meter.device_bytes / n, peak / n)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    resident, reported, peak = map(float, done.stdout.split())
    assert reported <= 0.25
    # Pieces are cut at multiples of 2^20 elements.
    assert 0.4 <= peak <= 0.6
    # Tables, the survey's motion (8 bytes a chunk) and what the allocator keeps come on top.
    assert resident <= 0.35


# ---- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3, 21, 24], ids=["first of the sample", "inside", "at the end"])
def test_resume_is_bit_exact(steps: int, tmp_path: pathlib.Path) -> None:
    walk = Walk()
    options: dict[str, Any] = {"sample": 1 / 8, "seed": 3}
    meter = AngularVelocity(walk.named, 2, **options)
    watch([meter], walk, steps)
    torch.save(meter.state_dict(), tmp_path / "state.pt")
    again = AngularVelocity(walk.named, 2, **options)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    first, second = watch([meter, again], walk, 12)
    assert repr(first) == repr(second)  # NaN equals itself here
    assert len(first) >= 5 and first[-1].angle is not None
    if steps > 3:
        assert {reading.angle is None for reading in first} == {False}
    assert meter.state_dict()["sample"]["drawn"] == again.state_dict()["sample"]["drawn"]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_checkpoint_in_the_survey_begins_a_new_one(steps: int) -> None:
    p = torch.zeros(3 << 20)
    meter = AngularVelocity([("p", p)], 2, sample=1 / 64)
    for _ in range(steps):
        p += 1
        meter.observe()
    state = meter.state_dict()
    assert not state["sample"]["sized"] and state["sample"]["sizes"] == {}
    assert state["arenas"] == {}
    again = AngularVelocity([("p", p)], 2, sample=1 / 64)
    again.load_state_dict(state)
    taken = 0
    while not again.state_dict()["sample"]["sized"]:
        p += 1
        again.observe()
        taken += 1
    assert taken == 3 * 2 + 1
    assert again.steps == steps + taken  # counts go on


@pytest.mark.parametrize(
    ("saved", "loaded", "words"),
    [
        ({"sample": 1 / 8}, {"sample": 1 / 4}, "sample=0.125 and seed=0, not 0.25 and 0"),
        ({"sample": 1 / 8, "seed": 1}, {"sample": 1 / 8}, "seed=1, not 0.125 and 0"),
        ({"sample": 1 / 8}, {}, "it has sample=0.125, and now everything is read"),
        ({}, {"sample": 1 / 8}, "it has sample=1 and seed=0, not 0.125 and 0"),
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
    # The motion of an earlier survey serves another sample too; without one a survey comes first.
    lost = 2 + ("sample" not in saved)
    assert [r.angle is None for r in readings] == [True] * lost + [False] * (5 - lost)
    assert readings[-1].step == 30


# ---- faults -------------------------------------------------------------------------------------


def test_the_same_sample_goes_on_after_nan() -> None:
    walk = Walk()
    meter = AngularVelocity(walk.named, 2, sample=1 / 8)
    watch([meter], walk, 20)
    before = meter.state_dict()["sample"]["drawn"]
    kept = walk.tensors[2][0, 0].clone()
    walk.tensors[2].fill_(math.nan)
    with pytest.warns(RuntimeWarning, match="t2 held NaN or infinity"):
        (readings,) = watch([meter], walk, 2)
    assert readings[0].angle is None and math.isnan(readings[0].standard_error)
    walk.tensors[2].copy_(torch.full(SHAPES[2], float(kept)))
    (readings,) = watch([meter], walk, 12)
    assert [r.angle is None for r in readings] == [True, True] + [False] * 4
    assert meter.state_dict()["sample"]["drawn"] == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sample": 0.0}, ValueError, "sample: expected None or a number above 0"),
        (
            {"sample": "auto"},
            ValueError,
            r"got 'auto'; read everything \(sample=None\), .* sample=1/64",
        ),
        ({"sample": 1.5}, ValueError, "at most 1, got 1.5"),
        ({"sample": "half"}, ValueError, "got 'half'"),
        ({"sample": True}, TypeError, "sample: .* got True"),
        ({"sample": [0.5]}, TypeError, r"sample: .* got \[0.5\]"),
        ({"sample": math.nan}, ValueError, "got nan"),
        ({"seed": 0.5}, TypeError, "seed: expected an int, got 0.5"),
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
    meters = [AngularVelocity(walk.named, 2, seed=s, sample=1 / 8) for s in (0, 0, 1)]
    a, b, c = (readings[2:] for readings in watch(meters, walk, 20))
    assert a == b
    assert len(a) > 5 and all(x.angle != y.angle for x, y in zip(a, c, strict=True))


def test_exact_readings_are_those_of_an_independent_meter() -> None:
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
    meters = [AngularVelocity(walk.named, 2, sample=s) for s in (None, 1 / 8)]
    watch(meters, walk, 20)
    held = [list(meter.arena_state.state_dict()["arenas"]) for meter in meters]
    names = [name for name, _ in walk.named]
    assert held == [names, []]


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
