"""The weighted average: against float64, constant to the bit, faults, checkpoints."""

from __future__ import annotations

import copy
import io
import math
import pickle
import subprocess
import sys
import textwrap
import warnings
from typing import Any

import pytest
import torch
from cases import BACKENDS, every_backend, every_case, make
from torch import Tensor

import autodrop_ext.ops
from autodrop_ext.averaging import ParameterAverage

WEIGHTS = (1, 2, 3, 4)


def moved(tensors: list[Tensor], step: int) -> None:
    """Take the tensors one step on, in place."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for t in tensors:
            noise = torch.randn(t.shape, generator=generator, dtype=torch.float32)
            t.copy_(t + 0.1 * noise.to(t.dtype) * t.abs().to(t.dtype))


def as_double(t: Tensor) -> Tensor:
    real = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    return real.detach().double().clone()


def average_on(
    backend: str, tensors: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> ParameterAverage:
    """An average that one of the test's backends takes."""
    monkeypatch.setitem(autodrop_ext.ops.BACKENDS, "cpu", BACKENDS[backend])
    return ParameterAverage(tensors, backend="cpu")


@every_case
@every_backend
def test_average_has_the_bits_of_the_reference_and_the_value_of_float64(
    case: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    for name in (backend, "reference"):
        tensors = make(case)
        average = average_on(name, tensors, monkeypatch)
        wanted = [torch.zeros_like(as_double(t)) for t in tensors]
        largest = [torch.zeros_like(w) for w in wanted]
        total = 0.0
        for step, weight in enumerate(WEIGHTS):
            moved(tensors, step)
            total += weight
            for w, most, t in zip(wanted, largest, tensors, strict=True):
                w += weight * as_double(t)
                most.copy_(torch.maximum(most, as_double(t).abs()))
            average.add(weight)
        assert average.write_back()
        written.append([as_double(t) for t in tensors])
        for t, w, most in zip(tensors, wanted, largest, strict=True):
            eps = torch.finfo(t.dtype).eps
            # Half an ulp of the parameter's own format, and of float32 (or float64) one rounding of
            # the difference, the product and the sum at each of four snapshots. Below the normal
            # numbers the format's spacing is fixed.
            share = eps / 2 + 8 * (eps if t.dtype == torch.float64 else 2.0**-24)
            info = torch.finfo(t.dtype)
            error = (as_double(t) - w / total).abs()
            assert bool((error <= share * most + info.tiny * info.eps * 8).all())
    assert all(torch.equal(a, b) for a, b in zip(*written, strict=True))


@every_case
@every_backend
def test_constant_parameters_stay_constant_to_the_bit(
    case: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, original = make(case), make(case)
    average = average_on(backend, tensors, monkeypatch)
    # The paper's delay; in the interpreter a shorter one does, as every snapshot is the same work.
    for weight in range(1, 4 if backend == "triton" else 21):
        average.add(weight)
    assert average.write_back()
    # torch.equal takes the two zeros for one: the sign of a zero is the one bit that may change.
    assert all(torch.equal(t, o) for t, o in zip(tensors, original, strict=True))


def test_the_weights_that_algorithm_1_prints_sum_to_one() -> None:
    x = torch.zeros(3)
    average = ParameterAverage([x])
    for j in range(1, 5):
        x.fill_(float(j))
        average.add(j)
        assert average.device_bytes == 4 * 32  # three elements, padded to 128 bytes
    assert average.snapshots == 4
    assert average.write_back()
    # (1 + 4 + 9 + 16) / (1 + 2 + 3 + 4); two float32 roundings at a step, damped by those after it.
    assert x.tolist() == pytest.approx([3.0] * 3, rel=3e-7)
    assert average.device_bytes == average.snapshots == 0


def test_float64_parameters_keep_their_digits() -> None:
    x = torch.tensor([1.0, 1.0], dtype=torch.float64)
    average = ParameterAverage([x])
    average.add(1)
    x += 1e-12
    average.add(2)
    average.write_back()
    # A rounding of 1.1e-16 at each of four operations, next to a displacement of 1e-12.
    assert (x - 1).tolist() == pytest.approx([2e-12 / 3] * 2, abs=5e-16)


def test_autograd_learns_that_the_parameters_have_changed() -> None:
    """A graph that needs the old values fails instead of using the new ones."""
    for dtype in (torch.float32, torch.float64):
        x = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        average = ParameterAverage([x])
        average.add()
        loss = (x * x).sum()
        average.write_back()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# ---- faults ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_average_that_is_not_finite_is_not_written(bad: float) -> None:
    a, b, c = torch.ones(3), torch.ones(4), torch.ones(5, dtype=torch.float64)
    average = ParameterAverage([("a", a), ("b", b), ("c", c)])
    with pytest.warns(RuntimeWarning, match="the average of b is not finite") as caught:
        for _ in range(2):
            b[1] = bad
            average.add(1)
            for x in (a, b, c):
                x.fill_(2.0)
            average.add(2)
            assert not average.write_back()
            assert all(bool((x == 2).all()) for x in (a, b, c))
            for x in (a, b, c):
                x.fill_(1.0)
    assert len(caught) == 1
    average.add(1)
    a.fill_(4.0)
    average.add(2)
    assert average.write_back()
    assert a.tolist() == [3.0] * 3


@pytest.mark.parametrize("when", ["before add", "before write_back"])
def test_parameters_that_change_are_never_written_with_an_average_of_others(when: str) -> None:
    x = torch.nn.Parameter(torch.ones(3))
    average = ParameterAverage([("x", x)])
    average.add(1)
    old, x.data = x.data, torch.full((3,), 7.0)
    with pytest.warns(RuntimeWarning, match="averaged parameters were moved.*starts over"):
        if when == "before add":
            average.add(2)
            assert average.snapshots == 1
        assert average.write_back() == (when == "before add")
    assert x.tolist() == [7.0] * 3
    assert old.tolist() == [1.0] * 3


def test_frozen_parameters_are_left_out() -> None:
    x, y = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3), requires_grad=False)
    average = ParameterAverage([x, y])
    for value in (1.0, 4.0):
        x.data.fill_(value)
        y.data.fill_(value)
        average.add(value / value)
    average.write_back()
    assert x.tolist() == [2.5] * 3
    assert y.tolist() == [4.0] * 3


