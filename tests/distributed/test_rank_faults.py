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
from driven import SETTINGS, WINDOW, Driven, Seen, alone, drive, optimizer_of, seen
from launch import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial

from autodrop_ext import AngularVelocity, AutoDrop, DisagreementError

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
        assert "4,736 elements" in message and "103 elements" in message


def test_undeclared_stages_of_the_same_shape() -> None:
    for kind, message, _ in run(2, undeclared_stages, True):
        assert kind == DisagreementError.__name__
        assert "hold copies of the same parameters, but the sums over their param" in message
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


def one_discards(rank: int) -> tuple[Seen, list[str]]:
    """An observation is interrupted on one rank: all start over together."""
    replica = Run()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        replica.steps(4 * WINDOW + 1)
        if rank == 1:
            replica.scheduler.meter.discard()
        replica.steps(6 * WINDOW - 1)
    return seen(replica.scheduler), [str(w.message) for w in caught]


def test_a_window_that_one_rank_discards() -> None:
    (first, quiet), (second, loud) = run(2, one_discards)
    assert str(first) == str(second)  # where NaN equals itself
    # Window 4 is discarded on both; the next angle comes with the third window after it.
    assert first.steps == [WINDOW * n for n in (3, 4, 6, 7, 8, 9, 10)]
    assert [c is None for c in first.cosines] == [False] * 2 + [True] * 2 + [False] * 3
    assert quiet == []
    assert ["the last observation was interrupted" in message for message in loud] == [True]


def one_is_replaced(rank: int) -> tuple[Seen, list[str]]:
    """A parameter gets another dtype on one rank, between two windows and for one of them."""
    replica = Run()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        replica.steps(4 * WINDOW)
        if rank == 1:
            replica.model.first.data = replica.model.first.data.t().contiguous().t()
        replica.steps(6 * WINDOW)
    return seen(replica.scheduler), [str(w.message) for w in caught]


def test_a_parameter_that_changes_its_form_on_one_rank() -> None:
    """Another order in memory is another form; the ranks' layouts differ then."""
    with pytest.raises(launch.RankFailedError, match="expected the same parameters on all ranks"):
        run(2, one_is_replaced)


def moves(rank: int, at: int) -> tuple[Seen, list[str]]:
    replica = Run()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        replica.steps(at)
        if rank == 1:
            replica.model.first.data = replica.model.first.data.clone()
        replica.steps(10 * WINDOW - at)
    return seen(replica.scheduler), [str(w.message) for w in caught]


@pytest.mark.parametrize("at", [4 * WINDOW, 4 * WINDOW + 1])
def test_memory_that_moves_on_one_rank_costs_nothing(at: int) -> None:
    expected = alone(10 * WINDOW)
    for ended, messages in run(2, moves, at):
        assert messages == []
        assert ended.lrs == expected.lrs
        # Sums in another order.
        assert ended.cosines == pytest.approx(expected.cosines, abs=1e-12)


def counted(rank: int, kind: str) -> tuple[list[list[str]], int]:
    """Collectives of the scheduler in each step, and windows."""
    model = Driven()
    if kind != "replicas":
        fully_shard(model)
    optimizer = optimizer_of(model)
    buckets = None if kind == "own tables" else 2**18
    scheduler = AutoDrop(optimizer, **SETTINGS, buckets=buckets)
    steps: list[list[str]] = []
    starts = ("all_", "reduce", "broadcast", "gather", "scatter", "send", "barrier")
    collectives = {n: getattr(dist, n) for n in dir(dist) if n.startswith(starts)}

    def counting(name: str) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            steps[-1].append(name)
            return collectives[name](*args, **kwargs)

        return count

    for t in range(10 * WINDOW):
        model(t).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append([])
        for n in collectives:
            setattr(dist, n, counting(n))
        scheduler.step()
        scheduler.state_dict()
        for n, function in collectives.items():
            setattr(dist, n, function)
    return steps, scheduler.meter.windows


@pytest.mark.parametrize("kind", ["replicas", "sharded", "own tables"])
def test_two_collectives_a_window_and_none_a_step(kind: str) -> None:
    """And one at the first step, which compares settings; none in ``state_dict()``."""
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else ""
    window = [[]] * (WINDOW - 1) + [[gather or "all_gather_into_tensor", "all_reduce"]]
    expected = window * 10
    expected[0] = ["all_gather_object"]
    assert run(2, counted, kind) == [(expected, 10)] * 2


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
    """A parameter is not finite on one rank, and there the warning is an error."""
    model = Driven()
    optimizer = optimizer_of(nn.parallel.DistributedDataParallel(model))
    scheduler = AutoDrop(optimizer, **SETTINGS)
    said = []
    for t in range(30):
        model(t).backward()
        optimizer.step()
        optimizer.zero_grad()
        if t == 9:
            good = model.second.data.clone()
            model.second.data[0, 0] = torch.nan if rank == 1 else 0.0
        elif t == 10:
            model.second.data.copy_(good)
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
    assert len(said) == 1 and "on rank 1 held NaN or infinity" in said[0]


def loaded_alone(rank: int, back: int, engine: str) -> tuple[str, int, float | None]:
    """One rank loads a state in the middle of training, that of so many steps ago."""
    model = Driven()
    if engine == "FSDP2":
        fully_shard(model)
    optimizer = optimizer_of(model)
    scheduler = AutoDrop(optimizer, **SETTINGS)
    for t in range(40):
        if t == 18 - back:
            state = scheduler.state_dict()
        if t == 18 and rank == 1:
            scheduler.load_state_dict(state)
        if engine == "alone":
            for name in model.names:
                getattr(model, name).grad = drive(name, t)
        else:
            model(t).backward()
        try:
            optimizer.step()
            scheduler.step()
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}", t, scheduler.history[-1].cosine
        optimizer.zero_grad()
    return "", -1, scheduler.history[-1].cosine


