"""DeepSpeed and accelerate, as their users set them up."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from typing import Any

import pytest
import torch
from driven import SETTINGS, STEPS, WINDOW, Driven, Seen, alone, assert_same, optimizer_of, seen
from launch import run
from torch import nn
from torch.distributed.tensor import DTensor

from autodrop_ext import AngularVelocity, AutoDrop
from autodrop_ext.schedulers.step_hook import StepHook
from autodrop_ext.sharding import zero_optimizer_of


def needs(name: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"{name} is not installed")


def start_deepspeed(model: nn.Module, optimizer: Any, stage: int, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Collectives through shared memory would be compiled first, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_batch_size": int(os.environ["WORLD_SIZE"]),
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1_000_000},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # the default is 1
    }
    return deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False, **options
    )


def two_groups(model: Driven) -> torch.optim.SGD:
    """ZeRO steps the inner optimizer once for each of them."""
    first, *others = model.parameters()
    return torch.optim.SGD([{"params": [first]}, {"params": others}], lr=2.0**-5)


def zero_run(rank: int, stage: int, given: str) -> Seen:
    model = Driven()
    optimizer = two_groups(model)
    settings = SETTINGS | {"buckets": None}  # flat partitions are hashed otherwise
    scheduler = AutoDrop(optimizer, **settings) if given == "before" else None
    engine, wrapped, _, _ = start_deepspeed(model, optimizer, stage)
    if scheduler is None:
        scheduler = AutoDrop(wrapped if given == "wrapped" else optimizer, **settings)
    for t in range(STEPS):
        engine.backward(engine(t))
        engine.step()
        scheduler.step()
    return seen(scheduler)


@needs("deepspeed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero(stage: int) -> None:
    """Flat partitions with padding, which does not count."""
    ranks = run(2, zero_run, stage, "wrapped")
    expected = alone()
    expected = expected._replace(lrs=[lr * 2 for lr in expected.lrs])
    assert_same(ranks, expected)


@needs("deepspeed")
@pytest.mark.slow
@pytest.mark.parametrize("given", ["before", "inner"])
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_given_the_optimizer_that_it_wraps(stage: int, given: str) -> None:
    expected = alone()
    expected = expected._replace(lrs=[lr * 2 for lr in expected.lrs])
    assert_same(run(2, zero_run, stage, given), expected)


def zero_steps_the_scheduler(rank: int) -> Seen:
    model = Driven()
    engine, _, _, scheduler = start_deepspeed(
        model,
        optimizer_of(model),
        2,
        lr_scheduler=lambda inner: AutoDrop(inner, buckets=None, **SETTINGS),
    )
    for t in range(STEPS):
        engine.backward(engine(t))
        engine.step()
    return seen(scheduler)


@needs("deepspeed")
@pytest.mark.slow
def test_zero_makes_and_steps_the_scheduler() -> None:
    assert_same(run(2, zero_steps_the_scheduler), alone())


def zero_parameters(rank: int) -> list[str]:
    model = Driven()
    optimizer = optimizer_of(model)
    _, wrapped, _, _ = start_deepspeed(model, optimizer, 3)
    wrapped.fp32_partitioned_groups_flat[0].data = torch.empty(0)  # as if on NVMe
    messages = []
    for params in (model.parameters(), wrapped):
        try:
            AngularVelocity(params, 2).observe()
        except RuntimeError as error:
            messages.append(str(error))
    return messages


@needs("deepspeed")
@pytest.mark.slow
def test_zero_three_never_looks_like_no_parameters() -> None:
    for from_model, from_engine in run(2, zero_parameters):
        assert "got one that DeepSpeed ZeRO-3 has partitioned; give the scheduler" in from_model
        assert "expected the float32 partition 0 of ZeRO-3 in GPU or host memory" in from_engine


def accelerated(rank: int, accumulation: int) -> Seen:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = Driven()
    optimizer = optimizer_of(model)
    scheduler = AutoDrop(optimizer, **SETTINGS)
    model, optimizer, prepared = accelerator.prepare(model, optimizer, scheduler)
    for t in range(STEPS):
        for _ in range(accumulation):
            with accelerator.accumulate(model):
                accelerator.backward(model(t))
                optimizer.step()
                prepared.step()
                optimizer.zero_grad()
    return seen(scheduler)


@needs("accelerate")
def test_accelerate_counts_optimizer_steps() -> None:
    """Two processes, two micro-batches a step: ``step()`` is called eight times as often."""
    assert_same(run(2, accelerated, 2), alone())


def accelerate_with_fsdp2(rank: int) -> Seen:
    """``prepare`` swaps the optimizer's parameters after the scheduler was made."""
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    PartialState(cpu=True)
    # Among CPUs accelerate turns FSDP into DDP and does not say so; torch shards there as well.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = Driven()
    optimizer = optimizer_of(model)
    scheduler = AutoDrop(optimizer, **SETTINGS)
    model, optimizer, prepared = accelerator.prepare(model, optimizer, scheduler)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert AutoDrop(optimizer, **SETTINGS).optimizer is optimizer.optimizer  # unwrapped
    for t in range(STEPS):
        accelerator.backward(model(t))
        optimizer.step()
        prepared.step()
        optimizer.zero_grad()
    return seen(scheduler)


@needs("accelerate")
@pytest.mark.slow
def test_accelerate_with_fsdp2() -> None:
    assert_same(run(2, accelerate_with_fsdp2), alone())


def overflow(rank: int, fused: bool) -> tuple[int, list[float | None]]:
    """One overflow in the middle of a window, seen by one rank and reduced to all."""
    model = torch.nn.parallel.DistributedDataParallel(Driven())
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-5, fused=fused)
    scheduler = AutoDrop(optimizer, **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10_000)
    t = 0
    for call in range(5 * WINDOW + 1):
        loss = model(t)
        overflows = call == WINDOW + 1
        scaler.scale(loss * (torch.inf if overflows and rank == 0 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step()
        t += not overflows
    return scheduler.meter.steps, [d.cosine for d in scheduler.history]


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_leaves_the_window_unchanged(fused: bool) -> None:
    expected = alone(5 * WINDOW)
    for steps, cosines in run(2, overflow, fused):
        assert steps == 5 * WINDOW
        assert len(cosines) == len(expected.cosines) == 3
        for ours, theirs in zip(cosines, expected.cosines, strict=True):
            assert ours is not None
            assert theirs is not None
            # Scaled gradients are exact, and so are the sums but for their order.
            assert abs(ours - theirs) < 1e-12


def test_without_deepspeed_there_is_no_engine() -> None:
    model = Driven()
    assert zero_optimizer_of(optimizer_of(model)) is None


def test_groups_that_are_stepped_one_by_one_are_one_step() -> None:
    """As ZeRO-1 and 2 do it: the hook fires for each of 25 groups."""
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(25)]
    groups = [{"params": [p]} for p in parameters]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    scheduler = AutoDrop(optimizer, window=2)
    hook = StepHook()
    hook.attach(optimizer)
    for _ in range(4):  # a warning of steps without calls would be an error here
        whole = optimizer.param_groups
        for group in whole:
            optimizer.param_groups = [group]
            group["params"][0].grad = torch.randn(2)
            optimizer.step()
        optimizer.param_groups = whole
        scheduler.step()
    assert scheduler.meter.steps == 4
    assert hook.real_steps == hook.steps_since_call == 4
