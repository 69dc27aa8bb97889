"""The weight rule: over all ranks together every element counts exactly once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Replicate, Shard

from autodrop_ext.distributed import PipelineStages
from autodrop_ext.distributed.engines import local_shards
from autodrop_ext.distributed.group import Alone, Ranks, find_group
from autodrop_ext.distributed.layout import Layout


@dataclass
class Mesh:
    """What is asked of a DeviceMesh, for a rank that is not running."""

    shape: tuple[int, ...]
    coordinate: list[int]
    mesh_dim_names: tuple[str, ...] | None = None

    def size(self, dimension: int) -> int:
        return self.shape[dimension]

    def get_coordinate(self) -> list[int]:
        return self.coordinate

    def get_group(self) -> None: ...

    def _get_root_mesh(self) -> Mesh:
        return self


class Spread(nn.Parameter):
    """Stands for a DTensor: indices of elements, cut as the placements say."""

    def __new__(cls, whole: Tensor, mesh: Mesh, placements: list[Any]) -> Spread:
        local = whole
        for d, placement in enumerate(placements):
            if isinstance(placement, Shard):
                chunks = list(local.chunk(mesh.shape[d], placement.dim))
                empty = local.narrow(placement.dim, 0, 0)
                chunks += [empty] * (mesh.shape[d] - len(chunks))
                local = chunks[mesh.coordinate[d]]
        self = super().__new__(cls, local.contiguous())
        self.local, self.device_mesh, self.placements = local, mesh, placements
        return self

    def to_local(self) -> Tensor:
        return self.local


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Any]]:
    """A mesh, and parameters of it: shape, dimensions of the submesh, placement on each."""
    shape = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    parameters = []
    for _ in range(draw(st.integers(1, 4))):
        size = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=2)))
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
    counted = [torch.zeros(math.prod(s), dtype=torch.float64) for s, _, _ in parameters]
    total = 0.0
    for rank in range(size):
        coordinate = [int(c) for c in torch.unravel_index(torch.tensor(rank), shape)]
        named: list[tuple[str, Tensor]] = []
        for i, (s, dimensions, placements) in enumerate(parameters):
            whole = torch.arange(math.prod(s), dtype=torch.float64).view(s)
            if dimensions:
                cut = Mesh(tuple(shape[d] for d in dimensions), [coordinate[d] for d in dimensions])
                named.append((str(i), Spread(whole, cut, placements)))
            else:
                named.append((str(i), whole))
        ranks = Ranks(None, size, rank)
        shards = local_shards(named, {})
        for i, shard in enumerate(shards):
            counted[i][shard.tensor.flatten().long()] += ranks.weight(shard)
        total += Layout([shards], ranks).elements
    for weights in counted:
        torch.testing.assert_close(weights, torch.ones_like(weights), rtol=1e-12, atol=0)
    assert math.isclose(total, sum(map(len, counted)), rel_tol=1e-12)


def test_pipeline_stages_of_several_ranks() -> None:
    """Six ranks, three stages: two ranks hold each stage."""
    shard = local_shards([("x", torch.zeros(4))], {})[0]
    assert Ranks(None, 6, 0, stage=0, num_stages=3).weight(shard) == 0.5


def test_a_tensor_given_twice_counts_once() -> None:
    x = torch.zeros(4)
    assert [s.name for s in local_shards([("a", x), ("b", x)], {})] == ["a"]


def test_a_pending_sum_is_no_parameter() -> None:
    parameter = Spread(torch.zeros(4), Mesh((2,), [0]), [Partial()])
    with pytest.raises(TypeError, match=r"x: expected a parameter that is sharded .* Partial"):
        local_shards([("x", parameter)], {})


@pytest.mark.parametrize(
    ("stage", "num_stages", "error", "message"),
    [
        (2, 2, ValueError, "stage: expected at least 0 and less than num_stages=2, got 2"),
        (-1, 2, ValueError, "stage: expected at least 0"),
        ("a", 2, TypeError, "stage: expected an int, got 'a'"),
        (0, 2.0, TypeError, "num_stages: expected an int, got 2.0"),
    ],
)
def test_wrong_stages(stage: Any, num_stages: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        PipelineStages(stage, num_stages)


def test_without_torch_distributed_a_process_is_alone() -> None:
    assert find_group(None, []) == Alone()
    (shard,) = local_shards([("x", torch.zeros(4))], {})
    assert Alone().weight(shard) == 1.0
    assert Alone().gather([1.0, 2.0]) == [[1.0, 2.0]]
