"""The CPU kernels of the table against tests/ops/table_model.py, through the bindings."""

from __future__ import annotations

import numpy as np
import pytest
import table_model as model

from autodrop_ext import _C

ISAS = ("baseline", "avx2", "avx512")
DTYPES = (model.FLOAT32, model.FLOAT64, model.FLOAT16, model.BFLOAT16)
# Of a bucket's sum of absolute values. A sum of n float64 is wrong by (n - 1) * 1.1e-16 of that at
# most, and no bucket of these tests has more than a few hundred elements.
TOLERANCE = 1e-12


def runs_here(isa: str) -> bool:
    try:
        _C.accumulate_exact(0, 0, 0, 0, 1, isa)
    except ValueError:  # only this is checked by the bindings
        return False
    return True


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if not runs_here(request.param):
        pytest.skip(f"this processor does not run {request.param}")
    return str(request.param)


def address(array: np.ndarray) -> int:
    return int(array.ctypes.data)


def accumulate(
    pieces: np.ndarray,
    runs: np.ndarray,
    tensors: list[model.Tensor],
    table: np.ndarray,
    threads: int,
    isa: str,
) -> None:
    bases = model.bases_of(tensors)
    weighted = any(tensor.weight != 1.0 for tensor in tensors)
    _C.accumulate(
        address(pieces),
        address(runs),
        table.shape[0],
        address(bases),
        address(table),
        weighted,
        threads,
        isa,
    )


def tensors_of(seed: int, dtypes: tuple[int, ...], weights: tuple[float, ...]) -> list:
    """Tensors of many lengths, alignments and positions in their parameters."""
    random = np.random.default_rng(seed)
    lengths = [0, 1, 2, 7, 8, 9, 15, 63, 64, 65, 2047, 2048, 2056, 4095, 4096, 4097, 30_011]
    return [
        model.Tensor.of(
            random.standard_normal(length),
            dtype,
            shift=int(random.integers(0, 5)),
            first=int(random.choice([0, 0, 3, 4090, 5000])),
            weight=float(random.choice(weights)),
            name=f"{length} {dtype}",
        )
        for length in lengths
        for dtype in dtypes
    ]


@pytest.mark.parametrize("rows", [1, 4, 32])
@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.5, 1 / 3)])
@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in DTYPES), DTYPES])
def test_every_piece_is_added_where_the_model_adds_it(
    dtypes: tuple[int, ...], weights: tuple[float, ...], rows: int, isa: str
) -> None:
    tensors = tensors_of(rows, dtypes, weights)
    pieces, runs = model.pieces_of(tensors, rows)
    start = np.random.default_rng(1).standard_normal((rows, model.LANES))
    expected, sizes = start.copy(), np.abs(start)
    model.accumulate(pieces, runs, tensors, expected, sizes)
    table = start.copy()
    accumulate(pieces, runs, tensors, table, 1, isa)
    assert np.all(np.abs(table - expected) <= TOLERANCE * sizes)
    assert not np.array_equal(table, start)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_whole_chunks_share_a_row(dtype: int, isa: str) -> None:
    """More chunks than a thread reads at the same time, of every rotation and swap."""
    values = np.random.default_rng(dtype).standard_normal(70 * model.LANES)
    tensors = [model.Tensor.of(values, dtype, weight=0.75, name="w")]
    pieces, runs = model.pieces_of(tensors, 2)
    assert np.all(np.diff(runs) > 0)
    expected, sizes = np.zeros((2, model.LANES)), np.zeros((2, model.LANES))
    model.accumulate(pieces, runs, tensors, expected, sizes)
    table = np.zeros_like(expected)
    accumulate(pieces, runs, tensors, table, 1, isa)
    assert np.all(np.abs(table - expected) <= TOLERANCE * sizes)


def test_shards_add_up_to_the_whole(isa: str) -> None:
    values = np.random.default_rng(3).standard_normal(50_000)
    cuts = [0, 1, 4096, 16_383, 33_333, 50_000]
    whole = [model.Tensor.of(values, name="w")]
    shards = [
        model.Tensor.of(values[a:b], first=a, name="w")
        for a, b in zip(cuts[:-1], cuts[1:], strict=True)
    ]
    tables = []
    for tensors in (whole, shards):
        table = np.zeros((3, model.LANES))
        pieces, runs = model.pieces_of(tensors, 3)
        accumulate(pieces, runs, tensors, table, 1, isa)
        tables.append(table)
    # Buckets get the same elements in another order.
    np.testing.assert_allclose(tables[0], tables[1], rtol=0, atol=1e-13)


