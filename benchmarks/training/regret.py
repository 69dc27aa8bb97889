"""Tables of how far each schedule is from the best that needs no length, and a picture."""

from __future__ import annotations

import json
import math
import pathlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.studies import NAMES, OPEN, STUDIES, WARMED, Study

Values = dict[tuple[str, float], dict[str, dict[int, dict[int, "float | None"]]]]
"""By task and rate, schedule, steps and seed; None of a run that diverged."""

_DRAWN = (
    "anytime",
    "anytime, auto",
    "constant+average",
    "sqrt300+average",
    "schedule-free",
    "cosine",
    "cosine+average",
)


@dataclass(frozen=True)
class Regret:
    """How far one schedule is from the best of a cell: one task, rate and length.

    Attributes:
        task, rate, steps: the cell.
        schedule: that which is compared.
        best: the schedule with the lowest mean over the seeds of the cell.
        differences: to the best, by seed; infinite if a run diverged where that is no number.
        value: mean quality.
        best_value: that of the best.
        diverged: runs that diverged.
    """

    task: str
    rate: float
    steps: int
    schedule: str
    best: str
    differences: dict[int, float]
    value: float
    best_value: float
    diverged: int

    @property
    def mean(self) -> float:
        """The mean difference, at least 0."""
        return statistics.fmean(self.differences.values())

    @property
    def error(self) -> float:
        """Its standard error, paired over the seeds; NaN of one seed."""
        return standard_error(list(self.differences.values()))

    @property
    def is_behind(self) -> bool:
        """Whether the difference is more than two standard errors."""
        return self.mean > 0 and not self.mean <= 2 * self.error


def standard_error(values: Sequence[float]) -> float:
    """Standard error of a mean; NaN of one value or of infinite ones."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Rows so far."""
    path = folder / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def by_cell(rows: Sequence[Mapping[str, Any]]) -> Values:
    """Rows by task and rate, schedule, steps and seed."""
    values: Values = {}
    for r in rows:
        of = values.setdefault((r["task"], r["rate"]), {}).setdefault(r["schedule"], {})
        of.setdefault(r["steps"], {})[r["seed"]] = r["value"]
    return values


def _cells(values: Values) -> Iterator[tuple[str, Study, float]]:
    """Tasks and rates that have rows, in the order of rates."""
    for task, study in STUDIES.items():
        for multiple in sorted(study.multiples):
            if (task, multiple * study.good) in values:
                yield task, study, multiple * study.good


# ---- regret ------------------------------------------------------------------------------------


def regrets(values: Values) -> list[Regret]:
    """Regret of every schedule that needs no length, in every cell with at least two of them.

    The seeds of a cell are three or more that the most schedules have, and schedules that lack one
    of them are left out of it.
    """
    found = []
    for task, study, rate in _cells(values):
        for steps in study.lengths:
            of_schedule = {
                name: values[task, rate][name][steps]
                for name in (*OPEN, *WARMED)
                if steps in values[task, rate].get(name, {})
            }
            seeds = _common_seeds(list(of_schedule.values()))
            complete = {
                name: [of_seed[s] for s in seeds]
                for name, of_seed in of_schedule.items()
                if seeds <= set(of_seed)
            }
            if len(complete) < 2:
                continue
            scores = {n: [_score(study, v) for v in vs] for n, vs in complete.items()}
            best = min(scores, key=lambda name: statistics.fmean(scores[name]))
            for name, own in scores.items():
                pairs = zip(own, scores[best], strict=True)
                differences = [0.0 if a == b else a - b for a, b in pairs]
                found.append(
                    Regret(
                        task,
                        rate,
                        steps,
                        name,
                        best,
                        dict(zip(sorted(seeds), differences, strict=True)),
                        _mean(study, complete[name]),
                        _mean(study, complete[best]),
                        complete[name].count(None),
                    )
                )
    return found


def _common_seeds(of_schedule: Sequence[Mapping[int, Any]]) -> set[int]:
    """The set of seeds that the most schedules have in full; three seeds count more than that."""
    sets = [set(of_seed) for of_seed in of_schedule]

    def order(seeds: set[int]) -> tuple[int, int, int]:
        return min(len(seeds), 3), sum(seeds <= other for other in sets), len(seeds)

    return max(sets, key=order, default=set())


def _score(study: Study, value: float | None) -> float:
    value = study.chance if value is None else value
    return math.log10(value) if study.logarithm else value


def _mean(study: Study, values: Sequence[float | None]) -> float:
    return statistics.fmean(study.chance if v is None else v for v in values)


