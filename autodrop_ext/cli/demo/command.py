"""``autodrop demo``: AutoDrop beside a constant rate and cosine annealing, on real data."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ...log import JsonLinesLog
from ...plotting.run import plot_comparison
from ...schedulers.saturation import Kernel
from ..plot import printable
from .digits import Digits
from .text import Bytes
from .theory import ALGORITHM_ITERATIONS, NQM_ITERATIONS, NQM_LEAST, NQM_SEEDS, nqm, theory
from .training import SCHEDULES, Run, Task, train

_TASKS: dict[str, type[Digits] | type[Bytes]] = {"digits": Digits, "bytes": Bytes}
_NEEDS = {
    "digits": ("matplotlib", "sklearn"),
    "bytes": ("matplotlib",),
    "nqm": ("matplotlib",),
    "theory": ("matplotlib",),
}
_FACTOR = 0.95  # AutoDrop's defaults, for the note below the table
_WINDOWS_PER_DROP = 11
_THRESHOLD = 0.1


@click.command()
@click.option(
    "--task",
    "name",
    type=click.Choice(list(_NEEDS)),
    default="digits",
    show_default=True,
    help="digits: a convolutional network on handwritten digits, SGD, under 2 minutes. "
    "bytes: a transformer on Python's source text, AdamW, under 3 minutes. "
    "nqm: the papers' noisy quadratic model, under a minute. "
    "theory: the velocity model and Algorithm 2, seconds.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    help="Runs per schedule.  [default: digits 3, bytes 1, nqm 32]",
)
@click.option(
    "--first-seed", type=click.IntRange(0), default=0, show_default=True, help="The others follow."
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    help="Optimizer steps.  [default: digits 3000, bytes 1500, nqm 4000, theory 1000]",
)
@click.option(
    "--window",
    type=click.IntRange(1),
    help="AutoDrop's window, optimizer steps.  [default: digits 3, bytes 2]",
)
@click.option(
    "--kernel",
    type=click.Choice(get_args(Kernel)),
    help="What AutoDrop's filter weighs angles by.  [default: value]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="demo-output",
    show_default=True,
    help="Folder of the picture and the log.",
)
def demo(
    name: str,
    seeds: int | None,
    first_seed: int,
    steps: int | None,
    window: int | None,
    kernel: Kernel | None,
    output: Path,
) -> None:
    """Train under AutoDrop, a constant rate and cosine annealing, and compare.

    The tasks nqm and theory draw the papers' figures instead.

    Nothing is downloaded, and no GPU is needed.
    """
    missing = [module for module in _NEEDS[name] if importlib.util.find_spec(module) is None]
    if missing:
        raise click.ClickException(
            f"the demo needs {' and '.join(missing)}: pip install 'autodrop_ext[demo]'"
        )
    if name not in _TASKS:
        _without_data(
            name, seeds, first_seed, steps, {"--window": window, "--kernel": kernel}, output
        )
        return
    task = _TASKS[name]()
    seeds = seeds or task.seeds
    steps = steps or task.steps
    window = window or task.window
    _make(output)
    console = Console()
    console.print(f"Training {task.description}:")
    console.print(
        f"{steps} steps, {len(SCHEDULES)} schedules, {seeds} {_plural(seeds, 'seed')} each"
    )

    start = time.perf_counter()
    log = output / f"{name}.jsonl"
    log.unlink(missing_ok=True)  # a log appends; this is a new run
    kernel = kernel or "value"
    runs = _train_all(
        console,
        task,
        range(first_seed, first_seed + seeds),
        steps=steps,
        window=window,
        kernel=kernel,
        log=log,
    )
    console.print()
    console.print(_table(task, runs))
    _explain(console, task, runs, steps, window, kernel)
    console.print(f"Took {time.perf_counter() - start:.0f} s.")
    _write_picture(console, output / f"{name}.png", task, runs, window, log)


def _without_data(
    name: str,
    seeds: int | None,
    first_seed: int,
    steps: int | None,
    unused: dict[str, object],
    output: Path,
) -> None:
    """Draw the papers' theory, for which there are no schedules and no log."""
    if name == "theory":
        unused = unused | {"--seeds": seeds, "--first-seed": first_seed or None}
    for option, value in unused.items():
        if value is not None:
            raise click.UsageError(f"{option}: expected none with --task {name}, got {value}")
    _make(output)
    console = Console()
    if name == "theory":
        steps = steps or ALGORITHM_ITERATIONS
        theory(console, output, iterations=steps)
        return
    steps = steps or NQM_ITERATIONS
    if steps < NQM_LEAST:
        raise click.UsageError(f"--steps: expected at least {NQM_LEAST}, got {steps}")
    last = first_seed + (seeds or NQM_SEEDS)
    nqm(console, output, iterations=steps, seeds=range(first_seed, last))


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(printable(f"--output: {error}")) from error


