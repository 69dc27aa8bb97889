"""The papers' figures of the theory: the noisy quadratic model, the velocity model, Algorithm 2.

python benchmarks/papers/theory/draw.py nqm           Figures 1 and 2 of UAI 2024, seconds
python benchmarks/papers/theory/draw.py algorithm-2   Figures 4 and 5
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

# Run as a file, these folders are not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from demo.training import single_thread

from papers.theory import (
    AutomaticDrop,
    NoisyQuadratic,
    Trajectory,
    VelocityModel,
    algorithm_2,
    learning_rate,
)
from papers.theory.figures import (
    plot_algorithm_2,
    plot_automatic_drop,
    plot_constant_rates,
    plot_velocity_model,
)

NQM_RATES = (0.06, 0.03, 0.01, 0.001)  # both papers
NQM_ITERATIONS = 4000  # until the angle at 0.001 has settled; the papers give no number
NQM_SEEDS = 32
NQM_LEAST = 22  # 21 angles make one mean of 20 and one change of it

# The papers give no values. The time constant 1 / gamma of the first rate is 20 iterations; tau0
# is between the thresholds of the first and the last rates, so that both sides of
# min(tau0, gamma alpha / 2) occur.
_MODEL = VelocityModel(gamma=0.05, epsilon=0.3)
_TAU0 = 0.01  # radians per iteration
_MODEL_RATES = (1.0, 0.3, 0.1, 0.03)
_MODEL_ITERATIONS = 1000
ALGORITHM_ITERATIONS = 1000
_ROWS = 15


def draw_nqm(console: Console, output: Path, *, iterations: int, seeds: range) -> None:
    """Run the noisy quadratic model, print a table and draw Figures 1 and 2 of UAI 2024."""
    quadratic = NoisyQuadratic()
    console.print(
        f"Noisy quadratic model in {quadratic.dim} dimensions, {iterations} iterations, "
        f"{len(seeds)} seeds"
    )
    start = time.perf_counter()
    with single_thread():
        constant = {}
        for lr in NQM_RATES:
            with console.status(f"rate {lr:g}"):
                constant[lr] = quadratic.run(lr, iterations, seeds)
        with console.status("automatic drops"):
            rule = AutomaticDrop(factor=0.5, min_lr=NQM_RATES[-1])
            dropped = quadratic.run(NQM_RATES[0], iterations, seeds, drop=rule)
    console.print()
    console.print(_table(quadratic, constant, dropped))
    drops = (dropped.lr[:, 1:] < dropped.lr[:, :-1]).sum(dim=1).double().mean()
    console.print(
        f"angle: mean over the second half of the run, and Theorem 3.2's limit. I/N: mean inner "
        f"product over mean squared length, and the theorem's cosine. loss: without noise, mean "
        f"over the last tenth, and its limit. automatic: {drops:.1f} drops on average, by 2, from "
        f"{NQM_RATES[0]:g} to {NQM_RATES[-1]:g}; its limits are those of the last rate."
    )
    console.print(
        "A constant 0.001 goes to the same loss, and gets there later. One run's angle scatters "
        "by 5 degrees, so that the drops' rule (a change below 0.01) is mostly met by chance."
    )
    console.print(f"Took {time.perf_counter() - start:.0f} s.")
    figures = (output / "nqm.png", output / "nqm-drops.png")
    plot_constant_rates(quadratic, constant, path=figures[0])
    plot_automatic_drop(dropped, constant, path=figures[1])
    _name_pictures(console, figures)


def draw_algorithm_2(console: Console, output: Path, *, iterations: int) -> None:
    """Print Algorithm 2's first drops and draw Figures 4 and 5 of UAI 2024."""
    rates = map(learning_rate, itertools.count())
    endless = algorithm_2(_MODEL, _TAU0, rates)
    phases = list(itertools.takewhile(lambda phase: phase.start < iterations, endless))
    table = Table(
        title=f"Algorithm 2: gamma {_MODEL.gamma:g}, epsilon {_MODEL.epsilon:g}, tau0 {_TAU0:g}",
        title_justify="left",
        title_style="bold",
    )
    for head in ("i", "rate", "t_i", "gap", "velocity", "of its limit", "threshold"):
        table.add_column(head, justify="right")
    for phase in phases[:_ROWS]:
        velocity, limit = _MODEL.velocity(float(phase.gap), phase.lr), _MODEL.limit(phase.lr)
        table.add_row(
            str(phase.index),
            f"{phase.lr:.4f}",
            str(phase.start),
            str(phase.gap),
            f"{math.degrees(velocity):.1f}°",
            f"{100 * velocity / limit:.0f} %",
            f"{_MODEL.threshold(phase.lr, _TAU0):.5f}",
        )
    console.print(table)
    more = f" {len(phases) - _ROWS} more rates follow." if len(phases) > _ROWS else ""
    console.print(
        "Rates of Theorem 5.2, (i + 1)^(-2/3). t_i and gap: iterations. velocity: the model's "
        f"where the rate drops. threshold: of its derivative, radians per iteration.{more}"
    )
    console.print(
        "The threshold gamma rate / 2 is met at 44 to 51 % of the limit, far from saturation; only "
        "a smaller tau0 lets the model climb higher."
    )
    figures = (output / "velocity-model.png", output / "algorithm-2.png")
    plot_velocity_model(_MODEL, _MODEL_RATES, _MODEL_ITERATIONS, path=figures[0])
    plot_algorithm_2(_MODEL, phases, path=figures[1])
    _name_pictures(console, figures)