def test_a_rank_that_loads_a_state_alone_keeps_its_place() -> None:
    """A state of replicas of the same step changes nothing, so that the ranks still agree."""
    (said, at, cosine), other = run(2, loaded_alone, 0, "alone")
    assert (said, at) == ("", -1) and cosine is not None
    assert other == (said, at, cosine)


@pytest.mark.parametrize(
    ("back", "message"),
    [
        # Counts and calls are loaded too, so that this rank's twentieth step comes a step later.
        (1, "ranks 0, 1 hold copies of the same parameters, but the sums over their parameters"),
        (5, "expected all ranks to end the same window; did one start late or load another check"),
    ],
)
def test_a_rank_that_loads_another_state_alone_stops_all(back: int, message: str) -> None:
    for said, _, _ in run(2, loaded_alone, back, "alone"):
        assert said.startswith(f"DisagreementError: {message}")


def test_a_rank_that_loads_a_sharded_state_alone_keeps_its_place() -> None:
    """It has lost the table of the open window, which all leave out then."""
    (said, at, cosine), other = run(2, loaded_alone, 0, "FSDP2")
    assert (said, at) == ("", -1) and cosine is not None
    assert other == (said, at, cosine)


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


# ---- cooldowns and averages of some ranks ---------------------------------------------------


def cools_down_alone(rank: int, what: str) -> tuple[str, str, float]:
    replica = Run()
    replica.steps(WINDOW + 1)
    if what == "end_cooldown":
        replica.scheduler.cooldown(3 * WINDOW)
        replica.steps(1)
        if rank == 1:
            replica.scheduler.end_cooldown()
    elif rank == 1:
        replica.scheduler.cooldown(1 if what == "over within the window" else 3 * WINDOW)
    kind, message, _ = replica.failure(2 * WINDOW)
    return kind, message, replica.scheduler.num_drops


@pytest.mark.parametrize("what", ["under way", "over within the window", "end_cooldown"])
def test_a_cooldown_on_one_rank_is_named(what: str) -> None:
    for kind, message, drops in run(2, cools_down_alone, what):
        assert (kind, drops) == ("DisagreementError", 0)
        assert message.startswith("cooldown: expected the same on all ranks, got {'begin': ")
        assert "on rank 0" in message and "on rank 1" in message


def averages_on_some_ranks(rank: int, what: str) -> list[Any]:
    model = Driven()
    if what.startswith("shards"):
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = optimizer_of(model)
    scheduler = AutoDrop(optimizer, **(SETTINGS | {"average": True, "factor": 0.999}))

    def steps(begin: int, end: int) -> None:
        for t in range(begin, end):
            model(t).backward()
            optimizer.step()
            optimizer.zero_grad()
            if rank == 1 and what.endswith("NaN") and t == 4 * WINDOW + 1:
                _local(model.second).data[0, 0] = torch.nan
            scheduler.step()
        if what.endswith("NaN"):
            _local(model.second).data[0, 0] = 0.25

    def held() -> bool:
        before = [p.detach().clone() for p in model.parameters()]
        with scheduler.averaged_parameters() as done:
            changed = any(not _equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert changed == done
        return done

    found: list[Any] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps(0, 4 * WINDOW + 1)
        found.append(held())
        if rank == 1 and what.endswith("interrupted"):
            scheduler.meter.discard()
        elif rank == 1 and what.endswith("state of one rank"):
            none = {"steps": 0, "updates": 0, "tensors": {}}
            scheduler.load_state_dict({**scheduler.state_dict(), "mean": none})
        steps(4 * WINDOW + 1, 4 * WINDOW + 2)
        found.append(held() if what.startswith("shards") else None)
        if what.endswith("interrupted"):
            steps(4 * WINDOW + 2, 5 * WINDOW + 3)
            mean = scheduler.state_dict()["mean"]
            found += [held(), mean["steps"], mean["updates"]]
    return [*found, [str(w.message) for w in caught if "different steps" in str(w.message)]]


def _local(p: Any) -> Any:
    return p.to_local() if isinstance(p, DTensor) else p


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(_local(a), _local(b))


@pytest.mark.parametrize("what", ["interrupted", "state of one rank", "NaN"])
def test_shards_are_averaged_on_all_ranks_or_on_none(what: str) -> None:
    first, second = run(2, averages_on_some_ranks, f"shards, {what}")
    assert first == second
    assert first[:2] == [True, False]
    assert len(first[-1]) == 1
    if what == "interrupted":  # the next window makes them equal
        assert first[2:5] == [True, 5 * WINDOW + 3, 3]


def test_averages_of_replicas_are_equal_after_the_window_that_was_interrupted() -> None:
    first, second = run(2, averages_on_some_ranks, "replicas, interrupted")
    assert first == second
    assert first[2:5] == [True, 5 * WINDOW + 3, 3]


def evaluates_on_one_rank(rank: int) -> bool:
    replica = Run(average=True)
    replica.steps(2 * WINDOW)
    if rank == 0:
        with replica.scheduler.averaged_parameters() as held:
            return held
    replica.steps(0)
    return False


def test_one_replica_may_be_evaluated_alone() -> None:
    assert run(2, evaluates_on_one_rank) == [True, False]