def _regret_tables(values: Values) -> list[str]:
    found = regrets(values)
    lines = [
        "## Regret",
        "",
        "How far each schedule is from the best of all that need no length, with and without a",
        "warm-up, at the same task, initial rate and length (a cell): the mean over seeds minus",
        "that of the schedule with the lowest mean. It is at least 0, and the best of many noisy",
        "means is too good, so that all of them are a little too high. ± is one standard error of",
        "the paired difference. A run that diverged counts as chance: an error of 90 %, 8 bits; on",
        "the quadratic, where regret is a difference of decimal logarithms, such cells are left",
        "out of the mean, and their number is given. The standard error of a mean over cells is",
        "that of the means of each seed. A second table has each cell, and in bold the value of",
        "its best schedule.",
    ]
    for task, study in STUDIES.items():
        of_task = [r for r in found if r.task == task]
        if not of_task:
            continue
        cells = len({(r.rate, r.steps) for r in of_task})
        unit = "log10 of the loss" if study.logarithm else study.make.measure  # type: ignore[attr-defined]
        lines += ["", f"### {task}, {unit}, {cells} cells", ""]
        rates = sorted({r.rate for r in of_task})
        head = "".join(f" at {rate:g} |" for rate in rates)
        lines.append(
            f"| schedule | cells | mean regret |{head} worst regret | cell | runs that diverged |"
        )
        lines.append("|:--|--:|--:|" + "--:|" * (len(rates) + 1) + ":--|--:|")
        for name in NAMES:
            own = [r for r in of_task if r.schedule == name]
            if own:
                worst = max(own, key=lambda r: r.mean)
                diverged = sum(r.diverged for r in own)
                at_rates = "".join(
                    f" {_mean_regret([r for r in own if r.rate == rate])} |" for rate in rates
                )
                lines.append(
                    f"| {NAMES[name]} | {len(own)} | {_mean_regret(own)} |{at_rates} "
                    f"{_text(worst)} | {worst.rate:g}, {worst.steps:,} steps | {diverged or ''} |"
                )
        lines += ["", *_cell_table(of_task)]
    lines += [
        "",
        "### All tasks",
        "",
        "In how many cells each schedule is the best or within two standard errors of it. Units",
        "differ, so that regrets of different tasks do not add up.",
        "",
        "| schedule | cells | best, or within two standard errors | share |",
        "|:--|--:|--:|--:|",
    ]
    for name in NAMES:
        own = [r for r in found if r.schedule == name and len(r.differences) > 1]
        if own:
            near = sum(not r.is_behind for r in own)
            lines.append(f"| {NAMES[name]} | {len(own)} | {near} | {near / len(own):.0%} |")
    lines += [
        "",
        "## Cells in which AnytimeAutoDrop is behind by more than two standard errors",
        "",
        "| task | initial rate | steps | schedule | value | best | its value | regret | seeds |",
        "|:--|--:|--:|:--|--:|:--|--:|--:|--:|",
    ]
    for r in found:
        if r.schedule.startswith("anytime") and r.is_behind and len(r.differences) > 1:
            own_value, best_value = _three_digits(r.value), _three_digits(r.best_value)
            lines.append(
                f"| {r.task} | {r.rate:g} | {r.steps:,} | {NAMES[r.schedule]} | {own_value} | "
                f"{NAMES[r.best]} | {best_value} | {_text(r)} | {len(r.differences)} |"
            )
    return lines


def _cell_table(of_task: Sequence[Regret]) -> list[str]:
    """Regret in each cell, and in bold the quality of the best."""
    names = [name for name in NAMES if any(r.schedule == name for r in of_task)]
    lines = ["| rate | steps | " + " | ".join(NAMES[name] for name in names) + " |"]
    lines.append("|" + "--:|" * (2 + len(names)))
    for rate, steps in dict.fromkeys((r.rate, r.steps) for r in of_task):
        own = {r.schedule: r for r in of_task if (r.rate, r.steps) == (rate, steps)}
        texts = [
            ""
            if (r := own.get(name)) is None
            else f"**{_three_digits(r.value)}**"
            if name == r.best
            else _text(r)
            for name in names
        ]
        lines.append(f"| {rate:g} | {steps:,} | " + " | ".join(texts) + " |")
    return lines


def _text(regret: Regret) -> str:
    if math.isinf(regret.mean):
        return "diverged"
    return _with_error(regret.mean, regret.error)


def _with_error(value: float, error: float) -> str:
    if math.isnan(error):
        return f"{value:.2g}"
    return f"{value:.2g} ± {error:.1g}" if error < 1 else f"{value:.2g} ± {error:.2g}"


