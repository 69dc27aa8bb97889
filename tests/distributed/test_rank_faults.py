"""What goes wrong on one rank: all ranks hear of it in words, and no learning rate drops."""

from __future__ import annotations

import os
import signal
import time
import warnings
from typing import Any

import launch
import pytest
import torch
import torch.distributed as dist
from driven import SETTINGS, WINDOW, Driven, Seen, drive, optimizer_of, seen
from launch import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial

from autodrop_ext import AngularVelocity, AutoDrop
from autodrop_ext.distributed import DisagreementError

START_LR = 2.0**-5


class Run:
    """A replica that is trained without reducing gradients: they are equal anyway."""

    def __init__(self, model: nn.Module | None = None, **settings: Any) -> None:
        self.model = model or Driven()
        self.optimizer = optimizer_of(self.model)
        self.scheduler = AutoDrop(self.optimizer, **(SETTINGS | settings))
        self.t = 0

    def step(self, skip: bool = False) -> None:
        for name in self.model.names:  # type: ignore[union-attr]
            getattr(self.model, name).grad = drive(name, self.t)
        self.t += 1
        if not skip:
            self.optimizer.step()
        self.scheduler.step()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @property
    def lr(self) -> float:
        lr: float = self.optimizer.param_groups[0]["lr"]
        return lr

    def failure(self, count: int) -> tuple[str, str, float]:
        """Type and message of what stops ``count`` steps, and the learning rate then."""
        try:
            self.steps(count)
        except RuntimeError as error:
            return type(error).__name__, str(error), self.lr
        return "", "", self.lr


def not_a_number(rank: int) -> tuple[Seen, list[str]]:
    replica = Run()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        replica.steps(4 * WINDOW + 1)
        if rank == 2:
            replica.model.second.data[0, 0] = torch.nan
        replica.steps(WINDOW - 1)
        replica.model.second.data[0, 0] = 0.25
        replica.steps(5 * WINDOW)
    return seen(replica.scheduler), [str(w.message) for w in caught]


def test_nan_on_the_last_rank_only() -> None:
    results = run(3, not_a_number)
    histories = [result[0] for result in results]
    assert histories[0].lrs == histories[1].lrs == histories[2].lrs
    cosines = histories[0].cosines
    assert cosines == histories[1].cosines == histories[2].cosines
    # Windows 2 to 9; window 4 held the NaN, and two more pass until three are finite.
    assert [c is None for c in cosines] == [False] * 2 + [True] * 3 + [False] * 3
    messages = [[w for w in result[1] if "NaN or infinity" in w] for result in results]
    assert len(messages[0]) == 1
    assert "rank 2 held NaN or infinity during window 4" in messages[0][0]
    assert messages[1] == []
    assert "['params'][3] on rank 2 held NaN" in messages[2][0]


def another_window(rank: int) -> tuple[str, str, float]:
    return Run(window=WINDOW if rank != 1 else 2 * WINDOW).failure(4 * WINDOW)


def test_one_rank_with_another_window() -> None:
    for kind, message, lr in run(3, another_window):
        assert kind == DisagreementError.__name__
        assert "window: expected the same on all ranks, got 4 on ranks 0, 2, 8 on rank 1" in message
        assert lr == START_LR


def skipped_step(rank: int) -> tuple[str, str, float]:
    replica = Run()
    replica.steps(WINDOW + 1)
    replica.step(skip=rank == 1)
    return replica.failure(2 * WINDOW)


def test_one_rank_that_skipped_a_step() -> None:
    for kind, message, lr in run(2, skipped_step):
        assert kind == DisagreementError.__name__
        assert "a rank skipped optimizer steps" in message
        assert "calls on rank 0" in message
        assert lr == START_LR


def skipped_step_between_collectives(rank: int, skipped: int) -> tuple[str, str, float]:
    """The training loop has collectives of its own, so that nobody gets to the next window."""
    replica = Run()
    other = dist.new_group([0, 1])
    try:
        for t in range(skipped + 1):
            replica.step(skip=rank == 1 and t == skipped)
        for _ in range(2 * WINDOW):
            dist.all_reduce(torch.zeros(1), group=other)
            replica.step()
    except RuntimeError as error:
        return type(error).__name__, str(error), replica.lr
    return "", "", replica.lr


