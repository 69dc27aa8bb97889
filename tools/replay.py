"""Replays many seeded runs through the public API, so that two versions can be compared to the bit.

    python tools/replay.py record OUT.json [--only SUBSTRING] [--no-ranks]
    python tools/replay.py compare A.json B.json [--ignore NAME ...] [--without-sampled]
    python tools/replay.py checkpoints FOLDER

``record`` writes every reading, decision and learning rate, a digest of the parameters, and of
every state the counts and a digest of each tensor. Run it once with each version on the path
(``PYTHONPATH=/path/to/version python tools/replay.py record ...``); the first line says which one
was imported. ``compare`` ends with status 1 and names the first difference of each run, where there
is one. It says how many entries only one side has when these are new on the right-hand side; an
entry that has gone is a difference. ``--ignore`` takes names of entries, such as ``usable``.

``checkpoints`` writes a few small states into a folder, with what followed them, for a test that
loads them into later versions.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import fnmatch
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import autodrop_ext
from autodrop_ext import AnalyticAutoDrop, AngularVelocity, AutoDrop, EpochAutoDrop

Record = dict[str, Any]

SCALARS = """
window steps windows position usable fresh still variances form fraction seed sized last_epoch
step_count base_lrs last_lr optimizer_steps stepped num_drops since_drop real_steps
current_threshold last_angle waited snapshots total buffer samples smoothed drops factor threshold
max_threshold delay average min_lr warmup_steps per_group buffer_size min_samples kernel gamma
epsilon tau0 rates
"""
"""Names of the plain values of a state that are compared, wherever in it they are."""


# ---- tensors ------------------------------------------------------------------------------------


def _normal(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    return lambda g: torch.randn(*shape, generator=g).to(dtype)


KINDS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "vector": _normal(37),
    "matrix": _normal(9, 13),
    "edge": _normal(1025),
    "seven chunks": _normal(6 * 1024 + 100),
    "five chunks": _normal(5 * 1024, dtype=torch.bfloat16),
    "bfloat16": _normal(3, 41, dtype=torch.bfloat16),
    "float16": _normal(67, dtype=torch.float16),
    "float64": _normal(5, 11, dtype=torch.float64),
    "complex64": lambda g: torch.randn(7, 5, generator=g, dtype=torch.complex64),
    "complex128": lambda g: torch.randn(6, generator=g, dtype=torch.complex128),
    "channels_last": lambda g: torch.randn(2, 3, 4, 5, generator=g).to(
        memory_format=torch.channels_last
    ),
    "transposed": lambda g: torch.randn(8, 5, generator=g).t(),
    "every second": lambda g: torch.randn(6, 10, generator=g)[:, ::2],
    "sub-matrix": lambda g: torch.randn(9, 9, generator=g)[2:6, 3:8],
    "misaligned": lambda g: torch.randn(90, generator=g)[1:72],
    "empty": lambda g: torch.empty(0, 3),
    "scalar": lambda g: torch.randn((), generator=g),
}


def _generator(*numbers: int) -> torch.Generator:
    seed = hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(seed, "big"))


def _noise(like: Tensor, *numbers: int) -> Tensor:
    """Normal values of a tensor's shape and dtype, the same ones for the same numbers."""
    shape = torch.view_as_real(like.detach()).shape if like.is_complex() else like.shape
    values = torch.randn(shape, generator=_generator(*numbers), dtype=torch.float64)
    if like.is_complex():
        values = torch.view_as_complex(values)
    return values.to(like.dtype)


def _direction(like: Tensor, seed: int, t: int, i: int, scatter: float) -> Tensor:
    """A direction that stays and noise that grows, so that angles rise."""
    return _noise(like, seed, i) + scatter * _noise(like, seed, i, t)


# ---- records ------------------------------------------------------------------------------------


def exact(value: Any) -> Any:
    """A value for JSON from which nothing is lost: floats in hexadecimal, NaN by its name."""
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, Tensor):
        return digest(value)
    if hasattr(value, "_asdict"):
        return exact(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): exact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [exact(item) for item in value]
    raise TypeError(f"expected a plain value or a tensor, got {type(value).__name__}")


