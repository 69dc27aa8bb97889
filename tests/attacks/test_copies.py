"""Copies of meters and schedulers in every state: they go on like the original, bit for bit."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from oracle import count
from trials import KINDS, Trial


def copied(trial: Trial, how: Callable[[Any], Any]) -> Trial:
    """A run with copies of the parameters, the optimizer and the scheduler."""
    other = Trial(trial.kind, trial.seed)
    if trial.kind != "meter":
        other.measure.close()
    parts = how((trial.parameters, trial.optimizer, trial.measure))
    other.parameters, other.optimizer, other.measure = parts
    other.t, other.call = trial.t, trial.call
    return other


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 6, 7, 9, 12, 13])
@pytest.mark.parametrize("kind", [*KINDS, "AnalyticAutoDrop"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_like_the_original(kind: str, calls: int, how: Callable[[Any], Any]) -> None:
    trial = Trial(kind)
    trial.advance(calls)
    before = repr(trial.history) if kind != "AnalyticAutoDrop" else ""
    other = copied(trial, how)
    again = copied(other, how)  # a copy that has not taken a step since
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for run in (trial, other, again):
            run.advance(count(11, 40))
    for run in (other, again):
        assert run.rates == trial.rates
        if kind != "AnalyticAutoDrop":
            assert repr(run.history) == repr(trial.history) != before
