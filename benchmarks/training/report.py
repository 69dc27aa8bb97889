"""Tables of mean and standard deviation over seeds, in Markdown, and the papers' curves."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .ablations import VARIED, runs_of
from .curves import draw_curves
from .run import RESULT
from .schedules import SCHEDULES

Result = dict[str, Any]
COMBINED = "results.json"
_HEADS = {"m": "`buffer_size` and `min_samples`"}
_DIGITS = {"test error, %": 2, "error, %": 2, "100 - BLEU": 2, "bits per byte": 3}


def read_results(paths: Iterable[Path]) -> list[Result]:
    """Results below folders, and in files of earlier reports.

    Raises:
        ValueError: there is none, or a file is not a result; the message names it.
    """
    results: dict[str, Result] = {}
    for path in paths:
        for file in sorted(path.rglob(RESULT)) if path.is_dir() else [path]:
            try:
                content = json.loads(file.read_text())
                for result in content if isinstance(content, list) else [content]:
                    results[json.dumps(result["spec"], sort_keys=True)] = _expanded(result)
            except (KeyError, TypeError, json.JSONDecodeError) as error:
                raise ValueError(f"{file}: expected results of training runs: {error}") from error
    if not results:
        raise ValueError(f"found no {RESULT} of a finished run below {', '.join(map(str, paths))}")
    return list(results.values())


def write_report(paths: Sequence[Path], target: Path) -> list[Path]:
    """Write ``report.md``, ``results.json`` and one picture for each comparison.

    Args:
        paths: see :func:`read_results`.
        target: folder of what is written.

    Returns:
        The files that were written.
    """
    results = read_results(paths)
    target.mkdir(parents=True, exist_ok=True)
    text = ["# Training under learning-rate schedules", ""]
    text += [f"{'; '.join(sorted({r['machine'] for r in results}))}.", ""]
    written = []
    for model in sorted({r["spec"]["model"] for r in results}):
        of_model = [r for r in results if r["spec"]["model"] == model]
        text += [f"## {model}", ""]
        for group, title in (("table", "All schedules"), ("runs", "Single runs")):
            chosen = [r for r in of_model if r["spec"]["group"] == group]
            if chosen:
                lines = _by(chosen, _label)
                picture = target / f"{group}-{model}.png"
                draw_curves(lines, picture, title=f"{model}: {_length(chosen, 'mean')}")
                written.append(picture)
                text += [f"### {title}", "", f"{_length(chosen)}.", "", *_schedules(lines), ""]
                text += [f"![curves]({picture.name})", ""]
        tuning = [r for r in of_model if r["spec"]["group"] == "tuning"]
        if tuning:
            text += ["### How the settings were chosen", "", *_tuning(tuning), ""]
        ablated = [r for r in of_model if r["spec"]["group"] == "ablations"]
        if ablated:
            text += ["### AutoDrop's settings", "", f"{_length(ablated)}.", ""]
            text += _ablations(ablated)
            windows = runs_of("window", ablated)
            if len(windows) > 1:
                picture = target / f"window-{model}.png"
                lines = {f"window {value}": runs for value, runs in windows.items()}
                draw_curves(lines, picture, title=f"{model}: AutoDrop's window", ordered=True)
                written.append(picture)
                text += [f"![curves]({picture.name})", ""]
    report, combined = target / "report.md", target / COMBINED
    report.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    combined.write_text(
        "[\n"
        + ",\n".join(json.dumps(_compact(r), separators=(",", ":")) for r in results)
        + "\n]\n",
        encoding="utf-8",
    )
    return [report, combined, *written]


def mean_and_std(values: Sequence[float | None], digits: int) -> str:
    """``1.50 ± 0.44``; the standard deviation is the sample's, and left out for one value.

    None, a run that diverged, is counted and left out.
    """
    finite = [v for v in values if v is not None]
    lost = len(values) - len(finite)
    note = f" ({lost} of {len(values)} diverged)" if lost else ""
    if not finite:
        return "diverged"
    mean = f"{statistics.fmean(finite):.{digits}f}"
    if len(finite) > 1:
        mean += f" ± {statistics.stdev(finite):.{digits}f}"
    return mean + note


def _schedules(lines: dict[str, list[Result]]) -> list[str]:
    first = next(iter(lines.values()))[0]
    digits = _DIGITS.get(first["measure"], 3)
    rows = []
    for label, runs in sorted(lines.items(), key=lambda item: _order(item[1])):
        drops = [r["drops"] for r in runs if r["drops"] is not None]
        rows.append(
            [
                label,
                "-"
                if not SCHEDULES[runs[0]["spec"]["schedule"]].rates
                else _rate([runs[0]], "initial_lr"),
                mean_and_std([r["error"] for r in runs], digits),
                mean_and_std([r["best_error"] for r in runs], digits),
                mean_and_std([r["loss"] for r in runs], 3),
                _rate(runs, "lr"),
                f"{statistics.fmean(drops):.0f}" if drops else "-",
            ]
        )
    heads = ["schedule", "initial rate", f"{first['measure']}, at the end", "best epoch"]
    return markdown_table([*heads, "training loss", "final rate", "drops"], rows)


def _tuning(results: Sequence[Result]) -> list[str]:
    digits = _DIGITS.get(results[0]["measure"], 3)
    seed = results[0]["spec"]["seed"]
    rates = sorted({r["spec"]["lr"] for r in results if r["spec"]["lr"] is not None})
    rows = []
    for label, runs in sorted(_by(results, _label_without_rate).items()):
        cells = {r["spec"]["lr"]: mean_and_std([r["error"]], digits) for r in runs}
        row = [cells.get(rate, "") for rate in rates]
        rows.append([label, *row] if None not in cells else [label, cells[None], *row[1:]])
    measure = results[0]["measure"].replace("test ", "")
    head = (
        f"Seed {seed}, which is not in the table; {measure}, on a fifth of the training data that "
        "was held out. Of every schedule the best of its row or rows was taken, equals by training "
        "loss. A schedule without an initial rate stands in the first column."
    )
    return [head, "", *markdown_table(["schedule", *(f"{rate:g}" for rate in rates)], rows)]


def _ablations(results: Sequence[Result]) -> list[str]:
    text = []
    for name in VARIED:
        groups = runs_of(name, results)
        if len(groups) < 2:
            continue
        digits = _DIGITS.get(results[0]["measure"], 3)
        rows = [
            [
                f"`{value}`",
                mean_and_std([r["error"] for r in runs], digits),
                mean_and_std([r["loss"] for r in runs], 3),
                _rate(runs, "lr"),
                f"{statistics.fmean(r['drops'] for r in runs):.0f}",
            ]
            for value, runs in groups.items()
        ]
        heads = [
            _HEADS.get(name, f"`{name}`"),
            results[0]["measure"],
            "training loss",
            "final rate",
            "drops",
        ]
        text += [*markdown_table(heads, rows), ""]
    return text


def _by(results: Iterable[Result], key: Callable[[Result], Any]) -> dict[Any, list[Result]]:
    groups: dict[Any, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return {k: sorted(runs, key=lambda r: r["spec"]["seed"]) for k, runs in groups.items()}


def _label_without_rate(result: Result) -> str:
    spec = result["spec"]
    label = SCHEDULES[spec["schedule"]].label
    changed = ", ".join(f"{k} {v}" for k, v in spec["settings"].items())
    return f"{label} ({changed})" if changed else label


def _label(result: Result) -> str:
    spec = result["spec"]
    if spec["group"] == "table" or spec["lr"] is None:
        return _label_without_rate(result)
    return f"{_label_without_rate(result)}, rate {spec['lr']:g}"


def _length(results: Sequence[Result], shown: str = "mean ± std") -> str:
    seeds = sorted({r["spec"]["seed"] for r in results})
    epochs = max(len(r["curve"]) for r in results)
    steps = results[0]["steps_per_epoch"]
    among = f"seed {seeds[0]}" if len(seeds) == 1 else f"{shown} of {len(seeds)} seeds"
    return f"{epochs} epochs of {steps} steps, {among}"


def _order(runs: Sequence[Result]) -> float:
    return statistics.fmean(math.inf if r["error"] is None else r["error"] for r in runs)


def _rate(runs: Sequence[Result], key: str) -> str:
    values = [r[key] for r in runs if r[key] is not None]
    if not values:
        return "-"
    mean = statistics.fmean(values)
    return f"{mean:.2g}" if abs(mean) > 1e-12 else "0"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table whose first column is text and whose others are numbers."""
    lines = [f"| {' | '.join(heads)} |", f"|:--|{'--:|' * (len(heads) - 1)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _compact(result: Result) -> Result:
    """For the combined file: curves as columns of four significant digits, no folders.

    Of runs that only chose settings the last epoch is kept.
    """
    curve = result["curve"][-1:] if result["spec"]["group"] == "tuning" else result["curve"]
    columns = {
        key: [float(f"{r[key]:.4g}") if isinstance(r[key], float) else r[key] for r in curve]
        for key in curve[0]
    }
    spec = {**result["spec"], "data": None, "cache": None, "checkpoint": None}
    return {**result, "curve": columns, "spec": spec}


def _expanded(result: Result) -> Result:
    """The opposite of :func:`_compact`, as far as it can be."""
    curve = result["curve"]
    if isinstance(curve, dict):
        rows = zip(*curve.values(), strict=True)
        curve = [dict(zip(curve, row, strict=True)) for row in rows]
    return {**result, "curve": curve}