@pytest.mark.parametrize(
    ("skipped", "problem"),
    [
        (0, "on rank 0: its settings could not be compared with the other 1 ranks"),
        (1, "on rank 0: window 0 ended after 4 optimizer steps, but its sums could not be"),
    ],
    ids=["the first", "the second"],
)
def test_a_skipped_step_ends_within_the_timeout(skipped: int, problem: str) -> None:
    results = run(2, skipped_step_between_collectives, skipped, timeout=3)
    (kind, message, lr), (waited, _, other_lr) = results
    assert kind == "RuntimeError"
    assert problem in message
    assert "one of them is dead, late, or counts fewer steps; no learning rate" in message
    assert lr == other_lr == START_LR
    assert waited  # in its own all_reduce


def killed(rank: int) -> tuple[str, str, float, float]:
    replica = Run()
    replica.steps(WINDOW + 2)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    return *replica.failure(WINDOW), time.monotonic() - began


def test_a_rank_that_dies_before_the_collective() -> None:
    timeout = 10.0
    results = run(3, killed, timeout=timeout, may_die=(1,))
    assert results[1] is None
    for kind, message, lr, seconds in (results[0], results[2]):
        assert kind == "RuntimeError"
        assert "one of them is dead, late" in message
        assert lr == START_LR
        assert seconds < 2 * timeout


def undeclared_stages(rank: int, alike: bool) -> tuple[str, str, float]:
    names = ("embedding", "first") if rank == 0 else ("bias", "second", "scale")
    model = Driven(("second",) if alike else names)
    if alike:
        model.second.data.mul_(1 + rank)
    return Run(model).failure(WINDOW)


def test_undeclared_pipeline_stages() -> None:
    for kind, message, _ in run(2, undeclared_stages, False):
        assert kind == DisagreementError.__name__
        assert "expected the same parameters on all ranks" in message
        assert "process_group=PipelineStages(stage, num_stages)" in message
        assert "240 elements" in message


def test_undeclared_stages_of_the_same_shape() -> None:
    for kind, message, _ in run(2, undeclared_stages, True):
        assert kind == DisagreementError.__name__
        assert "hold copies of the same parameters, but their parameters differ" in message
        assert "PipelineStages" in message


def partial_placement(rank: int) -> str:
    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    try:
        AngularVelocity([("weight", parameter)], 2).observe()
    except TypeError as error:
        return str(error)
    return ""


def test_partial_placement() -> None:
    for message in run(2, partial_placement):
        assert "weight: expected a parameter that is sharded or replicated, got" in message
        assert "Partial" in message


def one_changes(rank: int) -> tuple[Seen, list[str]]:
    """A parameter moves in memory on one rank: all start over together."""
    replica = Run()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        replica.steps(4 * WINDOW + 1)
        if rank == 1:
            replica.model.first.data = replica.model.first.data.clone()
        replica.steps(6 * WINDOW - 1)
    return seen(replica.scheduler), [str(w.message) for w in caught]


def test_parameters_that_move_on_one_rank() -> None:
    (first, quiet), (second, told) = run(2, one_changes)
    assert str(first) == str(second)  # where NaN equals itself
    # Window 4 is discarded on both; the next angle comes with the third window after it.
    assert first.steps == [WINDOW * n for n in (3, 4, 6, 7, 8, 9, 10)]
    assert [c is None for c in first.cosines] == [False] * 2 + [True] * 2 + [False] * 3
    assert quiet == []
    assert ["the watched parameters were moved" in message for message in told] == [True]


def moves_between_windows(rank: int) -> Seen:
    replica = Run()
    replica.steps(4 * WINDOW)
    if rank == 1:
        replica.model.first.data = replica.model.first.data.clone()
    replica.steps(6 * WINDOW)
    return seen(replica.scheduler)


def test_parameters_that_move_between_two_windows() -> None:
    first, second = run(2, moves_between_windows)
    assert first.cosines == second.cosines
    assert first.lrs == second.lrs
    assert first.cosines.count(None) == 2