def _table(
    quadratic: NoisyQuadratic, constant: Mapping[float, Trajectory], dropped: Trajectory
) -> Table:
    seeds = len(dropped.loss)
    table = Table(
        title=f"Noisy quadratic model: mean of {seeds} {'seed' if seeds == 1 else 'seeds'}",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("rate")
    for head in ("angle", "theorem", "I/N", "theorem", "loss", "limit"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, lr, run in [
        *((f"{lr:g}", lr, run) for lr, run in constant.items()),
        ("automatic", NQM_RATES[-1], dropped),
    ]:
        limits = quadratic.limits(lr)
        half = run.angle.shape[1] // 2
        settled = run.angle[:, half:].mean()
        ratio = run.inner_product[:, half:].mean() / run.squared_norm[:, half:].mean()
        tenth = -max(1, run.loss.shape[1] // 10)
        table.add_row(
            name,
            f"{settled:.2f}°",
            f"{limits.angle:.2f}°",
            f"{ratio:.4f}",
            f"{limits.cosine:.4f}",
            f"{run.loss[:, tenth:].mean():.1f}",
            f"{limits.loss:.1f}",
        )
    return table


def _name_pictures(console: Console, paths: Iterable[Path]) -> None:
    # soft_wrap: a path that is broken over lines cannot be copied.
    console.print()
    for path in paths:
        console.print(f"Picture: {path}", soft_wrap=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    figures = parser.add_subparsers(dest="figures", required=True)
    of_nqm = figures.add_parser("nqm", help="Figures 1 and 2 of UAI 2024")
    of_nqm.add_argument("--seeds", type=_at_least(1), default=NQM_SEEDS, help="number of runs")
    of_nqm.add_argument("--first-seed", type=_at_least(0), default=0, help="the others follow")
    of_nqm.add_argument("--steps", type=_at_least(NQM_LEAST), default=NQM_ITERATIONS)
    of_model = figures.add_parser("algorithm-2", help="Figures 4 and 5 of UAI 2024")
    of_model.add_argument("--steps", type=_at_least(1), default=ALGORITHM_ITERATIONS)
    for each in (of_nqm, of_model):
        each.add_argument("--output", type=Path, default=Path("build/theory"), help="a folder")
    chosen = parser.parse_args(arguments)
    chosen.output.mkdir(parents=True, exist_ok=True)
    if chosen.figures == "nqm":
        seeds = range(chosen.first_seed, chosen.first_seed + chosen.seeds)
        draw_nqm(Console(), chosen.output, iterations=chosen.steps, seeds=seeds)
    else:
        draw_algorithm_2(Console(), chosen.output, iterations=chosen.steps)


def _at_least(least: int) -> Callable[[str], int]:
    """Return a type of argparse for integers of at least ``least``."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
        return int(text)

    return convert


if __name__ == "__main__":
    main()
