"""Checkpoints of sharded runs, taken in the middle of a window."""

from __future__ import annotations

import io
import pathlib
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from driven import (
    SETTINGS,
    STEPS,
    WINDOW,
    Driven,
    Seen,
    alone,
    assert_same,
    drive,
    optimizer_of,
    seen,
    start,
)
from launch import run
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from autodrop_ext import AngularVelocity, AutoDrop
from autodrop_ext.distributed import PipelineStages

SAVED_AT = 6 * WINDOW + 3  # in the middle of a window, after drops


def about_sums(caught: list[warnings.WarningMessage]) -> list[str]:
    """Warnings of AutoDrop, but for those of rates: these tests load no state of an optimizer."""
    messages = [str(w.message) for w in caught]
    return [m for m in messages if "AutoDrop" in m and "the learning rates are" not in m]


class Run:
    """FSDP2 with AutoDrop, saved and loaded as torch documents it."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.model = Driven()
        shape = shape or (dist.get_world_size(),)
        names = ("replicate", "shard")[-len(shape) :]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = optimizer_of(self.model)
        self.scheduler = AutoDrop(self.optimizer, **SETTINGS)

    def train(self, begin: int, end: int) -> None:
        for t in range(begin, end):
            self.model(t).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()

    def hold(self, form: Any) -> None:
        """Let a meter decide whose sums stay in one form."""
        self.scheduler.meter = AngularVelocity(self.optimizer, WINDOW, form=form)

    def state(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "scheduler": self.scheduler,
            "arenas": self.scheduler.arena_state,
        }

    def load(self, folder: str) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])


def save(rank: int, folder: str, form: str) -> None:
    replica = Run()
    replica.hold(form)
    replica.train(0, SAVED_AT)
    # Helpers that run a step at rate zero in the middle of a window move nothing.
    get_optimizer_state_dict(replica.model, replica.optimizer)
    dcp.save(replica.state(), checkpoint_id=folder)


def resume(rank: int, folder: str, form: str, shape: tuple[int, ...]) -> Seen:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="AutoDrop|AngularVelocity")
        replica = Run(shape)
        replica.hold(form)
        replica.load(folder)
        replica.train(SAVED_AT, STEPS)
    return seen(replica.scheduler)


def uninterrupted(rank: int, form: str) -> Seen:
    replica = Run()
    replica.hold(form)
    replica.train(0, STEPS)
    return seen(replica.scheduler)


@pytest.mark.parametrize("form", ["delta", "sum"])
def test_resharding_in_the_middle_of_a_window(form: str, tmp_path: pathlib.Path) -> None:
    """From two ranks to one, two, three, and to a mesh of another shape."""
    expected = run(2, uninterrupted, form)[0]
    run(2, save, str(tmp_path), form)
    for world, shape in ((1, (1,)), (2, (2,)), (3, (3,)), (4, (2, 2))):
        assert_same(run(world, resume, str(tmp_path), form, shape), expected)


def rank_zero_saves(rank: int) -> bytes:
    replica = Run()
    replica.train(0, SAVED_AT)
    buffer = io.BytesIO()
    torch.save(replica.scheduler.state_dict(), buffer)
    return buffer.getvalue()


def every_rank_loads(rank: int, saved: bytes) -> tuple[Seen, list[str]]:
    replica = Run()
    replica.scheduler.load_state_dict(torch.load(io.BytesIO(saved), weights_only=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        replica.train(SAVED_AT, STEPS)
    return seen(replica.scheduler), [str(w.message) for w in caught]


def test_rank_zero_saves_and_every_rank_loads() -> None:
    """The local arenas of rank 0 are no rank's but its own: they are not in the file."""
    saved = run(2, rank_zero_saves)[0]
    assert torch.load(io.BytesIO(saved), weights_only=True)["meter"]["arenas"] == {}
    (first, said), (second, also_said) = run(2, every_rank_loads, saved)
    assert first.cosines == second.cosines
    assert first.lrs == second.lrs
    for messages in (said, also_said):
        (message,) = (m for m in messages if "warms up again" in m)
        assert "saved without the arenas, which arena_state would hold" in message
    # Windows 0 to 5 were known. The one that was open is given up, and angles need three more.
    known = SAVED_AT // WINDOW - 2
    assert None not in first.cosines[:known]
    assert [c is None for c in first.cosines[known:]] == [True] * 2 + [False] * 6


