"""Training under many learning-rate schedules: run, compare, ablate, report.

python benchmarks/training/command.py --help

``benchmarks/papers/command.py`` has the same commands with the papers' models.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

# Run as a file, this folder's parent is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.ablations import VARIED, ablation_specs
from training.parallel import train_all
from training.ranks import Ranks, start_ranks
from training.report import write_report
from training.run import RunSpec
from training.schedules import SCHEDULES, window_for
from training.table import compare
from training.tasks import MODELS, recipe_of

SMALL = tuple(name for name, model in MODELS.items() if model.data is None)
# What ends in a message and not in a traceback.
EXPECTED = (OSError, ValueError, ImportError, torch.cuda.OutOfMemoryError)
_NEEDS = {"schedule-free": "schedulefree", "prodigy": "prodigyopt"}


class Setting(click.ParamType):
    """``NAME=VALUE``; the value is a Python literal, or else a string."""

    name = "name=value"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, Any]:
        """A pair."""
        if isinstance(value, tuple):
            return value
        name, sign, text = value.partition("=")
        if not (name and sign and text):
            self.fail(f"expected NAME=VALUE, got {value!r}", param, ctx)
        try:
            return name, ast.literal_eval(text)
        except (SyntaxError, ValueError):
            return name, text


class Grid(click.ParamType):
    """``SCHEDULE.NAME=VALUE,VALUE``; every value is a Python literal, or else a string."""

    name = "schedule.name=values"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, str, tuple[Any, ...]]:
        """Schedule, setting and its values."""
        if isinstance(value, tuple):
            return value
        place, sign, text = value.partition("=")
        schedule, dot, name = place.partition(".")
        if not (sign and dot and name and text) or schedule not in SCHEDULES:
            self.fail(f"expected SCHEDULE.NAME=VALUE,VALUE, got {value!r}", param, ctx)
        if name not in SCHEDULES[schedule].settings:
            known = ", ".join(SCHEDULES[schedule].settings) or "none"
            self.fail(f"{schedule} has the settings {known}; got {name}", param, ctx)
        values = [Setting().convert(f"x={part}", param, ctx)[1] for part in text.split(",")]
        return schedule, name, tuple(values)


class ModelName(click.ParamType):
    """A key of :data:`training.tasks.MODELS`."""

    name = "model"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Return the name."""
        if value not in MODELS:
            self.fail(f"expected one of {', '.join(MODELS)}, got {value!r}", param, ctx)
        return str(value)


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_output = click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default="build/training",
    show_default=True,
    help="Folder of logs, checkpoints and results. Finished runs in it are not run again, "
    "interrupted ones go on.",
)
_run_options = _options(
    click.option("--epochs", type=click.IntRange(1), help="[default: the model's]"),
    click.option("--lr", type=float, help="Initial learning rate.  [default: the model's]"),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="auto: a GPU for the papers' models where there is one; with torchrun each process's.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["auto", "bf16", "fp32"]),
        default="auto",
        show_default=True,
        help="auto: bf16 autocast on a GPU, fp32 elsewhere.",
    ),
    click.option(
        "--data",
        type=click.Path(exists=True, file_okay=False),
        help="Folder of the papers' models' data.",
    ),
    click.option(
        "--cache",
        type=click.Path(dir_okay=False),
        help="File of what is decoded once.  [default: in the data's folder]",
    ),
    click.option(
        "--batch", type=click.IntRange(1), help="Examples a step.  [default: the model's]"
    ),
    click.option(
        "--subset", type=click.IntRange(1), help="Examples to train and to test on.  [default: all]"
    ),
    click.option(
        "--workers",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Processes that decode images (ImageNet).",
    ),
    click.option("--checkpoint", help="GLUE: folder or hub name of the pretrained model."),
    click.option(
        "--warmup",
        "warmup_steps",
        type=click.IntRange(0),
        metavar="STEPS",
        help="The rate rises linearly over these steps, under any schedule.  [default: the "
        "model's, or none]",
    ),
    click.option(
        "--log-every", type=click.IntRange(1), default=50, show_default=True, help="Steps."
    ),
    _output,
)
_processes = click.option(
    "--processes",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Runs side by side, each on one thread. With 1 a run has all threads; on a GPU take 1.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 90})
