"""Averages of parameters in the loops of other libraries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..average import ParameterAverage
from ..messages import Warnings
from ..schedulers import AnytimeAutoDrop, AutoDrop


def check_averages(schedulers: list[Any]) -> None:
    """Raise ValueError unless there are schedulers, and all of them average over the run."""
    averaging = (AutoDrop, AnytimeAutoDrop)
    without = [s for s in schedulers if not (isinstance(s, averaging) and s.average)]
    if without or not schedulers:
        got = ", ".join(type(s).__name__ for s in without) + " without one"
        raise ValueError(
            "evaluate_average: expected AutoDrop or AnytimeAutoDrop with an average (average=True, "
            f"also in a checkpoint that was loaded), got {got if without else 'no scheduler'}"
        )


@contextlib.contextmanager
def averaged(schedulers: list[Any]) -> Iterator[None]:
    """Within the block the parameters of all schedulers hold their averages."""
    with contextlib.ExitStack() as stack:
        for scheduler in schedulers:
            stack.enter_context(scheduler.averaged_parameters())
        yield


def write_averages(schedulers: list[Any], state: Any = None) -> None:
    """Set the parameters to their averages for good; warns if there is none of them.

    Args:
        schedulers: all schedulers of the run.
        state: saved state of the scheduler, or list of states, whose averages are taken; None for
            the present ones.
    """
    states = [None] * len(schedulers) if state is None else _find_states(state)
    for scheduler, saved in zip(schedulers, states, strict=True):
        if saved is None:
            _write_present(scheduler)
            continue
        average = ParameterAverage(scheduler.meter.named_parameters)
        problem = average.load_state_dict(saved["mean"]) if "mean" in saved else None
        if problem or not average.write_back():
            Warnings(type(scheduler).__name__).warn(
                "the checkpoint's parameters stay as they are and are not averaged "
                f"({problem or 'none was saved'})"
            )


@torch.no_grad()
def _write_present(scheduler: Any) -> None:
    parameters = [p for _, p in scheduler.meter.named_parameters()]
    with scheduler.averaged_parameters():  # it warns
        averages = [p.clone() for p in parameters]
    for p, average in zip(parameters, averages, strict=True):
        p.copy_(average)


def _find_states(state: Any) -> list[Mapping[str, Any]]:
    """Return the states of this package's schedulers, in the order of ``find_schedulers``."""
    if isinstance(state, Mapping):
        if "num_drops" in state:
            return [state]
        state = state.get("_schedulers", ())  # of SequentialLR and ChainedScheduler
    return [found for part in state for found in _find_states(part)]