def digest(tensor: Tensor) -> str:
    """Hash of a tensor's dtype, shape and bytes; of a DTensor, of the part on this rank."""
    tensor = tensor.detach()
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    local = torch.view_as_real(local.resolve_conj()) if local.is_complex() else local
    # A copy of its own: an arena of one element may come with strides of 0, which view() refuses.
    dense = torch.empty(local.shape, dtype=local.dtype).copy_(local).flatten()
    content = dense.view(torch.uint8).numpy().tobytes()
    header = f"{local.dtype} {tuple(local.shape)} ".encode()
    return hashlib.blake2b(header + content, digest_size=12).hexdigest()


def of_state(state: Any) -> Record:
    """The counts of a state by path, and by parameter the sorted digests of its tensors.

    Tensors are keyed by the name that holds them, not by their role, so that roles may be renamed.
    """
    record: Record = {}
    tensors: dict[str, list[str]] = collections.defaultdict(list)
    for path, value in _leaves(state, ()):
        if isinstance(value, Tensor):
            tensors[path[-2]].append(digest(value))
        elif path[-1] in SCALARS.split():
            record[".".join(path)] = exact(value)
    record["tensors"] = {name: sorted(found) for name, found in sorted(tensors.items())}
    return record


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key != "history":  # the readings are recorded one by one
                yield from _leaves(item, (*path, str(key)))
    else:
        yield path, value


def of_fields(reading: Any) -> Record:
    """Every field of a reading or decision."""
    return {f.name: exact(getattr(reading, f.name)) for f in dataclasses.fields(reading)}


