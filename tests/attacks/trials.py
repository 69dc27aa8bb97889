"""Small training runs that may be interrupted anywhere, with an oracle of what may be reported.

A trial moves parameters by given gradients, so that windows turn by large angles and a window with
one iterate too many or too few shows at once.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from oracle import Witness, allowed
from torch import nn

from autodrop_ext import AnalyticAutoDrop, AngularVelocity, AutoDrop, EpochAutoDrop

WINDOW = 3
FACTOR = 0.9
KINDS = ("meter", "AutoDrop", "per_group", "hashed", "EpochAutoDrop")
DROPS = {"threshold": 1000.0, "buffer_size": 2, "min_samples": 1, "factor": FACTOR}


class Trial:
    """One run of a kind, which counts its calls and keeps what was reported after each.

    Attributes:
        call: number of the last call of the meter or scheduler, counted from 0; -1 before.
        interrupted: calls that did not come to their end.
        reported: readings by the call that they came with.
    """

    def __init__(self, kind: str, seed: int = 0, shapes: tuple[int, ...] = (5, 7, 3)) -> None:
        self.kind = kind
        self.every = 2 if kind == "EpochAutoDrop" else 1  # optimizer steps per call
        self.window = 1 if kind == "EpochAutoDrop" else WINDOW
        self.seed = seed
        self.t = 0
        self.call = -1
        self.interrupted: list[int] = []
        self.reported: dict[int, Any] = {}
        # More elements than buckets, of few different values, so that windows turn by other angles.
        self.tiles = tiles = -(-9000 // sum(shapes)) if kind == "hashed" else 1
        generator = torch.Generator().manual_seed(seed)
        self.parameters = [
            nn.Parameter(torch.randn(n, generator=generator).repeat(tiles)) for n in shapes
        ]
        self.optimizer: Any = torch.optim.SGD(self._groups(), lr=0.5)
        self.measure: Any = self.new_measure()
        self.witness = Witness(lambda: self.parameters)
        self.known = 0

    def _groups(self) -> list[dict[str, Any]]:
        half = len(self.parameters) // 2
        groups = [{"params": self.parameters[:half]}, {"params": self.parameters[half:]}]
        return [group for group in groups if group["params"]]

    def new_measure(self) -> Any:
        """A meter or scheduler of this kind, over this run's parameters."""
        if self.kind == "meter":
            return AngularVelocity(self.parameters, WINDOW)
        if self.kind == "EpochAutoDrop":
            options: dict[str, Any] = {"threshold": 1e-9, "delay": 3}  # measures and never averages
            return EpochAutoDrop(self.optimizer, **options)
        if self.kind == "AnalyticAutoDrop":
            return AnalyticAutoDrop(self.optimizer, 4.0, 0.1, 0.05)
        buckets = 4096 if self.kind == "hashed" else 2**18
        per_group = self.kind == "per_group"
        return AutoDrop(self.optimizer, WINDOW, per_group=per_group, buckets=buckets, **DROPS)

    @property
    def history(self) -> list[Any]:
        history: list[Any] = self.measure.history
        return history

    @property
    def rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def train(self) -> None:
        """The optimizer steps before the next call."""
        for _ in range(self.every):
            for i, p in enumerate(self.parameters):
                number = 1 + (self.seed * 1009 + self.t) * 31 + i
                noise = torch.randn(
                    p.numel() // self.tiles, generator=torch.Generator().manual_seed(number)
                )
                p.grad = noise.repeat(self.tiles)
            if self.t == 0 and self.kind == "EpochAutoDrop":
                self.witness.see()  # the first displacement runs from before the first step
            self.optimizer.step()
            self.t += 1
        self.witness.see()
        self.call += 1
        self.known = len(self.history)

    def measured(self) -> None:
        """The call that may be interrupted."""
        self.measure.observe() if self.kind == "meter" else self.measure.step()

    def note(self) -> None:
        """Keep what the call has reported; after an interrupt too."""
        if len(self.history) > self.known:
            self.reported[self.call] = self.history[-1]

    def advance(self, calls: int = 1) -> None:
        """Train and measure, undisturbed."""
        for _ in range(calls):
            self.train()
            self.measured()
            self.note()

    def problems(self) -> Iterator[str]:
        """False angles among those reported so far.

        A window that was interrupted may be discarded, or go on with or without that iterate, but
        the angle must be that of the windows as they were counted.
        """
        first = len(self.witness.seen) - 1 - self.call  # index of the iterate of call 0
        for call, reading in self.reported.items():
            if reading.angle is None:
                continue
            until = Witness(lambda: ())
            until.seen = self.witness.seen[: first + call + 1]
            truths = [until.angle(self.window)]
            for gone in self.interrupted:
                truths.append(until.angle(self.window, [first + gone]))
            true = [t for t in truths if t is not None]
            if not any(abs(reading.angle - t.angle) <= allowed(reading, t) for t in true):
                yield f"call {call}: {reading.angle:.4f} where {true} are true"

    def resumed(self) -> Trial:
        """A new run that continues from this one's checkpoint, with this one's witness."""
        state = through_bytes(self.measure.state_dict())
        other = Trial(self.kind, self.seed, tuple(p.numel() // self.tiles for p in self.parameters))
        with torch.no_grad():
            for ours, theirs in zip(other.parameters, self.parameters, strict=True):
                ours.copy_(theirs)
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        other.measure.load_state_dict(state)
        other.t, other.call = self.t, self.call
        other.interrupted = list(self.interrupted)
        who = tuple(map(id, other.parameters))
        other.witness.seen = [(who, x) for _, x in self.witness.seen]
        return other


def through_bytes(state: Any) -> Any:
    """A state as a checkpoint file gives it back."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def calls_until_right(trial: Trial) -> int:
    """Calls after an interrupt within which readings must be right again: four windows."""
    return 4 * trial.window + 1


def aftermath(trial: Trial, said: list[str]) -> list[str]:
    """Train on after an interrupt: what is wrong with this run and with its checkpoint.

    Args:
        said: warnings so far; those of the rest are added.
    """
    wrong = []
    lost = trial.call
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, run in (("", trial), ("resumed ", trial.resumed())):
            before = len(run.reported)
            try:
                run.advance(calls_until_right(run) + 2 * run.window)
            except RuntimeError as error:
                wrong.append(f"{name}raises: {error}")
            wrong += [f"{name}{problem}" for problem in run.problems()]
            if not any(r.angle is not None for c, r in run.reported.items() if c > lost):
                wrong.append(f"{name}dead: no angle in {run.call - lost} calls after it")
            elif len(run.reported) == before:
                wrong.append(f"{name}no reading after it")
            if not all(0 < lr < float("inf") for lr in run.rates):
                wrong.append(f"{name}rates {run.rates}")
            if not name:
                of_this = len(caught)
    ours = said + [str(w.message) for w in caught[:of_this]]
    if len(ours) > len(trial.interrupted):
        wrong.append(f"{len(ours)} warnings: {ours}")
    return wrong


def half_dropped(trial: Trial) -> str | None:
    """A drop that was carried out in part, or is not counted."""
    if trial.kind in ("meter", "EpochAutoDrop"):
        return None
    if trial.kind != "per_group" and len(set(trial.rates)) > 1:
        return f"groups that began at one rate have {trial.rates}"
    counted = trial.measure.group_drops if trial.kind == "per_group" else [trial.measure.num_drops]
    for rate, drops in zip(trial.rates, counted, strict=False):
        if abs(rate / (0.5 * FACTOR**drops) - 1) > 1e-9:
            return f"{drops} drops are counted, but the rate is {rate!r}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial.measure.state_dict()  # finishes what was interrupted
    windows = [decision.window for decision in trial.history]
    if windows != sorted(set(windows)):
        return f"the history has the windows {windows}"
    return None
