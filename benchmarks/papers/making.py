"""Runs what a table or figure of the papers is made of, and prints its numbers next to ours."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from training.curves import draw_bars, draw_curves, draw_rates
from training.ranks import Ranks
from training.report import markdown_table, mean_and_std
from training.run import RESULT, RunSpec, check_same, machine
from training.table import candidates, chosen

from . import tasks  # noqa: F401 - adds the papers' models
from .exhibits import EXHIBITS, Entry, Exhibit, PaperRun, data_of
from .recipes import RECIPES
from .sources import SOURCES
from .theory.draw import (
    ALGORITHM_ITERATIONS,
    NQM_ITERATIONS,
    NQM_SEEDS,
    draw_algorithm_2,
    draw_nqm,
)
from .timing import MODELS, PRINTED, SCHEDULES_TIMED, describe, time_steps

_OF_THE_MACHINE = ("data", "cache", "log_every", "workers", "checkpoint", "device", "bf16")
GROUP, SEARCH = "paper", "paper-search"
Result = dict[str, Any]
Train = Callable[[Sequence[RunSpec], str], list[Result]]


@dataclass(frozen=True)
class Options:
    """What the command line says about the runs.

    Attributes:
        output: folder of the runs, and of the tables and pictures.
        data: folders by the data set's name; "bert" is a checkpoint.
        models, schedules: only these; empty: all.
        seeds: at most so many; None: the paper's.
        cache: folder of what is decoded once; None: next to the data.
        base: what replaces the recipe in all runs, such as ``epochs`` and ``subset``.
        timing: arguments of :func:`papers.timing.time_steps` but for model and schedules.
    """

    output: Path
    data: Mapping[str, str] = field(default_factory=dict)
    models: Sequence[str] = ()
    schedules: Sequence[str] = ()
    seeds: int | None = None
    cache: Path | None = None
    base: Mapping[str, Any] = field(default_factory=dict)
    timing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shortened(self) -> list[str]:
        """What of the recipes was replaced, for the reports."""
        names = ("epochs", "subset", "batch", "lr", "warmup_steps")
        changed = [f"{n} {self.base[n]}" for n in names if self.base.get(n) is not None]
        return changed + ([] if self.seeds is None else [f"at most {self.seeds} seeds"])


def list_exhibits(options: Options) -> list[str]:
    """One line for each table and figure, and one for each data set."""
    rows = []
    for exhibit in EXHIBITS.values():
        specs = _known_specs(exhibit, options)
        states = [_state(spec, options.output) for spec in specs]
        runs = [entry.run for entry in exhibit.entries if _wanted(entry.run, options)]
        missing = [name for name in data_of(runs) if name not in options.data]
        state = f"{states.count('finished')} of {len(specs)} runs" if specs else "no runs"
        others = states.count("other")
        state += f", {others} more under other settings" if others else ""
        needs = f", needs {' and '.join(missing)}" if missing else ""
        rows.append(f"{exhibit.name:15} {exhibit.title} ({state}{needs})")
    return [*rows, "", *(_describe(name) for name in SOURCES)]


def _describe(name: str) -> str:
    """What a data set's folder holds and where it comes from."""
    source = SOURCES[name]
    option = "--data " + name + "=" + ("CHECKPOINT" if name == "bert" else "FOLDER")
    return f"{option}: {source.title}; {source.holds}. From {source.origin}."


def _state(spec: RunSpec, output: Path) -> Literal["finished", "other", "open"]:
    """Whether a run has ended; "other": its folder holds one of a subset or of another recipe."""
    try:
        return "open" if finished(spec, output) is None else "finished"
    except ValueError:
        return "other"