def test_groups_have_tables_of_their_own(isa: str) -> None:
    values = np.random.default_rng(4).standard_normal(9000)
    tensors = [model.Tensor.of(values, group=group, name=str(group)) for group in (0, 2)]
    table = np.zeros((6, model.LANES))
    pieces, runs = model.pieces_of(tensors, 2, groups=3)
    accumulate(pieces, runs, tensors, table, 1, isa)
    assert np.any(table[:2]) and not np.any(table[2:4]) and np.any(table[4:])


def test_bits_do_not_depend_on_threads(isa: str) -> None:
    values = np.random.default_rng(5).standard_normal(5_000_000)  # enough for four threads
    tensors = [model.Tensor.of(values, name="w"), *tensors_of(6, DTYPES, (1.0, 0.5))]
    pieces, runs = model.pieces_of(tensors, 16)
    tables = []
    for threads in (1, 2, 3, 4):
        table = np.zeros((16, model.LANES))
        accumulate(pieces, runs, tensors, table, threads, isa)
        tables.append(table)
    assert np.any(tables[0])
    for table in tables[1:]:
        assert np.array_equal(tables[0], table)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [9, 100, 9000])
def test_what_is_not_finite_reaches_its_bucket_only(
    length: int, dtype: int, bad: float, isa: str
) -> None:
    values = np.random.default_rng(7).standard_normal(length)
    values[length // 2] = bad
    tensors = [model.Tensor.of(values, dtype, shift=1, name="w")]
    pieces, runs = model.pieces_of(tensors, 2)
    expected, sizes = np.zeros((2, model.LANES)), np.zeros((2, model.LANES))
    with np.errstate(invalid="ignore"):
        model.accumulate(pieces, runs, tensors, expected, sizes)
    table = np.zeros_like(expected)
    accumulate(pieces, runs, tensors, table, 1, isa)
    finite = np.isfinite(expected)
    assert np.count_nonzero(~finite) == 1
    np.testing.assert_array_equal(table[~finite], expected[~finite])
    assert np.all(np.abs(table[finite] - expected[finite]) <= TOLERANCE * sizes[finite])


def test_no_pieces_change_nothing(isa: str) -> None:
    table = np.ones((3, model.LANES))
    pieces, runs = model.pieces_of([], 3)
    accumulate(pieces, runs, [], table, 2, isa)
    assert np.all(table == 1.0)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_mode_gives_every_element_its_bucket(dtype: int, threads: int, isa: str) -> None:
    random = np.random.default_rng(8)
    lengths = [1, 31, 32, 33, 8192, 8193, 20_000, 900_000]
    tensors = [
        model.Tensor.of(
            random.standard_normal(n), dtype, shift=k % 4, weight=1 / (1 + k % 3), name=str(n)
        )
        for k, n in enumerate(lengths)
    ]
    buckets = np.concatenate([[0], np.cumsum(lengths) + 5])  # five buckets that get nothing
    spans = model.spans_of(tensors, [int(b) for b in buckets[:-1]])
    start = random.standard_normal(int(buckets[-1]) + 8)
    expected, sizes = start.copy(), np.abs(start)
    model.accumulate_exact(spans, tensors, expected, sizes)
    table, bases = start.copy(), model.bases_of(tensors)
    _C.accumulate_exact(address(spans), len(spans), address(bases), address(table), threads, isa)
    assert np.all(np.abs(table - expected) <= 1e-15 * sizes)  # one multiplication and one sum
    assert np.array_equal(table[-8:], start[-8:])


@pytest.mark.parametrize(
    "bounds", [[0, 12_288], [0, 1, 4097, 4097, 12_300], [0, 7], [0, 0], [0, 600_000]]
)
def test_close(bounds: list[int], isa: str) -> None:
    random = np.random.default_rng(9)
    arrays = [random.standard_normal(bounds[-1]) for _ in range(3)]
    expected = [array.copy() for array in arrays]
    edges = np.array(bounds, dtype=np.int64)
    wanted = model.close(*expected, 7.0, edges)
    results = []
    for threads in (1, 2, 5):
        got = [array.copy() for array in arrays]
        sums = np.full((len(bounds) - 1, 2), np.nan)
        _C.close(
            *map(address, got), 7.0, address(edges), len(bounds) - 1, address(sums), threads, isa
        )
        for array, right in zip(got, expected, strict=True):
            assert np.array_equal(array, right)
        # Sums of up to 600,000 products of standard normals in another order.
        np.testing.assert_allclose(sums, wanted, rtol=1e-12, atol=1e-9)
        results.append(sums)
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="isa: this processor does not run 'mmx'"):
        _C.accumulate(0, 0, 0, 0, 0, False, 1, "mmx")