def _mean_regret(own: Sequence[Regret]) -> str:
    finite = [r for r in own if math.isfinite(r.mean)]
    if not finite:
        return "diverged" if own else ""
    mean = statistics.fmean(r.mean for r in finite)
    seeds = set.intersection(*(set(r.differences) for r in finite))
    of_seed = [statistics.fmean(r.differences[s] for r in finite) for s in sorted(seeds)]
    text = _with_error(mean, standard_error(of_seed))
    without = len(own) - len(finite)
    return f"{text}, {without} diverged" if without else text


# ---- tables and picture of all runs ------------------------------------------------------------


def report(folder: pathlib.Path, to: pathlib.Path) -> None:
    """Tables as Markdown and a picture, tasks in the order of ``STUDIES``, rates by size."""
    to.mkdir(parents=True, exist_ok=True)
    rows = read(folder)
    values = by_cell(rows)
    lines = ["# One setting at many lengths", "", *_regret_tables(values), "", "## All values", ""]
    lines += [
        "Mean over seeds; in brackets the paired difference to cosine with its standard error, and",
        "the number of seeds. Lower is better. `python benchmarks/training/lengths.py`.",
    ]
    for task, study, rate in _cells(values):
        schedules = values[task, rate]
        lines += ["", f"### {task}, {study.make.measure}, initial rate {rate:g}", ""]  # type: ignore[attr-defined]
        lengths = [n for n in study.lengths if any(n in of for of in schedules.values())]
        lines.append("| schedule | " + " | ".join(f"{n:,} steps" for n in lengths) + " |")
        lines.append("|:--|" + "--:|" * len(lengths))
        for name in NAMES:
            if name in schedules:
                cells = [_cell(study, schedules, name, steps) for steps in lengths]
                lines.append(f"| {NAMES[name]} | " + " | ".join(cells) + " |")
    (to / "lengths.md").write_text("\n".join(lines) + "\n")
    if to.resolve() != folder.resolve():
        (to / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _draw(values, to / "lengths.png")


def _cell(
    study: Study, schedules: dict[str, dict[int, dict[int, float | None]]], name: str, steps: int
) -> str:
    of_seed = schedules[name].get(steps, {})
    if not of_seed:
        return ""
    diverged = list(of_seed.values()).count(None)
    text = _three_digits(_mean(study, list(of_seed.values())))
    if diverged == len(of_seed):
        return f"diverged ({diverged})"
    if diverged:
        return f"{text} ({diverged} of {len(of_seed)} diverged)"
    cosine = schedules.get("cosine", {}).get(steps, {})
    both = [(value, cosine.get(seed)) for seed, value in of_seed.items()]
    pairs = [a - b for a, b in both if a is not None and b is not None]
    if name == "cosine" or len(pairs) < 2:
        return f"{text} ({len(of_seed)})"
    return f"{text} ({statistics.mean(pairs):+.2g} ± {standard_error(pairs):.2g}, {len(pairs)})"


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def _draw(values: Values, path: pathlib.Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter

    # Eight times the good rate has one schedule only.
    drawn = [cell for cell in _cells(values) if cell[2] < 8 * cell[1].good]
    tasks = list(dict.fromkeys(task for task, _, _ in drawn))
    if not tasks:
        return
    columns = max(sum(1 for t, _, _ in drawn if t == task) for task in tasks)
    figure = Figure(figsize=(4 * columns, 3.2 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), columns, squeeze=False)
    handles: dict[str, Any] = {}
    for row, task in zip(axes, tasks, strict=True):
        of_task = [(study, rate) for t, study, rate in drawn if t == task]
        for ax in row[len(of_task) :]:
            ax.set_axis_off()
        for ax, (study, rate) in zip(row, of_task, strict=False):
            for i, name in enumerate(_DRAWN):
                points = sorted(values[task, rate].get(name, {}).items())
                points = [(n, of_seed) for n, of_seed in points if None not in of_seed.values()]
                if points:
                    means = [_mean(study, list(of_seed.values())) for _, of_seed in points]
                    ours = name.startswith("anytime")
                    style = "-o" if ours else "-." if name in OPEN else "--."
                    (handles[NAMES[name]],) = ax.plot(
                        [n for n, _ in points],
                        means,
                        style,
                        color=f"C{i}",
                        linewidth=2.0 if ours else 1.2,
                        markersize=5,
                        zorder=3 if ours else 2,
                    )
            ax.set(xscale="log", yscale="log", title=f"{task}, initial rate {rate:g}")
            ax.xaxis.set_major_locator(FixedLocator(study.lengths))
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            low, high = ax.get_ylim()
            ax.yaxis.set_major_locator(
                LogLocator(subs=range(1, 10) if high < 4 * low else (1, 2, 5))
            )
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.yaxis.set_minor_formatter(NullFormatter())
            ax.set_xlabel("optimizer steps")
        row[0].set_ylabel(STUDIES[task].make.measure)  # type: ignore[attr-defined]
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)