def test_tied_weights_are_averaged_once() -> None:
    x = torch.ones(6)
    average = ParameterAverage([x, x.view(6)])
    average.add(1)
    x.fill_(4.0)
    average.add(2)
    average.write_back()
    assert x.tolist() == [3.0] * 6


def test_missing_memory_says_how_much_was_needed() -> None:
    """In a process of its own whose address space is limited for real."""
    script = textwrap.dedent(
        """
        import resource, torch
        from autodrop_ext.averaging import ParameterAverage
        average = ParameterAverage([torch.zeros(100_000_000)])
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
        average.add()
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert (
        "no memory on cpu: 400,000,000 bytes were needed; the average takes 4 bytes for each"
        in done.stderr
    )
    assert "average=False" in done.stderr


def test_wrong_arguments_say_what_was_expected() -> None:
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight: expected a positive number, got"):
            ParameterAverage([torch.ones(1)]).add(weight)
    with pytest.raises(ValueError, match="backend: expected 'auto' or one of"):
        ParameterAverage([torch.ones(1)], backend="gpu")
    with pytest.raises(TypeError, match="params: expected an iterable of tensors"):
        ParameterAverage(3)
    assert not ParameterAverage([torch.ones(1)]).write_back()


# ---- state ----------------------------------------------------------------------------------


def run(average: ParameterAverage, tensors: list[Tensor], steps: range) -> None:
    for step in steps:
        moved(tensors, step)
        average.add(step + 1)


@pytest.mark.parametrize("case", ["mixed dtypes", "layouts", "complex", "empty and 0-d"])
@pytest.mark.parametrize("way", ["state", "deepcopy", "pickle"])
def test_continued_averages_have_the_same_bits(case: str, way: str) -> None:
    # Copies lose a lazy conjugate: to them the same values lie otherwise in memory.
    tensors = [t.resolve_conj() for t in make(case)]
    average = ParameterAverage(tensors)
    run(average, tensors, range(3))
    if way == "state":
        buffer = io.BytesIO()
        torch.save(average.state_dict(), buffer)
        other_tensors = [t.clone() for t in tensors]
        other = ParameterAverage(other_tensors)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        other.load_state_dict(state)
        again = other.state_dict()  # before the first use
        assert all(torch.equal(again["means"][k], v) for k, v in state["means"].items())
    elif way == "deepcopy":
        other, other_tensors = copy.deepcopy((average, tensors))
    else:
        other, other_tensors = pickle.loads(pickle.dumps((average, tensors)))
    run(average, tensors, range(3, 6))
    run(other, other_tensors, range(3, 6))
    assert average.snapshots == other.snapshots == 6
    assert average.write_back() and other.write_back()
    assert all(torch.equal(a, b) for a, b in zip(tensors, other_tensors, strict=True))


def test_a_state_that_does_not_fit_starts_over() -> None:
    x = torch.ones(3)
    average = ParameterAverage([("x", x)])
    average.add(1)
    for tensors, message in (
        ([("y", torch.ones(3))], "y is not in it"),
        ([("x", torch.ones(4))], r"x was \(3,\), now it is \(4,\)"),
        ([("x", torch.ones(3).double())], "averaged in torch.float32, not in torch.float64"),
    ):
        other = ParameterAverage(tensors)
        other.load_state_dict(average.state_dict())
        with pytest.warns(RuntimeWarning, match=f"{message}.*starts over"):
            other.add(5)
        assert other.snapshots == 1
        tensors[0][1].fill_(2.0)
        other.add(5)
        other.write_back()
        assert bool((tensors[0][1] == 1.5).all())
    without = ParameterAverage([("x", x)])
    with pytest.warns(RuntimeWarning, match="saved without the means"):
        without.load_state_dict(average.state_dict() | {"means": {}})
    assert without.snapshots == 0


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (3, "state_dict: expected a dict, got int"),
        ({}, "state_dict: no entry 'version'"),
        ({"version": 2}, r"state_dict\['version'\]: expected 1, which this release reads, got 2"),
        ({"version": 1, "snapshots": 1, "means": {}}, "state_dict: no entry 'total'"),
        (
            {"version": 1, "snapshots": 1, "total": "1", "means": {}},
            r"state_dict\['total'\]: expected a finite number above 0, got '1'",
        ),
        (
            {"version": 1, "snapshots": 1, "total": 1.0, "means": {"x": [1.0]}},
            r"state_dict\['means'\]\['x'\]: expected a dense floating-point tensor, got",
        ),
    ],
)
def test_a_wrong_state_changes_nothing(broken: Any, message: str) -> None:
    average = ParameterAverage([torch.ones(3)])
    average.add(1)
    with pytest.raises(ValueError, match=message):
        average.load_state_dict(broken)
    assert average.snapshots == 1


def test_an_empty_state_is_quiet() -> None:
    average = ParameterAverage([torch.ones(3)])
    other = ParameterAverage([torch.ones(3)])
    other.add(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(average.state_dict())
    assert other.snapshots == 0
