"""Averages of parameters in the loops of other libraries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any


def check_averages(schedulers: list[Any]) -> None:
    """Raise ValueError unless there are schedulers, and all of them average over the run."""
    without = [type(s).__name__ for s in schedulers if getattr(s, "_mean", None) is None]
    if without or not schedulers:
        got = f"{', '.join(without)} without one" if without else "no scheduler"
        raise ValueError(
            "evaluate_average: expected AutoDrop or AnytimeAutoDrop with an average (average=True, "
            f"also in a checkpoint that was loaded), got {got}"
        )


@contextlib.contextmanager
def averaged(schedulers: list[Any]) -> Iterator[None]:
    """Within the block the parameters of all schedulers hold their averages."""
    with contextlib.ExitStack() as stack:
        for scheduler in schedulers:
            stack.enter_context(scheduler.averaged_parameters())
        yield


def write_averages(schedulers: list[Any], state: Any = None) -> None:
    """Set the parameters to their averages for good, at the end of training.

    Warns if this cannot be done.

    Args:
        schedulers: all schedulers of the run.
        state: saved state of the scheduler, or list of states, whose averages are to be written;
            None for the present averages.
    """
    states = [None] * len(schedulers) if state is None else _find_states(state)
    for scheduler, saved in zip(schedulers, states, strict=True):
        problem = None
        if saved is not None:
            problem = "none was saved"
            if "mean" in saved:
                problem = scheduler._mean.load_state_dict(saved["mean"])
        if problem is None and not scheduler._mean.write_back():
            problem = "there is none of them"
        if problem is not None:
            scheduler._warnings.warn(
                f"the model holds the parameters of the last step and not their average ({problem})"
            )


def _find_states(state: Any) -> list[Mapping[str, Any]]:
    """Return the states of this package's schedulers, in the order of ``find_schedulers``."""
    if isinstance(state, Mapping):
        if "num_drops" in state:
            return [state]
        state = state.get("_schedulers", ())  # of SequentialLR and ChainedScheduler
    return [found for part in state for found in _find_states(part)]
