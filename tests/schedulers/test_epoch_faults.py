"""EpochAutoDrop: checkpoints in the middle of everything, and the faults that apply to it."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from trajectories import Given, turning

from autodrop_ext import EpochAutoDrop

EPOCHS, STEPS = 24, 3  # epochs of a run, steps of an epoch
# Wide enough for the condition to hold again and again, and delays to be met in every phase.
SETTINGS: dict[str, Any] = {"factor": 0.7, "threshold": 8.0, "max_threshold": 40.0, "delay": 3}


class Run:
    """A small training run whose every part is in its checkpoint."""

    def __init__(self, seed: int = 0, lr: Any = 0.05, fused: bool = False, **settings: Any):
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Conv2d(2, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 3)
        ).to(memory_format=torch.channels_last)
        self.model[2].double()  # averaged in float64
        # Fused SGD takes momentum from memory that nobody wrote where its first step is skipped.
        options = {"fused": True} if fused else {"momentum": 0.9}
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, **options)
        self.scheduler = EpochAutoDrop(self.optimizer, **(SETTINGS | settings))
        self.data = torch.Generator().manual_seed(1)
        self.scaler: torch.amp.GradScaler | None = None
        self.poison = False

    def batch(self) -> None:
        x = torch.randn(8, 2, 4, 4, generator=self.data)
        hidden = self.model[1](self.model[0](x)).double()
        loss = (self.model[2](hidden) - x.mean(dim=(1, 2, 3))[:, None]).square().mean()
        if self.poison:
            loss = loss * math.inf
        self.optimizer.zero_grad()
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            for _ in range(STEPS):
                self.batch()
            self.scheduler.step()

    def train_until_waiting(self) -> None:
        """Up to the end of the first epoch of a delay."""
        while not self.scheduler.history or self.scheduler.history[-1].waited != 1:
            self.train(1)

    def save(self) -> bytes:
        buffer = io.BytesIO()
        parts = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "data": self.data.get_state(),
        }
        torch.save(parts, buffer)
        return buffer.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.data.set_state(state["data"])

    def outcome(self) -> tuple[list[dict[str, Any]], list[bytes]]:
        """All decisions, and the bits of all parameters."""
        bits = [p.detach().numpy().tobytes() for p in self.model.parameters()]
        return [d.as_dict() for d in self.scheduler.history], bits

    @property
    def params(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


# ---- checkpoints ----------------------------------------------------------------------------


def test_resume_is_bit_exact_from_every_epoch() -> None:
    whole = Run()
    saved = [whole.save()]
    for _ in range(EPOCHS):
        whole.train(1)
        saved.append(whole.save())
    history = whole.scheduler.history
    assert whole.scheduler.num_drops >= 3
    assert {d.waited for d in history} == {None, 0, 1, 2, 3}
    assert sum(d.averaged for d in history) >= 3
    for epoch, checkpoint in enumerate(saved):
        resumed = Run(seed=99)
        resumed.load(checkpoint)
        resumed.train(EPOCHS - epoch)
        assert resumed.outcome() == whole.outcome(), f"resumed after epoch {epoch}"
        assert resumed.scheduler.get_last_lr() == whole.scheduler.get_last_lr()
        assert resumed.scheduler.current_threshold == whole.scheduler.current_threshold


@pytest.mark.parametrize("epoch", [0, 1, 6])
def test_resume_is_bit_exact_in_the_middle_of_an_epoch(epoch: int) -> None:
    whole, resumed = Run(), Run(seed=99)
    whole.train(epoch)
    whole.batch()
    resumed.load(whole.save())
    for run in (whole, resumed):
        run.batch()
        run.batch()
        run.scheduler.step()
        run.train(EPOCHS - epoch - 1)
    assert resumed.outcome() == whole.outcome()


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_go_on_alone_in_the_middle_of_a_delay(copied: str) -> None:
    run = Run()
    run.train_until_waiting()
    twin = copy.deepcopy(run) if copied == "deepcopy" else Run()
    if copied == "pickle":
        parts = (run.model, run.optimizer, run.scheduler)
        twin.model, twin.optimizer, twin.scheduler = pickle.loads(pickle.dumps(parts))
        twin.data.set_state(run.data.get_state())
    else:
        twin.data = torch.Generator()
        twin.data.set_state(run.data.get_state())
    run.train(10)
    twin.train(10)
    assert twin.outcome() == run.outcome()
    assert run.scheduler.num_drops >= 2


def test_state_is_plain_and_aliases_nothing() -> None:
    run = Run()
    run.train_until_waiting()
    state = run.scheduler.state_dict()
    # The average is in it without a copy, as the optimizer's moments are in the optimizer's state.
    assert state["mean"]["tensors"] and state["mean"]["updates"] == 1
    others = {name: value for name, value in state.items() if name != "mean"}
    before = pickle.dumps(others)
    run.train(6)
    assert pickle.dumps(others) == before

    def check(value: Any) -> None:
        if isinstance(value, dict):
            assert all(type(k) is str for k in value)
            for v in value.values():
                check(v)
        elif isinstance(value, list):
            for v in value:
                check(v)
        else:
            assert type(value) in (int, float, bool, str, type(None), torch.Tensor), type(value)

    check(state)
    keys = {key for state in run.optimizer.state.values() for key in state}
    assert keys == {"momentum_buffer"}


def test_settings_of_the_checkpoint_win_and_it_is_said() -> None:
    run = Run()
    run.train(5)
    other = Run(delay=7, threshold=0.5)
    with pytest.warns(RuntimeWarning, match=r"threshold=8.0 \(was 0.5\), delay=3 \(was 7\)"):
        other.load(run.save())
    assert (other.scheduler.delay, other.scheduler.threshold) == (3, 8.0)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([1], "^state_dict: expected a dict, got list"),
        ({"version": 1, "scheduler": "AutoDrop"}, "expected 'EpochAutoDrop', got 'AutoDrop'"),
        ({"version": 1, "scheduler": "EpochAutoDrop"}, "^state_dict: no entry 'settings'"),
        (
            {"mean": {"steps": 0, "updates": -1, "tensors": {}}},
            r"^state_dict\['mean'\]\['updates'\]: expected at least 0, got -1",
        ),
        ({"meter": 3}, r"^state_dict\['meter'\]: expected a dict, got int"),
        ({"waited": 4}, r"^state_dict\['waited'\]: expected at most delay=3, got 4"),
    ],
)
def test_a_wrong_state_changes_nothing(broken: Any, message: str) -> None:
    run, twin = Run(), Run()
    run.train_until_waiting()
    twin.load(run.save())
    if isinstance(broken, dict) and "version" not in broken:
        broken = run.scheduler.state_dict() | broken
    with pytest.raises(ValueError, match=message):
        twin.scheduler.load_state_dict(broken)
    run.train(8)
    twin.train(8)
    assert twin.outcome() == run.outcome()


def test_a_state_without_tables_keeps_the_decisions_and_starts_the_average_over() -> None:
    run = Run()
    run.train_until_waiting()
    state = run.scheduler.state_dict()
    for name in ("running", "mean", "displacement"):
        state["meter"]["tables"][name] = None
    state["mean"]["tensors"] = {}
    other = Run()
    epochs = len(run.scheduler.history)
    with pytest.warns(RuntimeWarning) as caught:
        other.scheduler.load_state_dict(state)
        other.train(2)
    said = " ".join(str(w.message) for w in caught)
    assert "warms up again" in said
    assert "the average of the delay starts over" in said
    last = other.scheduler.history[-1]
    assert (last.waited, last.averaged, last.dropped) == (3, True, True)
    other.train(1)
    assert [d.angle is None for d in other.scheduler.history[epochs:]] == [True, True, False]


# ---- the reference point --------------------------------------------------------------------


def test_the_reference_point_is_taken_right_before_the_first_step() -> None:
    optimizer = Given(np.array([[3.0, 0.0], [3.0, 4.0]]))
    scheduler = EpochAutoDrop(optimizer)
    with torch.no_grad():
        optimizer.parameter.copy_(torch.tensor([1.0, 0.0]))  # a checkpoint that is loaded later
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    last = scheduler.history[-1]
    # From (1, 0) by 2 to the right, then by 4 up; the 16 bits that are kept hold all of it.
    assert (last.previous_norm, last.norm) == (2.0, 4.0)
    assert last.angle == 90.0


@pytest.mark.parametrize("rate", [0.05, torch.tensor(0.05)])
def test_helper_steps_at_a_rate_of_zero_set_no_reference_point(rate: Any) -> None:
    run = Run(lr=rate)
    get_optimizer_state_dict(run.model, run.optimizer)  # runs a step at lr=0 on a fresh optimizer
    assert not run.scheduler.meter.started
    run.scheduler.step()
    assert run.scheduler.history == []
    run.batch()
    assert run.scheduler.meter.started


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_gradscaler_skips_are_no_steps(fused: bool) -> None:
    run = Run(fused=fused)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    run.poison = True
    run.train(2)
    assert not run.scheduler.meter.started
    assert run.scheduler.history == []
    run.poison = False
    run.batch()
    run.poison = True
    run.batch()
    run.scheduler.step()
    assert [(d.step, d.window) for d in run.scheduler.history] == [(1, 1)]


def test_an_epoch_counts_once_however_often_step_is_called() -> None:
    optimizer = Given(turning([90.0] * 5)[1:])
    scheduler = EpochAutoDrop(optimizer, 0.5, delay=2, average=False)
    for _ in range(6):
        optimizer.step()
        for _ in range(3):
            scheduler.step()
    assert [d.window for d in scheduler.history] == [1, 2, 3, 4, 5, 6]
    assert [d.lr[0] for d in scheduler.history] == [1, 1, 1, 1, 0.5, 0.5]


def test_an_optimizer_without_its_hooks_gets_each_back_once() -> None:
    run = Run()
    run.train(3)
    parts = pickle.loads(pickle.dumps((run.model, run.optimizer)))
    run.model, run.optimizer = parts
    run.scheduler.optimizer = run.optimizer
    # The parameters are others too: that is said besides.
    with pytest.warns(RuntimeWarning) as caught:
        run.train(4)
    assert any("lost its step hook" in str(w.message) for w in caught)
    assert len(run.optimizer._optimizer_step_pre_hooks) == 1
    assert len(run.optimizer._optimizer_step_post_hooks) == 1
    assert [d.window for d in run.scheduler.history] == [1, 2, 3, 4, 5, 6]


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
@pytest.mark.parametrize("before", [False, True])
def test_compiled_steps_are_seen(before: bool) -> None:
    """Compiled: optimizer.step itself, before the scheduler is made, or a caller of it."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    if before:
        optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
    scheduler = EpochAutoDrop(optimizer, threshold=1e-9)
    step = optimizer.step if before else torch.compile(lambda: optimizer.step(), backend="eager")
    for epoch in range(4):
        for _ in range(2):
            parameter.grad = torch.tensor([float(epoch % 2), float(1 - epoch % 2)])
            step()
        scheduler.step()
    assert [d.step for d in scheduler.history] == [2, 4, 6, 8]
    # Along one axis and along the other: the first displacement starts before the first step.
    assert [d.angle for d in scheduler.history] == [None, 90.0, 90.0, 90.0]
    assert scheduler.history[1].previous_norm == 2.0


