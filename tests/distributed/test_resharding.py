"""Checkpoints of distributed runs: any rank's state resumes on any number of ranks."""

from __future__ import annotations

import datetime
import io
import pathlib
import shutil
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
from launch import TIMEOUT, run
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from autodrop_ext import AutoDrop, PipelineStages

AT_AN_END = 6 * WINDOW  # of a window, after drops
SAVED_AT = AT_AN_END + 3  # in the middle of a window


def of_ours(caught: list[warnings.WarningMessage]) -> list[str]:
    """Warnings of AutoDrop, but for those of rates: some tests load no state of an optimizer."""
    messages = [str(w.message) for w in caught]
    return [m for m in messages if "AutoDrop" in m and "the learning rates are" not in m]


class Run:
    """A model with AutoDrop; sharded by FSDP2 unless ``shape`` is None."""

    def __init__(self, shape: tuple[int, ...] | None, **settings: Any) -> None:
        self.model = Driven()
        if shape is not None:
            names = ("replicate", "shard")[-len(shape) :]
            fully_shard(self.model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
        self.optimizer = optimizer_of(self.model)
        self.scheduler = AutoDrop(self.optimizer, **(SETTINGS | settings))

    def train(self, begin: int, end: int) -> None:
        for t in range(begin, end):
            self.model(t).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()

    def state(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "scheduler": self.scheduler,
        }

    def load(self, folder: str, scheduler: bytes | None) -> None:
        """Load everything, but for a scheduler that was saved with ``torch.save``."""
        state = self.state()
        if scheduler is not None:
            del state["scheduler"]
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        if scheduler is not None:
            saved = torch.load(io.BytesIO(scheduler), weights_only=True)
            self.scheduler.load_state_dict(saved)


def world_of(shape: tuple[int, ...]) -> int:
    return int(torch.tensor(shape).prod())


def as_bytes(scheduler: AutoDrop) -> bytes:
    buffer = io.BytesIO()
    torch.save(scheduler.state_dict(), buffer)
    return buffer.getvalue()


def save(rank: int, folder: str, at: int, sharded: bool) -> bytes:
    """Save with ``torch.distributed.checkpoint``, and return what ``torch.save`` writes."""
    replica = Run((dist.get_world_size(),) if sharded else None)
    replica.train(0, at)
    # Helpers that run a step at rate zero in the middle of a window move nothing.
    get_optimizer_state_dict(replica.model, replica.optimizer)
    dcp.save(replica.state(), checkpoint_id=folder)
    return as_bytes(replica.scheduler)


def resume(
    rank: int, folder: str, at: int, shape: tuple[int, ...] | None, scheduler: bytes | None
) -> Seen:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="AutoDrop|AngularVelocity")
        replica = Run(shape)
        replica.load(folder, scheduler)
        replica.train(at, STEPS)
    return seen(replica.scheduler)


def without_the_open_window(at: int) -> Seen:
    """One process that does at a step what a resume of sharded parameters does."""
    replica = Run(None)
    replica.train(0, at)
    state = replica.scheduler.state_dict()
    state["meter"]["tables"]["whole"] = False
    replica.scheduler.load_state_dict(state)
    replica.train(at, STEPS)
    return seen(replica.scheduler)


@pytest.mark.parametrize("at", [AT_AN_END, SAVED_AT])
def test_sharded_parameters(at: int, tmp_path: pathlib.Path) -> None:
    """From two ranks to one, two, three, and to a mesh of another shape."""
    expected = without_the_open_window(at)
    if at == AT_AN_END:
        assert_same([expected], alone())
    else:
        assert expected.steps == [step for step in alone().steps if step != AT_AN_END + WINDOW]
        assert None not in expected.cosines
    first, second = run(2, save, str(tmp_path), at, True)
    assert len(first) == len(second)  # the same entries and tables
    for scheduler in (first, second, None):
        shapes: list[tuple[int, ...]] = [(1,), (2,), (3,), (2, 2)]
        for shape in shapes if scheduler is not second else shapes[:1]:
            arguments = (str(tmp_path), at, shape, scheduler)
            assert_same(run(world_of(shape), resume, *arguments), expected)