def of_rates(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The learning rate of each param group."""
    return [exact(float(group["lr"])) for group in optimizer.param_groups]


def through_bytes(state: Any) -> Any:
    """A state as a checkpoint file gives it back."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ---- runs ---------------------------------------------------------------------------------------


class Run:
    """One run, described by a dict of plain values, taken one step at a time.

    Entries of the description: ``seed``, ``tensors`` (kinds), ``groups`` (how many the tensors are
    dealt to), ``steps``, ``scatter``, ``events`` (a list of ``[step, name, index]``), ``settings``
    of the meter or scheduler, and what subclasses name.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.spec = spec
        self.seed: int = spec["seed"]
        self.t = 0
        self.scatter: float = spec.get("scatter", 1.0)
        self.parameters = [self._make(i, kind) for i, kind in enumerate(spec["tensors"])]
        count = spec.get("groups", 1)
        self.groups = [{"params": self.parameters[g::count]} for g in range(count)]
        self._lost: tuple[Tensor, Tensor] | None = None

    def _make(self, i: int, kind: str) -> nn.Parameter:
        return nn.Parameter(KINDS[kind](_generator(self.seed, i, 0)))

    def step(self) -> list[Record]:
        """Move the parameters once, measure, and tell what was seen."""
        self.t += 1
        records: list[Record] = []
        if self._lost is not None:
            with torch.no_grad():
                self._lost[0].copy_(self._lost[1])
            self._lost = None
        now = [(name, i) for t, name, i in self.spec.get("events", []) if t == self.t]
        for name, i in now:
            if name != "nan":
                records += getattr(self, f"_{name}")(i % len(self.parameters))
        self._move()
        for name, i in now:
            if name == "nan":
                self._nan(i % len(self.parameters))
        records += self._measure()
        return [{"at": f"step {self.t}", **record} for record in records]

    def run(self, until: int | None = None) -> list[Record]:
        """Records of all steps up to one; an exception ends them with its type."""
        records: list[Record] = []
        try:
            while self.t < (until or self.spec["steps"]):
                records += self.step()
        except (RuntimeError, ValueError, TypeError) as error:
            records.append({"at": f"step {self.t}", "error": type(error).__name__})
        records.append({"at": "end", "parameters": [digest(p) for p in self.parameters]})
        records.append({"at": "end", "state": of_state(self.state())})
        return records

    def checkpoint(self) -> dict[str, Any]:
        """Everything from which :func:`continued` goes on, as plain values and tensors."""
        values = [p.detach().clone(memory_format=torch.contiguous_format) for p in self.parameters]
        return {
            "spec": dict(self.spec),
            "at": self.t,
            "parameters": values,
            "state": self.state(),
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of a run that had no events."""
        self.t = saved["at"]
        with torch.no_grad():
            for parameter, value in zip(self.parameters, saved["parameters"], strict=True):
                parameter.copy_(value)

    def state(self) -> dict[str, Any]:
        raise NotImplementedError

    def _move(self) -> None:
        raise NotImplementedError

    def _measure(self) -> list[Record]:
        raise NotImplementedError

    # Events, by name.

    def _freeze(self, i: int) -> list[Record]:
        self.parameters[i].requires_grad_(False)
        return []

    def _thaw(self, i: int) -> list[Record]:
        self.parameters[i].requires_grad_(True)
        return []

    def _swap(self, i: int) -> list[Record]:
        parameter = self.parameters[i]
        parameter.data = parameter.data.clone()
        return []

    def _nan(self, i: int) -> None:
        parameter = self.parameters[i]
        if parameter.numel():
            self._lost = parameter, parameter.detach().clone()
            with torch.no_grad():
                parameter[(0,) * parameter.dim()] = torch.nan


class MeterRun(Run):
    """An :class:`AngularVelocity` over tensors that are moved by hand."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__(spec)
        if spec.get("tied"):
            self.groups[0]["params"].append(self.parameters[0])
        self.meter = self._new()

    def _new(self) -> AngularVelocity:
        return AngularVelocity(lambda: self.groups, **self.spec["settings"])

    def _move(self) -> None:
        with torch.no_grad():
            for i, p in enumerate(self.parameters):
                p.add_(_direction(p, self.seed, self.t, i, self.scatter), alpha=self.spec["scale"])

    def _measure(self) -> list[Record]:
        reading = self.meter.observe()
        records: list[Record] = [] if reading is None else [of_fields(reading)]
        if reading is not None:
            records[0] |= {"meter.form": self.meter.form, "meter.steps": self.meter.steps}
        if self.t % 7 == 0:
            records.append({"state": of_state(self.meter.state_dict())})
        return records

    def _resume(self, i: int) -> list[Record]:
        state = through_bytes(self.meter.state_dict())
        self.meter = self._new()
        self.meter.load_state_dict(state)
        return [{"resumed": of_state(state)}]

    def _close(self, i: int) -> list[Record]:
        self.meter.close()
        return []

    def _add(self, i: int) -> list[Record]:
        self.parameters.append(self._make(len(self.parameters), "matrix"))
        self.groups[-1]["params"].append(self.parameters[-1])
        return []

    def state(self) -> dict[str, Any]:
        return self.meter.state_dict()

    def load(self, saved: Mapping[str, Any]) -> None:
        super().load(saved)
        self.meter.load_state_dict(saved["state"])


SCHEDULERS = {c.__name__: c for c in (AutoDrop, EpochAutoDrop, AnalyticAutoDrop)}


class SchedulerRun(Run):
    """A scheduler over an optimizer whose gradients are given.

    Entries: ``scheduler``, ``optimizer``, ``options`` of the optimizer, ``tensor_lr`` and
    ``every``, optimizer steps per call of the scheduler.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__(spec)
        self._start()

    def _start(self) -> None:
        spec = self.spec
        groups = [{**group, "lr": self._lr(g)} for g, group in enumerate(self.groups)]
        kind = getattr(torch.optim, spec["optimizer"])
        options = {"foreach": False} if spec.get("tensor_lr") else {}
        self.optimizer = kind(groups, lr=self._lr(0), **spec.get("options", {}), **options)
        self.scheduler: Any = SCHEDULERS[spec["scheduler"]](self.optimizer, **spec["settings"])

    def _lr(self, g: int) -> Any:
        lr = 0.05 / (g + 1)
        return torch.tensor(lr) if self.spec.get("tensor_lr") else lr

    def _move(self) -> None:
        for i, p in enumerate(self.parameters):
            p.grad = None
            if p.requires_grad:
                p.grad = _direction(p, self.seed, self.t, i, self.scatter)
        self.optimizer.step()

    def _measure(self) -> list[Record]:
        if self.t % self.spec.get("every", 1):
            return []
        before = len(self.scheduler.history)
        self.scheduler.step()
        record: Record = {"rates": of_rates(self.optimizer)}
        record["get_last_lr"] = exact([float(lr) for lr in self.scheduler.get_last_lr()])
        if len(self.scheduler.history) > before:
            record |= of_fields(self.scheduler.history[-1])
            record["num_drops"] = self.scheduler.num_drops
        records = [record]
        if self.t % 11 == 0:
            records.append({"state": of_state(self.state())})
        return records

    def _resume(self, i: int) -> list[Record]:
        ours = through_bytes(self.scheduler.state_dict())
        theirs = copy.deepcopy(self.optimizer.state_dict())
        self.scheduler.close()
        self._start()
        self.optimizer.load_state_dict(theirs)
        self.scheduler.load_state_dict(ours)
        return [{"resumed": of_state(ours)}]

    def _add(self, i: int) -> list[Record]:
        self.parameters.append(self._make(len(self.parameters), "matrix"))
        group: dict[str, Any] = {"params": [self.parameters[-1]], "lr": self._lr(1)}
        self.optimizer.add_param_group(group)
        self.groups.append({"params": [self.parameters[-1]]})
        return []

    def _skip(self, i: int) -> list[Record]:
        self.scheduler.step()  # without an optimizer step in between
        return []

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.scheduler.state_dict()
        return state

    def checkpoint(self) -> dict[str, Any]:
        return {**super().checkpoint(), "optimizer": self.optimizer.state_dict()}

    def load(self, saved: Mapping[str, Any]) -> None:
        super().load(saved)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["state"])


