"""AnytimeAutoDrop on several ranks: decisions, doublings, averages and the cooldown."""

from __future__ import annotations

import contextlib
import io
import math
import pathlib
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from driven import SHAPES, Driven, optimizer_of
from launch import run
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from autodrop_ext import AnytimeAutoDrop
from autodrop_ext.schedulers.base import as_floats

# Windows of 4 steps, of 8 from step 32 on, of 16 from step 64 on, of 32 from step 128 on. A cosine
# is never above 1, so that every window with a mean cosine lowers the rates.
SETTINGS: dict[str, Any] = {"min_window": 4, "windows": 4, "snapshots": 4, "critical": 1.0}
STEPS = 170
COOLDOWN = (100, 40)  # begins at this step and takes so many
ENGINES = ("DDP", "FSDP1", "FSDP1, flat", "FSDP2", "HSDP")


class Seen(NamedTuple):
    steps: list[int]
    windows: list[int]
    cosines: list[float | None]
    lrs: list[float]
    average: list[np.ndarray]  # the whole parameters, and what a forward pass made of them
    last: list[np.ndarray]


def exact_mean(world, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations as objects
    """DDP divides before it adds, which a third does not survive; this adds first."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0].div_(world))


def wrapped(engine: str) -> nn.Module:
    model = Driven()
    if engine == "DDP":
        parallel = DistributedDataParallel(model)
        parallel.register_comm_hook(dist.get_world_size(), exact_mean)
        return parallel
    if engine.startswith("FSDP1"):
        original = engine == "FSDP1"
        device = torch.device("cpu")
        return FullyShardedDataParallel(model, use_orig_params=original, device_id=device)
    shape = (2, dist.get_world_size() // 2) if engine == "HSDP" else (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    fully_shard(model, mesh=mesh)
    return model


def whole(model: nn.Module) -> list[np.ndarray]:
    """Every parameter of the model, gathered, and the loss that a forward pass computes of it."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            named = {
                n.removeprefix("_fsdp_wrapped_module."): p.detach().clone()
                for n, p in model.named_parameters()
            }
    else:
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        named = {
            n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for n, p in inner.named_parameters()
        }
    with torch.no_grad():
        loss = model(7)
    return [t.numpy() for t in (*(named[n] for n in SHAPES), loss)]


def train(model: nn.Module, scheduler: AnytimeAutoDrop, begin: int = 0, end: int = STEPS) -> Seen:
    for t in range(begin, end):
        model(t).backward()
        scheduler.optimizer.step()
        scheduler.optimizer.zero_grad()
        scheduler.step()
    with scheduler.averaged_parameters():
        average = whole(model)
    history = scheduler.history
    return Seen(
        [d.step for d in history],
        [d.window_steps for d in history],
        [d.cosine for d in history],
        [as_floats(d.lr)[0] for d in history],
        average,
        whole(model),
    )


def alone() -> Seen:
    model = Driven()
    return train(model, AnytimeAutoDrop(optimizer_of(model), **SETTINGS))


def on_engine(rank: int, engine: str) -> Seen:
    model = wrapped(engine)
    return train(model, AnytimeAutoDrop(optimizer_of(model), **SETTINGS))


def assert_same(ranks: list[Seen], expected: Seen) -> None:
    assert max(expected.windows) == 32
    assert sum(a > b for a, b in zip(expected.lrs, expected.lrs[1:], strict=False)) > 5
    for rank in ranks:
        assert rank.steps == expected.steps
        assert rank.windows == expected.windows
        assert rank.cosines == ranks[0].cosines  # between ranks, to the bit
        assert rank.lrs == ranks[0].lrs
        for ours, theirs in zip(rank.cosines, expected.cosines, strict=True):
            assert (ours is None) == (theirs is None)
            # Sums of float32 values in another order, and parameters moved at rates that differ by
            # the rounding of these.
            assert ours is None or theirs is None or abs(ours - theirs) < 1e-6
        for a, b in zip(rank.lrs, expected.lrs, strict=True):
            assert math.isclose(a, b, rel_tol=1e-5)
        for which in ("average", "last"):
            for mine, other in zip(getattr(rank, which), getattr(expected, which), strict=True):
                np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)
        # The average is another model than the last one.
        difference = max(
            float(np.abs(a - b).max()) for a, b in zip(rank.average, rank.last, strict=True)
        )
        assert difference > 0.01


