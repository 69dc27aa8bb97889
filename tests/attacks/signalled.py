"""Trains under real signals, delivered inside calls at random times; run as a script.

    python signalled.py COUNT SEED

Prints a JSON object: by kind of meter or scheduler, how many signals were delivered inside a call,
and what was wrong after them. A timer's signal has the handler of SIGINT, so that Python raises
KeyboardInterrupt wherever it is, as for the stop button of a notebook.
"""

from __future__ import annotations

import json
import pathlib
import random
import signal
import sys
import time
import traceback
import warnings
from typing import Any

import torch
from trials import KINDS, Trial, aftermath

import autodrop_ext

PACKAGE = str(pathlib.Path(autodrop_ext.__file__).parent)
SHAPES = (20_000, *[9] * 40)  # a kernel that takes a while, and tensors to look at one by one


def interrupted(trial: Trial, delay: float) -> str | None:
    """Run the call with a signal after ``delay`` seconds; the place if it struck inside."""
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, delay)
            trial.measured()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt as error:
        frames = traceback.extract_tb(error.__traceback__)
        inside = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
        if inside:
            trial.interrupted.append(trial.call)
            return f"{pathlib.Path(inside[-1].filename).name}:{inside[-1].lineno}"
    return None


def attack(kind: str, count: int, seed: int) -> dict[str, Any]:
    """Deliver ``count`` signals inside calls of one kind."""
    choose = random.Random(f"{kind} {seed}")
    typical: dict[int, float] = {}  # duration of a call by its place in the window
    wrong: list[str] = []
    struck = tries = 0
    while struck < count and tries < 20 * count:
        tries += 1
        trial = Trial(kind, tries, SHAPES)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            calls = choose.randint(0, 5 * trial.window)
            trial.advance(calls)
            trial.train()
            place = (trial.call + 1) % trial.window if calls else -1
            began = time.perf_counter()
            where = interrupted(trial, choose.uniform(1e-6, 1.1 * typical.get(place, 1e-3)))
            trial.note()
            if where is None:
                typical[place] = time.perf_counter() - began
        if where is not None:
            struck += 1
            said = [str(w.message) for w in caught]
            wrong += [f"{where} in call {trial.call}: {p}" for p in aftermath(trial, said)]
    return {"struck": struck, "wrong": wrong}


def main() -> None:
    """Attack all kinds and print what was found."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    count, seed = map(int, sys.argv[1:])
    print(json.dumps({kind: attack(kind, count, seed) for kind in KINDS}))


if __name__ == "__main__":
    main()