def make_exhibit(name: str, options: Options, train: Train | None) -> list[Path]:
    """Train what is missing of a table or figure, then write it.

    Args:
        name: a key of :data:`papers.exhibits.EXHIBITS`.
        options: of the command.
        train: trains specs under a title; None: only what is finished is taken.

    Returns:
        Files that were written below ``options.output``: ``NAME.md`` and pictures. With several
        ranks all of them train; the first one writes and measures, and the others return nothing.
    """
    exhibit = EXHIBITS[name]
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    first = Ranks().first
    if exhibit.kind == "theory":
        return _theory(exhibit, folder) if first else []
    if exhibit.kind == "time":
        return [_write(exhibit, folder, _times(options), options)] if first else []
    entries = [e for e in exhibit.entries if _wanted(e.run, options)]
    unique: list[PaperRun] = []
    for entry in entries:
        if entry.run not in unique:
            unique.append(entry.run)
    of_run = [(run, _results(run, options, train, exhibit.name)) for run in unique]

    def results(run: PaperRun) -> list[Result]:
        return next(found for known, found in of_run if known == run)

    if exhibit.kind in ("table", "epochs"):
        text = _table(exhibit, entries, results)
    else:
        text = [f"{e.column}: {len(results(e.run))} finished runs." for e in entries]
    if not first:
        return []
    missing = [d for d in data_of(unique) if d not in options.data]
    if missing and train is not None:
        text += ["", "Some runs lack their data:", "", *(f"- {_describe(d)}" for d in missing)]
    alone = dict.fromkeys(RECIPES[run.model].title for run in unique if not _shares(run))
    if alone and train is not None:
        text += ["", f"Not run, because it takes one process: {', '.join(alone)}. Run it again "]
        text[-1] += "without torchrun; finished runs are kept."
    lines = {e.column: results(e.run) for e in entries if results(e.run)}
    pictures = []
    picture = folder / f"{name}.png"
    if exhibit.kind == "curves" and lines:
        draw_curves(lines, picture, title=exhibit.title)
        pictures.append(picture)
    elif exhibit.kind == "rates" and lines:
        draw_rates(lines, picture, title=exhibit.title, angles=exhibit.angles)
        pictures.append(picture)
    elif exhibit.kind == "epochs":
        bars: dict[str, dict[str, float]] = {}
        for entry in entries:
            values = _values(entry, results(entry.run))
            if values:
                bars.setdefault(entry.row, {})[entry.column] = statistics.fmean(values)
        if bars:
            draw_bars(bars, picture, title=exhibit.title, unit=exhibit.unit)
            pictures.append(picture)
    text += ["", *(f"![{exhibit.title}]({p.name})" for p in pictures)]
    machines = sorted({r["machine"] for _, found in of_run for r in found})
    return [_write(exhibit, folder, text, options, machines), *pictures]


def _shares(run: PaperRun) -> bool:
    """Whether the processes that there are can share a run: CIFAR is whole on one device."""
    return Ranks().size == 1 or RECIPES[run.model].kind != "cifar"


def _wanted(run: PaperRun, options: Options) -> bool:
    return (not options.models or run.model in options.models) and (
        not options.schedules or run.schedule in options.schedules
    )


def base_spec(run: PaperRun, options: Options) -> RunSpec:
    """The run with its recipe's data, without a seed."""
    recipe = RECIPES[run.model]
    given = {k: v for k, v in options.base.items() if v is not None}
    spec = RunSpec(
        run.model,
        run.schedule,
        settings=dict(run.settings),
        group=GROUP,
        data=options.data.get(recipe.data),
        cache=None if options.cache is None else str(options.cache / f"{recipe.data}.cache"),
        checkpoint=options.data.get("bert") if recipe.kind == "glue" else None,
        angles=run.angles,
    )
    return replace(spec, **{"lr": run.lr, "epochs": run.epochs, **given})


def _seeds(run: PaperRun, options: Options) -> Sequence[int]:
    seeds = RECIPES[run.model].seeds
    least = min(n for n in (len(seeds), run.seeds, options.seeds) if n is not None)
    return seeds[:least]


def _results(run: PaperRun, options: Options, train: Train | None, title: str) -> list[Result]:
    """Of all seeds that are finished, after training what can be trained."""
    base = base_spec(run, options)
    if any(name not in options.data for name in data_of([run])) or not _shares(run):
        train = None
    title = f"{title}: {run.model}, {run.schedule}"

    def results(specs: Sequence[RunSpec]) -> list[Result | None]:
        if train is not None:
            return list(train(specs, title))
        return [finished(spec, options.output) for spec in specs]

    settled = _settled(run, base, results)
    if settled is None:
        return []
    specs = [replace(settled, seed=seed) for seed in _seeds(run, options)]
    return [result for result in results(specs) if result is not None]


def _tries(run: PaperRun, base: RunSpec) -> list[RunSpec]:
    """What is tried before the run counts; nothing where nothing is searched."""
    if not (run.searched or run.rates):
        return []
    return [replace(s, group=SEARCH) for s in candidates(base, rates=run.rates)]


