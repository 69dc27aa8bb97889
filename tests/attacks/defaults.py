"""Changes torch's defaults around a run, before or in the middle; run as a script.

    python defaults.py CHANGE KIND,KIND,... WHEN,WHEN

``CHANGE`` is ``meta`` (the default device), ``context`` (``with torch.device``), or a dtype. The
run must report what it reports without, to the bit, and crash nowhere.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings

import torch
from trials import Trial

CALLS, AT = 24, 10


def readings(kind: str, change: str, when: str) -> list[str]:
    """What a run reports, with the default changed from ``when`` on.

    Training itself runs under torch's own defaults: only our calls see the change.
    """
    trial = Trial(kind)
    if when == "before":
        with contextlib.ExitStack() as changed:
            _change(changed, change)
            getattr(trial.measure, "close", lambda: None)()
            trial.measure = trial.new_measure()
    for call in range(CALLS):
        trial.train()
        with contextlib.ExitStack() as changed:
            if when == "before" or call >= AT:
                _change(changed, change)
            trial.measured()
            trial.measure.state_dict()
        trial.note()
    return [repr(reading) for reading in trial.reported.values()]


def _change(stack: contextlib.ExitStack, change: str) -> None:
    if not change:
        return
    if change == "meta":
        torch.set_default_device("meta")
        stack.callback(torch.set_default_device, None)
    elif change == "context":
        stack.enter_context(torch.device("meta"))
    elif change == "inference":
        stack.enter_context(torch.inference_mode())
    else:
        torch.set_default_dtype(getattr(torch, change))
        stack.callback(torch.set_default_dtype, torch.float32)


def main() -> None:
    """Compare a run with and without the change."""
    change, kinds, moments = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    wrong = []
    for when in moments.split(","):
        for kind in kinds.split(","):
            pairs = zip(readings(kind, change, when), readings(kind, "", when), strict=True)
            wrong += [f"{kind}, {when}: {f} instead of {e}" for f, e in pairs if f != e]
    print(json.dumps(wrong))


if __name__ == "__main__":
    main()