def make(spec: Mapping[str, Any]) -> Run:
    """The run of a description."""
    return SchedulerRun(spec) if "scheduler" in spec else MeterRun(spec)


def continued(saved: Mapping[str, Any], state: Any = None) -> Run:
    """A run that goes on from a checkpoint, in new objects.

    Args:
        state: in place of the meter's or scheduler's state in the checkpoint.
    """
    run = make(saved["spec"])
    run.load(saved if state is None else {**saved, "state": state})
    return run


# ---- descriptions -------------------------------------------------------------------------------

ALL = [kind for kind in KINDS if "chunks" not in kind]
NO_HALF = [kind for kind in ALL if kind not in ("bfloat16", "float16")]


def _tensors(choose: random.Random, kinds: list[str], most: int = 5) -> list[str]:
    # One that always moves, so that there is an angle.
    return ["vector", *(choose.choice(kinds) for _ in range(choose.randint(0, most)))]


def _events(choose: random.Random, steps: int, names: list[str]) -> list[list[Any]]:
    events = []
    for _ in range(choose.choice([0, 0, 1, 2, 3])):
        name = choose.choice(names)
        i = choose.randint(1, 5)
        at = choose.randint(2, steps - 2)
        events.append([at, name, i])
        if name == "freeze":
            events.append([choose.randint(at + 1, steps - 1), "thaw", i])
    return events