def flat_shards(rank: int, folder: str, resumed: bool) -> list[str]:
    model = FullyShardedDataParallel(Driven(), device_id=torch.device("cpu"))
    optimizer = optimizer_of(model)
    scheduler = AutoDrop(optimizer, **SETTINGS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if resumed:
            state = {"scheduler": scheduler, "arenas": scheduler.arena_state}
            dcp.load(state, checkpoint_id=folder)
        for t in range(SAVED_AT):
            model(t).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    if not resumed:
        state = {"scheduler": scheduler, "arenas": scheduler.arena_state}
        dcp.save(state, checkpoint_id=folder)
    assert len(scheduler.history) == (2 if resumed else 1) * (SAVED_AT // WINDOW) - 2
    return about_sums(caught)


def test_flat_shards_warm_up_again(tmp_path: pathlib.Path) -> None:
    assert run(2, flat_shards, str(tmp_path), False) == [[], []]
    for messages in run(3, flat_shards, str(tmp_path), True):
        assert len(messages) == 1
        assert "the meter warms up again" in messages[0]


def other_step(rank: int, folder: str) -> list[str]:
    replica = Run()
    replica.train(0, WINDOW + 1)
    dcp.save({"arenas": replica.scheduler.arena_state}, checkpoint_id=folder)
    replica.train(WINDOW + 1, SAVED_AT)
    saved = replica.scheduler.state_dict()
    other = Run()
    dcp.load({"arenas": other.scheduler.arena_state}, checkpoint_id=folder)
    other.scheduler.load_state_dict(saved)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other.train(SAVED_AT, STEPS)
    return about_sums(caught)


def test_arenas_of_another_step_are_refused(tmp_path: pathlib.Path) -> None:
    for messages in run(2, other_step, str(tmp_path)):
        assert len(messages) == 1
        assert f"its arenas are of step {WINDOW + 1}, its counts of step {SAVED_AT}" in messages[0]


def replicas(rank: int, folder: str) -> None:
    """Unsharded parameters: also with torch.distributed.checkpoint, on another number of ranks."""
    model = Driven()
    optimizer = optimizer_of(model)
    scheduler = AutoDrop(optimizer, **SETTINGS)
    for t in range(SAVED_AT):
        model(t).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    state = {"model": model, "scheduler": scheduler, "arenas": scheduler.arena_state}
    state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    dcp.save(state, checkpoint_id=folder)


def go_on(rank: int, folder: str) -> Seen:
    model = Driven()
    optimizer = optimizer_of(model)
    scheduler = AutoDrop(optimizer, **SETTINGS)
    state = {"model": model, "scheduler": scheduler, "arenas": scheduler.arena_state}
    state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    for t in range(SAVED_AT, STEPS):
        model(t).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return seen(scheduler)


def test_replicas_go_on_elsewhere(tmp_path: pathlib.Path) -> None:
    run(2, replicas, str(tmp_path))
    assert_same(run(3, go_on, str(tmp_path)), alone())


class Stage:
    """A pipeline stage of plain tensors, whose names and shapes the other stage has too."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.parameter = torch.nn.Parameter(start("first") + rank)
        self.optimizer = torch.optim.SGD([("weight", self.parameter)], lr=2.0**-5)
        group = PipelineStages(rank, 2)
        self.scheduler = AutoDrop(self.optimizer, process_group=group, **SETTINGS)

    def train(self, begin: int, end: int) -> None:
        for t in range(begin, end):
            self.parameter.grad = drive("first", t) * (1 + self.rank)
            self.optimizer.step()
            self.scheduler.step()


def stages(rank: int, folder: str) -> tuple[Seen, Seen]:
    whole, saved, other = Stage(rank), Stage(rank), Stage(rank)
    whole.train(0, STEPS)
    uninterrupted = seen(whole.scheduler)
    saved.train(0, SAVED_AT)
    state = {"scheduler": saved.scheduler, "arenas": saved.scheduler.arena_state}
    dcp.save(state, checkpoint_id=folder)
    dcp.load(
        {"scheduler": other.scheduler, "arenas": other.scheduler.arena_state}, checkpoint_id=folder
    )
    other.optimizer.load_state_dict(saved.optimizer.state_dict())
    other.parameter.data.copy_(saved.parameter.data)
    other.train(SAVED_AT, STEPS)
    return uninterrupted, seen(other.scheduler)


def test_stages_with_equal_names_keep_their_own_sums(tmp_path: pathlib.Path) -> None:
    """Plain tensors under one key would be taken for copies, and all but one be lost."""
    for whole, resumed in run(2, stages, str(tmp_path)):
        assert whole.drops >= 3
        assert resumed == whole


def nothing_before_a_step(rank: int) -> tuple[int, int]:
    """The first forward may re-pad shards: tables made before it would point astray."""
    replica = Run()
    meter = replica.scheduler.meter
    replica.model(0).backward()
    before = meter.device_bytes
    replica.optimizer.step()
    replica.scheduler.step()
    return before, meter.device_bytes


def test_nothing_is_built_before_the_first_optimizer_step() -> None:
    for before, after in run(2, nothing_before_a_step):
        assert before == 0
        assert after > 0
