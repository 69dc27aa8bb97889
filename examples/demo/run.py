"""The demo: one run read at three lengths, next to cosine set for each, on real data.

python examples/demo/run.py --help
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# Run as a file, this folder's parent is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from autodrop_ext import JsonLinesLog
from autodrop_ext.plotting.titles import printable
from autodrop_ext.schedulers.saturation import Kernel
from demo.digits import Digits
from demo.picture import plot_lengths
from demo.text import Bytes
from demo.training import CLOCKS, SCHEDULES, SET_FOR_A_LENGTH, Run, Task, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TASKS: dict[str, type[Digits] | type[Bytes]] = {"digits": Digits, "bytes": Bytes}
_NEEDS = {"digits": ("matplotlib", "sklearn"), "bytes": ("matplotlib",)}
_FACTOR = 0.95  # AutoDrop's defaults, for the note below the table
_WINDOWS_PER_DROP = 11
_POINTS = 15  # of a curve in the picture


@click.command()
@click.option(
    "--task",
    "name",
    type=click.Choice(list(_TASKS)),
    default="digits",
    show_default=True,
    help="digits: a convolutional network on handwritten digits, SGD, under 2 minutes. "
    "bytes: a transformer on Python's source text, AdamW, under 3 minutes.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    help="Runs per schedule.  [default: digits 3, bytes 1]",
)
@click.option(
    "--first-seed", type=click.IntRange(0), default=0, show_default=True, help="The others follow."
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    help="Optimizer steps of the longest run.  [default: digits 3000, bytes 1500]",
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
    help="Folder of the picture and the logs.",
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
    """Train under AnytimeAutoDrop, two clocks, cosine and AutoDrop, and compare.

    AnytimeAutoDrop is also run at four times the initial rate, with the automatic warm-up. The
    clocks are a constant rate and one that falls as the root of the time, with the average of
    AnytimeAutoDrop but without its meter.

    Every schedule is read at three lengths: a tenth, three tenths and all of the steps. Cosine,
    which must know its length, is trained once for each; the others are one run.

    Nothing is downloaded, and no GPU is needed.
    """
    missing = [module for module in _NEEDS[name] if importlib.util.find_spec(module) is None]
    if missing:
        raise click.ClickException(
            f"the demo needs {' and '.join(missing)}: pip install 'autodrop_ext[demo]'"
        )
    task = _TASKS[name]()
    seeds = seeds or task.seeds
    steps = steps or task.steps
    window = window or task.window
    lengths = sorted({max(1, steps // 10), max(1, 3 * steps // 10), steps})
    _make(output)
    console = Console()
    console.print(f"Training {task.description}:")
    console.print(
        f"{steps} steps, {len(SCHEDULES)} schedules, {seeds} {_plural(seeds, 'seed')} each"
    )

    start = time.perf_counter()
    kernel = kernel or "value"
    runs = _train_all(
        console,
        task,
        range(first_seed, first_seed + seeds),
        lengths=lengths,
        window=window,
        kernel=kernel,
        output=output,
    )
    console.print()
    console.print(_table(task, runs, lengths))
    _explain(console, task, runs, lengths, window, kernel)
    console.print(f"Took {time.perf_counter() - start:.0f} s.")
    _write_picture(console, output, task, runs)


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
    lengths: Sequence[int],
    window: int,
    kernel: Kernel,
    output: Path,
) -> dict[str, list[Run]]:
    """All runs of each schedule; the first seed's readings go to logs."""
    runs: dict[str, list[Run]] = {schedule: [] for schedule in SCHEDULES}
    of_schedule = {s: lengths if s in SET_FOR_A_LENGTH else lengths[-1:] for s in SCHEDULES}
    columns = (
        TextColumn("{task.description:<25}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(seeds) * sum(map(sum, of_schedule.values())))
        for seed in seeds:
            for schedule in SCHEDULES:
                progress.update(bar, description=f"{schedule}, seed {seed}")
                logged = seed == seeds[0] and "AutoDrop" in schedule
                log = _new_log(output, task, schedule) if logged else None
                for steps in of_schedule[schedule]:
                    run = train(
                        task,
                        schedule,
                        seed,
                        steps=steps,
                        reads=read_at(lengths),
                        window=window,
                        kernel=kernel,
                        log=log,
                        on_step=lambda: progress.advance(bar),
                    )
                    runs[schedule].append(run)
    return runs


def read_at(lengths: Sequence[int]) -> list[int]:
    """The lengths and, for the picture, steps in between, at equal distances of their logarithm.

    Two steps next to each other would draw a jag, so that none of these is close to a length.
    """
    first, last = max(1, lengths[0] / 3), lengths[-1]
    ratio = math.log(last / first) / (_POINTS - 1)
    between = {round(first * math.exp(ratio * i)) for i in range(_POINTS)}
    return sorted({*lengths, *(b for b in between if all(abs(b / of - 1) > 0.1 for of in lengths))})


def _new_log(output: Path, task: Task, schedule: str) -> JsonLinesLog:
    path = _log_path(output, task, schedule)
    path.unlink(missing_ok=True)  # a log appends; this is a new run
    return JsonLinesLog(path)


def _log_path(output: Path, task: Task, schedule: str) -> Path:
    return output / f"{task.name}-{schedule.lower().replace(', ', '-')}.jsonl"


def _table(task: Task, runs: dict[str, list[Run]], lengths: Sequence[int]) -> Table:
    title = f"{task.measure}, {_seeds(runs)}; lower is better"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("schedule", no_wrap=True)
    for length in lengths:
        table.add_column(f"{length:,} steps", justify="right", no_wrap=True)
    table.add_column("in step()", justify="right", no_wrap=True)
    digits = 2 if task.measure.endswith("%") else 3
    for schedule, group in runs.items():
        longest = [run for run in group if run.steps == lengths[-1]]
        table.add_row(
            schedule,
            *(_mean([*read(runs, schedule, length).values()], digits) for length in lengths),
            f"{100 * statistics.fmean(run.share for run in longest):.1f} %",
        )
    return table


def read(runs: Mapping[str, Sequence[Run]], schedule: str, length: int) -> dict[int, float]:
    """The quality of a schedule at a length, by seed."""
    whole = schedule not in SET_FOR_A_LENGTH
    return {run.seed: run.quality(length) for run in runs[schedule] if whole or run.steps == length}


def _explain(
    console: Console,
    task: Task,
    runs: dict[str, list[Run]],
    lengths: Sequence[int],
    window: int,
    kernel: Kernel,
) -> None:
    steps = lengths[-1]
    most = steps // (_WINDOWS_PER_DROP * window)
    console.print(
        "Cosine is trained once for every length, the others are one run that is read on the way. "
        "AnytimeAutoDrop has averaged parameters; 4x: at four times the initial rate, with "
        "warmup_steps='auto'. constant and sqrt(300 / (t + 300)) have the same average and no "
        "meter. ±: standard deviation. in step(): share of the training time spent there."
    )
    for other in ("cosine", *CLOCKS):
        difference = _paired(runs, other, lengths)
        console.print(f"AnytimeAutoDrop minus {other}, paired over the seeds: {difference}.")
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


def _paired(runs: Mapping[str, Sequence[Run]], other: str, lengths: Sequence[int]) -> str:
    """Mean difference to another schedule at each length, and its standard error over seeds."""
    texts = []
    for length in lengths:
        others = read(runs, other, length)
        differences = [v - others[s] for s, v in read(runs, "AnytimeAutoDrop", length).items()]
        text = f"{statistics.fmean(differences):+.2f}"
        if len(differences) > 1:
            text += f" ± {statistics.stdev(differences) / math.sqrt(len(differences)):.2f}"
        texts.append(f"{text} at {length:,}")
    return ", ".join(texts) + (" (± standard error)" if "±" in texts[0] else "")


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


def _write_picture(console: Console, output: Path, task: Task, runs: dict[str, list[Run]]) -> None:
    path = output / f"{task.name}.png"
    lengths_picture(task, runs, path)
    lines = ["", f"Picture: {path}"]
    for schedule in runs:
        if runs[schedule][0].readings:
            log = _log_path(output, task, schedule)
            lines += [f"Log:     {log}", f"Draw it: autodrop plot {log}"]
    # soft_wrap: a path or command that is broken over lines cannot be copied.
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)


def lengths_picture(
    task: Task, runs: Mapping[str, Sequence[Run]], path: Path | None = None
) -> Figure:
    """Draw the means over the seeds; ``runs`` has those of all seeds, schedule by schedule."""
    lengths = {
        name: [
            _mean_points([run.points for run in group if run.steps == steps])
            for steps in sorted({run.steps for run in group})
        ]
        for name, group in runs.items()
    }
    return plot_lengths(
        {name: points[0] for name, points in lengths.items() if name not in SET_FOR_A_LENGTH},
        {name: points for name, points in lengths.items() if name in SET_FOR_A_LENGTH},
        task.measure,
        path=path,
        title=f"{task.name}, {_seeds(runs)}: {task.description}",
    )


def _mean_points(of_seeds: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    return [
        {key: statistics.fmean(point[key] for point in points) for key in points[0]}
        for points in zip(*of_seeds, strict=True)
    ]


def _seeds(runs: Mapping[str, Sequence[Run]]) -> str:
    seeds = sorted({run.seed for run in runs["AutoDrop"]})
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"mean of seeds {seeds[0]} to {seeds[-1]}"


def _mean(values: list[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"


if __name__ == "__main__":
    demo()