# ---- trouble during a delay -----------------------------------------------------------------


@pytest.mark.parametrize("average", [True, False])
def test_nan_during_a_delay_gives_the_drop_up(average: bool) -> None:
    run = Run(average=average)
    run.train_until_waiting()
    good = [p.clone() for p in run.params]
    lr = run.optimizer.param_groups[0]["lr"]
    with torch.no_grad():
        run.model[0].weight[0, 0, 0, 0] = math.nan
    with pytest.warns(RuntimeWarning, match=r"\[0\] held NaN or infinity during window"):
        run.train(6)
    assert run.optimizer.param_groups[0]["lr"] == lr
    assert [d.waited for d in run.scheduler.history[-6:]] == [None] * 6
    assert run.scheduler.state_dict()["mean"]["updates"] == 0
    with torch.no_grad():
        for p, value in zip(run.model.parameters(), good, strict=True):
            p.copy_(value)
        for state in run.optimizer.state.values():
            state["momentum_buffer"].zero_()
    epochs = len(run.scheduler.history)
    run.train(4)
    # Back at work: a reference point before the next step, an angle two epochs later.
    angles = [d.angle is None for d in run.scheduler.history[epochs:]]
    assert angles == [True, False, False, False]
    assert run.scheduler.history[epochs + 2].change is not None