def _train_all(
    console: Console,
    task: Task,
    seeds: range,
    *,
    steps: int,
    window: int,
    kernel: Kernel,
    log: Path,
) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {schedule: [] for schedule in SCHEDULES}
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=steps * len(SCHEDULES) * len(seeds))
        for seed in seeds:
            for schedule in SCHEDULES:
                progress.update(bar, description=f"{schedule}, seed {seed}")
                logged = schedule == "AutoDrop" and seed == seeds[0]
                lines = JsonLinesLog(log) if logged else None
                run = train(
                    task,
                    schedule,
                    seed,
                    steps=steps,
                    window=window,
                    kernel=kernel,
                    log=lines,
                    on_step=lambda: progress.advance(bar),
                )
                if lines is not None:
                    lines.close()
                runs[schedule].append(run)
    return runs


def _table(task: Task, runs: dict[str, list[Run]]) -> Table:
    seeds = [run.seed for run in runs["AutoDrop"]]
    among = (
        f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}, mean ± std"
    )
    table = Table(title=f"{task.name}: {among}", title_justify="left", title_style="bold")
    table.add_column("schedule")
    heads = (task.measure, "train loss", "drops", "final rate", "in step()")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    digits = 2 if task.measure.endswith("%") else 3
    for schedule, group in runs.items():
        drops = [run.drops for run in group if run.drops is not None]
        table.add_row(
            schedule,
            _mean([run.quality for run in group], digits),
            _mean([run.loss for run in group], 3),
            f"{statistics.fmean(drops):.0f}" if drops else "-",
            f"{statistics.fmean(run.lr for run in group):.1e}",
            f"{100 * statistics.fmean(run.share for run in group):.1f} %",
        )
    return table


def _explain(
    console: Console,
    task: Task,
    runs: dict[str, list[Run]],
    steps: int,
    window: int,
    kernel: Kernel,
) -> None:
    most = steps // (_WINDOWS_PER_DROP * window)
    quality = {name: statistics.fmean(run.quality for run in g) for name, g in runs.items()}
    best = min(quality, key=lambda name: quality[name])
    console.print(
        f"{task.measure}: lower is better; lowest here: {best}. train loss: mean over the last "
        f"twentieth of the run. in step(): share of the training time spent in scheduler.step()."
    )
    console.print(
        f"AutoDrop ran with window={window} because the run is short: the rate falls by "
        f"{_FACTOR} at most once in {_WINDOWS_PER_DROP} windows, so {steps} steps allow at most "
        f"{most} {_plural(most, 'drop')}, down to {_FACTOR**most:.2g} of the initial rate. The "
        f"default of 64 would allow {steps // (_WINDOWS_PER_DROP * 64)}."
    )
    drops = statistics.fmean(run.drops or 0 for run in runs["AutoDrop"])
    if most and drops > 0.8 * most:
        console.print(
            "It dropped nearly as often as it could: over windows this short the angle is noisy, "
            "and the rate falls much like an exponential."
        )
    smoothing = _smoothing(runs["AutoDrop"][0].readings, kernel)
    if smoothing:
        console.print(smoothing)
    if task.steps == steps:
        console.print(task.note)


def _smoothing(readings: Sequence[Mapping[str, Any]], kernel: Kernel) -> str:
    """How far the filter moves an angle, and how far angles scatter; nothing of a short run."""
    angles = [r["angle"] for r in readings if r["angle"] is not None]
    moved = [abs(r["smoothed"] - r["angle"]) for r in readings if r["smoothed"] is not None]
    tens = [angles[i : i + 10] for i in range(0, len(angles) - 9, 10)]
    if not tens or not moved:
        return ""
    scatter = statistics.fmean(map(statistics.pstdev, tens))
    text = (
        f"How much smoothed smooths (kernel={kernel!r}): ten angles in a row scatter by "
        f"{scatter:.1f} degrees, and the filter moves the newest one by "
        f"{statistics.fmean(moved):.1f} degrees on average."
    )
    if kernel == "value":
        text += " It weighs angles by their distance in degrees, so that only near ones count."
    return text


def _write_picture(
    console: Console, path: Path, task: Task, runs: dict[str, list[Run]], window: int, log: Path
) -> None:
    first = runs["AutoDrop"][0]
    if not first.readings:
        console.print(
            "No picture: the run ended before AutoDrop's first reading, at the end of the third "
            "window."
        )
        return
    plot_comparison(
        first.readings,
        {schedule: group[0].metrics for schedule, group in runs.items()},
        threshold=_THRESHOLD,
        path=path,
        title=f"{task.name}, seed {first.seed}, window {window}: {task.description}",
    )
    # soft_wrap: a path or command that is broken over lines cannot be copied.
    for line in ("", f"Picture: {path}", f"Log:     {log}", f"Draw it: autodrop plot {log}"):
        console.print(Text(printable(line)), soft_wrap=True)


def _mean(values: list[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"
