"""Recorded checkpoints: small states in files, and the runs that continue from them.

    python tools/replay.py FOLDER

writes the files of ``tests/data/checkpoints``, with the readings, rates and parameters that
followed each checkpoint, for a test that loads them into later versions.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autodrop_ext import AnalyticAutoDrop, AngularVelocity, AutoDrop, EpochAutoDrop

Record = dict[str, Any]

KINDS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "vector": lambda g: torch.randn(37, generator=g),
    "matrix": lambda g: torch.randn(9, 13, generator=g),
    "five chunks": lambda g: torch.randn(5 * 1024, generator=g).to(torch.bfloat16),
    "bfloat16": lambda g: torch.randn(3, 41, generator=g).to(torch.bfloat16),
    "float64": lambda g: torch.randn(5, 11, generator=g).to(torch.float64),
    "complex64": lambda g: torch.randn(7, 5, generator=g, dtype=torch.complex64),
    "channels_last": lambda g: torch.randn(2, 3, 4, 5, generator=g).to(
        memory_format=torch.channels_last
    ),
    "every second": lambda g: torch.randn(6, 10, generator=g)[:, ::2],
    "empty": lambda g: torch.empty(0, 3),
    "scalar": lambda g: torch.randn((), generator=g),
}


def _generator(*numbers: int) -> torch.Generator:
    seed = hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(seed, "big"))


def _noise(like: Tensor, *numbers: int) -> Tensor:
    """Return normal values of a tensor's shape and dtype, the same ones for the same numbers."""
    shape = torch.view_as_real(like.detach()).shape if like.is_complex() else like.shape
    values = torch.randn(shape, generator=_generator(*numbers), dtype=torch.float64)
    if like.is_complex():
        values = torch.view_as_complex(values)
    return values.to(like.dtype)


def _direction(like: Tensor, seed: int, t: int, i: int, scatter: float) -> Tensor:
    """Return a direction that stays and noise that grows, so that angles rise."""
    return _noise(like, seed, i) + scatter * _noise(like, seed, i, t)


def exact(value: Any) -> Any:
    """Return a value for JSON from which nothing is lost: floats in hexadecimal."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, (list, tuple)):
        return [exact(item) for item in value]
    return value


def digest(tensor: Tensor) -> str:
    """Return a hash of a tensor's dtype, shape and bytes."""
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    # A new tensor: one of a single element may come with strides of 0, which view() refuses.
    dense = torch.empty(real.shape, dtype=real.dtype).copy_(real).flatten()
    header = f"{real.dtype} {tuple(real.shape)} ".encode()
    content = dense.view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(header + content, digest_size=12).hexdigest()


def of_fields(reading: Any) -> Record:
    """Return the fields of a reading or decision that the record has."""
    names = {f.name for f in dataclasses.fields(reading)} & set(KEPT)
    return {name: exact(getattr(reading, name)) for name in names}


class Run:
    """One run, described by a dict of plain values, taken one step at a time.

    Entries of the description: ``seed``, ``tensors`` (kinds), ``groups`` (how many the tensors are
    dealt to), ``steps``, ``scatter``, ``settings`` of the meter or scheduler, and what subclasses
    name.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.spec = spec
        self.seed: int = spec["seed"]
        self.t = 0
        self.scatter: float = spec.get("scatter", 1.0)
        self.parameters = [
            nn.Parameter(KINDS[kind](_generator(self.seed, i, 0)))
            for i, kind in enumerate(spec["tensors"])
        ]
        count = spec.get("groups", 1)
        self.groups = [{"params": self.parameters[g::count]} for g in range(count)]

    def run(self, until: int | None = None) -> list[Record]:
        """Return the records of all steps up to one, and then the parameters."""
        records: list[Record] = []
        while self.t < (until or self.spec["steps"]):
            self.t += 1
            self._move()
            records += [{"at": f"step {self.t}", **record} for record in self._measure()]
        records.append({"at": "end", "parameters": [digest(p) for p in self.parameters]})
        return records

    def checkpoint(self) -> dict[str, Any]:
        """Return everything from which :func:`continued` goes on, as plain values and tensors."""
        values = [p.detach().clone(memory_format=torch.contiguous_format) for p in self.parameters]
        return {
            "spec": dict(self.spec),
            "at": self.t,
            "parameters": values,
            "state": self.state(),
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
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


class MeterRun(Run):
    """An :class:`AngularVelocity` over tensors that are moved by hand."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__(spec)
        self.meter = AngularVelocity(lambda: self.groups, **self.spec["settings"])

    def _move(self) -> None:
        with torch.no_grad():
            for i, p in enumerate(self.parameters):
                p.add_(_direction(p, self.seed, self.t, i, self.scatter), alpha=self.spec["scale"])

    def _measure(self) -> list[Record]:
        reading = self.meter.observe()
        return [] if reading is None else [of_fields(reading)]

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
        rates = [exact(float(group["lr"])) for group in self.optimizer.param_groups]
        decisions = self.scheduler.history[before:]
        return [{"rates": rates} | (of_fields(decisions[-1]) if decisions else {})]

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
    """Return the run of a description."""
    return SchedulerRun(spec) if "scheduler" in spec else MeterRun(spec)


def continued(saved: Mapping[str, Any]) -> Run:
    """Return a run that goes on from a checkpoint, in new objects."""
    run = make(saved["spec"])
    run.load(saved)
    return run


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
    """Write a file for each checkpoint, and one with the records that followed it."""
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
    """Return one of the files of :func:`write_checkpoints`."""
    saved: dict[str, Any] = torch.load(io.BytesIO(gzip.decompress(path.read_bytes())))
    return saved


KEPT = ("at", "rates", "angle", "norm", "rounding_error", "waited", "parameters")


def brief(records: list[Record]) -> list[Record]:
    """Return the records without steps at which there was no reading and no new rate."""
    changed, rates = [], None
    for record in records:
        new = record.get("rates") not in (None, rates)
        rates = record.get("rates", rates)
        if new or len(record) > 1 + ("rates" in record):
            changed.append(record)
    return changed


if __name__ == "__main__":
    write_checkpoints(pathlib.Path(sys.argv[1]))