def meters(count: int, *, sampled: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Descriptions of meters, with names that say what is unusual."""
    for n in range(count):
        choose = random.Random(f"meter {n} {sampled}")
        window = 64 if n % 16 == 0 else choose.randint(1, 9)
        backend = "reference" if n % 3 == 0 else "cpu"
        form = ("auto", "sum", "delta")[n % 3 if n % 2 else choose.randint(0, 2)]
        settings: dict[str, Any] = {"window": window, "form": form, "backend": backend}
        settings["per_tensor"] = choose.random() < 0.25
        settings["per_group"] = choose.random() < 0.25
        steps = max(6 * window, 24) if window < 64 else 5 * window
        spec: dict[str, Any] = {
            "seed": n,
            "tensors": _tensors(choose, ALL),
            "groups": choose.randint(1, 2),
            "tied": choose.random() < 0.2,
            "scale": choose.choice([1e-2, 1e-2, 1e-4, 1e-6]),
            "scatter": choose.choice([0.5, 2.0, 8.0]),
            "steps": steps,
            "settings": settings,
        }
        events = ["resume", "resume", "freeze", "swap", "nan", "add", "close"]
        if sampled:
            settings["sample"], settings["seed"] = 0.25, n
            spec["tensors"] += ["seven chunks", "five chunks"]
            spec["steps"] = 14 * window if window < 64 else 10 * window
            events = ["resume", "nan"]
        spec["events"] = _events(choose, spec["steps"], events)
        what = " ".join(sorted({event[1] for event in spec["events"]})) or "plain"
        start = "sampled meter" if sampled else "meter"
        yield f"{start} {n}: window {window} {form} {backend} {what}", spec


def autodrops(count: int, *, sampled: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Descriptions of runs with AutoDrop."""
    for n in range(count):
        choose = random.Random(f"autodrop {n} {sampled}")
        window = choose.randint(1, 4)
        groups = choose.randint(1, 3)
        settings: dict[str, Any] = {
            "window": window,
            "factor": choose.choice([0.5, 0.9]),
            "threshold": choose.choice([0.1, 1.0, 5.0]),
            "buffer_size": choose.randint(2, 4),
            "min_samples": choose.randint(1, 4),
            "kernel": choose.choice(["value", "time"]),
            "min_lr": choose.choice([0.0, 0.0, 0.02, [0.03] * groups]),
            "warmup_steps": choose.choice([0, 0, 3, 7]),
            "per_group": choose.random() < 0.4,
            "per_tensor": choose.random() < 0.2,
            "backend": "reference" if n % 4 == 0 else "cpu",
        }
        adam = choose.random() < 0.4
        kinds = [k for k in NO_HALF if k != "every second"] if adam else ALL
        spec: dict[str, Any] = {
            "scheduler": "AutoDrop",
            "seed": 1000 + n,
            "tensors": _tensors(choose, kinds) + ["matrix"] * groups,
            "groups": groups,
            "optimizer": "AdamW" if adam else "SGD",
            "options": {} if adam else {"momentum": choose.choice([0.0, 0.9])},
            "tensor_lr": choose.random() < 0.3,
            "scatter": choose.choice([0.5, 2.0, 8.0]),
            "steps": 24 * window,
            "settings": settings,
        }
        events = ["resume", "resume", "freeze", "swap", "nan", "add", "skip"]
        if settings["min_lr"] not in (0.0, 0.02):
            events.remove("add")
        if sampled:
            settings["sample"] = 0.25
            spec["tensors"] += ["seven chunks"]
            spec["steps"] += 8 * window
            events = ["resume", "nan", "skip"]
        spec["events"] = _events(choose, spec["steps"], events)
        if any(event[1] == "add" for event in spec["events"]):
            # A resumed optimizer must have been made with as many groups.
            spec["events"] = [event for event in spec["events"] if event[1] != "resume"]
        what = " ".join(sorted({event[1] for event in spec["events"]})) or "plain"
        start = "sampled AutoDrop" if sampled else "AutoDrop"
        yield f"{start} {n}: window {window} {spec['optimizer']} {what}", spec


def epochs(count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Descriptions of runs with EpochAutoDrop."""
    for n in range(count):
        choose = random.Random(f"epochs {n}")
        every = choose.choice([1, 2, 3, 5])
        delay = choose.choice([0, 1, 2, 4])
        spec: dict[str, Any] = {
            "scheduler": "EpochAutoDrop",
            "seed": 2000 + n,
            "tensors": _tensors(choose, ALL, 3),
            "groups": choose.randint(1, 2),
            "optimizer": "SGD",
            "options": {"momentum": choose.choice([0.0, 0.9])},
            "tensor_lr": choose.random() < 0.3,
            "every": every,
            "scatter": choose.choice([0.5, 2.0]),
            "steps": 18 * every,
            "settings": {
                "factor": choose.choice([0.2, 0.5]),
                "threshold": choose.choice([2.0, 20.0]),
                "max_threshold": 40.0,
                "delay": delay,
                "average": choose.random() < 0.75,
                "min_lr": choose.choice([0.0, 0.001]),
                "backend": "reference" if n % 4 == 0 else "cpu",
            },
        }
        spec["events"] = _events(choose, spec["steps"], ["resume", "resume", "nan", "freeze"])
        what = " ".join(sorted({event[1] for event in spec["events"]})) or "plain"
        yield f"EpochAutoDrop {n}: {every} steps, delay {delay} {what}", spec


def analytic(count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Descriptions of runs with AnalyticAutoDrop."""
    for n in range(count):
        choose = random.Random(f"analytic {n}")
        spec: dict[str, Any] = {
            "scheduler": "AnalyticAutoDrop",
            "seed": 3000 + n,
            "tensors": ["vector"] * 2,
            "groups": choose.randint(1, 2),
            "optimizer": "SGD",
            "tensor_lr": choose.random() < 0.3,
            "steps": 80,
            "settings": {
                "gamma": choose.choice([1.0, 4.0]),
                "epsilon": 0.1,
                "tau0": choose.choice([0.05, 0.5]),
                "rates": choose.choice(["theorem", "proof", [1.0, 0.5, 0.1]]),
                "warmup_steps": choose.choice([0, 5]),
            },
        }
        spec["events"] = _events(choose, spec["steps"], ["resume", "skip"])
        yield f"AnalyticAutoDrop {n}", spec


def everything() -> Iterator[tuple[str, dict[str, Any]]]:
    """All descriptions for one process."""
    yield from meters(180, sampled=False)
    yield from autodrops(120, sampled=False)
    yield from epochs(60)
    yield from analytic(12)
    yield from meters(30, sampled=True)
    yield from autodrops(20, sampled=True)


# ---- ranks --------------------------------------------------------------------------------------

RANK_SETTINGS: dict[str, Any] = {
    "window": 3,
    "factor": 0.5,
    "threshold": 0.5,
    "buffer_size": 3,
    "min_samples": 2,
}
RANK_RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "ddp per_tensor": ("ddp", {"per_tensor": True}),
    "ddp per_group warm-up": ("ddp", {"per_group": True, "warmup_steps": 4}),
    "sampled ddp": ("ddp", {"sample": 0.25}),
    "fsdp2": ("fsdp2", {}),
    "fsdp2 per_tensor": ("fsdp2", {"per_tensor": True}),
    "fsdp2 per_group": ("fsdp2", {"per_group": True}),
    "sampled fsdp2": ("fsdp2", {"sample": 0.25}),
    "fsdp2 resumed": ("fsdp2 resumed", {}),
}


class Small(nn.Module):
    """Parameters of odd sizes, with a loss whose gradients are given."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        shapes = {"a": (7, 5), "b": (13,), "c": (1100,), "d": (3, 2, 2)}
        for i, (name, shape) in enumerate(shapes.items()):
            values = torch.randn(shape, generator=_generator(seed, i))
            setattr(self, name, nn.Parameter(values))

    def forward(self, t: int) -> Tensor:
        terms = []
        for i, p in enumerate(self.parameters()):
            gradient = _direction(torch.empty(p.shape), 7, t, i, 4.0)
            if hasattr(p, "to_local"):
                from torch.distributed.tensor import distribute_tensor

                gradient = distribute_tensor(gradient, p.device_mesh, p.placements)
                terms.append((gradient * p).sum().full_tensor())
            else:
                terms.append((gradient * p).sum())
        return torch.stack(terms).sum()


class RankRun:
    """One run of a model on all ranks."""

    def __init__(self, kind: str, settings: Mapping[str, Any], folder: str) -> None:
        self._settings = {**RANK_SETTINGS, **settings}
        self._kind = kind
        self._folder = folder
        self._start()

    def _start(self) -> None:
        self.model: Any = Small(5)
        if self._kind == "ddp":
            self.model = nn.parallel.DistributedDataParallel(self.model)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        first, *others = self.model.parameters()
        groups = [{"params": [first]}, {"params": others}]
        self.optimizer = torch.optim.SGD(groups, lr=2.0**-5)
        self.scheduler = AutoDrop(self.optimizer, **self._settings)

    def run(self) -> list[Record]:
        records: list[Record] = []
        for t in range(1, 61):
            self.model(t).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            before = len(self.scheduler.history)
            self.scheduler.step()
            record: Record = {"at": f"step {t}", "rates": of_rates(self.optimizer)}
            if len(self.scheduler.history) > before:
                record |= of_fields(self.scheduler.history[-1])
            records.append(record)
            if t % 10 == 0:
                arenas = self.scheduler.arena_state.state_dict()
                states = {"state": of_state(self.scheduler.state_dict())}
                records.append({"at": f"step {t}", **states, "arenas": of_state(arenas)})
            if t == 32 and self._kind == "fsdp2 resumed":
                self._resume()
        records.append({"at": "end", "parameters": [digest(p) for p in self.model.parameters()]})
        return records

    def _resume(self) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        dcp.save(self._saved(get_model_state_dict(self.model)), checkpoint_id=self._folder)
        rates = self.optimizer.state_dict()
        self.scheduler.close()
        self._start()
        state = self._saved(get_model_state_dict(self.model))
        dcp.load(state, checkpoint_id=self._folder)
        self.optimizer.load_state_dict(rates)

    def _saved(self, model: Any) -> dict[str, Any]:
        arenas = self.scheduler.arena_state
        return {"model": model, "scheduler": self.scheduler, "arenas": arenas}


def _on_rank(results: Any, rank: int, world: int, folder: str, only: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    init = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    runs = {}
    for i, (name, (kind, settings)) in enumerate(RANK_RUNS.items()):
        full = f"{world} ranks, {name}"
        if only in full:
            runs[f"{full}, rank {rank}"] = RankRun(kind, settings, f"{folder}/saved{i}").run()
    results.put(runs)
    results.close()
    results.join_thread()
    dist.barrier()
    os._exit(0)  # destroy_process_group waits for ranks that are gone already


def on_ranks(world: int, only: str = "") -> dict[str, list[Record]]:
    """The runs on several ranks, each rank's records under a name with its number."""
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    runs: dict[str, list[Record]] = {}
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            spawn.Process(target=_on_rank, args=(results, rank, world, folder, only))
            for rank in range(world)
        ]
        for worker in workers:
            worker.start()
        for _ in workers:
            runs |= results.get(timeout=600)
        for worker in workers:
            worker.join()
    return runs


