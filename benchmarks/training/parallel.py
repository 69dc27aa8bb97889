"""Many runs, some side by side, each in its own process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .loop import train
from .run import RunSpec
from .tasks import MODELS, Model


def train_all(
    specs: Sequence[RunSpec],
    root: Path,
    *,
    processes: int,
    title: str,
    console: Console,
    keep_checkpoint: bool = False,
) -> list[dict[str, Any]]:
    """Results in the order of the specs. Runs that are finished already are only read.

    Args:
        specs: what to train.
        root: folder of all runs.
        processes: runs at a time, each on one thread; with 1 the runs stay in this process, on
            torch's threads.
        title: of the progress bar.
        console: where the bar goes.
        keep_checkpoint: see ``training.loop.train``.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    results: list[dict[str, Any]] = [{} for _ in specs]
    with Progress(*columns, console=console) as progress:
        if processes == 1:
            bar = progress.add_task(title, total=None, note="")
            for i, spec in enumerate(specs):
                results[i] = train(
                    spec,
                    root,
                    keep_checkpoint=keep_checkpoint,
                    on_epoch=lambda epoch, epochs, record, i=i, spec=spec: progress.update(
                        bar,
                        completed=i * epochs + epoch,
                        total=len(specs) * epochs,
                        note=_note(spec, epoch, epochs, record),
                    ),
                )
                epochs = len(results[i]["curve"])  # also of runs that were finished before
                progress.update(bar, completed=(i + 1) * epochs, total=len(specs) * epochs)
            return results
        bar = progress.add_task(title, total=len(specs), note="")
        # Spawned, not forked: torch's threads do not survive a fork.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            processes, spawn, initializer=_start_worker, initargs=(MODELS,)
        ) as pool:
            jobs = {
                pool.submit(train, spec, root, keep_checkpoint=keep_checkpoint): i
                for i, spec in enumerate(specs)
            }
            try:
                for job in as_completed(jobs):
                    results[jobs[job]] = job.result()
                    spec = specs[jobs[job]]
                    progress.update(bar, advance=1, note=f"{spec.schedule}, seed {spec.seed}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return results


def _start_worker(models: Mapping[str, Model]) -> None:
    MODELS.update(models)
    torch.set_num_threads(1)


def _note(spec: RunSpec, epoch: int, epochs: int, record: dict[str, Any]) -> str:
    error = record["error"]
    shown = "" if error is None else f", error {error:.3g}"
    loss = "diverged" if record["loss"] is None else f"loss {record['loss']:.3g}"
    return f"{spec.schedule}, seed {spec.seed}: epoch {epoch} of {epochs}, {loss}{shown}"
