"""Ranks with different settings, states or rates: all of them raise, and the message names them."""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from driven import SETTINGS, Driven, optimizer_of
from launch import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from autodrop_ext import (
    AnalyticAutoDrop,
    AngularVelocity,
    AnytimeAutoDrop,
    AutoDrop,
    DisagreementError,
    EpochAutoDrop,
)


def model_of(engine: str) -> nn.Module:
    model = Driven()
    if engine == "fsdp2":
        return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return nn.parallel.DistributedDataParallel(model)


def differing(
    rank: int, engine: str, kind: str, name: str, values: tuple[Any, Any]
) -> tuple[str, int]:
    """What a rank says, and after how many steps."""
    model = model_of(engine)
    optimizer = optimizer_of(model)
    if kind == "AutoDrop":
        scheduler: Any = AutoDrop(optimizer, **(SETTINGS | {name: values[rank]}))
    else:
        made = {
            "AnytimeAutoDrop": AnytimeAutoDrop,
            "EpochAutoDrop": EpochAutoDrop,
            "AnalyticAutoDrop": AnalyticAutoDrop,
        }[kind]
        model_of_velocity = {"gamma": 4.0, "epsilon": 0.1, "tau0": 0.05}
        settings = model_of_velocity if kind == "AnalyticAutoDrop" else {}
        scheduler = made(optimizer, **(settings | {name: values[rank]}))
    for t in range(30):
        model(t).backward()
        optimizer.step()
        optimizer.zero_grad()
        try:
            scheduler.step()
        except DisagreementError as error:
            return str(error), t
    return "", -1


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("window", (4, 5)),
        ("factor", (0.5, 0.9)),
        ("threshold", (0.5, 0.1)),
        ("buffer_size", (3, 4)),
        ("min_samples", (2, 3)),
        ("kernel", ("value", "time")),
        ("min_lr", (0.0, 0.001)),
        ("warmup_steps", (0, 7)),
        ("snapshots", (None, 2)),
        ("buckets", (2**18, None)),
        ("per_group", (False, True)),
        ("per_tensor", (False, True)),
    ],
)
def test_every_setting_of_autodrop(engine: str, name: str, values: tuple[Any, Any]) -> None:
    ended = run(2, differing, engine, "AutoDrop", name, values)
    assert ended[0] == ended[1]
    message, step = ended[0]
    assert step == 0  # before any window ends, so that nobody waits for the others
    left, right = ([v] if name == "min_lr" else v for v in values)
    assert message.startswith(
        f"{name}: expected the same on all ranks, got {left!r} on rank 0, {right!r} on rank 1"
    )


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        ("AnytimeAutoDrop", "min_window", (16, 8)),
        ("AnytimeAutoDrop", "windows", (8, 4)),
        ("AnytimeAutoDrop", "critical", (0.25, 0.2)),
        ("AnytimeAutoDrop", "gain", (5.0, 4.0)),
        ("AnytimeAutoDrop", "max_power", (0.5, 0.4)),
        ("AnytimeAutoDrop", "cosines", (8, 4)),
        ("EpochAutoDrop", "factor", (0.2, 0.3)),
        ("EpochAutoDrop", "delay", (20, 10)),
        ("EpochAutoDrop", "average", (True, False)),
        ("EpochAutoDrop", "threshold", (0.01, 0.02)),
        ("EpochAutoDrop", "max_threshold", (1.0, 2.0)),
        ("AnytimeAutoDrop", "snapshots", (32, 16)),
        ("AnytimeAutoDrop", "warmup_steps", (0, 7)),
        ("AnalyticAutoDrop", "gamma", (4.0, 5.0)),
        ("AnalyticAutoDrop", "rates", ("theorem", "proof")),
        ("AnalyticAutoDrop", "warmup_steps", (0, 7)),
    ],
)
def test_settings_of_the_other_schedulers(kind: str, name: str, values: tuple[Any, Any]) -> None:
    ended = run(2, differing, "ddp", kind, name, values)
    assert ended[0] == ended[1]
    message, step = ended[0]
    assert step == 0 and f"got {values[0]!r} on rank 0, {values[1]!r} on rank 1" in message
    # A meter's settings come first; min_window is its window.
    assert message.startswith("window:" if name == "min_window" else f"{name}:")


def kept_by_one(rank: int) -> tuple[str, int]:
    model = model_of("ddp")
    state = AutoDrop(optimizer_of(model), **SETTINGS).state_dict()
    optimizer = optimizer_of(model)
    scheduler = AutoDrop(optimizer, **(SETTINGS | {"factor": 0.25}))
    warnings.simplefilter("ignore")  # rank 0's settings are replaced
    scheduler.load_state_dict(state, keep=("factor",) if rank == 1 else ())
    model(0).backward()
    optimizer.step()
    try:
        scheduler.step()
    except DisagreementError as error:
        return str(error), 0
    return "", -1


def test_a_setting_that_one_rank_keeps_on_resume() -> None:
    ended = run(2, kept_by_one)
    assert ended[0] == ended[1]
    assert ended[0][0].startswith("factor: expected the same on all ranks"), ended
    assert "0.25 on rank 1" in ended[0][0]


def drifting_apart(rank: int, what: str) -> tuple[str, int]:
    model = model_of("ddp")
    optimizer = optimizer_of(model)
    scheduler = AutoDrop(optimizer, **SETTINGS)
    for t in range(60):
        model(t).backward()
        optimizer.step()
        optimizer.zero_grad()
        if t == 31 and rank == 1:  # a window ends with this step
            if what == "rates":
                optimizer.param_groups[0]["lr"] *= 0.5
            else:
                scheduler.num_drops += 1
        try:
            scheduler.step()
        except DisagreementError as error:
            return str(error), t
    return "", -1


@pytest.mark.parametrize(("what", "name"), [("rates", "lr: "), ("state", "num_drops: ")])
def test_what_drifts_apart_later_is_named_at_the_next_window(what: str, name: str) -> None:
    ended = run(2, drifting_apart, what)
    assert ended[0] == ended[1]
    message, step = ended[0]
    assert step == 31 and message.startswith(name), (step, message)


def meters(rank: int) -> str:
    meter = AngularVelocity([nn.Parameter(torch.ones(3))], window=(4, 5)[rank])
    try:
        meter.observe()
    except DisagreementError as error:
        return str(error)
    return ""


def test_meters_alone_are_compared_at_the_first_step() -> None:
    said = run(2, meters)
    assert said[0] == said[1] and said[0].startswith("window: expected the same on all ranks")


def joined(rank: int) -> float:
    """DDP's join() with uneven inputs: what the documentation says to do ends at once."""
    model = model_of("ddp")
    optimizer = optimizer_of(model)
    scheduler = AutoDrop(optimizer, **SETTINGS)
    begin = time.monotonic()

    def train() -> None:
        with model.join(throw_on_early_termination=True):  # type: ignore[operator]
            for t in range((9, 30)[rank]):
                model(t).backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()

    with pytest.raises(RuntimeError, match="exhausted"):
        train()
    return time.monotonic() - begin


def test_join_ends_early_as_documented() -> None:
    assert max(run(2, joined)) < 15  # seconds; the process group gives up after 20