def cli() -> None:
    """Train models under learning-rate schedules and compare them."""


@cli.command()
@click.option(
    "--model",
    type=ModelName(),
    required=True,
    metavar="NAME",
    help="One that the list command names.",
)
@click.option(
    "--schedule",
    "schedules",
    type=click.Choice(list(SCHEDULES)),
    metavar="NAME",
    multiple=True,
    required=True,
    help="One that the list command names; may be given several times.",
)
@click.option("--seed", "seeds", type=int, multiple=True, default=[0], show_default=True)
@click.option(
    "--set",
    "settings",
    type=Setting(),
    multiple=True,
    help="A setting of the schedules, such as window=64 (see the list command).",
)
@click.option(
    "--angles",
    type=click.IntRange(1),
    metavar="WINDOW",
    help="Also measure the angular velocity; it goes into the log and the result.",
)
@_run_options
def run(
    model: str,
    schedules: Sequence[str],
    seeds: Sequence[int],
    settings: Sequence[tuple[str, Any]],
    angles: int | None,
    output: Path,
    **options: Any,
) -> None:
    """Train one model; an interrupted run goes on where it stopped."""
    specs = [
        _spec(model, schedule=name, seed=seed, settings=dict(settings), angles=angles, **options)
        for name in schedules
        for seed in seeds
    ]
    _check(specs)
    results = train_runs(specs, model, output, processes=1, keep_checkpoint=True)
    for spec, result in zip(specs, results, strict=True):
        error = "diverged" if result["error"] is None else f"{result['error']:.4g}"
        click.echo(
            f"{SCHEDULES[spec.schedule].label}, seed {spec.seed}: {result['measure']} {error}, "
            f"log {spec.folder(output) / 'log.jsonl'}"
        )


@cli.command()
@click.option(
    "--model",
    "models",
    type=ModelName(),
    metavar="NAME",
    multiple=True,
    default=SMALL,
    show_default=True,
)
@click.option(
    "--schedule",
    "schedules",
    type=click.Choice(list(SCHEDULES)),
    metavar="NAME",
    multiple=True,
    help="May be given several times.  [default: all]",
)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="How many.")
@click.option(
    "--tune/--no-tune",
    default=True,
    show_default=True,
    help="Choose each schedule's initial rate from the model's grid first, on another seed and "
    "held-out training data. Without, all start at --lr.",
)
@click.option(
    "--search",
    "grids",
    type=Grid(),
    multiple=True,
    metavar="SCHEDULE.NAME=V,V",
    help="Also try these values of a setting at each initial rate, such as "
    "exponential.gamma=0.8,0.9,0.95,0.99,0.999; may be given several times.",
)
@_processes
@_run_options
def table(
    models: Sequence[str],
    schedules: Sequence[str],
    seeds: int,
    tune: bool,
    grids: Sequence[tuple[str, str, tuple[Any, ...]]],
    processes: int,
    output: Path,
    **options: Any,
) -> None:
    """All schedules on the small models, then a report.

    Under half an hour on two cores.
    """
    if tune and options["lr"] is not None:
        raise click.UsageError("--lr has no meaning with --tune; add --no-tune")
    if grids and not tune:
        raise click.UsageError("--search has no meaning with --no-tune")
    search: dict[str, dict[str, tuple[Any, ...]]] = {}
    for schedule, setting, values in grids:
        search.setdefault(schedule, {})[setting] = values
    bases = [_spec(model, schedule="constant", **options) for model in models]
    names = list(schedules or SCHEDULES)
    _check([_with(base, name) for base in bases for name in names])
    for base in bases:
        compare(
            base,
            names,
            range(seeds),
            tune=tune,
            train=lambda specs, title: train_runs(specs, title, output, processes=processes),
            search=search,
        )
    _report([output], output)


