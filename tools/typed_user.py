"""A user's script with types, which mypy --strict must accept against the installed package."""

from __future__ import annotations

import torch
from torch import nn

from autodrop_ext import AngularVelocity, AutoDrop, Decision, EpochAutoDrop, JsonLinesLog, Reading


class Watcher:
    """Counts drops."""

    def __init__(self) -> None:
        self.drops: list[int] = []

    def __call__(self, decision: Decision) -> None:
        """Called by the scheduler."""
        self.drops.append(decision.step)


def train(steps: int) -> AutoDrop:
    """Train a linear model; uses what a user would use."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = Watcher()
    scheduler = AutoDrop(optimizer, window=4, factor=0.5, min_lr=[1e-4], on_drop=watcher)
    for _ in range(steps):
        loss: torch.Tensor = model(torch.randn(8, 4)).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)  # torch gives loss.backward() no types
        optimizer.step()
        scheduler.step()
    angles: list[float] = [d.angle for d in scheduler.history if d.angle is not None]
    metrics: dict[str, float] = scheduler.get_metrics()
    assert len(watcher.drops) == scheduler.num_drops
    assert len(angles) == len(scheduler.history) and metrics["num_drops"] == scheduler.num_drops
    return scheduler


def measure(model: nn.Module) -> Reading | None:
    """Use the meter alone."""
    meter = AngularVelocity(model.named_parameters(), window=1)
    readings = [meter.observe() for _ in range(3)]
    return readings[-1]


def main() -> None:
    """Run all of it."""
    scheduler = train(steps=100)
    state = scheduler.state_dict()
    train(steps=0).load_state_dict(state)
    reading = measure(nn.Linear(2, 2))
    assert reading is not None and reading.angle is None  # nothing moved
    epochs = EpochAutoDrop(torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1), delay=2)
    log = JsonLinesLog("run.jsonl")
    print(len(scheduler.history), scheduler.num_drops, epochs.current_threshold, log.path)


if __name__ == "__main__":
    main()
