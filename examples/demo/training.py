"""The demo's training loop: one task, one schedule, one seed, read at several lengths."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from autodrop_ext import AnytimeAutoDrop, AutoDrop, JsonLinesLog
from autodrop_ext.average import ParameterAverage
from autodrop_ext.schedulers.saturation import Kernel

CLOCKS: dict[str, Callable[[int], float]] = {
    "constant, averaged": lambda t: 1.0,
    "sqrt, averaged": lambda t: math.sqrt(300 / (t + 300)),
}
"""Schedules without a meter: the rate over the initial one after ``t`` steps."""
FOUR_TIMES = "AnytimeAutoDrop, 4x"
"""At four times the initial rate of the others, with the automatic warm-up."""
SCHEDULES = ("AnytimeAutoDrop", FOUR_TIMES, *CLOCKS, "cosine", "AutoDrop")
SET_FOR_A_LENGTH = ("cosine",)
"""Schedules that need a run for every length; the others are read on the way."""

_LOSSES = 150  # in the log: the mean loss of each 150th part of the run


class Task(Protocol):
    """What is trained: a model, its optimizer, its batches, its measure of quality."""

    name: str
    """Also of the files."""
    description: str
    measure: str
    """Of the quality, as a column's head: "test error %"."""
    note: str
    """What a reader must know to judge the table fairly."""
    steps: int
    seeds: int
    window: int
    """``k`` that suits the default number of steps."""

    def model(self) -> nn.Module:
        """A new model, from torch's global random state."""

    def optimizer(self, model: nn.Module) -> Optimizer:
        """A new optimizer at the initial learning rate."""

    def loss(self, model: nn.Module, random: Generator) -> Tensor:
        """Loss of the next batch."""

    def quality(self, model: nn.Module) -> float:
        """On data that was not trained on; lower is better."""


class Average:
    """The average of ``AnytimeAutoDrop`` without its meter: the same weights at the same steps."""

    def __init__(self, model: nn.Module) -> None:
        self._average = ParameterAverage(lambda: list(model.named_parameters()))
        self.swapped = self._average.swapped

    def step(self, t: int) -> None:
        """Take the parameters after ``t`` optimizer steps, if it is time to."""
        # A window has 2^floor(log2(t)) / 8 steps, at least 16, and is read 32 times.
        if t > 0 and t % (1 << max(0, t.bit_length() - 9)) == 0:
            self._average.update(t - self._average.steps)


@dataclass
class Run:
    """What one training led to."""

    schedule: str
    seed: int
    steps: int
    points: list[dict[str, float]] = field(default_factory=list)
    """``step``, ``quality`` and ``lr`` where the run was read."""
    drops: int | None = None
    """None for schedules that do not drop."""
    share: float = math.nan
    """Part of the training time that was spent in ``scheduler.step()``."""
    readings: list[dict[str, Any]] = field(default_factory=list)

    def quality(self, step: int) -> float:
        """As it was read at a step."""
        return next(point["quality"] for point in self.points if point["step"] == step)


def train(
    task: Task,
    schedule: str,
    seed: int,
    *,
    steps: int,
    reads: Sequence[int],
    window: int,
    kernel: Kernel = "value",
    log: JsonLinesLog | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> Run:
    """Train a task from the start under one of :data:`SCHEDULES`.

    The initial parameters and the order of the batches depend on the seed alone, so that the
    schedules of one seed start alike.

    Args:
        task: what to train.
        schedule: one of :data:`SCHEDULES`.
        seed: of parameters and batches.
        steps: optimizer steps.
        reads: steps at which the quality is measured; later ones than ``steps`` are left out.
        window: of AutoDrop, optimizer steps.
        kernel: of AutoDrop's Gaussian filter.
        log: takes the readings of our schedulers and every schedule's losses.
        on_step: called after every step.
    """
    run = Run(schedule, seed, steps)
    with torch.random.fork_rng(devices=[]), single_thread():
        torch.manual_seed(seed)
        model = task.model()
        optimizer = task.optimizer(model)
        if schedule == FOUR_TIMES:
            optimizer.param_groups[0]["lr"] *= 4
        average = Average(model)
        scheduler = _scheduler(schedule, optimizer, steps, window, kernel, log)
        random = Generator().manual_seed(seed)
        losses: list[float] = []
        in_step = training = 0.0  # seconds
        every = max(1, steps // _LOSSES)
        for step in range(1, steps + 1):
            start = time.perf_counter()
            loss = task.loss(model, random)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
            before = time.perf_counter()
            scheduler.step()
            if schedule in CLOCKS:
                average.step(step)
            end = time.perf_counter()
            in_step, training = in_step + end - before, training + end - start
            if step % every == 0 and log is not None:
                log.metrics(step, loss=math.fsum(losses[-every:]) / every)
            if step in reads:
                own = isinstance(scheduler, AnytimeAutoDrop)
                with scheduler.averaged_parameters() if own else average.swapped():
                    quality = task.quality(model)
                lr = float(optimizer.param_groups[0]["lr"])
                run.points.append({"step": step, "quality": quality, "lr": lr})
            on_step()
    run.share = in_step / training
    if isinstance(scheduler, (AnytimeAutoDrop, AutoDrop)):
        run.drops = scheduler.num_drops
        run.readings = [decision.as_dict() for decision in scheduler.history]
        scheduler.close()
    return run


def _scheduler(
    schedule: str,
    optimizer: Optimizer,
    steps: int,
    window: int,
    kernel: Kernel,
    log: JsonLinesLog | None,
) -> Any:
    if schedule == "AnytimeAutoDrop":
        return AnytimeAutoDrop(optimizer, on_reading=log)
    if schedule == FOUR_TIMES:
        return AnytimeAutoDrop(optimizer, warmup_steps="auto", on_reading=log)
    if schedule == "AutoDrop":
        return AutoDrop(optimizer, window=window, kernel=kernel, on_reading=log)
    if schedule in CLOCKS:
        return LambdaLR(optimizer, CLOCKS[schedule])
    if schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=steps)
    raise ValueError(f"schedule: expected one of {SCHEDULES}, got {schedule!r}")


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch on one thread.

    The demo's models are so small that a second thread costs more than it brings: up to ten times
    the time per step on a machine with two busy cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
