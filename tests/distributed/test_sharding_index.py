"""Weight and global index of local elements: every element counts once, at its own place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from driven import Driven, optimizer_of
from hypothesis import given
from hypothesis import strategies as st
from launch import run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from autodrop_ext.global_index import Cut, axis_of, runs_of
from autodrop_ext.parameters import ParameterSource
from autodrop_ext.ranks import Ranks
from autodrop_ext.sharding import LocalShard, local_shards, zero_shards, zero_tensors


def index_of(shard: LocalShard) -> np.ndarray[Any, Any]:
    """Return the global index of each local element, in row-major order of the local tensor."""
    if shard.runs is None:
        return np.arange(shard.tensor.numel())
    offset, index, length = shard.runs
    for array in shard.runs:
        assert array.dtype == np.int64
    assert (length > 0).all()
    assert offset.tolist() == (np.cumsum(length) - length).tolist()
    assert length.sum() == shard.tensor.numel()
    assert (index[1:] != index[:-1] + length[:-1]).all(), "two stretches that are one"
    pieces = [np.arange(i, i + n) for i, n in zip(index, length, strict=True)]
    return np.concatenate([np.zeros(0, np.int64), *pieces])


def check(parameter: Tensor, name: str = "w") -> LocalShard:
    """Compare with a parameter that holds its own global indices."""
    (shard,) = local_shards([(name, parameter)], {})
    assert not shard.staged
    values = shard.tensor.flatten().long().tolist()
    assert index_of(shard).tolist() == values, (name, shard.layout, shard.runs)
    assert shard.current().data_ptr() == shard.tensor.data_ptr()
    return shard


def counted(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float64).view(shape)


# ---- layouts, as torch spreads them -----------------------------------------------------------

SPREAD: list[tuple[tuple[int, ...], str, list[Any]]] = [
    ((13, 5), "dp", [Shard(0)]),
    ((13, 5), "tp", [Shard(1)]),
    ((1, 65), "dp", [Shard(0)]),
    ((5,), "both", [Shard(0), Shard(0)]),
    ((13, 5), "both", [Shard(0), Shard(0)]),
    ((13, 5), "both", [Shard(0), Shard(1)]),
    ((13, 5), "both", [Shard(1), Shard(0)]),
    ((13, 5), "both", [Shard(1), Shard(1)]),
    ((13, 5), "both", [Replicate(), Shard(1)]),
    ((13, 5), "both", [Shard(0), Replicate()]),
    ((13, 5), "both", [Replicate(), Replicate()]),
    ((3, 4, 5), "both", [Shard(1), Shard(2)]),
    ((3, 4, 5), "both", [Shard(2), Shard(0)]),
    ((3, 4, 5), "tp", [Shard(1)]),
    ((8, 6), "both", [_StridedShard(0, split_factor=2), Shard(0)]),
    ((6, 8), "both", [_StridedShard(1, split_factor=2), Shard(1)]),
    ((24, 2), "both", [Shard(0), _StridedShard(0, split_factor=3)]),
]


def spread(rank: int) -> int:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    meshes = {"both": mesh, "dp": mesh["dp"], "tp": mesh["tp"]}
    for shape, where, placements in SPREAD:
        parameter = distribute_tensor(counted(*shape), meshes[where], placements)
        shard = check(parameter, f"{shape} {placements}")
        assert shard.total == math.prod(shape)
        assert shard.parts == math.prod(
            2 if isinstance(p, (Shard, _StridedShard)) else 1 for p in placements
        )
    return len(SPREAD)


def test_every_layout_of_dtensors() -> None:
    assert run(4, spread) == [len(SPREAD)] * 4


def three_ranks(rank: int) -> tuple[int, ...]:
    mesh = init_device_mesh("cpu", (3,))
    for shape in ((1, 65), (2, 3), (4, 65), (7, 2), (3, 3)):
        for dim in (0, 1):
            check(distribute_tensor(counted(*shape), mesh, [Shard(dim)]))
    return tuple(check(distribute_tensor(counted(1, 65), mesh, [Shard(0)])).tensor.shape)


def test_uneven_parts_and_empty_ones() -> None:
    assert run(3, three_ranks) == [(1, 65), (0, 65), (0, 65)]


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for i, shape in enumerate([(13, 8), (8, 17), (17,), (1,), (1, 65), (3, 4, 5)]):
            setattr(self, f"p{i}", nn.Parameter(counted(*shape)))


def engines(rank: int, shape: tuple[int, ...], tensor_parallel: bool) -> list[str]:
    """FSDP2, HSDP, and FSDP2 over tensor parallelism, of uneven parameters."""
    names = ("dp", "tp") if tensor_parallel else ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = Counted()
    if tensor_parallel:
        for i, (name, parameter) in enumerate(list(model.named_parameters())):
            placement = [Shard(0), Shard(0), Replicate()][i % 3]
            whole = distribute_tensor(parameter.detach(), mesh["tp"], [placement])
            setattr(model, name, nn.Parameter(whole))
    fully_shard(model, mesh=mesh["dp"] if tensor_parallel else mesh)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        check(parameter, name)
    return sorted({type(p).__name__ for q in model.parameters() for p in q.placements})


@pytest.mark.parametrize("shape", [(2,), (3,), (2, 2)])
def test_fsdp2(shape: tuple[int, ...]) -> None:
    run(math.prod(shape), engines, shape, False)


def test_fsdp2_over_tensor_parallelism() -> None:
    for kinds in run(4, engines, (2, 2), True):
        assert "_StridedShard" in kinds


def awkward(rank: int) -> list[str]:
    """Locals that are not row-major, complex ones, and one whose shape does not fit."""
    mesh = init_device_mesh("cpu", (2,))
    local = counted(3, 4).t()  # what a rank holds of 8 x 3
    permuted = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    (shard,) = local_shards([("permuted", permuted)], {})
    assert shard.staged and shard.tensor.data_ptr() == local.data_ptr()
    assert index_of(shard).tolist() == list(range(12 * rank, 12 * rank + 12))

    pairs = distribute_tensor(torch.view_as_complex(counted(5, 3, 2)), mesh, [Shard(1)])
    shard = check(pairs, "complex")
    assert shard.total == 30 and shard.tensor.dtype == torch.float64

    wrong = DTensor.from_local(
        counted(4, 3), mesh, [Shard(0)], shape=torch.Size((9, 3)), stride=(3, 1), run_check=False
    )
    try:
        local_shards([("wrong", wrong)], {})
    except RuntimeError as error:
        return [str(error)]
    return []


def test_awkward_locals() -> None:
    first, _ = run(2, awkward)
    assert first == [
        "wrong: expected the local shape that (Shard(dim=0),) gives to a parameter of shape (9, 3) "
        "on this rank, got (4, 3)"
    ]


def flat(rank: int, use_orig_params: bool) -> tuple[int, float]:
    model = FullyShardedDataParallel(
        Driven(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    source = ParameterSource(optimizer_of(model))
    shards = source.shards()
    assert all(s.flat and s.runs is None and s.part == (rank,) and s.parts == 3 for s in shards)
    assert source.unchanged()
    current = [s.current() for s in shards]
    assert [c.data_ptr() for c in current] == source.addresses().tolist()
    assert [c.shape for c in current] == [s.tensor.shape for s in shards]
    ranks = Ranks(None, 3, rank)
    layout = ranks.layout(shards)
    return int(layout["elements"]), int(layout["model_elements"])


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_flat_shards_of_fsdp1_have_no_index(use_orig_params: bool) -> None:
    counts = run(3, flat, use_orig_params)
    whole = sum(p.numel() for p in Driven().parameters())
    assert sum(elements for elements, _ in counts) == whole
    assert {total for _, total in counts} == {whole}


@dataclass
class Group:
    """What is asked of a process group, for a rank that is not running."""

    members: int
    mine: int

    def size(self) -> int:
        return self.members

    def rank(self) -> int:
        return self.mine


def test_partitions_of_zero() -> None:
    """DeepSpeed's attributes, as in 0.19: flat float32 tensors with padding at the end."""
    tensor = torch.arange(8.0)
    inner = SimpleNamespace(param_groups=[{"params": [tensor]}])
    two = SimpleNamespace(
        optimizer=inner,
        groups_padding=[3],
        bit16_groups=[[torch.zeros(9), torch.zeros(4)]],
        real_dp_process_group=[Group(2, 1)],
    )
    (shard,) = zero_shards(two)
    assert shard.tensor.tolist() == tensor[:5].tolist()
    assert (shard.total, shard.parts, shard.part, shard.flat) == (13, 2, (1,), True)
    assert shard.current().equal(shard.tensor) and zero_tensors(two)[0] is tensor

    def parameter(number: int, size: int, part: int) -> SimpleNamespace:
        return SimpleNamespace(
            ds_id=number, ds_numel=size, ds_tensor=SimpleNamespace(ds_numel=part)
        )

    three = SimpleNamespace(
        fp32_partitioned_groups_flat=[tensor],
        fp16_groups=[[parameter(0, 9, 5), parameter(1, 6, 3)]],
        sub_group_to_group_id={0: 2},
        dp_process_group=Group(2, 1),
    )
    first, second = zero_shards(three)
    assert first.tensor.tolist() == [0, 1, 2, 3] and second.tensor.tolist() == [5, 6, 7]
    assert (second.offset, second.total, second.group) == (5, 6, 2)
    assert second.current().data_ptr() == tensor[5:].data_ptr()
    three.fp32_partitioned_groups_flat = [None]
    with pytest.raises(RuntimeError, match="expected the float32 partition 0 of ZeRO-3 in GPU or"):
        zero_shards(three)


