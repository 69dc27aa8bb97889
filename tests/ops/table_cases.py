"""Cases of the table's kernels, how the kernels of CUDA and of Triton are called, and their tests.

A case is a list of tensors of ``table_model``. Every backend's kernels run every case.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import table_model
import torch
from table_model import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, LANES, Tensor

from autodrop_ext.ops import native

Float64s = npt.NDArray[np.float64]
DTYPES = {"float32": FLOAT32, "float64": FLOAT64, "float16": FLOAT16, "bfloat16": BFLOAT16}

# Backends add in different orders: so much of the sum of absolute values in a bucket.
TOLERANCE = 1e-12


def _values(n: int, seed: int) -> Float64s:
    generator = np.random.default_rng(seed)
    return generator.standard_normal(n) * 2.0 ** -(np.arange(n) % 12)


def _whole(dtype: int) -> list[Tensor]:
    """Every swap, and more pieces of a run than a thread has in flight."""
    return [Tensor.of(_values(40 * LANES, 1), dtype, name="w")]


def _ragged(dtype: int) -> list[Tensor]:
    sizes = (0, 1, 7, 8, 9, 15, 64, 100, 4095, 4097, 9000)
    return [Tensor.of(_values(n, n), dtype, name=str(n)) for n in sizes]


def _shards(dtype: int) -> list[Tensor]:
    return [
        Tensor.of(_values(5_003, first), dtype, shift=shift, first=first, name=f"{first} {shift}")
        for first in (1, 8, 13, 4090, 4096, 12_345)
        for shift in (0, 1, 3)
    ]


def _misaligned(dtype: int) -> list[Tensor]:
    return [Tensor.of(_values(LANES, i), dtype, shift=1, name=str(i)) for i in range(9)]


def _mixed() -> list[Tensor]:
    return [
        Tensor.of(
            _values(1 + i * i * 37 % 6_000, i),
            i * 7 % 4,
            shift=i % 3,
            weight=1.0 if i % 5 == 0 else 1 / 3,
            group=i % 3,
            name=str(i),
        )
        for i in range(40)
    ]


def _not_finite() -> list[Tensor]:
    values = _values(9_001, 3)
    values[[4_100, 9_000]] = np.inf, np.nan
    return [Tensor.of(values, dtype, name=str(dtype)) for dtype in DTYPES.values()]


CASES: dict[str, Callable[[], list[Tensor]]] = {
    **{
        f"{what}, {name}": (lambda make=make, dtype=dtype: make(dtype))
        for what, make in (
            ("whole chunks", _whole),
            ("ragged ends", _ragged),
            ("shards", _shards),
            ("misaligned", _misaligned),
        )
        for name, dtype in DTYPES.items()
    },
    "dtypes, weights and groups": _mixed,
    "more pieces than a batch": lambda: [
        Tensor.of(_values(24, i), first=8, name=str(i)) for i in range(600)
    ],
    "not finite": _not_finite,
    "no tensors": list,
}


def case(name: str) -> list[Tensor]:
    return CASES[name]()


def rounded(tensors: list[Tensor]) -> list[Tensor]:
    """Round elements to sixteenths and weights to quarters, in place.

    No sum of a case then has more than 24 bits, so it is exact in every order of additions.
    """
    for t in tensors:
        raw = table_model.encode(np.round(t.values() * 16) / 16, t.dtype).view(np.uint8)
        t.memory[t.shift : t.shift + raw.size] = raw
        t.weight = np.ceil(t.weight * 4) / 4
    return tensors


CLOSES: dict[str, list[int]] = {
    "whole blocks": [0, 4_096, 8_192],
    "parts of any length": [0, 4_096, 5_001, 5_002, 5_003, 7_000, 11_096],
    "small parts": [0, 1, 3, 6, 263, 776, 1_801],
    "an empty part": [0, 0, 5],
}


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Rows of 32 bytes come as int64 ``[n, 4]``."""
    if array.dtype.names is not None:
        array = array.view(np.int64).reshape(-1, 4)
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


@dataclasses.dataclass
class Work:
    """One accumulate with everything that it reads, on a device."""

    pieces: torch.Tensor
    runs: torch.Tensor
    bases: torch.Tensor
    memory: list[torch.Tensor]
    partials: torch.Tensor
    table: torch.Tensor
    dtypes: set[int]
    run: Callable[[], None] = lambda: None


