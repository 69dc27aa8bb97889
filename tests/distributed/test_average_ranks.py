"""Averages of sharded parameters: the same numbers as on one rank, bits, and checkpoints."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from launch import run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from autodrop_ext.average import ParameterAverage

UPDATES = 5
ENGINES = ("FSDP2", "FSDP1", "FSDP1 original parameters")


def sharded(tensor: Tensor, *placements: Any) -> nn.Parameter:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return nn.Parameter(distribute_tensor(tensor, mesh, placements))


class Material:
    """Parameters on the placements that occur, uneven ones and empty local parts included."""

    def __init__(self, alone: bool) -> None:
        g = torch.Generator().manual_seed(0)
        tensors = {
            "rows": (torch.randn(7, 4, generator=g), Shard(0)),
            "columns": (torch.randn(4, 5, generator=g), Shard(1)),
            "half": (torch.randn(9, generator=g).bfloat16(), Shard(0)),
            "one": (torch.randn(1, 3, generator=g), Shard(0)),
            "everywhere": (torch.randn(3, generator=g).double(), Replicate()),
        }
        self.parameters = {
            name: nn.Parameter(t) if alone else sharded(t, placement)
            for name, (t, placement) in tensors.items()
        }
        self.average = ParameterAverage(self.named)

    def named(self) -> list[tuple[str, Tensor]]:
        return list(self.parameters.items())

    def train(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            with torch.no_grad():
                for p in self.parameters.values():
                    p.mul_(1 + 0.1 * step)
            assert self.average.update(1 + step) is None

    def averages(self) -> dict[str, np.ndarray]:
        tensors = self.average.state_dict()["tensors"]
        whole = {n: a.full_tensor() if isinstance(a, DTensor) else a for n, a in tensors.items()}
        return {name: a.numpy() for name, a in whole.items()}


def alone() -> dict[str, np.ndarray]:
    material = Material(alone=True)
    material.train(0, UPDATES)
    return material.averages()


def assert_same(results: list[Any], expected: dict[str, np.ndarray]) -> None:
    for result in results:
        assert result.keys() == expected.keys()
        # Elements are averaged one by one: sharding changes no bit.
        assert all(np.array_equal(result[name], a) for name, a in expected.items())


def of_dtensors(rank: int) -> dict[str, np.ndarray]:
    material = Material(alone=False)
    material.train(0, UPDATES)
    tensors = material.average.state_dict()["tensors"]
    before = {n: p.to_local().detach().clone() for n, p in material.parameters.items()}
    versions = [p._version for p in material.parameters.values()]
    for name, p in material.parameters.items():
        a = tensors[name]
        assert isinstance(a, DTensor)
        assert (a.device_mesh, a.placements) == (p.device_mesh, p.placements)
    with material.average.swapped() as swapped:
        assert swapped
        for name, p in material.parameters.items():
            assert torch.equal(p.to_local(), tensors[name].to_local().to(p.dtype))
    for name, p in material.parameters.items():
        assert torch.equal(p.to_local(), before[name])
    assert all(p._version > v for p, v in zip(material.parameters.values(), versions, strict=True))
    return material.averages()


def test_the_average_of_dtensors_has_the_bits_of_one_rank() -> None:
    assert_same(run(2, of_dtensors), alone())


# ---- checkpoints ----------------------------------------------------------------------------


def saves(rank: int, folder: str) -> None:
    material = Material(alone=False)
    material.train(0, 3)
    dcp.save({"average": material.average.state_dict()}, checkpoint_id=folder)


def resumes(rank: int, folder: str) -> dict[str, np.ndarray]:
    material = Material(alone=False)
    with torch.no_grad():
        for step in range(3):
            for p in material.parameters.values():
                p.mul_(1 + 0.1 * step)
    state = {"average": material.average.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    assert material.average.load_state_dict(state["average"]) is None
    assert (material.average.steps, material.average.updates) == (6, 3)
    material.train(3, UPDATES)
    return material.averages()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_checkpoint_of_two_ranks_goes_on_with_others(world: int, tmp_path: pathlib.Path) -> None:
    run(2, saves, str(tmp_path))
    assert_same(run(world, resumes, str(tmp_path)), alone())


def loads_others(rank: int) -> list[str | None]:
    material = Material(alone=False)
    material.train(0, 1)
    state = material.average.state_dict()
    reasons = []
    for rows in (
        state["tensors"]["rows"].full_tensor(),
        state["tensors"]["rows"].redistribute(placements=[Shard(1)]),
    ):
        other = Material(alone=False)
        tensors = {**state["tensors"], "rows": rows}
        reasons.append(other.average.load_state_dict({**state, "tensors": tensors}))
        assert other.average.updates == 0
    return reasons


def test_averages_of_another_sharding_are_not_continued() -> None:
    for reasons in run(2, loads_others):
        assert all("rows was sharded as " in str(reason) for reason in reasons)


# ---- engines --------------------------------------------------------------------------------


def bits_come_back(rank: int, engine: str) -> list[bool]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    if engine == "FSDP2":
        fully_shard(model[0])
        fully_shard(model)
    else:
        original = engine == "FSDP1 original parameters"
        model = FullyShardedDataParallel(
            model, use_orig_params=original, device_id=torch.device("cpu")
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def named() -> list[tuple[str, Tensor]]:
        return [(str(i), p) for i, p in enumerate(optimizer.param_groups[0]["params"])]

    def local() -> list[Tensor]:
        return [
            (p.to_local() if isinstance(p, DTensor) else p).detach().clone() for _, p in named()
        ]

    average = ParameterAverage(named)
    x = torch.ones(2, 4)
    for _ in range(4):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert average.update() is None
    # FSDP1's flat parts would be without those of other ranks; DTensors know their place.
    assert bool(average.state_dict()["tensors"]) == (engine == "FSDP2")
    with torch.no_grad():
        before, output = local(), model(x)
        kept = []
        for _ in range(2):
            with average.swapped() as swapped:
                kept += [swapped, not torch.equal(model(x), output)]
            kept += [all(map(torch.equal, before, local())), torch.equal(model(x), output)]
    return kept


@pytest.mark.parametrize("engine", ENGINES)
def test_every_bit_comes_back(engine: str) -> None:
    """Also those that a forward pass sees, which FSDP may have gathered inside the block."""
    assert run(2, bits_come_back, engine) == [[True] * 8] * 2
