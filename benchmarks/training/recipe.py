"""What all schedules of one model and data share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Recipe:
    """Optimizer, length and grids of a task.

    Attributes:
        optimizer: "sgd", "adam" or "adamw".
        lr: initial rate where none is chosen.
        rates: grid of initial rates that settings are chosen from.
        epochs: of a run.
        window: AutoDrop's ``k``; None: the rule of
            :func:`~autodrop_ext.schedulers.auto_window.window_for`, which has no floor, where
            ``window="auto"`` of the package never goes below 16.
        momentum, nesterov: of SGD.
        weight_decay: as the optimizer takes it.
        betas, eps: of Adam and AdamW.
        batch: examples a step, or tokens of each language of a translation task; None: the
            task's own.
        settings: of schedules, by the schedule's name, where they differ from its usual ones.
        search: values of settings that are tried before a schedule's runs count, by the schedule's
            name; they come on top of what the schedule itself searches.
        warmup_steps: of those schedules in ``warmed``; the rate rises linearly from nearly zero.
        warmup_share: of the run, instead of a number of steps.
        warmed: names of schedules.
    """

    optimizer: Literal["sgd", "adam", "adamw"]
    lr: float
    rates: tuple[float, ...]
    epochs: int
    window: int | None = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    batch: int | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    search: Mapping[str, Mapping[str, tuple[Any, ...]]] = field(default_factory=dict)
    warmup_steps: int = 0
    warmup_share: float = 0.0
    warmed: tuple[str, ...] = ()
