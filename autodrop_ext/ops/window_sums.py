"""The sums of a window over all devices of this rank, every element read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from . import select
from .device_sums import ROLES, DeviceSums, NamedArenas
from .interface import Form, Sums
from .memory import Named
from .plan import FloatArray, Plan, Ranges

COVARIANCES = 6
"""Entries of a symmetric matrix over dot, norm and previous norm: DD, DA, DB, AA, AB, BB."""

WANDERING = 4
"""Numbers that say whether estimated covariances can be trusted; see ``angle.movers``."""


class Watched(NamedTuple):
    """A tensor whose sums are taken.

    Attributes:
        name: for messages and checkpoints.
        tensor: its elements on this rank.
        weight: weight of its sums in the total.
        label: what tells it apart from other tensors and from other parts of the same one.
        elements: about how many elements of it each rank has; None where ranks could come to
            different numbers.
    """

    name: str
    tensor: Tensor
    weight: float
    label: str
    elements: float | None


class Extra(Protocol):
    """Numbers of a window next to its totals, which ranks add up in the same collective."""

    size: int
    """How many numbers there are; the same on all ranks."""

    def local(self, sums: WindowSums) -> list[float]:
        """This rank's numbers after a close, weighted like the totals."""

    def fields(self, totals: Sums, numbers: Sequence[float]) -> dict[str, Any]:
        """Fields of a reading from the numbers of all ranks."""

    def unknown(self) -> dict[str, Any]:
        """Fields of a reading where the numbers are not known."""


def fields_of(
    extras: Sequence[Extra], totals: Sums | None, numbers: Sequence[float] | None
) -> dict[str, Any]:
    """Fields of a reading.

    Args:
        extras: what is added to the totals.
        totals: totals over all ranks; None where there is no angle.
        numbers: numbers of all extras, one after the other, over all ranks; None where they are not
            known.
    """
    fields: dict[str, Any] = {}
    begin = 0
    for extra in extras:
        if totals is None or numbers is None:
            fields |= extra.unknown()
        else:
            fields |= extra.fields(totals, numbers[begin : begin + extra.size])
            begin += extra.size
    return fields