# ---- layouts, without processes ---------------------------------------------------------------


@dataclass
class Mesh:
    """What is asked of a DeviceMesh, for a rank that is not running."""

    shape: tuple[int, ...]
    coordinate: list[int]

    def size(self, dimension: int) -> int:
        return self.shape[dimension]

    def get_coordinate(self) -> list[int]:
        return self.coordinate


class Spread(nn.Parameter):
    """Stands for a DTensor: indices of elements, cut by the placements' own rules."""

    def __new__(cls, whole: Tensor, mesh: Mesh, placements: list[Any]) -> Spread:
        local = whole
        for d, placement in enumerate(placements):
            if hasattr(placement, "dim"):
                chunks, _ = placement._split_tensor(local, mesh.shape[d], with_padding=False)
                local = chunks[mesh.coordinate[d]]
        self = super().__new__(cls, local.contiguous())
        self.local, self.device_mesh, self.placements = local.contiguous(), mesh, placements
        self.whole = whole
        return self

    def to_local(self) -> Tensor:
        return self.local

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.whole.shape


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Any]]:
    """A mesh, and parameters of it: shape, dimensions of the submesh, placement on each."""
    shape = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    parameters = []
    for _ in range(draw(st.integers(1, 4))):
        size = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
        dimensions = [d for d in range(len(shape)) if draw(st.booleans())]
        options = [Replicate(), *(Shard(i) for i in range(len(size)))]
        placements = [draw(st.sampled_from(options)) for _ in dimensions]
        parameters.append((size, dimensions, placements))
    return shape, parameters