@pytest.fixture(scope="module")
def one_process() -> Seen:
    return alone()


@pytest.mark.parametrize(
    ("engine", "world"), [*((engine, 2) for engine in ENGINES[:4]), ("FSDP2", 3), ("HSDP", 4)]
)
def test_ranks_are_one_process(engine: str, world: int, one_process: Seen) -> None:
    assert_same(run(world, on_engine, engine), one_process)


# ---- the automatic warm-up ----------------------------------------------------------------------

AUTOMATIC: dict[str, Any] = {**SETTINGS, "critical": 0.25, "warmup_steps": "auto"}


def rising(rank: int, engine: str | None) -> tuple[list[Any], list[float], list[float]]:
    model = Driven() if engine is None else wrapped(engine)
    scheduler = AnytimeAutoDrop(optimizer_of(model), **AUTOMATIC)
    seen = train(model, scheduler)
    return [d.warmup for d in scheduler.history], seen.lrs, scheduler.base_lrs


@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
def test_rates_rise_alike_on_all_ranks(engine: str) -> None:
    phases, lrs, base = rising(0, None)
    assert phases.count("rising") > 10 and lrs[-1] > 1.5 * lrs[0]
    assert max(lrs) <= base[0]
    ranks = run(2, rising, engine)
    assert ranks[0] == ranks[1]
    assert ranks[0][0] == phases
    # As in assert_same: sums of float32 values in another order.
    np.testing.assert_allclose(ranks[0][1], lrs, rtol=1e-5)


# ---- resharding around a doubling ---------------------------------------------------------------


def state_of(model: nn.Module, scheduler: AnytimeAutoDrop) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "scheduler": scheduler}


def saves(rank: int, folder: str, at: int) -> bytes:
    """Save with ``torch.distributed.checkpoint``, and return what ``torch.save`` writes."""
    model = wrapped("FSDP2")
    scheduler = AnytimeAutoDrop(optimizer_of(model), **SETTINGS)
    train(model, scheduler, 0, at)
    dcp.save(state_of(model, scheduler), checkpoint_id=folder)
    buffer = io.BytesIO()
    torch.save(scheduler.state_dict(), buffer)
    return buffer.getvalue()


