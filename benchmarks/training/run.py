"""One training run: what makes it the run it is, and the files it keeps."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .recipe import Recipe
from .schedules import SCHEDULES
from .task import Task
from .tasks import make_task

LOG, CHECKPOINT, RESULT = "log.jsonl", "checkpoint.pt", "result.json"


@dataclass(frozen=True)
class RunSpec:
    """One training run; the same spec gives the same run.

    Attributes:
        model: one of ``training.tasks.MODELS``.
        schedule: a key of ``training.schedules.SCHEDULES``.
        seed: of the parameters and the batches.
        lr: initial rate; None: the task's.
        epochs: None: the task's.
        settings: of the schedule, those that differ from its own.
        validation: measure the error on held-out training data.
        group: what the run is for; part of its folder.
        device, bf16: where, and whether under bf16 autocast.
        data, cache, batch, subset, workers: see ``training.tasks.make_task``.
        checkpoint: folder or hub name of the pretrained model that GLUE's tasks start from.
        warmup_steps: over which the rate rises linearly; None: those of the recipe, for the
            schedules that it warms.
        angles: window of an angular-velocity meter that only watches, in steps; None: none. "epoch"
            is three meters: of the means of epochs, of the parameters at the ends of epochs, and
            of the recipe's window.
        log_every: steps between two lines of the log.
    """

    model: str
    schedule: str
    seed: int = 0
    lr: float | None = None
    epochs: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    validation: bool = False
    group: str = "runs"
    device: str = "cpu"
    bf16: bool = False
    data: str | None = None
    cache: str | None = None
    batch: int | None = None
    subset: int | None = None
    workers: int = 0
    checkpoint: str | None = None
    warmup_steps: int | None = None
    angles: int | str | None = None
    log_every: int = 50

    def warmup(self, recipe: Recipe, steps: int) -> int:
        """Steps of warm-up in a run of so many steps."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        if self.schedule not in recipe.warmed:
            return 0
        return recipe.warmup_steps or round(recipe.warmup_share * steps)

    def schedule_settings(self, recipe: Recipe) -> dict[str, Any]:
        """The schedule's own, then the recipe's, then the run's."""
        schedule = SCHEDULES[self.schedule]
        changes = {**recipe.settings.get(self.schedule, {}), **self.settings}
        return schedule.settings_with(changes)

    def recipe_in_use(self, recipe: Recipe) -> dict[str, Any]:
        """All of the recipe and of the schedule's settings that decides this run, for JSON."""
        used = asdict(recipe)
        for name in ("rates", "search", "settings", "warmed"):
            del used[name]
        for name in ("lr", "epochs", "batch"):
            if getattr(self, name) is not None:  # the run's own, not the recipe's
                del used[name]
        if self.warmup_steps is not None or self.schedule not in recipe.warmed:
            del used["warmup_steps"], used["warmup_share"]
        if self.schedule != "autodrop":
            del used["window"]
        used["schedule"] = self.schedule_settings(recipe)
        plain: dict[str, Any] = json.loads(json.dumps(used))
        return plain

    def folder(self, root: Path) -> Path:
        """Where the run keeps its files: one folder for each combination of settings."""
        changes = [] if self.lr is None else [f"lr={self.lr:g}"]
        changes += [] if self.epochs is None else [f"epochs={self.epochs}"]
        changes += [] if self.warmup_steps is None else [f"warmup={self.warmup_steps}"]
        changes += [] if self.angles is None else [f"angles={self.angles}"]
        changes += [f"{k}={v}" for k, v in sorted(self.settings.items())]
        name = ",".join([self.schedule, *changes]).replace(" ", "").replace("/", "_")
        return root / self.group / self.model / name / f"seed-{self.seed}"

    def task(self) -> Task:
        """Kept from run to run: reading the data can take longer than an epoch."""
        return made_task(
            self.model,
            device=self.device,
            data=self.data,
            cache=self.cache,
            batch=self.batch,
            subset=self.subset,
            workers=self.workers,
            validation=self.validation,
        )


made_task = lru_cache(maxsize=2)(make_task)


def machine(device: str) -> str:
    """What the figures were made on, without names of hosts."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"CPU ({platform.machine()}), torch {torch.__version__}"


# Where the data are and how often is logged changes nothing in a run.
_OF_NO_EFFECT = ("data", "cache", "log_every", "workers")


def check_same(
    spec: RunSpec,
    recipe: Recipe,
    found: Mapping[str, Any],
    path: Path,
    ignored: tuple[str, ...] = _OF_NO_EFFECT,
) -> None:
    """Check that a run that was found is the one of a spec under a recipe.

    Args:
        spec: what is wanted.
        recipe: of its model, as it is now.
        found: has the keys "spec" and "recipe" of the run that was found.
        path: of its file.
        ignored: fields of the spec that may differ.

    Raises:
        ValueError: a field of the spec or of the recipe differs; the message names it.
    """
    differing = []
    for name, wanted in (("spec", asdict(spec)), ("recipe", spec.recipe_in_use(recipe))):
        wanted = json.loads(json.dumps(wanted))
        there = json.loads(json.dumps(found.get(name, {})))
        prefix = "" if name == "spec" else "the recipe's "
        differing += [
            f"{prefix}{k} (expected {v!r}, found {there.get(k)!r})"
            for k, v in wanted.items()
            if (k not in ignored or name == "recipe") and v != there.get(k)
        ]
    if differing:
        raise ValueError(
            f"{path}: holds another run: {', '.join(differing)}; give another folder, or delete it"
        )


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)