@given(layouts())
def test_every_element_counts_once(layout: tuple[tuple[int, ...], list[Any]]) -> None:
    """Random meshes; each parameter on a random submesh (none: a plain tensor)."""
    shape, parameters = layout
    size = math.prod(shape)
    weights = [np.zeros(math.prod(s)) for s, _, _ in parameters]
    total = 0.0
    for rank in range(size):
        coordinate = [int(c) for c in torch.unravel_index(torch.tensor(rank), shape)]
        named: list[tuple[str, Tensor]] = []
        for i, (s, dimensions, placements) in enumerate(parameters):
            parameter = counted(*s)
            if dimensions:
                cut = Mesh(tuple(shape[d] for d in dimensions), [coordinate[d] for d in dimensions])
                parameter = Spread(parameter, cut, placements)
            named.append((str(i), parameter))
        ranks = Ranks(None, size, rank)
        shards = local_shards(named, {})
        for i, shard in enumerate(shards):
            index = index_of(shard)
            assert index.tolist() == shard.tensor.flatten().long().tolist()
            weights[i][index] += ranks.weight(shard)
        total += ranks.layout(shards)["elements"]
    for weight in weights:
        # Weights such as 1/3 are rounded.
        np.testing.assert_allclose(weight, 1, rtol=1e-12)
    assert math.isclose(total, sum(map(len, weights)), rel_tol=1e-12)