def add_group(run: Run) -> None:
    run.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.05})


def replace_data(run: Run) -> None:
    run.model[0].weight.data = run.model[0].weight.data.clone()


def convert(run: Run) -> None:
    run.model.to(torch.float64)
    for state in run.optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].double()
    run.batch = lambda: train_in_double(run)  # type: ignore[method-assign]


def train_in_double(run: Run) -> None:
    x = torch.randn(8, 2, 4, 4, generator=run.data, dtype=torch.float64)
    run.optimizer.zero_grad()
    run.model(x).square().mean().backward()
    run.optimizer.step()


def freeze(run: Run) -> None:
    run.model[0].bias.requires_grad_(False)


@pytest.mark.parametrize("change", [add_group, replace_data, convert, freeze])
def test_parameters_that_change_during_a_delay_are_not_written_wrong(
    change: Callable[[Run], None],
) -> None:
    run = Run()
    run.train_until_waiting()
    change(run)
    with pytest.warns(RuntimeWarning) as caught:
        run.train(1)
        second = run.params
        for _ in range(STEPS):
            run.batch()
        third = run.params
        run.scheduler.step()
    said = [str(w.message) for w in caught]
    (average,) = [s for s in said if "the average starts over" in s]
    assert average.startswith("EpochAutoDrop: the averaged parameters")
    assert sum("the window is discarded" in s for s in said) == 1
    last = run.scheduler.history[-1]
    assert (last.waited, last.averaged, last.dropped) == (3, True, True)
    # What is left of the delay: the second and the third epoch with the weights 2 and 3.
    for p, a, b in zip(run.model.parameters(), second, third, strict=True):
        # A frozen parameter keeps what the averages of the two, which are equal, would give too.
        torch.testing.assert_close(p.detach(), (2 * a + 3 * b) / 5, rtol=1e-6, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.train(6)
    assert run.scheduler.history[-1].angle is not None


@pytest.mark.parametrize("change", [add_group, replace_data, freeze])
def test_warnings_that_are_errors_leave_no_epoch_half_done(change: Callable[[Run], None]) -> None:
    run, twin = Run(), Run()
    for r in (run, twin):
        r.train_until_waiting()
        change(r)
    raised = 0
    for _ in range(8):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                run.train(1)
            except RuntimeWarning:
                raised += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            twin.train(1)
    assert raised >= 1
    assert run.outcome() == twin.outcome()


def test_load_state_dict_in_place_is_no_change() -> None:
    run, twin = Run(), Run()
    for r in (run, twin):
        r.train_until_waiting()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin.model.load_state_dict(copy.deepcopy(twin.model.state_dict()))
        twin.optimizer.load_state_dict(copy.deepcopy(twin.optimizer.state_dict()))
        run.train(8)
        twin.train(8)
    assert twin.outcome() == run.outcome()


def test_zero_displacement_decides_nothing() -> None:
    optimizer = Given(np.ones((8, 3)))
    with torch.no_grad():
        optimizer.parameter.fill_(1.0)
    scheduler = EpochAutoDrop(optimizer, 0.5, delay=0)
    with pytest.warns(RuntimeWarning, match="no parameter moved during the last 5 windows"):
        for _ in range(8):
            optimizer.step()
            scheduler.step()
    assert [d.angle for d in scheduler.history] == [None] * 8
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_averages_are_taken_on_the_named_backend() -> None:
    """The CPU's kernels and the reference leave the same bits, from the first epoch to the last."""
    outcomes = []
    for backend in ("cpu", "reference"):
        run = Run(backend=backend)
        run.train(EPOCHS)
        outcomes.append(run.outcome()[1])
        assert sum(d.averaged for d in run.scheduler.history) >= 3
    assert outcomes[0] == outcomes[1]


# ---- wrong wiring ---------------------------------------------------------------------------


def test_epochs_without_a_step_are_pointed_out() -> None:
    run = Run()
    with pytest.warns(RuntimeWarning, match="called 10 times without an optimizer step in between"):
        for _ in range(11):
            run.scheduler.step()


def test_calling_once_a_step_is_pointed_out_and_long_epochs_are_not() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    scheduler = EpochAutoDrop(optimizer, threshold=1e-9)
    generator = torch.Generator().manual_seed(0)

    def epoch(steps: int) -> None:
        for _ in range(steps):
            parameter.grad = torch.randn(2, generator=generator)
            optimizer.step()
        scheduler.step()

    for _ in range(3):
        epoch(100)
    with pytest.warns(RuntimeWarning, match="after every single optimizer step 1000 times"):
        for _ in range(1000):
            epoch(1)