class WindowSums:
    """Sums of one window after the other.

    Args:
        tensors: what is read; identical views count once.
        backend: "auto" or a name.
        drawn: :meth:`state` of saved sums that will be loaded, or None.

    Raises:
        TypeError: a parameter is on the device "meta".
        ValueError: two tensors overlap in memory without being the same.
        RuntimeError: no memory for the arenas; the named backend does not serve a device.

    Attributes:
        devices: the sums on each device.
        kept: for each device, indices of the ``tensors`` that are summed.
        begun: whether the sums hold anything.
    """

    def __init__(
        self, tensors: Sequence[Watched], backend: str, drawn: Mapping[str, Any] | None = None
    ) -> None:
        self.devices: list[DeviceSums] = []
        self.kept: list[list[int]] = []
        self.begun = False
        self._backend = backend
        for device, members in by_device(tensors).items():
            made = self._make_device(device, [tensors[i] for i in members])
            self.devices.append(made)
            self.kept.append([members[segment.index] for segment in made.plan.segments])

    def _make_device(
        self, device: torch.device, members: Sequence[Watched], ranges: Ranges | None = None
    ) -> DeviceSums:
        named: list[Named] = [(member.name, member.tensor) for member in members]
        weights = [member.weight for member in members]
        plan = Plan(named, device, weights, ranges=ranges)
        return DeviceSums(plan, select(self._backend, device))

    # ---- what is read -----------------------------------------------------------------------

    @property
    def fraction(self) -> float:
        """Part of the elements that is read."""
        return 1.0

    @property
    def device_bytes(self) -> int:
        """Bytes of the arenas on all devices together."""
        return sum(device.device_bytes for device in self.devices)

    @property
    def digests(self) -> list[str]:
        """For each device, what tells the elements that are read apart from others."""
        return []

    def extras(self) -> list[Extra]:
        """What this way to read adds to the totals."""
        return []

    def concentration(self) -> float:
        """Weighted sum over the tensors of ``|s|^4 / n`` at the last close, for ``n`` elements.

        ``|s|^4`` of all of them over this is as many elements as would carry the motion if each
        carried as much (Kish): rounding errors average out over these, and not over elements that
        stand still.
        """
        total = 0.0
        for device in self.devices:
            norm = device.per_tensor()[:, 1]
            total += float(device.plan.tensor_weights @ (norm**2 / self._counted(device)))
        return total

    def _counted(self, device: DeviceSums) -> FloatArray:
        """How many elements the sums of each tensor are worth, at least 1."""
        return device.plan.tensor_elements

    # ---- a window ---------------------------------------------------------------------------

    def begin_window(self) -> None:
        """A window begins with the next snapshot, or step that is not read."""

    def add(self, form: Form, *, first: bool) -> None:
        """Take a snapshot of the parameters.

        Args:
            form: form to begin in; it counts for the first snapshot of all.
            first: whether this is the first snapshot of its window.
        """
        for device in self.devices:
            if self.begun:
                device.add(first)
            else:
                device.begin(form)
        self.begun = True

    def close(self, k: int) -> Sums | None:
        """The weighted sums of a window of ``k`` snapshots; None where none were taken."""
        total = Sums(0.0, 0.0, 0.0, 0.0)
        for device in self.devices:
            total += device.close(k)
        return total

    def per_tensor(self) -> list[FloatArray]:
        """Unweighted :class:`Sums` of each device's tensors at the last close, ``[n, 4]``."""
        return [device.per_tensor() for device in self.devices]

    def tensor_table(self) -> list[FloatArray]:
        """For each device, weighted sums of each tensor at the last close, ``[n, 13]``.

        The columns are dot, norm and previous norm, their covariances, and four numbers that say
        whether these can be trusted: 0 where every element is read.
        """
        tables = []
        for device in self.devices:
            sums = device.per_tensor()[:, :3]
            table = np.concatenate([sums, self._error_columns(device)], axis=1)
            tables.append(table * device.plan.tensor_weights[:, None])
        return tables

    def _error_columns(self, device: DeviceSums) -> FloatArray:
        return np.zeros((len(device.plan.segments), COVARIANCES + WANDERING))

    # ---- between windows --------------------------------------------------------------------

    def reset(self) -> None:
        """Start over with the next snapshot."""
        self.begun = False

    def convert(self, form: Form, k: int) -> None:
        """Hold the sums in another form, right after a close."""
        for device in self.devices:
            (device.to_delta if form == "delta" else device.to_sum)(k)

    def rebase(self, k: int) -> None:
        """Measure the next displacement from the parameters as they are now, in delta form."""
        if not self.begun:
            self.add("delta", first=True)
        for device in self.devices:
            device.rebase(k)

    def merge(self, k: int, merged: int) -> None:
        """Let the last two windows become one; see :meth:`DeviceSums.merge`."""
        for device in self.devices:
            device.merge(k, merged)

    def write_mean(self, k: int, snapshots: int, weights: tuple[float, float, float]) -> None:
        """Set the parameters to a mean of windows; see :meth:`DeviceSums.write_mean`."""
        for device in self.devices:
            device.write_mean(k, snapshots, weights)

    # ---- checkpoints ------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the elements were drawn by, in plain values; see :data:`EVERYTHING`."""
        return dict(EVERYTHING)

    def views(self) -> dict[str, dict[str, Tensor]]:
        """The live arenas by parameter name and role."""
        return {name: a for device in self.devices for name, a in device.views().items()}

    def problem_of(self, drawn: Mapping[str, Any], arenas: NamedArenas) -> str | None:
        """Why :meth:`load` cannot take saved arenas, or None.

        Args:
            drawn: :meth:`state` of the sums that were saved.
            arenas: by parameter name and role.
        """
        if drawn["fraction"] != 1:
            return f"it has sample={drawn['fraction']:g}, and now everything is read"
        return self._misfit(arenas)

    def _misfit(self, arenas: NamedArenas) -> str | None:
        problems = (device.misfit(arenas) for device in self.devices)
        return next((p for p in problems if p is not None), None)

    def load(self, form: Form, arenas: NamedArenas) -> None:
        """Continue saved arenas, unless :meth:`problem_of` objects to them."""
        for device in self.devices:
            device.load(form, arenas)
        self.begun = True


EVERYTHING: dict[str, Any] = {
    "fraction": 1.0,
    "seed": 0,
    "drawn": [],
    "sized": False,
    "sizes": {},
}
"""State of sums that read everything. ``torch.distributed.checkpoint`` loads only into what has the
structure of what was saved, so sums of a part have the same entries."""


def by_device(tensors: Sequence[Watched]) -> dict[torch.device, list[int]]:
    """Indices of the tensors on each device.

    Raises:
        TypeError: a parameter is on the device "meta".
    """
    groups: dict[torch.device, list[int]] = {}
    for i, watched in enumerate(tensors):
        if watched.tensor.is_meta:
            raise TypeError(
                f"{watched.name}: expected a parameter with data, got one on device 'meta'"
            )
        groups.setdefault(watched.tensor.device, []).append(i)
    return groups


def on_cpu(views: NamedArenas) -> dict[str, dict[str, Tensor]]:
    """Clones of live arenas on the CPU, for a checkpoint."""
    return {
        name: {role: arenas[role].to("cpu", copy=True) for role in ROLES}
        for name, arenas in views.items()
    }