def test_replicas_resume_in_the_middle_of_a_window(tmp_path: pathlib.Path) -> None:
    first, _ = run(2, save, str(tmp_path), SAVED_AT, False)
    expected = alone()
    for scheduler in (first, None):
        for world in (1, 2, 3):
            ranks = run(world, resume, str(tmp_path), SAVED_AT, None, scheduler)
            assert_same(ranks, expected)
    # Tables of replicas are those of the whole model: sharded ranks go on with them as well.
    ranks = run(2, resume, str(tmp_path), SAVED_AT, (2,), None)
    assert_same(ranks, without_the_open_window(SAVED_AT))


def test_one_process_goes_on_with_a_sharded_checkpoint(tmp_path: pathlib.Path) -> None:
    run(2, save, str(tmp_path), SAVED_AT, True)
    ranks = run(1, resume, str(tmp_path), SAVED_AT, None, None)
    assert_same(ranks, without_the_open_window(SAVED_AT))


# ---- what cannot be continued -------------------------------------------------------------------


def flat_shards(
    rank: int, folder: str, use_orig_params: bool, resumed: bool
) -> tuple[list[str], list[bool]]:
    """Train up to SAVED_AT, or from there; return warnings, and where angles are unknown."""
    model = FullyShardedDataParallel(
        Driven(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    optimizer = optimizer_of(model)
    scheduler = AutoDrop(optimizer, **SETTINGS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if resumed:
            dcp.load({"scheduler": scheduler}, checkpoint_id=folder)
        for t in range(SAVED_AT if resumed else 0, STEPS if resumed else SAVED_AT):
            model(t).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    if not resumed:
        dcp.save({"scheduler": scheduler}, checkpoint_id=folder)
    return of_ours(caught), [d.angle is None for d in scheduler.history]


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_flat_shards_go_on_with_as_many_ranks_only(
    use_orig_params: bool, tmp_path: pathlib.Path
) -> None:
    known = SAVED_AT // WINDOW - 2
    saved = run(2, flat_shards, str(tmp_path), use_orig_params, False)
    assert saved == [([], [False] * known)] * 2
    again = (STEPS - SAVED_AT) // WINDOW
    for messages, unknown in run(2, flat_shards, str(tmp_path), use_orig_params, True):
        # The parameters are those of a new run, but the displacements are measured.
        assert messages == []
        assert unknown == [False] * (known + again)
    for messages, unknown in run(3, flat_shards, str(tmp_path), use_orig_params, True):
        (message,) = messages
        assert "cannot be continued (it was saved for other parameters" in message
        assert "the meter warms up again" in message
        # Three windows before the next angle, of which the first is the third of the meter.
        assert unknown == [False] * known + [True] * 2 + [False] * (again - 2)


def own_tables(rank: int, folder: str, at: int, resumed: bool) -> tuple[list[str], Seen]:
    replica = Run((dist.get_world_size(),), buckets=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if resumed:
            replica.load(folder, None)
            assert replica.scheduler.num_drops
        replica.train(at if resumed else 0, STEPS if resumed else at)
    if not resumed:
        assert replica.scheduler.state_dict()["meter"]["tables"]["mean"] is None
        dcp.save(replica.state(), checkpoint_id=folder)
    return of_ours(caught), seen(replica.scheduler)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_tables_of_a_rank_are_not_saved(world: int, tmp_path: pathlib.Path) -> None:
    """``buckets=None`` on sharded parameters: counts and decisions go on, angles come later."""
    for messages, saved in run(2, own_tables, str(tmp_path), AT_AN_END, False):
        assert messages == [] and None not in saved.cosines
    results = run(world, own_tables, str(tmp_path), AT_AN_END, True)
    expected = alone()
    known = AT_AN_END // WINDOW - 2
    for messages, again in results:
        (message,) = messages
        assert "it has no tables: parameters had changed, or each rank has its" in message
        assert again.cosines[:known] == pytest.approx(expected.cosines[:known], abs=1e-12)
        assert again.cosines[known : known + 2] == [None] * 2
        assert None not in again.cosines[known + 2 :]
        assert again.cosines[known + 2 :] == results[0][1].cosines[known + 2 :]


# ---- pipelines ----------------------------------------------------------------------------------


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


def stages(rank: int, folder: str) -> tuple[Seen, Seen, Seen]:
    whole, saved, other, third = (Stage(rank) for _ in range(4))
    whole.train(0, STEPS)
    saved.train(0, AT_AN_END)
    dcp.save({"scheduler": saved.scheduler}, checkpoint_id=folder)
    dcp.load({"scheduler": other.scheduler}, checkpoint_id=folder)
    of_rank_zero: list[Any] = [as_bytes(saved.scheduler)]
    dist.broadcast_object_list(of_rank_zero)
    state = torch.load(io.BytesIO(of_rank_zero[0]), weights_only=True)
    third.scheduler.load_state_dict(state)
    for resumed in (other, third):
        resumed.optimizer.load_state_dict(saved.optimizer.state_dict())
        resumed.parameter.data.copy_(saved.parameter.data)
        resumed.train(AT_AN_END, STEPS)
    return seen(whole.scheduler), seen(other.scheduler), seen(third.scheduler)


def test_stages_with_equal_names(tmp_path: pathlib.Path) -> None:
    for whole, *resumed in run(2, stages, str(tmp_path)):
        assert whole.drops >= 3 and None not in whole.cosines
        assert resumed == [whole, whole]


# ---- saving and loading ------------------------------------------------------------------------


def nothing_before_a_step(rank: int) -> tuple[int, int]:
    """The first forward may re-pad shards: tables made before it would point astray."""
    replica = Run((dist.get_world_size(),))
    meter = replica.scheduler.meter
    replica.model(0).backward()
    replica.scheduler.state_dict()
    before = meter.device_bytes
    replica.optimizer.step()
    replica.scheduler.step()
    return before, meter.device_bytes


def test_nothing_is_built_before_the_first_optimizer_step() -> None:
    for before, after in run(2, nothing_before_a_step):
        assert before == 0
        assert after > 0


def saved_while_training(rank: int, folder: str) -> tuple[Seen, Seen]:
    """Continue from an asynchronous checkpoint, while whose writing the run goes on."""
    shape = (dist.get_world_size(),)
    whole, resumed = Run(shape), Run(shape)
    whole.train(0, AT_AN_END)
    saving = dcp.async_save(whole.state(), checkpoint_id=folder, process_group=dist.new_group())
    whole.train(AT_AN_END, STEPS)
    saving.result()
    resumed.load(folder, None)
    resumed.train(AT_AN_END, STEPS)
    return seen(whole.scheduler), seen(resumed.scheduler)


def test_an_asynchronous_checkpoint(tmp_path: pathlib.Path) -> None:
    for whole, resumed in run(2, saved_while_training, str(tmp_path)):
        assert whole == resumed and None not in whole.cosines


def half_a_checkpoint(rank: int, folder: str, broken: str) -> Seen:
    """A save was interrupted: its files are there, but for the one that is written last."""
    replica = Run((dist.get_world_size(),))
    replica.train(0, SAVED_AT)
    dcp.save(replica.state(), checkpoint_id=folder)
    if rank == 0:
        shutil.copytree(folder, broken)
        (pathlib.Path(broken) / ".metadata").unlink()
    dist.barrier()
    with pytest.raises(BaseException, match=r"metadata"):  # torch's is no Exception
        dcp.load(replica.state(), checkpoint_id=broken)
    replica.train(SAVED_AT, STEPS)
    return seen(replica.scheduler)


def test_half_a_checkpoint_changes_nothing(tmp_path: pathlib.Path) -> None:
    ranks = run(2, half_a_checkpoint, str(tmp_path / "whole"), str(tmp_path / "broken"))
    assert_same(ranks, alone())


# ---- process groups -----------------------------------------------------------------------------


def groups_made_again(rank: int, folder: str, worlds: tuple[int, ...]) -> tuple[Seen, list[str]]:
    """The default group is destroyed and made again in the middle of training."""
    model = Driven()
    optimizer = optimizer_of(model)
    scheduler = AutoDrop(optimizer, **SETTINGS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(STEPS):
            if t and t % AT_AN_END == 0:
                dist.destroy_process_group()
                world = worlds[t // AT_AN_END - 1]
                if rank >= world:
                    break
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{folder}/store{t}",
                    rank=rank,
                    world_size=world,
                    timeout=datetime.timedelta(seconds=TIMEOUT),
                )
            for name in model.names:
                getattr(model, name).grad = drive(name, t)
            optimizer.step()
            scheduler.step()
    return seen(scheduler), of_ours(caught)


@pytest.mark.parametrize("worlds", [(3, 3), (2, 1), (3, 2)])
def test_a_process_group_that_is_made_again(
    worlds: tuple[int, ...], tmp_path: pathlib.Path
) -> None:
    results = run(3, groups_made_again, str(tmp_path), worlds)
    assert [messages for _, messages in results] == [[]] * 3
    assert_same([ended for ended, _ in results[: worlds[-1]]], alone())
