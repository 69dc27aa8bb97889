"""The training loop: any task under any schedule, logged, resumable."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Generator, nn
from torch.optim.swa_utils import update_bn

from autodrop_ext import AngularVelocity, Decision, JsonLinesLog
from autodrop_ext.cli.demo.training import single_thread

from .driver import Driver
from .schedules import SCHEDULES, Setup
from .tasks import IMAGE_MODELS, Task, make_task

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
        data, cache, batch, subset: of CIFAR-10; see ``training.tasks.make_task``.
        angles: window of an angular-velocity meter that only watches; None: none.
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
    angles: int | None = None
    log_every: int = 50

    def folder(self, root: Path) -> Path:
        """Where the run keeps its files: one folder for each combination of settings."""
        changes = [] if self.lr is None else [f"lr={self.lr:g}"]
        changes += [f"{k}={v}" for k, v in sorted(self.settings.items())]
        name = ",".join([self.schedule, *changes]).replace(" ", "").replace("/", "_")
        return root / self.group / self.model / name / f"seed-{self.seed}"

    def task(self) -> Task:
        """Kept from run to run: reading the data can take longer than an epoch."""
        return _make_task(
            self.model,
            device=self.device,
            data=self.data,
            cache=self.cache,
            batch=self.batch,
            subset=self.subset,
            validation=self.validation,
        )


_make_task = lru_cache(maxsize=2)(make_task)


def train(
    spec: RunSpec,
    root: Path,
    *,
    keep_checkpoint: bool = True,
    on_epoch: Callable[[int, int, dict[str, Any]], object] = lambda epoch, epochs, record: None,
) -> dict[str, Any]:
    """Train, or go on where an interrupted run stopped, or return what a finished one led to.

    After every epoch the state is saved, so that a killed run continues from its last whole epoch;
    on the CPU it then ends with the same bits and the same log as one that was never killed.

    Args:
        spec: what to train.
        root: the run's folder lies below it; it gets ``log.jsonl``, ``checkpoint.pt`` and at the
            end ``result.json``.
        keep_checkpoint: leave ``checkpoint.pt`` behind, which holds the trained parameters.
        on_epoch: called after every epoch with its number, the number of epochs and its record.

    Returns:
        What ``result.json`` holds: the spec, one record an epoch, and the final values.

    Raises:
        ValueError: the folder holds a run of another spec.
    """
    folder = spec.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / RESULT
    if result.exists():
        done: dict[str, Any] = json.loads(result.read_text())
        _check_same(spec, done["spec"], result)
        return done
    devices = [] if spec.device == "cpu" else [torch.device(spec.device)]
    with torch.random.fork_rng(devices=devices), _threads_and_kernels(spec):
        run = _Run(spec, spec.task(), folder)
        try:
            run.restore()
            while run.epoch < run.epochs and not run.diverged:
                record = run.train_epoch()
                run.save()
                on_epoch(run.epoch, run.epochs, record)
        finally:
            run.close()
        done = run.result()
    _replace(result, json.dumps(done, indent=1).encode())
    if not keep_checkpoint:
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return done


class _Run:
    """A run between two epochs, and what is needed to save and restore it."""

    def __init__(self, spec: RunSpec, task: Task, folder: Path) -> None:
        self.spec, self.task, self.folder = spec, task, folder
        self.epochs = spec.epochs or task.recipe.epochs
        self.epoch = 0
        self.curve: list[dict[str, Any]] = []
        self.diverged = False
        self.log = JsonLinesLog(folder / LOG)
        schedule = SCHEDULES[spec.schedule]
        torch.manual_seed(spec.seed)
        self.model: nn.Module = task.model()
        self.random = Generator(spec.device).manual_seed(spec.seed)
        self.setup = Setup(
            self.model,
            task.recipe,
            task.recipe.lr if spec.lr is None else spec.lr,
            self.epochs,
            task.steps_per_epoch,
            schedule.settings_with(spec.settings),
            on_reading=self.log,
            on_average=lambda decision: self._measure_statistics(),
        )
        self.driver: Driver = schedule.build(self.setup)
        self.meter = (
            None if spec.angles is None else AngularVelocity(self.driver.optimizer, spec.angles)
        )

    def train_epoch(self) -> dict[str, Any]:
        """Train one epoch, evaluate, log."""
        task, model, driver = self.task, self.model, self.driver
        device = torch.device(self.spec.device)
        step = self.epoch * task.steps_per_epoch
        # Summed on the device: reading every loss would wait for every step.
        total, since, pending = 0.0, torch.zeros((), device=device), 0
        model.train()
        driver.train()
        task.start_epoch(self.random)
        last = step + task.steps_per_epoch
        while step < last:
            with self._precision():
                loss = task.loss(model, self.random)
            driver.optimizer.zero_grad()
            loss.backward()
            driver.step()
            self._observe()
            since += loss.detach()
            step, pending = step + 1, pending + 1
            if pending == self.spec.log_every or step == last:
                self.log.metrics(step, loss=float(since) / pending, lr=driver.lr)
                total += float(since)
                since.zero_()
                pending = 0
        mean = total / task.steps_per_epoch
        self.epoch += 1
        self.diverged = not math.isfinite(mean)
        error = None
        if not self.diverged:
            driver.end_epoch(mean)  # before the evaluation: EpochAutoDrop may average
            error = self._evaluate()
            self.diverged = not math.isfinite(error or 0.0)
        record = {
            "epoch": self.epoch,
            "step": step,
            "loss": None if self.diverged else mean,
            "lr": driver.lr if math.isfinite(driver.lr) else None,
            "error": None if self.diverged else error,
        }
        self.curve.append(record)
        self.log.metrics(step, **{k: v for k, v in record.items() if v is not None and k != "step"})
        return record

    def _evaluate(self) -> float | None:
        self.driver.eval()
        # While settings are chosen only the end counts.
        every = self.epochs if self.spec.validation else self.task.evaluate_every
        if self.epoch % every and self.epoch != self.epochs:
            return None
        if self.driver.averages:
            self._measure_statistics()
        self.model.eval()
        with self._precision():
            return self.task.quality(self.model)

    def _observe(self) -> None:
        reading = None if self.meter is None else self.meter.observe()
        if reading is not None:
            self.log(Decision(**vars(reading), lr=(self.driver.lr,)))

    def _measure_statistics(self) -> None:
        """Batch-norm statistics of parameters that no batch has been run through."""
        random = Generator(self.spec.device).manual_seed(self.spec.seed)
        with self._precision():
            update_bn(self.task.inputs(random), self.model)

    def _precision(self) -> torch.autocast:
        device = torch.device(self.spec.device).type
        return torch.autocast(device, torch.bfloat16, enabled=self.spec.bf16)

    def save(self) -> None:
        """After an epoch, with the optimizer in evaluation mode."""
        state = {
            "spec": asdict(self.spec),
            "epoch": self.epoch,
            "curve": self.curve,
            "diverged": self.diverged,
            "model": self.model.state_dict(),
            "driver": self.driver.state_dict(),
            "meter": None if self.meter is None else self.meter.state_dict(),
            "random": self.random.get_state(),
            "torch_random": torch.get_rng_state(),
            "log_size": self.log.path.stat().st_size,
        }
        path = self.folder / CHECKPOINT
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def restore(self) -> None:
        """From the checkpoint, if there is one. Log lines that came after it are cut off."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            self.log.path.unlink(missing_ok=True)
            return
        state = torch.load(path, map_location=self.spec.device, weights_only=True)
        _check_same(self.spec, state["spec"], path)
        self.epoch, self.curve, self.diverged = state["epoch"], state["curve"], state["diverged"]
        self.model.load_state_dict(state["model"])
        self.driver.load_state_dict(state["driver"])
        if self.meter is not None:
            self.meter.load_state_dict(state["meter"])
        self.random.set_state(state["random"].cpu())
        torch.set_rng_state(state["torch_random"].cpu())
        os.truncate(self.log.path, state["log_size"])

    def result(self) -> dict[str, Any]:
        """For ``result.json``; a run that diverged has no error."""
        errors = [r["error"] for r in self.curve if r["error"] is not None]
        last = self.curve[-1]
        return {
            "spec": asdict(self.spec),
            "measure": self.task.measure,
            "initial_lr": self.setup.lr,
            "settings": _plain(self.setup.settings),
            "steps_per_epoch": self.task.steps_per_epoch,
            "diverged": self.diverged,
            "error": None if self.diverged else last["error"],
            "best_error": min(errors) if errors and not self.diverged else None,
            "loss": last["loss"],
            "lr": last["lr"],
            "drops": self.driver.drops,
            "curve": self.curve,
            "machine": machine(self.spec.device),
        }

    def close(self) -> None:
        self.log.close()
        self.driver.close()
        if self.meter is not None:
            self.meter.close()


def machine(device: str) -> str:
    """What the figures were made on, without names of hosts."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"CPU ({platform.machine()}), torch {torch.__version__}"


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


def _check_same(spec: RunSpec, found: dict[str, Any], path: Path) -> None:
    wanted = json.loads(json.dumps(asdict(spec)))
    found = json.loads(json.dumps(found))
    # Where the data lies and how often is logged changes nothing in the run.
    differing = [
        f"{k} (expected {wanted[k]!r}, found {found.get(k)!r})"
        for k in wanted
        if k not in ("data", "cache", "log_every") and wanted[k] != found.get(k)
    ]
    if differing:
        raise ValueError(
            f"{path}: holds another run: {', '.join(differing)}; give another folder, or delete it"
        )


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


@contextmanager
def _threads_and_kernels(spec: RunSpec) -> Iterator[None]:
    """One thread for models so small that a second one costs more; cuDNN's choice on a GPU."""
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = torch.device(spec.device).type == "cuda"
    try:
        with nullcontext() if spec.model in IMAGE_MODELS else single_thread():
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
