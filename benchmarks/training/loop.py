"""The training loop: any task under any schedule, logged, resumable."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from demo.training import single_thread
from torch import Generator, nn
from torch.optim.swa_utils import update_bn

from autodrop_ext import AngularVelocity, Decision, JsonLinesLog

from .driver import Driver
from .ranks import Ranks
from .run import CHECKPOINT, LOG, RESULT, RunSpec, check_same, machine, replace_file
from .schedules import SCHEDULES, Setup
from .task import Scores, Task
from .tasks import MODELS, recipe_of


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
        root: the run's folder is below it; it gets ``log.jsonl``, ``checkpoint.pt`` and at the
            end ``result.json``.
        keep_checkpoint: leave ``checkpoint.pt`` behind, which holds the trained parameters.
        on_epoch: called after every epoch with its number, the number of epochs and its record.

    Returns:
        What ``result.json`` holds: the spec, one record an epoch, and the final values.

    Raises:
        ValueError: the folder holds a run of another spec.
    """
    train_itself = MODELS[spec.model].train
    if train_itself is not None:
        return train_itself(spec, root, keep_checkpoint=keep_checkpoint, on_epoch=on_epoch)
    folder = spec.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / RESULT
    if result.exists():
        done: dict[str, Any] = json.loads(result.read_text())
        check_same(spec, recipe_of(spec.model), done, result)
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
    ranks = Ranks()
    if ranks.first:
        replace_file(result, json.dumps(done, indent=1).encode())
        if not keep_checkpoint:
            (folder / CHECKPOINT).unlink(missing_ok=True)
    ranks.wait()
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
        self.ranks = Ranks()
        torch.manual_seed(spec.seed)
        self.model: nn.Module = task.model()
        # What is called in training: DistributedDataParallel sums the gradients of all ranks.
        self.wrapped = self.ranks.wrap(self.model)
        self.random = Generator(spec.device).manual_seed(spec.seed)
        self.setup = Setup(
            self.model,
            task.recipe,
            task.recipe.lr if spec.lr is None else spec.lr,
            self.epochs,
            task.steps_per_epoch,
            spec.schedule_settings(task.recipe),
            on_reading=self.log,
            on_average=lambda decision: self._measure_statistics(),
            warmup_steps=spec.warmup(task.recipe, self.epochs * task.steps_per_epoch),
        )
        self.driver: Driver = SCHEDULES[spec.schedule].driver(self.setup)
        self.meters = self._meters()
        self.angles: dict[str, list[tuple[int, float | None]]] = {n: [] for n in self.meters}

    def train_epoch(self) -> dict[str, Any]:
        """Train one epoch, evaluate, log."""
        task, model, driver = self.task, self.wrapped, self.driver
        device = torch.device(self.spec.device)
        step = self.epoch * task.steps_per_epoch
        # Summed on the device: reading every loss would wait for every step.
        total, since, pending = 0.0, torch.zeros((), device=device), 0
        model.train()
        driver.train()
        if self.ranks.size > 1:
            # Dropout must differ between ranks; by epoch, so that a resumed run draws the same.
            torch.manual_seed(
                2**20 * self.spec.seed + self.ranks.size * self.epoch + self.ranks.rank
            )
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
                summed = float(self.ranks.mean(since))
                self.log.metrics(step, loss=summed / pending, lr=driver.lr)
                total += summed
                since.zero_()
                pending = 0
        mean = total / task.steps_per_epoch
        self.epoch += 1
        self.diverged = not math.isfinite(mean)
        error = test_loss = None
        if not self.diverged:
            driver.end_epoch(mean)  # before the evaluation: EpochAutoDrop may average
            error, test_loss = self._evaluate()
            self.diverged = not math.isfinite(error or 0.0)
        record = {
            "epoch": self.epoch,
            "step": step,
            "loss": None if self.diverged else mean,
            "lr": driver.lr if math.isfinite(driver.lr) else None,
            "error": None if self.diverged else error,
            "test_loss": None if self.diverged else test_loss,
        }
        self.curve.append(record)
        # Under another name than the steps' loss: it would be a second value at the same step,
        # the mean of a whole epoch, and a jag in every curve that is drawn from the log.
        logged = {"epoch_loss" if k == "loss" else k: v for k, v in record.items() if k != "step"}
        self.log.metrics(step, **{k: v for k, v in logged.items() if v is not None})
        return record

    def _evaluate(self) -> Scores:
        self.driver.eval()
        # While settings are chosen only the end counts.
        every = self.epochs if self.spec.validation else self.task.evaluate_every
        if self.epoch % every and self.epoch != self.epochs:
            return Scores(None, None)
        if self.driver.averages:
            self._measure_statistics()
        # Each rank has seen other batches: the statistics of the first one are everyone's.
        self.ranks.share_buffers(self.model)
        self.model.eval()
        with self._precision():
            return self.task.scores(self.model)

    def _meters(self) -> dict[str, AngularVelocity]:
        """The spec's meter under the name "angles", and those of epochs; all angles are exact."""
        optimizer, epoch = self.driver.optimizer, self.task.steps_per_epoch
        if self.spec.angles is None:
            return {}
        if self.spec.angles != "epoch":
            return {"angles": AngularVelocity(optimizer, int(self.spec.angles), buckets=None)}
        meters = {
            "angles": AngularVelocity(optimizer, epoch, buckets=None),
            "end_angles": AngularVelocity(optimizer, epoch, snapshots=1, buckets=None),
        }
        if self.task.recipe.window is not None:
            window = self.task.recipe.window
            meters["window_angles"] = AngularVelocity(optimizer, window, buckets=None)
        return meters

    def _observe(self) -> None:
        for name, meter in self.meters.items():
            reading = meter.observe()
            if reading is not None:
                self.angles[name].append((reading.step, reading.angle))
                if name == "angles":
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
        """After an epoch, with the optimizer in evaluation mode; the first rank writes."""
        state = {
            "spec": asdict(self.spec),
            "recipe": self.spec.recipe_in_use(self.task.recipe),
            "epoch": self.epoch,
            "curve": self.curve,
            "angles": self.angles,
            "diverged": self.diverged,
            "model": self.model.state_dict(),
            "driver": self.driver.state_dict(),
            "meters": {name: meter.state_dict() for name, meter in self.meters.items()},
            "random": self.random.get_state(),
            "torch_random": torch.get_rng_state(),
            "cuda_random": self._cuda_random(),
            "log_size": self.log.path.stat().st_size if self.ranks.first else 0,
        }
        if not self.ranks.first:
            return
        path = self.folder / CHECKPOINT
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def restore(self) -> None:
        """From the checkpoint, if there is one. Log lines that came after it are cut off."""
        path = self.folder / CHECKPOINT
        self.ranks.wait()  # for a first rank that is still writing the run before
        if not path.exists():
            if self.ranks.first:
                self.log.path.unlink(missing_ok=True)
            return
        state = torch.load(path, map_location=self.spec.device, weights_only=True)
        check_same(self.spec, self.task.recipe, state, path)
        self.epoch, self.curve, self.diverged = state["epoch"], state["curve"], state["diverged"]
        self.angles = {
            name: [(step, angle) for step, angle in pairs]
            for name, pairs in state["angles"].items()
        }
        self.model.load_state_dict(state["model"])
        self.driver.load_state_dict(state["driver"])
        for name, meter in self.meters.items():
            meter.load_state_dict(state["meters"][name])
        self.random.set_state(state["random"].cpu())
        torch.set_rng_state(state["torch_random"].cpu())
        if state["cuda_random"] is not None:
            torch.cuda.set_rng_state(state["cuda_random"].cpu(), self.spec.device)
        if self.ranks.first:
            os.truncate(self.log.path, state["log_size"])

    def result(self) -> dict[str, Any]:
        """For ``result.json``; a run that diverged has no error."""
        errors = [r["error"] for r in self.curve if r["error"] is not None]
        last = self.curve[-1]
        return {
            "spec": asdict(self.spec),
            "recipe": self.spec.recipe_in_use(self.task.recipe),
            "measure": self.task.measure,
            "initial_lr": self.setup.lr,
            "settings": self.setup.plain_settings(),
            "steps_per_epoch": self.task.steps_per_epoch,
            "diverged": self.diverged,
            "error": None if self.diverged else last["error"],
            "best_error": min(errors) if errors and not self.diverged else None,
            "loss": last["loss"],
            "test_loss": last["test_loss"],
            "lr": last["lr"],
            "drops": self.driver.drops,
            "curve": self.curve,
            "angles": [],
            **{name: [list(pair) for pair in pairs] for name, pairs in self.angles.items()},
            "machine": machine(self.spec.device),
        }

    def close(self) -> None:
        self.driver.close()
        for meter in self.meters.values():
            meter.close()

    def _cuda_random(self) -> torch.Tensor | None:
        """State of the GPU's global generator, from which dropout draws there."""
        if torch.device(self.spec.device).type != "cuda":
            return None
        return torch.cuda.get_rng_state(self.spec.device)


@contextmanager
def _threads_and_kernels(spec: RunSpec) -> Iterator[None]:
    """One thread for models so small that a second one costs more; cuDNN's choice on a GPU."""
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = torch.device(spec.device).type == "cuda"
    try:
        with single_thread() if MODELS[spec.model].data is None else nullcontext():
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