@pytest.mark.parametrize("size", range(1, 25))
@pytest.mark.parametrize(("dp", "tp"), [(2, 2), (3, 2), (2, 3), (4, 2)])
def test_fsdp2_cuts_what_tensor_parallelism_has_cut(size: int, dp: int, tp: int) -> None:
    """In memory, uneven cuts are not where ``_StridedShard._split_tensor`` puts them."""
    seen = []
    for j in range(tp):
        for i in range(dp):
            columns = torch.arange(size).chunk(tp)
            column = columns[j] if j < len(columns) else columns[0][:0]
            rows = column.chunk(dp)
            expected = (rows[i] if i < len(rows) else column[:0]).tolist()
            cuts = [Cut(dp, i, tp), Cut(tp, j, 1)]
            index = axis_of(size, cuts, len(expected))
            assert index is not None and list(index) == expected
            seen += expected
    assert sorted(seen) == list(range(size))


@pytest.mark.parametrize("size", [12, 24, 25, 31])
def test_a_strided_shard_by_itself_is_cut_like_torch_cuts_it(size: int) -> None:
    placement = _StridedShard(0, split_factor=3)
    parts, _ = placement._split_tensor(torch.arange(size), 2, with_padding=False)
    for i, part in enumerate(parts):
        index = axis_of(size, [Cut(2, i, 3)], len(part))
        assert index is not None and list(index) == part.tolist()
    assert axis_of(size, [Cut(2, 0, 3)], size) is None


def test_stretches_are_as_long_as_they_can_be() -> None:
    whole = range(6)
    assert runs_of((4, 6), [range(4), whole]) is None
    rows = runs_of((4, 6), [range(1, 3), whole])
    assert rows is not None and [a.tolist() for a in rows] == [[0], [6], [12]]
    columns = runs_of((2, 6), [range(2), range(2, 4)])
    assert columns is not None and [a.tolist() for a in columns] == [[0, 2], [2, 8], [2, 2]]
    # The end of a row and the beginning of the next one.
    ends = runs_of((2, 6), [range(2), np.array([0, 4, 5])])
    assert ends is not None and [a.tolist() for a in ends] == [[0, 1, 4], [0, 4, 10], [1, 3, 2]]
    huge = runs_of((2**20, 2**20), [range(2**20 - 1, 2**20), range(2**20)])
    assert huge is not None and huge.global_index.tolist() == [2**40 - 2**20]


def test_plain_tensors_are_read_in_the_order_of_their_memory() -> None:
    def shard(tensor: Tensor) -> LocalShard:
        return local_shards([("w", tensor)], {})[0]

    plain = shard(torch.zeros(2, 3, 4, 5))
    assert plain.layout == "(2, 3, 4, 5) torch.float32"
    assert (plain.runs, plain.staged, plain.parts, plain.part) == (None, False, 1, ())
    last = shard(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    assert last.layout == "(2, 3, 4, 5) torch.float32 in memory order (0, 2, 3, 1)"
    assert not last.staged and last.runs is None
    gaps = shard(torch.zeros(4, 6)[:, ::2])
    assert gaps.staged and gaps.layout == "(4, 3) torch.float32"
    pairs = shard(torch.zeros(3, dtype=torch.complex64))
    assert pairs.total == pairs.tensor.numel() == 6 and pairs.tensor.dtype == torch.float32


def test_a_tensor_given_twice_counts_once() -> None:
    x = torch.zeros(4)
    shards = local_shards([("a", x), ("b", x)], {id(x): 3})
    assert [(s.name, s.group) for s in shards] == [("a", 3)]


def test_a_pending_sum_is_no_parameter() -> None:
    parameter = Spread(torch.zeros(4), Mesh((2,), [0]), [Partial()])
    with pytest.raises(TypeError, match=r"x: expected a parameter that is sharded .* Partial"):
        local_shards([("x", parameter)], {})
