"""The same motion, however the parameters are spread: the same angles, the same drops."""

from __future__ import annotations

import datetime
import pathlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from driven import (
    SETTINGS,
    STEPS,
    Driven,
    Seen,
    alone,
    assert_same,
    drive,
    optimizer_of,
    seen,
    train,
)
from launch import TIMEOUT, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from autodrop_ext import AutoDrop
from autodrop_ext.distributed import PipelineStages


@pytest.fixture(scope="module")
def one_process() -> Seen:
    return alone()


def exact_mean(world, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations as objects
    """DDP divides before it adds, which a third does not survive; this adds first."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0].div_(world))


def ddp(rank: int) -> Seen:
    model = DistributedDataParallel(Driven())
    model.register_comm_hook(dist.get_world_size(), exact_mean)
    optimizer = optimizer_of(model)
    return train(model, optimizer, AutoDrop(optimizer, **SETTINGS))


@pytest.mark.parametrize("world", [2, 3])
def test_ddp(world: int, one_process: Seen) -> None:
    assert_same(run(world, ddp), one_process)


def zero_redundancy(rank: int) -> Seen:
    # torch's own module warns of torch.jit when it is imported.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(Driven())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=2.0**-5)
    return train(model, optimizer, AutoDrop(optimizer, **SETTINGS))


def test_zero_redundancy_optimizer(one_process: Seen) -> None:
    assert_same(run(2, zero_redundancy), one_process)


def fsdp1(rank: int, use_orig_params: bool, strategy: str) -> Seen:
    options: dict[str, Any] = {}
    if strategy == "HYBRID_SHARD":
        options["device_mesh"] = init_device_mesh("cpu", (2, 2))
    model = FullyShardedDataParallel(
        Driven(),
        use_orig_params=use_orig_params,
        sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
        **options,
    )
    optimizer = optimizer_of(model)
    return train(model, optimizer, AutoDrop(optimizer, **SETTINGS))


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize(
    ("strategy", "world"), [("FULL_SHARD", 3), ("HYBRID_SHARD", 4), ("NO_SHARD", 2)]
)
def test_fsdp1(use_orig_params: bool, strategy: str, world: int, one_process: Seen) -> None:
    assert_same(run(world, fsdp1, use_orig_params, strategy), one_process)


def fsdp2(rank: int, shape: tuple[int, ...]) -> Seen:
    names = ("replicate", "shard")[-len(shape) :]
    model = Driven()
    fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    optimizer = optimizer_of(model)
    return train(model, optimizer, AutoDrop(optimizer, **SETTINGS))


@pytest.mark.parametrize("shape", [(2,), (3,), (2, 2)], ids=["2 ranks", "3 ranks", "HSDP 2x2"])
def test_fsdp2(shape: tuple[int, ...], one_process: Seen) -> None:
    """Uneven shards, and on most ranks an empty one of ``scale``."""
    world = shape[0] * (shape[1] if len(shape) > 1 else 1)
    assert_same(run(world, fsdp2, shape), one_process)


class Mover:
    """Moves parameters of any placement as SGD would move the whole ones."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.optimizer = torch.optim.SGD(parameters.values(), lr=2.0**-5)

    def train(self, scheduler: AutoDrop, steps: int = STEPS) -> Seen:
        for t in range(steps):
            for name, parameter in self.parameters.items():
                gradient = drive(name, t)
                if isinstance(parameter, DTensor):
                    gradient = distribute_tensor(
                        gradient, parameter.device_mesh, parameter.placements
                    )
                parameter.grad = gradient
            self.optimizer.step()
            scheduler.step()
        return seen(scheduler)


def mixed_meshes(rank: int) -> Seen:
    """FSDP2 x TP as torchtitan lays it out, a parameter on the dp submesh only, plain ones."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    whole = Driven()
    placements: dict[str, Any] = {
        "embedding": (mesh, [Shard(0), Shard(0)]),
        "first": (mesh, [Shard(0), Shard(1)]),
        "bias": (mesh, [Shard(0), Replicate()]),
        "second": (mesh["dp"], [Shard(1)]),
    }
    parameters = {}
    for name, parameter in whole.named_parameters():
        if name in placements:
            where, how = placements[name]
            parameter = nn.Parameter(distribute_tensor(parameter.detach(), where, how))
        parameters[name] = parameter
    mover = Mover(parameters)
    return mover.train(AutoDrop(mover.optimizer, **SETTINGS))


def test_several_meshes_and_plain_tensors(one_process: Seen) -> None:
    assert_same(run(4, mixed_meshes), one_process)


def fsdp2_and_tensor_parallel(rank: int) -> Seen:
    """The engine's own layout, with ``_StridedShard``."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = Driven()
    for name in ("embedding", "first", "second"):
        parameter = nn.Parameter(
            distribute_tensor(getattr(model, name).detach(), mesh["tp"], [Shard(0)])
        )
        setattr(model, name, parameter)
    for name in ("bias", "scale"):
        parameter = nn.Parameter(
            distribute_tensor(getattr(model, name).detach(), mesh["tp"], [Replicate()])
        )
        setattr(model, name, parameter)
    fully_shard(model, mesh=mesh["dp"])
    assert "_StridedShard" in {type(p).__name__ for q in model.parameters() for p in q.placements}
    optimizer = optimizer_of(model)
    return train(model, optimizer, AutoDrop(optimizer, **SETTINGS))


def test_fsdp2_and_tensor_parallel(one_process: Seen) -> None:
    assert_same(run(4, fsdp2_and_tensor_parallel), one_process)


STAGES = (("embedding", "first"), ("bias", "second", "scale"))


def pipeline(rank: int, declared: str) -> Seen:
    """Two stages of two data-parallel ranks each."""
    stage = rank // 2
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    model = Driven(STAGES[stage])
    group: Any = None
    if declared == "stages":
        group = PipelineStages(stage, 2)
    elif declared == "mesh":
        group = mesh
    else:  # detected from the DTensors' mesh
        fully_shard(model, mesh=mesh["dp"])
    mover = Mover(dict(model.named_parameters()))
    return mover.train(AutoDrop(mover.optimizer, process_group=group, **SETTINGS))


@pytest.mark.parametrize("declared", ["stages", "mesh", "detected"])
def test_pipeline(declared: str, one_process: Seen) -> None:
    assert_same(run(4, pipeline, declared), one_process)


def one_group_of_several(rank: int) -> Seen:
    """Two models at once, each with a process group of its own."""
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    model = Driven()
    mover = Mover(dict(model.named_parameters()))
    scheduler = AutoDrop(mover.optimizer, process_group=groups[rank // 2], **SETTINGS)
    return mover.train(scheduler, STEPS if rank < 2 else 2 * STEPS)


def test_a_process_group_of_its_own(one_process: Seen) -> None:
    first, second, other = run(3, one_group_of_several)
    assert_same([first, second], one_process)
    assert len(other.steps) > len(first.steps)


def without_a_default_group(rank: int, store: str) -> Seen:
    """A process group that ``torch.distributed`` has not been told of."""
    from torch.distributed import _dist2

    dist.destroy_process_group()
    timeout, cpu = datetime.timedelta(seconds=TIMEOUT), torch.device("cpu")
    group = _dist2._BACKENDS["gloo"](dist.FileStore(store, 2), rank, 2, timeout, cpu)
    assert not dist.is_initialized()
    model = Driven()
    optimizer = optimizer_of(model)
    return train(model, optimizer, AutoDrop(optimizer, process_group=group, **SETTINGS))


def test_without_a_default_group(one_process: Seen, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torch.distributed._dist2", reason="torch before 2.8 has no such groups")
    assert_same(run(2, without_a_default_group, str(tmp_path / "store")), one_process)
