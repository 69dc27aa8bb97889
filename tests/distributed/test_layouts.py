"""The same motion, however the parameters are spread: the same angles, the same drops."""

from __future__ import annotations

import datetime
import math
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from driven import (
    BUCKETS,
    SETTINGS,
    STEPS,
    WINDOW,
    Driven,
    Observers,
    Seen,
    alone,
    assert_same,
    assert_same_tables,
    drive,
    optimizer_of,
    train,
)
from launch import TIMEOUT, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from autodrop_ext import AutoDrop, PipelineStages
from autodrop_ext.sharding import local_shards
from autodrop_ext.sketch import Sketch


@pytest.fixture(scope="module")
def one_process() -> Seen:
    return alone()


def assert_one_process(ranks: list[Seen], expected: Seen) -> None:
    assert_same(ranks, expected)
    assert_same_tables(ranks, expected)


def assert_same_without_places(ranks: list[Seen], expected: Seen) -> None:
    """The same if ranks keep their own tables; angles of hashed ones have their standard error."""
    assert_same(ranks, expected)
    for rank in ranks:
        assert rank.others == ranks[0].others
        for ours, theirs in zip(rank.others["own"], expected.others["own"], strict=True):
            # Products of equal float32 values, added in another order in float64.
            assert ours is not None and theirs is not None and abs(ours - theirs) < 1e-12
        for ours, theirs in zip(rank.others["hashed"], expected.others["own"], strict=True):
            # The angle's standard error is sin(angle) / sqrt(BUCKETS), that of the cosine at most
            # 1 / sqrt(BUCKETS); five of them.
            assert ours is not None and theirs is not None
            assert abs(ours - theirs) < 5 / math.sqrt(BUCKETS)


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
    assert_one_process(run(world, ddp), one_process)


def zero_redundancy(rank: int) -> Seen:
    # torch's own module warns of torch.jit when it is imported.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(Driven())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=2.0**-5)
    return train(model, optimizer, AutoDrop(optimizer, **SETTINGS))


def test_zero_redundancy_optimizer(one_process: Seen) -> None:
    assert_one_process(run(2, zero_redundancy), one_process)


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
    return train(model, optimizer, AutoDrop(optimizer, buckets=None, **SETTINGS))


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize(
    ("strategy", "world"), [("FULL_SHARD", 3), ("HYBRID_SHARD", 4), ("NO_SHARD", 2)]
)
def test_fsdp1(use_orig_params: bool, strategy: str, world: int, one_process: Seen) -> None:
    """Flat shards have no global index: they are hashed by rank and position."""
    assert_same_without_places(run(world, fsdp1, use_orig_params, strategy), one_process)


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
    assert_one_process(run(world, fsdp2, shape), one_process)


class Mover:
    """Moves parameters of any placement as SGD would move the whole ones."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.optimizer = torch.optim.SGD(parameters.values(), lr=2.0**-5)

    def train(self, scheduler: AutoDrop, steps: int = STEPS, process_group: Any = None) -> Seen:
        observers = Observers(scheduler, process_group)
        for t in range(steps):
            self.move(t)
            scheduler.step()
            observers.observe()
        return observers.seen()

    def move(self, t: int) -> None:
        for name, parameter in self.parameters.items():
            gradient = drive(name, t)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        self.optimizer.step()


def tensor_parallel(rank: int, dim: int) -> Seen:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parameters = {
        name: nn.Parameter(
            distribute_tensor(p.detach(), mesh, [Shard(dim) if p.ndim > dim else Replicate()])
        )
        for name, p in Driven().named_parameters()
    }
    mover = Mover(parameters)
    return mover.train(AutoDrop(mover.optimizer, **SETTINGS))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("world", [2, 3])
def test_tensor_parallel(dim: int, world: int, one_process: Seen) -> None:
    assert_one_process(run(world, tensor_parallel, dim), one_process)


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
    assert_one_process(run(4, mixed_meshes), one_process)


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
    assert_one_process(run(4, fsdp2_and_tensor_parallel), one_process)


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
    scheduler = AutoDrop(mover.optimizer, process_group=group, buckets=None, **SETTINGS)
    return mover.train(scheduler, process_group=group)


def tables_of_stages() -> np.ndarray:
    """Mean and displacement of the last window of one process that holds both stages."""
    stages = [dict(Driven(names).named_parameters()) for names in STAGES]
    mover = Mover({**stages[0], **stages[1]})
    scheduler = AutoDrop(mover.optimizer, **SETTINGS)
    sketches = []
    for i, parameters in enumerate(stages):
        # The names that an optimizer of one stage gives to its parameters.
        named = [(f"param_groups[0]['params'][{j}]", p) for j, p in enumerate(parameters.values())]
        shards = local_shards(named, {})
        options: dict[str, Any] = {"num_groups": 1, "per_tensor": False, "backend": "auto"}
        weights = [1.0] * len(shards)
        sketches.append(Sketch(shards, weights, buckets=BUCKETS, stage=i, **options))
    for t in range(STEPS):
        mover.move(t)
        scheduler.step()
        for sketch in sketches:
            sketch.add(np.array([shard.tensor.data_ptr() for shard in sketch.shards]))
            if t % WINDOW == WINDOW - 1:
                sketch.close(WINDOW)
    states = [sketch.state_dict(running=False) for sketch in sketches]
    return sum(torch.cat([s["mean"], s["displacement"]]) for s in states).numpy()


@pytest.mark.parametrize("declared", ["stages", "mesh", "detected"])
def test_pipeline(declared: str, one_process: Seen) -> None:
    """Elements are hashed by stage as well, because stages may have the same names."""
    ranks = run(4, pipeline, declared)
    assert_same_without_places(ranks, one_process)
    expected = tables_of_stages()
    for rank in ranks:
        # Sums in another order.
        difference = np.abs(rank.tables["hashed"] - expected).max()
        assert difference <= 1e-12 * np.abs(expected).max()


def one_group_of_several(rank: int) -> Seen:
    """Two models at once, each with a process group of its own."""
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    model = Driven()
    mover = Mover(dict(model.named_parameters()))
    group = groups[rank // 2]
    scheduler = AutoDrop(mover.optimizer, process_group=group, **SETTINGS)
    return mover.train(scheduler, STEPS if rank < 2 else 2 * STEPS, group)


def test_a_process_group_of_its_own(one_process: Seen) -> None:
    first, second, other = run(3, one_group_of_several)
    assert_one_process([first, second], one_process)
    assert len(other.steps) > len(first.steps)


def without_a_default_group(rank: int, store: str) -> Seen:
    """A process group that ``torch.distributed`` has not been told of."""
    from torch.distributed import _dist2

    dist.destroy_process_group()
    timeout, cpu = datetime.timedelta(seconds=TIMEOUT), torch.device("cpu")
    group = _dist2._BACKENDS["gloo"](dist.FileStore(store, 2), rank, 2, timeout, cpu)
    assert not dist.is_initialized()
    mover = Mover(dict(Driven().named_parameters()))
    scheduler = AutoDrop(mover.optimizer, process_group=group, **SETTINGS)
    return mover.train(scheduler, process_group=group)


def test_without_a_default_group(one_process: Seen, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torch.distributed._dist2", reason="torch before 2.8 has no such groups")
    ranks = run(2, without_a_default_group, str(tmp_path / "store"))
    assert_one_process(ranks, one_process)