# ---- comparing ----------------------------------------------------------------------------------


def first_difference(
    ours: list[Record], theirs: list[Record], ignore: list[str], new: collections.Counter[str]
) -> str | None:
    """Where two runs part, or None.

    Args:
        ignore: patterns of the last part of an entry's name that is left out.
        new: counts entries that only ``theirs`` has.
    """
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        where = f"record {i} ({a.get('at')})"
        found = _differs(a, b, "", ignore, new)
        if found is not None:
            return f"{where}: {found}"
    if len(ours) != len(theirs):
        return f"{len(ours)} records against {len(theirs)}"
    return None


def _differs(
    a: Any, b: Any, path: str, ignore: list[str], new: collections.Counter[str]
) -> str | None:
    if isinstance(a, dict) and isinstance(b, dict):
        new.update(f"{path}.{key}".lstrip(".") for key in b if key not in a)
        for key, value in a.items():
            if any(fnmatch.fnmatch(key.rsplit(".", 1)[-1], pattern) for pattern in ignore):
                continue
            if key not in b:
                return f"{path}.{key} has gone".lstrip(".")
            found = _differs(value, b[key], f"{path}.{key}", ignore, new)
            if found is not None:
                return found
        return None
    return None if a == b else f"{path.lstrip('.')}: {_shown(a)} against {_shown(b)}"


