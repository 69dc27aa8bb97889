"""AutoDrop's settings, one at a time: UAI 2024, section 10.2 (factor, m) and Table 15 (window)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .run import RunSpec
from .tasks import MODELS

# The papers' values.
FACTORS = (0.5, 0.8, 0.9, 0.95, 0.99)
BUFFER_SIZES = (5, 10, 20, 30, 50)
KERNELS = ("value", "time")
# What changes together under each name. m is UAI's: the buffer's size, and, if the buffer must be
# full before anything is smoothed, the number of angles that are waited for as well.
VARIED: dict[str, tuple[str, ...]] = {
    "window": ("window",),
    "factor": ("factor",),
    "buffer_size": ("buffer_size",),
    "m": ("buffer_size", "min_samples"),
    "kernel": ("kernel",),
}
# Written out in every run, so that a value that is a default is run only once.
USUAL: dict[str, Any] = {"factor": 0.95, "buffer_size": 10, "min_samples": 10, "kernel": "value"}


def values_of(name: str, model: str) -> tuple[Any, ...]:
    """What is tried under a name of :data:`VARIED`."""
    return {
        "window": MODELS[model].windows,
        "factor": FACTORS,
        "buffer_size": BUFFER_SIZES,
        "m": BUFFER_SIZES,
        "kernel": KERNELS,
    }[name]


def ablation_specs(
    base: RunSpec, varied: Sequence[str], seeds: Sequence[int], window: int
) -> list[RunSpec]:
    """One run for each value and seed, all else as AutoDrop's defaults.

    Args:
        base: the model and everything else that all runs share.
        varied: names of :data:`VARIED`.
        seeds: of the runs.
        window: of those runs that vary something else.
    """
    specs: list[RunSpec] = []
    for name in varied:
        for value in values_of(name, base.model):
            settings = {"window": window, **USUAL, **dict.fromkeys(VARIED[name], value)}
            for seed in seeds:
                spec = replace(
                    base, schedule="autodrop", seed=seed, settings=settings, group="ablations"
                )
                if spec not in specs:
                    specs.append(spec)
    return specs


def runs_of(name: str, results: Sequence[dict[str, Any]]) -> dict[Any, list[dict[str, Any]]]:
    """Those results that vary only what is under a name, by its value."""
    together = VARIED[name]
    usual = {**USUAL, "window": statistics.mode(r["settings"]["window"] for r in results)}
    groups: dict[Any, list[dict[str, Any]]] = {}
    for result in results:
        values = {result["settings"][s] for s in together}
        others_usual = all(
            result["settings"][s] == v for s, v in usual.items() if s not in together
        )
        if len(values) == 1 and others_usual:
            groups.setdefault(values.pop(), []).append(result)
    return dict(sorted(groups.items(), key=lambda item: (isinstance(item[0], str), item[0])))