def counted(rank: int, sharded: bool) -> tuple[list[int], int]:
    """Collectives of the scheduler after each step, and windows."""
    model = Driven()
    if sharded:
        fully_shard(model)
    optimizer = optimizer_of(model)
    scheduler = AutoDrop(optimizer, **SETTINGS)
    calls, after = 0, []
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather = getattr(dist, name)

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return gather(*args, **kwargs)

    starts = ("all_", "reduce", "broadcast", "gather", "scatter", "send", "barrier")
    collectives = {n: getattr(dist, n) for n in dir(dist) if n.startswith(starts)}
    for t in range(10 * WINDOW):
        model(t).backward()
        optimizer.step()
        optimizer.zero_grad()
        for n in collectives:
            setattr(dist, n, count if n == name else _refuse)
        scheduler.step()
        for n, function in collectives.items():
            setattr(dist, n, function)
        after.append(calls)
    return after, scheduler.meter.windows


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("no other collective was expected")


def test_one_collective_a_window_and_none_a_step() -> None:
    """And two at the first step, which compare settings: lengths of the texts, then the texts."""
    expected = [2 + t // WINDOW for t in range(1, 10 * WINDOW + 1)]
    for sharded in (False, True):
        assert run(2, counted, sharded) == [(expected, 10)] * 2


def nothing_here(rank: int) -> tuple[str, list[float | None]]:
    """A rank without any element takes part: FSDP leaves it empty."""
    model = Driven(("scale",))
    fully_shard(model)
    optimizer = optimizer_of(model)
    meter = AngularVelocity(optimizer, 2)
    readings = []
    for t in range(8):
        model(t).backward()
        optimizer.step()
        optimizer.zero_grad()
        readings.append(meter.observe())
    return str(tuple(model.scale.to_local().shape)), [r.cosine for r in readings if r is not None]


def test_a_rank_without_elements() -> None:
    (shape0, here), (shape1, there) = run(2, nothing_here)
    assert (shape0, shape1) == ("(1,)", "(0,)")
    assert here == there
    assert all(abs(abs(c) - 1.0) < 1e-12 for c in here if c is not None)  # one coordinate: a line


def warned_as_error(rank: int) -> tuple[int, list[str], int]:
    """Parameters move on one rank, and there the warning is an error."""
    model = Driven()
    optimizer = optimizer_of(nn.parallel.DistributedDataParallel(model))
    scheduler = AutoDrop(optimizer, **SETTINGS)
    said = []
    for t in range(30):
        if rank == 1 and t == 9:
            model.share_memory()
        model(t).backward()
        optimizer.step()
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error" if rank == 1 else "ignore")
            try:
                scheduler.step()
            except RuntimeWarning as warning:
                said.append(str(warning))
    return scheduler.meter.windows, said, len(scheduler.history)


def test_a_warning_that_is_an_error_on_one_rank_leaves_no_rank_waiting() -> None:
    (windows, _, readings), (same, said, as_many) = run(2, warned_as_error)
    assert windows == same >= 5 and readings == as_many > 0
    assert len(said) == 1 and "parameters were moved" in said[0]


def loaded_alone(rank: int) -> tuple[str, int]:
    """One rank loads a state in the middle of training."""
    model = Driven()
    optimizer = optimizer_of(nn.parallel.DistributedDataParallel(model))
    scheduler = AutoDrop(optimizer, **SETTINGS)
    for t in range(40):
        model(t).backward()
        optimizer.step()
        optimizer.zero_grad()
        try:
            scheduler.step()
        except DisagreementError as error:
            return str(error), t
        if t == 17 and rank == 1:
            scheduler.load_state_dict(scheduler.state_dict())
    return "", -1


def test_a_rank_that_loads_a_state_alone_keeps_its_place() -> None:
    """A state of the same step changes nothing, so that the ranks still agree."""
    assert run(2, loaded_alone) == [("", -1)] * 2


def test_ranks_that_do_not_meet_are_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, failures = launch.start_ranks, [launch.NotConnectedError("rank 0: connection closed")]

    def meeting(*args: Any) -> list[Any]:
        if failures:
            raise failures.pop()
        return begin(*args)

    monkeypatch.setattr(launch, "start_ranks", meeting)
    assert launch.run(2, own_rank) == [0, 1]
    assert not failures


def own_rank(rank: int) -> int:
    return rank
