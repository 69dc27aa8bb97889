"""The three operations of every backend, on every case, against the reference and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import BACKENDS, every_backend, every_case, make
from torch import Tensor

from autodrop_ext.ops import Sums, reference
from autodrop_ext.ops.device_sums import DeviceSums
from autodrop_ext.ops.plan import Plan

WINDOW = 3
CPU = torch.device("cpu")


def device_sums_of(tensors: list[Tensor], backend: str) -> DeviceSums:
    return DeviceSums(Plan([(f"t{i}", t) for i, t in enumerate(tensors)], CPU), BACKENDS[backend])


def move(tensors: list[Tensor], step: int) -> None:
    """The same motion for every backend: a drift and a wobble, relative to each element."""
    for i, tensor in enumerate(tensors):
        tensor.mul_(1 + 0.01 * ((i + step) % 3) - 0.004 * step)


def run(case: str, backend: str, form: str, windows: int = 4) -> tuple[DeviceSums, list[Sums]]:
    return run_on(make(case), backend, form, windows)


def run_on(
    tensors: list[Tensor], backend: str, form: str, windows: int = 4
) -> tuple[DeviceSums, list[Sums]]:
    arenas = device_sums_of(tensors, backend)
    sums = []
    for window in range(windows):
        for step in range(WINDOW):
            move(tensors, step + window)
            if window == 0 and step == 0:
                arenas.begin(form)
            else:
                arenas.add(first=step == 0)
        sums.append(arenas.close(WINDOW))
    return arenas, sums


def bits(arena: Tensor) -> Tensor:
    return arena.view(torch.int32).clone()


@every_case
@every_backend
@pytest.mark.parametrize("form", ["sum", "delta"])
def test_arenas_have_the_bits_of_the_reference(case: str, backend: str, form: str) -> None:
    arenas, sums = run(case, backend, form)
    expected, expected_sums = run(case, "reference", form)
    for role in ("running", "previous", "before"):
        assert torch.equal(bits(getattr(arenas, role)), bits(getattr(expected, role))), role
    for got, wanted in zip(sums, expected_sums, strict=True):
        # Both sum in float64, in another order: 2^-53 for each of up to 3e5 additions.
        assert list(got) == pytest.approx(list(wanted), rel=1e-10, abs=1e-300)


@every_case
@every_backend
@pytest.mark.parametrize("form", ["sum", "delta"])
def test_sums_match_float64(case: str, backend: str, form: str) -> None:
    if case == "extreme values":
        pytest.skip("their float32 sums overflow or lose every bit; the bits are compared above")
    tensors = make(case)
    means = []
    for window in range(4):
        total = None
        for step in range(WINDOW):
            move(tensors, step + window)
            flat = torch.cat([_real(t).double().reshape(-1) for t in tensors])
            total = flat if total is None else total + flat
        means.append(total / WINDOW)
    s, previous = means[3] - means[2], means[2] - means[1]
    _, sums = run(case, backend, form)
    last = sums[-1]
    # The accuracy contract: sums and norms to 1e-6 relative. Steps here are 1 % of the parameters,
    # so that the roundings of a float32 sum, 2^-24 of it, weigh 6e-6 of a displacement at worst,
    # and less the more elements share them.
    assert last.mean_norm == pytest.approx(float(means[3] @ means[3]), rel=1e-6)
    assert last.norm == pytest.approx(float(s @ s), rel=2e-5)
    assert last.previous_norm == pytest.approx(float(previous @ previous), rel=2e-5)
    scale = float(s.norm() * previous.norm())
    assert last.dot == pytest.approx(float(s @ previous), abs=2e-5 * scale)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


@every_case
@every_backend
@pytest.mark.parametrize("weight", [1.0, 3.0, 0.1])
@pytest.mark.parametrize("delta", [False, True])
def test_weighted_accumulate_has_the_bits_of_the_reference(
    case: str, backend: str, weight: float, delta: bool
) -> None:
    results = []
    for name in (backend, "reference"):
        tensors = make(case)
        arenas = device_sums_of(tensors, name)
        operations = BACKENDS[name].bind(arenas.plan)
        mean = arenas.before if delta else None
        if delta:
            operations.accumulate(arenas.before, None, first=True)
            move(tensors, 1)
        operations.accumulate(arenas.running, mean, first=True, weight=weight)
        move(tensors, 2)
        operations.accumulate(arenas.running, mean, first=False, weight=weight)
        results.append(bits(arenas.running))
    assert torch.equal(*results)


@every_case
@every_backend
@pytest.mark.parametrize("with_mean", [False, True])
def test_write_back_sets_the_parameters(case: str, backend: str, with_mean: bool) -> None:
    results = []
    for name in (backend, "reference"):
        tensors = make(case)
        arenas = device_sums_of(tensors, name)
        arenas.begin("sum")
        arenas.add(first=False)
        if with_mean:
            arenas.before.copy_(arenas.running * 0.25)
        BACKENDS[name].bind(arenas.plan).write_back(
            arenas.running, arenas.before if with_mean else None, 0.25 if with_mean else 0.5
        )
        results.append([_real(t).clone() for t in tensors])
    for got, wanted, original in zip(*results, map(_real, make(case)), strict=True):
        assert torch.equal(got, wanted)
        # Twice the parameter, halved: exact but where float64 does not fit the float32 arena.
        tolerance = 1e-7 if original.dtype == torch.float64 else 0.0
        torch.testing.assert_close(got, original, rtol=tolerance, atol=0.0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
@every_backend
def test_values_that_are_not_finite_reach_the_sums(backend: str) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        tensors = [torch.ones(40), torch.ones(3), torch.ones(9, dtype=torch.float16)]
        tensors[1][1] = bad
        arenas = device_sums_of(tensors, backend)
        arenas.begin("sum")
        arenas.close(1)
        finite = np.isfinite(arenas.per_tensor()).all(axis=1).tolist()
        assert finite == [True, False, True]


def test_half_precision_conversions_are_exact_for_every_bit_pattern() -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = patterns.view(dtype)
        for backend in ("cpu baseline", "cpu widest"):
            arenas = device_sums_of([x.clone()], backend)
            arenas.begin("sum")
            wanted = x.float()
            same = arenas.running.view(torch.int32) == wanted.view(torch.int32)
            assert bool((same | (arenas.running.isnan() & wanted.isnan())).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_write_back_rounds_half_precision_to_nearest_even(dtype: torch.dtype) -> None:
    # Every representable value, the midpoints to its neighbours and a hair to either side of them.
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    exact = patterns.view(dtype).float()
    exact = exact[exact.isfinite()]
    ulp = (exact.abs() * torch.finfo(dtype).eps).clamp(min=float(torch.finfo(dtype).tiny) / 512)
    values = torch.cat([exact + ulp * share for share in (0, 0.25, 0.5, 0.499, 0.501, 1.5)])
    for backend in ("cpu baseline", "cpu widest"):
        target = torch.zeros(len(values), dtype=dtype)
        arenas = device_sums_of([target], backend)
        arenas.running[: len(values)] = values
        BACKENDS[backend].bind(arenas.plan).write_back(arenas.running, None, 1.0)
        assert torch.equal(target.view(torch.int16), values.to(dtype).view(torch.int16))


@pytest.mark.parametrize("form", ["sum", "delta"])
def test_sums_do_not_depend_on_the_number_of_threads(form: str) -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            # 1.5e6 elements: enough for 4 threads when steps are added (see kBytesPerThread in
            # csrc/cpu/parallel.h), and for 7 when a window is closed in delta form.
            generator = torch.Generator().manual_seed(0)
            tensors = [torch.randn(250_000 + 17 * i, generator=generator) for i in range(6)]
            arenas, sums = run_on(tensors, "cpu widest", form)
            results.append((sums, bits(arenas.running).tolist(), arenas.per_tensor().tolist()))
    finally:
        torch.set_num_threads(threads)
    assert all(result == results[0] for result in results[1:])


@pytest.mark.parametrize("form", ["sum", "delta"])
def test_sums_do_not_depend_on_the_instruction_set(form: str) -> None:
    for case in ("threads", "odd sizes", "mixed dtypes", "chunk edges"):
        assert run(case, "cpu baseline", form)[1] == run(case, "cpu widest", form)[1]


@pytest.mark.parametrize("case", ["threads", "mixed dtypes", "layouts", "complex"])
@every_backend
def test_forms_convert_into_each_other(case: str, backend: str) -> None:
    """A sum after a conversion equals the sum without one, to float32 rounding."""
    angles = []
    for convert in (None, "to_delta", "to_sum"):
        tensors = make(case)
        arenas = device_sums_of(tensors, backend)
        last = None
        for window in range(5):
            for step in range(WINDOW):
                move(tensors, step + window)
                if window == 0 and step == 0:
                    arenas.begin("delta" if convert == "to_sum" else "sum")
                else:
                    arenas.add(first=step == 0)
            last = arenas.close(WINDOW)
            if window == 2 and convert is not None:
                getattr(arenas, convert)(WINDOW)
        assert last is not None
        angles.append(last)
    for converted in angles[1:]:
        assert list(converted) == pytest.approx(list(angles[0]), rel=2e-5)


def test_delta_form_keeps_a_constant_exactly() -> None:
    """Parameters that stand still have exactly no displacement, whatever their value."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    arenas = device_sums_of([x], "cpu widest")
    for window in range(4):
        for step in range(7):
            if window == 0 and step == 0:
                arenas.begin("delta")
            else:
                arenas.add(first=False)
        assert arenas.close(7).norm == 0.0
    assert torch.equal(arenas.before[:1000], x)


def test_a_residual_survives_packing() -> None:
    """Mean and displacement come back from the packed arenas as precisely as documented."""
    g = torch.Generator().manual_seed(0)
    exact = torch.randn(10_000, generator=g, dtype=torch.float64)
    displacement = torch.randn(10_000, generator=g) * 1e-7
    packed, mean = displacement.clone(), torch.empty(10_000)
    start = reference.round_mean(exact, out=mean, packed=packed, k=64)
    back = reference.exact_mean(mean, packed)
    assert ((back - exact).abs() <= exact.abs() * 2.0**-31.9).all()
    assert (
        (reference.displacement(packed) - displacement).abs() <= displacement.abs() * 2.0**-16
    ).all()
    # `back` is rounded to 2^-53 |m|, which is up to 2^-22 of the smallest residual of 2^-31 |m|.
    torch.testing.assert_close(start.double(), 64 * (mean.double() - back), rtol=2.0**-21, atol=0.0)