@cli.command()
@click.option(
    "--model",
    "models",
    type=ModelName(),
    metavar="NAME",
    multiple=True,
    default=SMALL[:1],
    show_default=True,
)
@click.option(
    "--vary",
    "varied",
    type=click.Choice(list(VARIED)),
    multiple=True,
    help="[default: all of them]",
)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="How many.")
@_processes
@_run_options
def ablations(
    models: Sequence[str],
    varied: Sequence[str],
    seeds: int,
    processes: int,
    output: Path,
    **options: Any,
) -> None:
    """AutoDrop's settings one at a time, then a report."""
    for model in models:
        base = _spec(model, schedule="autodrop", **options)
        _check([base])
        recipe = recipe_of(model)
        steps = (base.epochs or recipe.epochs) * base.task().steps_per_epoch
        window = recipe.window or window_for(max(1, steps - base.warmup(recipe, steps)))
        specs = ablation_specs(base, varied or list(VARIED), range(seeds), window)
        train_runs(specs, f"{model}: ablations", output, processes=processes)
    _report([output], output)


@cli.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--to",
    "target",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder that gets report.md, results.json and the pictures.",
)
def report(results: Sequence[Path], target: Path) -> None:
    """Tables of mean and standard deviation over seeds, and curves.

    RESULTS are output folders of the other commands, or results.json files of earlier reports.
    """
    _report(results, target)


@cli.command(name="list")
def list_schedules() -> None:
    """Models; schedules, their settings, and where these come from."""
    click.echo(f"models: {', '.join(MODELS)}")
    for name, schedule in SCHEDULES.items():
        settings = ", ".join(f"{k}={v}" for k, v in schedule.settings.items())
        click.echo(f"{name}: {schedule.label}")
        for text in (settings, schedule.source):
            if text:
                click.echo(f"    {text}")


def _spec(model: str, *, device: str, precision: str, **options: Any) -> RunSpec:
    place = MODELS[model].data
    on_gpu = place is not None and torch.cuda.is_available()
    device = ("cuda" if on_gpu else "cpu") if device == "auto" else device
    device = start_ranks() or device
    bf16 = device.startswith("cuda") if precision == "auto" else precision == "bf16"
    if place is not None and options["data"] is None:
        raise click.UsageError(f"{model} needs --data, the folder of {place}")
    return RunSpec(model=model, device=device, bf16=bf16, **options)


def _with(base: RunSpec, schedule: str) -> RunSpec:
    return replace(base, schedule=schedule)


def _check(specs: Sequence[RunSpec]) -> None:
    """Before hours of training: settings that exist, packages that are there."""
    for spec in specs:
        try:
            SCHEDULES[spec.schedule].settings_with(spec.settings)
        except ValueError as error:
            raise click.UsageError(f"--set: {error}") from error
        needed = _NEEDS.get(spec.schedule)
        if needed and importlib.util.find_spec(needed) is None:
            raise click.ClickException(
                f"{spec.schedule} needs {needed}: pip install 'autodrop_ext[bench]'"
            )


def train_runs(
    specs: Sequence[RunSpec],
    title: str,
    output: Path,
    *,
    processes: int,
    keep_checkpoint: bool = False,
) -> list[dict[str, Any]]:
    """As :func:`training.parallel.train_all`; what goes wrong ends in a message."""
    try:
        return train_all(
            specs,
            output,
            processes=processes,
            title=title,
            console=Console(stderr=True, quiet=not Ranks().first),
            keep_checkpoint=keep_checkpoint,
        )
    except EXPECTED as error:
        raise click.ClickException(message_of(error)) from error


def message_of(error: Exception) -> str:
    """Return what a user is shown of an expected error."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return f"the GPU's memory is full; give a smaller --batch, or free the GPU. {error}"
    return str(error)


def _report(results: Sequence[Path], target: Path) -> None:
    try:
        written = write_report(results, target)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    for path in written:
        click.echo(path)


if __name__ == "__main__":
    cli()