def resumes(rank: int, folder: str, at: int, saved: bytes | None) -> tuple[Seen, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = wrapped("FSDP2")
        scheduler = AnytimeAutoDrop(optimizer_of(model), **SETTINGS)
        state = state_of(model, scheduler)
        if saved is not None:
            del state["scheduler"]
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        if saved is not None:
            scheduler.load_state_dict(torch.load(io.BytesIO(saved), weights_only=True))
        # torch's helper for the optimizer's state would restore the rates too.
        for group, lr in zip(
            scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True
        ):
            group["lr"] = lr
        ended = train(model, scheduler, at)
    return ended, [str(w.message) for w in caught if "AutoDrop" in str(w.message)]


def without_the_open_window(at: int) -> Seen:
    """One process that does at a step what a resume of sharded parameters does."""
    model = Driven()
    scheduler = AnytimeAutoDrop(optimizer_of(model), **SETTINGS)
    train(model, scheduler, 0, at)
    state = scheduler.state_dict()
    state["meter"]["tables"]["whole"] = False
    scheduler.load_state_dict(state)
    return train(model, scheduler, at)


@pytest.mark.parametrize("at", [31, 32, 33, 45, 64, 66, 128, 131])
def test_resharding_around_a_doubling(at: int, one_process: Seen, tmp_path: pathlib.Path) -> None:
    """Right before, at and after one, and in the middle of a window between two."""
    run(2, saves, str(tmp_path), at)
    results = run(3, resumes, str(tmp_path), at, None)
    assert [messages for _, messages in results] == [[]] * 3
    expected = without_the_open_window(at)
    assert_same([ended for ended, _ in results], expected)
    if at in (32, 64, 128):
        assert (expected.steps, expected.lrs) == (one_process.steps, one_process.lrs)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_state_of_rank_zero_alone(world: int, tmp_path: pathlib.Path) -> None:
    """Everything but the average, of which each rank has a part."""
    at = 66
    saved, _ = run(2, saves, str(tmp_path), at)
    expected = without_the_open_window(at)
    for ended, messages in run(world, resumes, str(tmp_path), at, saved):
        (message,) = messages
        assert "the average over the run starts over (" in message
        assert_same([ended], expected._replace(average=ended.average))


# ---- the average --------------------------------------------------------------------------------


def bits_come_back(rank: int, engine: str) -> list[bool]:
    model = wrapped(engine)
    scheduler = AnytimeAutoDrop(optimizer_of(model), **SETTINGS)
    train(model, scheduler, 0, 50)

    def local() -> list[Tensor]:
        """Shards, from the optimizer: a model's own parameters may be gathered ones."""
        return [
            (p.to_local() if isinstance(p, DTensor) else p).detach().clone()
            for p in scheduler.optimizer.param_groups[0]["params"]
        ]

    before, output = local(), float(whole(model)[-1])
    kept = []
    for ending in (None, RuntimeError, KeyboardInterrupt):
        expected = contextlib.nullcontext() if ending is None else pytest.raises(ending)
        with expected, scheduler.averaged_parameters():
            inside = float(whole(model)[-1])
            if ending is not None:
                raise ending
        kept += [all(map(torch.equal, before, local())), float(whole(model)[-1]) == output]
        kept += [inside != output]
    return kept


@pytest.mark.parametrize(
    ("engine", "world"), [*((engine, 2) for engine in ENGINES[:4]), ("HSDP", 4)]
)
def test_every_bit_comes_back(engine: str, world: int) -> None:
    """Also those that a forward pass sees, which FSDP may have gathered inside the block."""
    assert run(world, bits_come_back, engine) == [[True] * 9] * world


# ---- cooldown -----------------------------------------------------------------------------------


def cools_down(model: nn.Module) -> tuple[list[float], list[np.ndarray]]:
    scheduler = AnytimeAutoDrop(optimizer_of(model), **SETTINGS, min_lr=2.0**-20)
    rates = []
    for t in range(STEPS):
        if t == COOLDOWN[0]:
            scheduler.cooldown(COOLDOWN[1])
        model(t).backward()
        scheduler.optimizer.step()
        scheduler.optimizer.zero_grad()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates, whole(model)


def cools_down_sharded(rank: int) -> tuple[list[float], list[np.ndarray]]:
    return cools_down(wrapped("FSDP2"))


def test_a_cooldown_of_shards_is_that_of_one_process() -> None:
    expected, parameters = cools_down(Driven())
    first, last = COOLDOWN[0], sum(COOLDOWN)
    steps = [a - b for a, b in zip(expected[first:], expected[first + 1 : last], strict=False)]
    # A straight line, to the rounding of a subtraction of rates of 2^-5 or less.
    assert max(steps) - min(steps) < 1e-15 < steps[0]
    assert expected[last - 1 :] == [2.0**-20] * (STEPS - last + 1)
    ranks = run(3, cools_down_sharded)
    for rates, own in ranks:
        assert rates == ranks[0][0]
        # As above: cosines differ by roundings.
        assert rates == pytest.approx(expected, rel=1e-5)
        for mine, other in zip(own, parameters, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)