def _settled(
    run: PaperRun, base: RunSpec, results: Callable[[Sequence[RunSpec]], list[Result | None]]
) -> RunSpec | None:
    """The run with the settings that were searched; None where the search is not finished."""
    tries = _tries(run, base)
    if not tries:
        return base
    tried = [result for result in results(tries) if result is not None]
    return chosen(base, tried) if len(tried) == len(tries) else None


def _known_specs(exhibit: Exhibit, options: Options) -> list[RunSpec]:
    """All runs of an exhibit, as far as the searches before them are finished, and these."""
    specs: list[RunSpec] = []
    for entry in exhibit.entries:
        if not _wanted(entry.run, options):
            continue
        base = base_spec(entry.run, options)
        specs += [s for s in _tries(entry.run, base) if s not in specs]
        settled = _settled(
            entry.run,
            base,
            lambda tries: [
                finished(s, options.output) if _state(s, options.output) == "finished" else None
                for s in tries
            ],
        )
        for seed in _seeds(entry.run, options):
            spec = replace(settled or base, seed=seed)
            if spec not in specs:
                specs.append(spec)
    return specs


def finished(spec: RunSpec, output: Path) -> Result | None:
    """What a run has led to, on whatever machine, or None where it has not ended.

    Raises:
        ValueError: the folder holds a run of other settings, such as a subset.
    """
    path = spec.folder(output) / RESULT
    if not path.is_file():
        return None
    result: Result = json.loads(path.read_text())
    check_same(spec, RECIPES[spec.model].recipe, result, path, ignored=_OF_THE_MACHINE)
    return result


def _values(entry: Entry, results: Sequence[Result]) -> list[float]:
    return [v for r in results if not r["diverged"] and (v := entry.value(r)) is not None]


def _table(
    exhibit: Exhibit, entries: Sequence[Entry], results: Callable[[PaperRun], list[Result]]
) -> list[str]:
    rows = []
    for entry in entries:
        found = results(entry.run)
        values = [None if r["diverged"] else entry.value(r) for r in found]
        known = [v for v, r in zip(values, found, strict=True) if v is not None or r["diverged"]]
        ours = mean_and_std(known, exhibit.digits) if known else "not run"
        rows.append([entry.row, entry.column, entry.printed, ours, str(len(known))])
    return markdown_table(["", "", f"paper: {exhibit.unit}", "ours", "runs"], rows)


def _times(options: Options) -> list[str]:
    rows = []
    device = str(options.timing["device"])
    for model in MODELS:
        if options.models and model not in options.models:
            continue
        names = [n for n in SCHEDULES_TIMED if not options.schedules or n in options.schedules]
        seconds = time_steps(model, names, **options.timing)
        for name, printed in zip(SCHEDULES_TIMED, PRINTED[model], strict=True):
            if name in seconds:
                measured = describe(seconds[name])
                rows.append(
                    [RECIPES[model].title, name, printed, measured, str(len(seconds[name]))]
                )
    table = markdown_table(["", "", "paper: seconds", "ours: mean (range)", "rounds"], rows)
    shown = ", ".join(f"{k} {v}" for k, v in options.timing.items() if v is not None)
    return [*table, "", f"{machine(device)}; {shown}."]


def _theory(exhibit: Exhibit, folder: Path) -> list[Path]:
    """Draw a figure that needs no training."""
    made = folder / "theory"
    made.mkdir(exist_ok=True)
    if exhibit.picture.startswith("nqm"):
        draw_nqm(Console(), made, iterations=NQM_ITERATIONS, seeds=range(NQM_SEEDS))
    else:
        draw_algorithm_2(Console(), made, iterations=ALGORITHM_ITERATIONS)
    target = folder / f"{exhibit.name}.png"
    shutil.copyfile(made / exhibit.picture, target)
    return [target]


def _write(
    exhibit: Exhibit,
    folder: Path,
    text: Sequence[str],
    options: Options,
    machines: Sequence[str] = (),
) -> Path:
    path = folder / f"{exhibit.name}.md"
    lines = [f"# {exhibit.name}: {exhibit.title}", ""]
    if exhibit.note:
        lines += [exhibit.note, ""]
    if options.shortened and exhibit.kind != "time":
        lines += [f"Not the paper's setting: {', '.join(options.shortened)}.", ""]
    if machines:
        lines += [f"{'; '.join(machines)}.", ""]
    path.write_text("\n".join([*lines, *text]).rstrip() + "\n", encoding="utf-8")
    return path