class Kernels:
    """Calls kernels on one device; the operations of ``table_model`` on tensors there.

    Attributes:
        infinite: False if sums make a NaN of an infinity.
    """

    infinite = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    # What the kernels of CUDA and of Triton do in different ways.

    def launch(self, work: Work) -> None:
        raise NotImplementedError

    def launch_exact(
        self, spans: torch.Tensor, bases: torch.Tensor, table: torch.Tensor, dtypes: set[int]
    ) -> None:
        raise NotImplementedError

    def launch_close(
        self, tables: list[torch.Tensor], divisor: float, blocks: torch.Tensor, sums: torch.Tensor
    ) -> None:
        raise NotImplementedError

    def partial_rows(self, splits: int) -> int:
        """Return how many rows of partial sums a row of the table has."""
        raise NotImplementedError

    def bases(self, tensors: Sequence[Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Addresses on the device of tensors there, with the shifts that they have here."""
        memory = [torch.from_numpy(t.memory) for t in tensors]
        if self.device.type == "cpu":
            return torch.from_numpy(table_model.bases_of(tensors)), memory
        # Device memory is aligned to 512 bytes; what is before is kept modulo 64.
        moved = []
        addresses = []
        for t, m in zip(tensors, memory, strict=True):
            before = t.address % 64
            there = torch.empty(before + m.numel(), dtype=torch.uint8, device=self.device)
            there[before : before + m.numel() - t.shift] = m[t.shift :].to(self.device)
            moved.append(there)
            addresses.append(there.data_ptr() + before)
        return torch.tensor(addresses, dtype=torch.int64, device=self.device), moved

    def zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def poisoned(self, *shape: int) -> torch.Tensor:
        return self.zeros(*shape).fill_(float("nan"))

    def prepare(self, tensors: Sequence[Tensor], rows: int, groups: int, splits: int) -> Work:
        pieces, runs = table_model.pieces_of(tensors, rows, groups)
        bases, memory = self.bases(tensors)
        table = self.zeros(rows * groups, LANES)
        work = Work(
            to_device(pieces, self.device),
            to_device(runs, self.device),
            bases,
            memory,
            self.poisoned(self.partial_rows(splits), table.numel()),
            table,
            {t.dtype for t in tensors},
        )
        work.run = lambda: self.launch(work)
        return work

    def accumulate(
        self, tensors: Sequence[Tensor], rows: int, groups: int, splits: int
    ) -> Float64s:
        work = self.prepare(tensors, rows, groups, splits)
        work.run()
        return work.table.cpu().numpy()

    def accumulate_exact(
        self, tensors: Sequence[Tensor], buckets: Sequence[int], size: int
    ) -> Float64s:
        spans = to_device(table_model.spans_of(tensors, buckets), self.device)
        bases, memory = self.bases(tensors)
        table = self.zeros(size)
        self.launch_exact(spans, bases, table, {t.dtype for t in tensors})
        result = table.cpu().numpy()
        del memory
        return result

    def close(
        self,
        running: Float64s,
        mean: Float64s,
        displacement: Float64s,
        divisor: float,
        blocks: npt.NDArray[np.int64],
    ) -> Float64s:
        """Change the arrays as ``table_model.close`` does; return the sums of blocks."""
        arrays = (running, mean, displacement)
        tables = [torch.from_numpy(a.copy()).to(self.device) for a in arrays]
        sums = self.poisoned(len(blocks), 2)
        self.launch_close(tables, divisor, to_device(blocks, self.device), sums)
        for array, table in zip(arrays, tables, strict=True):
            array[:] = table.cpu().numpy()
        return sums.cpu().numpy()


class CudaKernels(Kernels):
    """Through the bindings of a core: ``autodrop_ext._C`` or the emulated one.

    Args:
        two_floats: sums are two float32 numbers.
    """

    def __init__(
        self, device: torch.device, core: ModuleType, stream: int = 0, *, two_floats: bool = False
    ) -> None:
        super().__init__(device)
        self.core = core
        self.stream = stream
        self.infinite = not two_floats

    def partial_rows(self, splits: int) -> int:
        return splits if splits > 1 else 0

    def launch(self, work: Work) -> None:
        self.core.cuda_accumulate(
            self.device.index or 0,
            work.pieces.data_ptr(),
            work.runs.data_ptr(),
            len(work.table),
            max(1, len(work.partials)),
            work.bases.data_ptr(),
            work.partials.data_ptr(),
            work.table.data_ptr(),
            True,
            self.stream,
        )

    def launch_exact(
        self, spans: torch.Tensor, bases: torch.Tensor, table: torch.Tensor, dtypes: set[int]
    ) -> None:
        self.core.cuda_accumulate_exact(
            self.device.index or 0,
            spans.data_ptr(),
            len(spans),
            bases.data_ptr(),
            table.data_ptr(),
            self.stream,
        )

    def launch_close(
        self, tables: list[torch.Tensor], divisor: float, blocks: torch.Tensor, sums: torch.Tensor
    ) -> None:
        self.core.cuda_close(
            self.device.index or 0,
            *(t.data_ptr() for t in tables),
            divisor,
            blocks.data_ptr(),
            len(blocks),
            sums.data_ptr(),
            self.stream,
        )


class TritonKernels(Kernels):
    """As :mod:`autodrop_ext.ops.triton` launches them."""

    def partial_rows(self, splits: int) -> int:
        return 8 * splits

    def launch(self, work: Work) -> None:
        from triton_kernels import launches

        launches.accumulate(
            work.pieces, work.runs, work.bases, work.partials, work.table, work.dtypes
        )

    def launch_exact(
        self, spans: torch.Tensor, bases: torch.Tensor, table: torch.Tensor, dtypes: set[int]
    ) -> None:
        from triton_kernels import launches

        launches.accumulate_exact(spans, bases, table, dtypes)

    def launch_close(
        self, tables: list[torch.Tensor], divisor: float, blocks: torch.Tensor, sums: torch.Tensor
    ) -> None:
        from triton_kernels import launches

        launches.close(*tables, divisor, blocks, sums)


class KernelTests:
    """Tests of a fixture ``kernels``, on a GPU or without one."""

    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("splits", [1, 3])
    def test_accumulate(self, kernels: Kernels, name: str, splits: int) -> None:
        check_accumulate(kernels, case(name), splits)

    @pytest.mark.parametrize("name", CASES)
    def test_exact_sums_have_the_bits_of_the_cpu_kernels(self, kernels: Kernels, name: str) -> None:
        if name != "not finite":
            check_bits(kernels, rounded(case(name)))

    @pytest.mark.parametrize("name", CLOSES)
    def test_close(self, kernels: Kernels, name: str) -> None:
        check_close(kernels, CLOSES[name])

    def test_the_same_bits_run_after_run(self, kernels: Kernels) -> None:
        work = kernels.prepare(case("dtypes, weights and groups"), 2, 3, 3)
        work.run()
        first = work.table.clone()
        assert first.any()
        for _ in range(2):
            work.table.zero_()
            work.run()
            assert torch.equal(work.table, first)


def check_accumulate(kernels: Kernels, tensors: list[Tensor], splits: int) -> None:
    """Both kinds of tables against the model."""
    rows, groups = 2, 1 + max((t.group for t in tensors), default=0)
    pieces, runs = table_model.pieces_of(tensors, rows, groups)
    wanted = np.zeros((rows * groups, LANES))
    sizes = np.zeros_like(wanted)
    table_model.accumulate(pieces, runs, tensors, wanted, sizes)
    got = kernels.accumulate(tensors, rows, groups, splits)
    check_equal(got, wanted, sizes, infinite=kernels.infinite)

    # A gap of one bucket, so that some spans begin at an odd one.
    ends = np.cumsum([0, *(t.length + 1 for t in tensors)]).tolist()
    buckets, size = ends[:-1], ends[-1]
    wanted = np.zeros(size)
    sizes = np.zeros_like(wanted)
    table_model.accumulate_exact(table_model.spans_of(tensors, buckets), tensors, wanted, sizes)
    check_equal(kernels.accumulate_exact(tensors, buckets, size), wanted, sizes)


def check_equal(got: Float64s, wanted: Float64s, sizes: Float64s, *, infinite: bool = True) -> None:
    finite = np.isfinite(wanted)
    assert np.array_equal(np.isfinite(got), finite)
    if infinite:
        assert np.array_equal(np.isnan(got), np.isnan(wanted))
    error = np.abs(got[finite] - wanted[finite])
    assert (error <= TOLERANCE * sizes[finite]).all(), error.max()


def check_bits(kernels: Kernels, tensors: list[Tensor]) -> None:
    """Both kinds of tables against the CPU kernels, bit for bit; sums must be exact."""
    core = native.loaded()
    rows, groups = 2, 1 + max((t.group for t in tensors), default=0)
    pieces, runs = table_model.pieces_of(tensors, rows, groups)
    bases = table_model.bases_of(tensors)
    wanted = np.zeros((rows * groups, LANES))
    at = [a.ctypes.data for a in (pieces, runs, bases, wanted)]
    core.accumulate(*at[:2], rows * groups, *at[2:], True, 1, "")
    assert np.array_equal(kernels.accumulate(tensors, rows, groups, 2), wanted)
    assert wanted.any() == bool(tensors)

    ends = np.cumsum([0, *(t.length + 1 for t in tensors)]).tolist()
    spans = table_model.spans_of(tensors, ends[:-1])
    wanted = np.zeros(ends[-1])
    core.accumulate_exact(
        spans.ctypes.data, len(spans), bases.ctypes.data, wanted.ctypes.data, 1, ""
    )
    assert np.array_equal(kernels.accumulate_exact(tensors, ends[:-1], ends[-1]), wanted)


def check_close(kernels: Kernels, bounds: list[int]) -> None:
    """Two windows in a row: tables bit for bit, sums to the tolerance."""
    generator = np.random.default_rng(0)
    mine = [generator.standard_normal(bounds[-1]) for _ in range(3)]
    model = [a.copy() for a in mine]
    blocks = np.array([bounds[:-1], bounds[1:]], np.int64).T
    for divisor in (3.0, 64.0):
        sums = kernels.close(*mine, divisor, blocks)
        s = model[0] / divisor - model[1]
        sizes = [(np.abs(s[a:b] * model[2][a:b]).sum(), np.square(s[a:b]).sum()) for a, b in blocks]
        wanted = table_model.close(*model, divisor, np.array(bounds))
        assert (np.abs(sums - wanted) <= TOLERANCE * np.array(sizes)).all()
        for a, b in zip(mine, model, strict=True):
            assert np.array_equal(a, b)
        for a, b in zip(mine, model, strict=True):
            fresh = generator.standard_normal(bounds[-1])
            a[:], b[:] = a + fresh, b + fresh