def _shown(value: Any) -> str:
    if isinstance(value, str) and value.lstrip("-").startswith("0x"):
        return repr(float.fromhex(value))
    text = json.dumps(value)
    return text if len(text) < 200 else text[:200] + "..."


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any], options: Any) -> bool:
    """Print what differs; whether nothing does."""
    new: collections.Counter[str] = collections.Counter()
    differences: dict[str, str] = {}
    names = [n for n in ours["runs"] if not (options.without_sampled and "sampled" in n)]
    for name in names:
        other = theirs["runs"].get(name)
        found = "is missing"
        if other is not None:
            found = first_difference(ours["runs"][name], other, options.ignore, new) or ""
        if found:
            differences[name] = found
    for name, found in differences.items():
        print(f"DIFFERENT  {name}: {found}")
    for name, count in sorted(new.items()):
        print(f"new entry  {name} ({count} times)")
    records = sum(len(ours["runs"][name]) for name in names)
    print(f"{len(names) - len(differences)} of {len(names)} runs are equal ({records} records)")
    return not differences


# ---- recorded checkpoints -----------------------------------------------------------------------

CHECKPOINTS: dict[str, tuple[dict[str, Any], int]] = {
    "meter": (
        {
            "seed": 1,
            "tensors": ["vector", "matrix", "bfloat16", "float64", "complex64", "channels_last"],
            "scale": 1e-2,
            "steps": 40,
            "settings": {"window": 5, "backend": "cpu"},
        },
        23,
    ),
    "meter-sum": (
        {
            "seed": 2,
            "tensors": ["vector", "every second"],
            "scale": 1e-2,
            "steps": 40,
            "settings": {"window": 4, "form": "sum", "backend": "cpu", "per_tensor": True},
        },
        18,
    ),
    "autodrop": (
        {
            "scheduler": "AutoDrop",
            "seed": 3,
            "tensors": ["vector", "matrix", "scalar", "empty"],
            "optimizer": "SGD",
            "options": {"momentum": 0.9},
            "scatter": 8.0,
            "steps": 90,
            "settings": {"window": 3, "factor": 0.5, "buffer_size": 3, "min_samples": 3},
        },
        44,
    ),
    "per-group": (
        {
            "scheduler": "AutoDrop",
            "seed": 4,
            "tensors": ["vector", "matrix", "vector"],
            "groups": 2,
            "optimizer": "AdamW",
            "scatter": 8.0,
            "steps": 90,
            "tensor_lr": True,
            "settings": {
                "window": 2,
                "factor": 0.5,
                "buffer_size": 3,
                "min_samples": 2,
                "per_group": True,
                "warmup_steps": 5,
            },
        },
        44,
    ),
    "epoch": (
        {
            "scheduler": "EpochAutoDrop",
            "seed": 5,
            "tensors": ["vector", "matrix", "float64"],
            "optimizer": "SGD",
            "options": {"momentum": 0.9},
            "every": 4,
            "scatter": 1.0,
            "steps": 100,
            "settings": {
                "factor": 0.5,
                "threshold": 30.0,
                "max_threshold": 60.0,
                "delay": 4,
            },
        },
        22,  # in the middle of an epoch and of a delay
    ),
    "analytic": (
        {
            "scheduler": "AnalyticAutoDrop",
            "seed": 6,
            "tensors": ["vector"],
            "optimizer": "SGD",
            "steps": 120,
            "settings": {"gamma": 4.0, "epsilon": 0.1, "tau0": 0.05, "warmup_steps": 3},
        },
        50,
    ),
    "sampled": (
        {
            "seed": 7,
            "tensors": ["five chunks"],
            "scale": 1e-2,
            "steps": 70,
            "settings": {"window": 3, "sample": 0.25, "seed": 3, "backend": "cpu"},
        },
        40,
    ),
}
"""Descriptions of the recorded checkpoints, and the step after which each is taken."""


