"""Moves the memory of parameters inside windows; run as a script, because it may crash.

    python moving.py WAY KIND

Trains one run for each place in a window, moves the memory there, trains on, and ends with status 0
and one line of JSON: the problems that were found.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor
from trials import Trial

SHAPES = (50_000, 7, 300)  # freed memory of this size goes back to the system: reading it crashes


def share(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.share_memory_()


def pickle_for_a_worker(tensors: list[Tensor]) -> None:
    """What sending a model to a process of torch.multiprocessing does in the sender."""
    for tensor in tensors:
        ForkingPickler.dumps(tensor)


def _touch(tensors: list[Tensor]) -> None:
    torch.stack([tensor.detach().sum() for tensor in tensors]).sum()


def send_to_a_worker(tensors: list[Tensor]) -> None:
    """A real worker, started by spawning."""
    worker = torch.multiprocessing.get_context("spawn").Process(target=_touch, args=(tensors,))
    worker.start()
    worker.join()


def free_and_fill(tensors: list[Tensor]) -> None:
    """FSDP1's way: the storage is freed, and later gets memory at another address."""
    for tensor in tensors:
        storage = tensor.untyped_storage()
        values, size = tensor.detach().clone(), storage.nbytes()
        storage.resize_(0)
        blocked = torch.empty(size, dtype=torch.uint8)  # takes the old place, if it is free
        storage.resize_(size)
        tensor.detach().copy_(values)
        del blocked


def grow(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storage.resize_(2 * storage.nbytes() + (1 << 20))


def empty(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)


def measured_while_freed(trial: Trial) -> None:
    """One call while no parameter has memory; it may raise, in words."""
    trial.train()
    values = [p.detach().clone() for p in trial.parameters]
    sizes = [p.untyped_storage().nbytes() for p in trial.parameters]
    empty(list(trial.parameters))
    with contextlib.suppress(RuntimeError, TypeError, ValueError):
        trial.measured()
    trial.interrupted.append(trial.call)
    for parameter, value, size in zip(trial.parameters, values, sizes, strict=True):
        parameter.untyped_storage().resize_(size)
        parameter.detach().copy_(value)
    trial.note()


WAYS: dict[str, Callable[[list[Tensor]], None]] = {
    "share_memory": share,
    "pickle": pickle_for_a_worker,
    "worker": send_to_a_worker,
    "resize": free_and_fill,
    "grow": grow,
    "freed": empty,
}


def run(kind: str, way: Callable[[list[Tensor]], None], calls: int) -> list[str]:
    """Move after so many calls: problems of what is reported from then on."""
    trial = Trial(kind, calls, SHAPES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trial.advance(calls)
        if way is empty:
            measured_while_freed(trial)
        else:
            way(list(trial.parameters))
            trial.advance(1)
        trial.measure.state_dict()
        trial.advance(6 * trial.window)
    wrong = list(trial.problems())
    ours = [str(w.message) for w in caught if "AngularVelocity" in str(w.message)]
    if len(ours) > (way is empty):  # memory that is only elsewhere is no reason to warn
        wrong.append(f"{len(ours)} warnings: {ours}")
    if not any(r.angle is not None for c, r in trial.reported.items() if c > calls):
        wrong.append(f"dead: no angle in {trial.call - calls} calls")
    return [f"moved after {calls} calls: {problem}" for problem in wrong]


def average(way: Callable[[list[Tensor]], None]) -> list[str]:
    """Move during a delay of EpochAutoDrop, whose average is written back later."""
    from autodrop_ext import EpochAutoDrop

    trial = Trial("EpochAutoDrop", 0, SHAPES)
    trial.measure.close()
    trial.measure = EpochAutoDrop(trial.optimizer, threshold=100.0, max_threshold=180.0, delay=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial.advance(8)
        way(list(trial.parameters))
        trial.advance(12)
    fine = all(bool(p.isfinite().all()) and float(p.abs().max()) < 100 for p in trial.parameters)
    return [] if fine else ["parameters hold something else after the average"]


def main() -> None:
    """Try one way of moving at several places."""
    way, kind = sys.argv[1:]
    torch.set_num_threads(1)
    wrong: list[Any] = []
    if kind == "averaging":
        wrong = average(WAYS[way])
    else:
        # A worker takes seconds to start: one place in the middle of a window.
        for calls in [13] if way == "worker" else range(9, 13):
            wrong += run(kind, WAYS[way], calls)
    print(json.dumps(wrong))


if __name__ == "__main__":
    main()
