"""The comparison of all schedules: settings are chosen first, the same way for every schedule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .run import RunSpec
from .schedules import SCHEDULES
from .tasks import recipe_of

TUNING_SEED = 1000  # in no table

Train = Callable[[Sequence[RunSpec], str], list[dict[str, Any]]]


Search = Mapping[str, Mapping[str, tuple[Any, ...]]]


def candidates(base: RunSpec, *, rates: bool = True, search: Search | None = None) -> list[RunSpec]:
    """What is tried before a schedule's runs count.

    Every schedule tries the task's grid of initial rates; those whose papers search one setting
    more try it at each rate. All on one seed that is in no table, with the error measured on
    training data that is held out, so that the choice sees neither the table's seeds nor the test
    data.

    Args:
        base: what is to be run.
        rates: try the task's grid of initial rates; otherwise ``base.lr`` alone.
        search: settings that are searched in addition, or on another grid, by the schedule's name.
    """
    schedule, recipe = SCHEDULES[base.schedule], recipe_of(base.model)
    lrs: Iterable[float | None] = recipe.rates if schedule.rates and rates else (base.lr,)
    grids = {
        **schedule.search,
        **recipe.search.get(base.schedule, {}),
        **(search or {}).get(base.schedule, {}),
    }
    searched = [
        dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values())
    ]
    return [
        replace(
            base,
            seed=TUNING_SEED,
            lr=lr,
            settings={**base.settings, **settings},
            validation=True,
            group="tuning",
        )
        for lr in lrs
        for settings in searched
    ]


def chosen(base: RunSpec, tried: Sequence[dict[str, Any]]) -> RunSpec:
    """The candidate of the lowest held-out error; of equals the one of the lowest training loss."""

    def order(result: dict[str, Any]) -> tuple[float, float]:
        error, loss = result["error"], result["loss"]
        return (math.inf if error is None else error, math.inf if loss is None else loss)

    best = min(tried, key=order)["spec"]
    return replace(base, lr=best["lr"], settings=best["settings"])


def compare(
    base: RunSpec,
    schedules: Sequence[str],
    seeds: Sequence[int],
    *,
    tune: bool,
    train: Train,
    search: Search | None = None,
) -> list[dict[str, Any]]:
    """Train one model under every schedule and seed.

    Args:
        base: the model and everything else that all runs share.
        schedules: keys of ``training.schedules.SCHEDULES``.
        seeds: of the table.
        tune: choose initial rates first; otherwise every schedule runs at ``base.lr``.
        train: trains specs under a title, and returns their results in the same order.
        search: see :func:`candidates`.

    Returns:
        Results of the runs that were tried, and of those that count.
    """
    bases = [replace(base, schedule=name) for name in schedules]
    results: list[dict[str, Any]] = []
    if tune:
        tries = [candidates(b, search=search) for b in bases]
        results = train([spec for group in tries for spec in group], f"{base.model}: rates")
        remaining = iter(results)
        bases = [
            chosen(b, list(itertools.islice(remaining, len(group))))
            for b, group in zip(bases, tries, strict=True)
        ]
    runs = [replace(b, seed=seed, group="table") for b in bases for seed in seeds]
    return results + train(runs, f"{base.model}: table")
