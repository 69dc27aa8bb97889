"""The sums of windows on one device: three float32 arenas and the form that they are in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import reference
from .interface import Backend, Form, Sums
from .memory import needing
from .plan import FloatArray, Plan

NamedArenas = Mapping[str, Mapping[str, Tensor]]

ROLES = ("running", "previous", "third")
"""Names of the three arenas in checkpoints; the third holds ``before`` or ``mean``."""

_SLICE = 1 << 20  # elements converted at a time: 24 MiB of float64 temporaries


class DeviceSums:
    """Sums of one plan, 12 bytes for each parameter that is read.

    ============  ============================  ================================================
    arena         sum form                      delta form
    ============  ============================  ================================================
    ``running``   sum of this window            sum of ``x - mean``, and the mean's residual
    ``previous``  sum of the last window        ``k s`` of the last window, residual in low bytes
    ``before``    sum of the window before it   ``mean`` of the last window
    ============  ============================  ================================================

    Sum form moves 12 bytes per float32 parameter and step, delta form 16, but only delta form
    resolves steps that are tiny next to the parameters.

    ``k`` counts the snapshots of a window, in all methods.

    Raises:
        RuntimeError: no memory for the arenas; the message says how many bytes were needed.
    """

    def __init__(self, plan: Plan, backend: Backend) -> None:
        self.plan = plan
        self.form: Form = "delta"
        self._operations = backend.bind(plan)
        self._used = False
        advice = (
            f"the sums take 12 bytes for each of {plan.num_elements:,} parameters. Track fewer "
            "parameters with params=, or read a part of each with sample=, such as sample=1/64"
        )
        with needing(3 * plan.arena_elements, torch.float32, plan.device, advice):
            self.running, self.previous, self.before = (
                torch.zeros(plan.arena_elements, dtype=torch.float32, device=plan.device)
                for _ in ROLES
            )

    @property
    def mean(self) -> Tensor:
        """Mean of the last window, in delta form: the arena that sum form calls ``before``."""
        return self.before

    @property
    def device_bytes(self) -> int:
        """Bytes of the arenas."""
        return 12 * self.plan.arena_elements

    def rows(self) -> FloatArray:
        """:class:`Sums` of each row of the plan at the last close, float64 ``[num_rows, 4]``."""
        rows: FloatArray = self._operations.per_tensor.cpu().numpy()
        return rows

    def per_tensor(self) -> FloatArray:
        """:class:`Sums` of each tensor at the last close, float64 ``[num_segments, 4]``."""
        return self.plan.per_tensor(self.rows())

    def begin(self, form: Form) -> None:
        """Take the first snapshot of all; whatever the arenas held is forgotten.

        In delta form the snapshot itself stands in for the mean that there is not yet.
        """
        self.form = form
        if self._used:
            self.previous.zero_()
            self.before.zero_()
        self._used = True
        if form == "delta":
            self._operations.accumulate(self.mean, None, first=True)
            self._operations.accumulate(self.running, self.mean, first=True)
        else:
            self._operations.accumulate(self.running, None, first=True)

    def add(self, first: bool) -> None:
        """Take a snapshot. ``first``: it is the first of its window."""
        if self.form == "delta":
            # The residual of the mean is already in the running sum: every snapshot adds.
            self._operations.accumulate(self.running, self.mean, first=False)
        else:
            self._operations.accumulate(self.running, None, first=first)

    def close(self, k: int) -> Sums:
        """The window's sums; its running sum becomes the previous one."""
        if self.form == "delta":
            sums = self._operations.close_delta(self.running, self.previous, self.mean, k)
            self.running, self.previous = self.previous, self.running
        else:
            sums = self._operations.close_sum(self.running, self.previous, self.before, k)
            self.running, self.previous, self.before = self.before, self.running, self.previous
        return sums

    # ---- right after a close ----------------------------------------------------------------

    def rebase(self, k: int) -> None:
        """Measure the next displacement from the parameters as they are now, in delta form.

        The last displacement stays, in the upper 24 bits of ``previous``.
        """
        self.plan.refresh()
        for elements, at in self.plan.rows():
            parts = [elements, self.running[at], self.previous[at], self.mean[at]]
            slices = (torch.split(part, _SLICE) for part in parts)
            for x, running, previous, mean in zip(*slices, strict=True):
                previous.copy_(reference.displacement(previous))
                running.copy_(reference.round_mean(x.double(), out=mean, packed=previous, k=k))

    def to_delta(self, k: int) -> None:
        """Turn from sum to delta form."""
        for running, previous, third in self._slices():
            exact = previous.double() / k
            previous.sub_(third)
            running.copy_(reference.round_mean(exact, out=third, packed=previous, k=k))
        self.form = "delta"

    def to_sum(self, k: int) -> None:
        """Turn from delta to sum form."""
        for _, previous, third in self._slices():
            newest = reference.exact_mean(third, previous) * k
            third.copy_(newest - reference.displacement(previous).double())
            previous.copy_(newest)
        self.form = "sum"

    def merge(self, k: int, merged: int) -> None:
        """Let the last two windows become the last one of twice the length.

        Its mean is the mean of the two means, and there is no displacement yet.

        Args:
            k: snapshots of each of the two windows.
            merged: snapshots of the windows that follow, which the sum is scaled to.
        """
        for running, previous, third in self._slices():
            if self.form == "sum":
                previous.copy_((previous.double() + third.double()) * (merged / (2 * k)))
                third.zero_()
            else:
                half = reference.displacement(previous).double() / (2 * k)
                exact = reference.exact_mean(third, previous) - half
                previous.zero_()
                running.copy_(reference.round_mean(exact, out=third, packed=previous, k=merged))

    # ---- means ------------------------------------------------------------------------------

    def write_mean(self, k: int, snapshots: int, weights: tuple[float, float, float]) -> None:
        """Set the parameters to a weighted mean of window means, and leave the arenas alone.

        Args:
            k: snapshots of a whole window.
            snapshots: those of the open window so far.
            weights: weights of the window before the last one, of the last one and of the open
                one, which add up to 1; 0 where there is none.
        """
        for segment in self.plan.segments:
            flats = [segment.in_arena(a) for a in (self.running, self.previous, self.before)]
            slices = (torch.split(part, _SLICE) for part in (segment.flat, *flats))
            for x, running, previous, third in zip(*slices, strict=True):
                x.copy_(self._mean(running, previous, third, k, snapshots, weights))
        self.plan.publish()

    def _mean(
        self,
        running: Tensor,
        previous: Tensor,
        third: Tensor,
        k: int,
        snapshots: int,
        weights: tuple[float, float, float],
    ) -> Tensor:
        """The weighted mean of one slice, float64."""
        oldest, last, current = weights
        if self.form == "sum":
            mean = previous.double() * (last / k)
            if oldest:
                mean += third.double() * (oldest / k)
            if current:
                mean += running.double() * (current / snapshots)
            return mean
        exact = reference.exact_mean(third, previous)
        mean = exact.clone()
        if oldest:
            mean -= reference.displacement(previous).double() * (oldest / k)
        if current:
            # The running sum starts at k times the residual of the rounded mean.
            residual = (third.double() - exact) * k
            moved = (running.double() - residual) / snapshots + (third.double() - exact)
            mean += moved * current
        return mean

    # ---- checkpoints ------------------------------------------------------------------------

    def views(self) -> dict[str, dict[str, Tensor]]:
        """The live arenas by parameter name and role, in the parameters' shapes."""
        arenas = dict(zip(ROLES, (self.running, self.previous, self.before), strict=True))
        return {
            segment.name: {role: segment.shaped(arena) for role, arena in arenas.items()}
            for segment in self.plan.segments
        }

    def misfit(self, named: NamedArenas) -> str | None:
        """Why :meth:`load` cannot take these arenas, or None."""
        return next(
            (p for s in self.plan.segments if (p := misfit(s.name, s.shape, named)) is not None),
            None,
        )

    def load(self, form: Form, named: NamedArenas) -> None:
        """Restore :meth:`views`, unless :meth:`misfit` objects to them."""
        self.form = form
        self._used = True
        for name, views in self.views().items():
            for role, view in views.items():
                view.copy_(named[name][role])

    def _slices(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        arenas = (self.running, self.previous, self.before)
        running, previous, third = (torch.split(arena, _SLICE) for arena in arenas)
        return list(zip(running, previous, third, strict=True))


def misfit(name: str, shape: torch.Size, named: NamedArenas) -> str | None:
    """Why saved arenas do not fit a tensor of this name and shape, or None."""
    if name not in named:
        return f"{name} is not in it"
    for role in ROLES:
        saved = named[name].get(role)
        if saved is None:
            return f"{name} has no {role!r}"
        if saved.shape != shape:
            return f"{name} was {tuple(saved.shape)}, now it is {tuple(shape)}"
    return None
