"""The comparison of all schedules: settings are chosen first, the same way for every schedule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from .loop import RunSpec
from .schedules import SCHEDULES
from .tasks import IMAGE_MODELS, ByteTransformer, DigitsConvnet, Recipe

TUNING_SEED = 1000  # in no table

Train = Callable[[Sequence[RunSpec], str], list[dict[str, Any]]]


def recipe_of(model: str) -> Recipe:
    """Without reading the model's data."""
    if model in IMAGE_MODELS:
        return IMAGE_MODELS[model][1]
    return {"digits-convnet": DigitsConvnet, "byte-transformer": ByteTransformer}[model].recipe


def candidates(base: RunSpec) -> list[RunSpec]:
    """What is tried before a schedule's runs count.

    Every schedule tries the task's grid of initial rates; those whose papers search one setting
    more try it at each rate. All on one seed that is in no table, with the error measured on
    training data that is held out, so that the choice sees neither the table's seeds nor the test
    data.
    """
    schedule = SCHEDULES[base.schedule]
    rates: Iterable[float | None] = recipe_of(base.model).rates if schedule.rates else (None,)
    searched = [
        dict(zip(schedule.search, values, strict=True))
        for values in itertools.product(*schedule.search.values())
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
        for lr in rates
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
    base: RunSpec, schedules: Sequence[str], seeds: Sequence[int], *, tune: bool, train: Train
) -> list[dict[str, Any]]:
    """Train one model under every schedule and seed.

    Args:
        base: the model and everything else that all runs share.
        schedules: keys of ``training.schedules.SCHEDULES``.
        seeds: of the table.
        tune: choose initial rates first; otherwise every schedule runs at ``base.lr``.
        train: trains specs under a title, and returns their results in the same order.

    Returns:
        Results of the runs that were tried, and of those that count.
    """
    bases = [replace(base, schedule=name) for name in schedules]
    results: list[dict[str, Any]] = []
    if tune:
        tries = [candidates(b) for b in bases]
        results = train([spec for group in tries for spec in group], f"{base.model}: rates")
        remaining = iter(results)
        bases = [
            chosen(b, list(itertools.islice(remaining, len(group))))
            for b, group in zip(bases, tries, strict=True)
        ]
    runs = [replace(b, seed=seed, group="table") for b in bases for seed in seeds]
    return results + train(runs, f"{base.model}: table")