def write_checkpoints(folder: pathlib.Path) -> None:
    """A file for each checkpoint, and one with the records that followed it."""
    folder.mkdir(parents=True, exist_ok=True)
    expected: dict[str, Any] = {}
    for name, (spec, at) in CHECKPOINTS.items():
        run = make(spec)
        run.run(until=at)
        content = io.BytesIO()
        torch.save(run.checkpoint(), content)
        (folder / f"{name}.pt.gz").write_bytes(gzip.compress(content.getvalue(), mtime=0))
        expected[name] = brief(run.run())
    lines = [f"{json.dumps(name)}: {json.dumps(records)}" for name, records in expected.items()]
    (folder / "expected.json").write_text("{" + ",\n".join(lines) + "}\n")


def read_checkpoint(path: pathlib.Path) -> dict[str, Any]:
    """One of the files of :func:`write_checkpoints`."""
    saved: dict[str, Any] = torch.load(io.BytesIO(gzip.decompress(path.read_bytes())))
    return saved


def brief(records: list[Record]) -> list[Record]:
    """What decides whether a run went on as before: angles, rates, drops, parameters."""
    kept = ("at", "rates", "angle", "norm", "rounding_error", "waited", "parameters", "error")
    short = [{k: v for k, v in record.items() if k in kept} for record in records]
    changed, rates = [], None
    for record in short:
        new = record.get("rates") not in (None, rates)
        rates = record.get("rates", rates)
        if new or len(record) > 1 + ("rates" in record):
            changed.append(record)
    return changed


# ---- commands -----------------------------------------------------------------------------------


def record(only: str, ranks: bool) -> dict[str, list[Record]]:
    """All runs whose name contains ``only``."""
    runs = {name: make(spec).run() for name, spec in everything() if only in name}
    if ranks:
        for world in (1, 2):
            runs |= on_ranks(world, only)
    return runs


def main() -> None:
    """Record, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("out", type=pathlib.Path)
    recording.add_argument("--only", default="", metavar="SUBSTRING")
    recording.add_argument("--no-ranks", action="store_true")
    comparing = commands.add_parser("compare")
    comparing.add_argument("a", type=pathlib.Path)
    comparing.add_argument("b", type=pathlib.Path)
    comparing.add_argument("--ignore", action="append", default=[], metavar="NAME")
    comparing.add_argument("--without-sampled", action="store_true")
    writing = commands.add_parser("checkpoints")
    writing.add_argument("folder", type=pathlib.Path)
    options = parser.parse_args()
    if options.command == "compare":
        ours, theirs = (json.loads(path.read_text()) for path in (options.a, options.b))
        print(f"{ours['package']} against {theirs['package']}")
        sys.exit(0 if compare(ours, theirs, options) else 1)
    print(f"autodrop_ext from {autodrop_ext.__file__}, torch {torch.__version__}")
    warnings.simplefilter("ignore")
    if options.command == "checkpoints":
        write_checkpoints(options.folder)
        return
    runs = record(options.only, not options.no_ranks)
    meta = {"package": autodrop_ext.__file__, "torch": torch.__version__}
    options.out.write_text(json.dumps({**meta, "runs": runs}))
    readings = sum(1 for records in runs.values() for r in records if "angle" in r)
    print(f"{len(runs)} runs, {readings} readings, {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
