"""The meter's state on one device: three float32 arenas and the form they are in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..sampling.error import FloatArray
from . import Backend, Sums, reference
from .plan import Plan

Form = Literal["sum", "delta"]
NamedArenas = Mapping[str, Mapping[str, Tensor]]

_CPU_ALLOCATOR = "DefaultCPUAllocator: "

_SLICE = 1 << 20  # elements converted at a time: 24 MiB of float64 temporaries


class Arenas:
    """Running sums of one plan, 12 bytes a parameter that is read.

    ==========  ============================  ==========================================
    role        sum form                      delta form
    ==========  ============================  ==========================================
    running     sum of this window            sum of ``x - mean``, and the mean's residual
    previous    sum of the last window        ``k s`` of the last window, residual in the low byte
    third       sum of the window before it   mean of the last window
    ==========  ============================  ==========================================

    Sum form moves 12 bytes per float32 parameter and step, delta form 16, but only delta form
    resolves steps that are tiny beside the parameters.

    Raises:
        RuntimeError: no memory for the arenas; the message says how many bytes were needed.
    """

    ROLES = ("running", "previous", "third")

    def __init__(self, plan: Plan, backend: Backend) -> None:
        self.plan = plan
        self.form: Form = "sum"
        self._operations = backend.bind(plan)
        self._used = False
        try:
            self.running, self.previous, self.third = (
                torch.zeros(plan.arena_elements, dtype=torch.float32, device=plan.device)
                for _ in self.ROLES
            )
        except RuntimeError as error:
            # The CPU's allocator has no error class for it; any other error is none of ours.
            if not isinstance(error, torch.OutOfMemoryError) and _CPU_ALLOCATOR not in str(error):
                raise
            needed = 12 * plan.arena_elements
            raise RuntimeError(
                f"no memory for the arenas: {needed:,} bytes were needed on {plan.device} (12 for "
                f"each of {plan.num_elements:,} parameters); track fewer parameters with params=, "
                "or read a part of each with sample=, such as sample=1/64"
            ) from error

    @property
    def rows(self) -> FloatArray:
        """float64 ``[num_rows, 4]``: :class:`Sums` of each row of the plan at the last close."""
        rows: FloatArray = self._operations.per_tensor.cpu().numpy()
        return rows

    @property
    def per_tensor(self) -> Tensor:
        """float64 ``[num_tensors, 4]``: :class:`Sums` of each tensor at the last close.

        Of a sampled tensor they are expanded to the whole of it.
        """
        choice = self.plan.choice
        if choice is None:
            return self._operations.per_tensor
        expanded = self.rows * choice.expansion[:, None]
        tensors = len(self.plan.segments)
        sums = [np.bincount(choice.tensor, column, tensors) for column in expanded.T]
        return torch.from_numpy(np.stack(sums, axis=1))

    def begin(self, form: Form) -> None:
        """Take the first iterate of the first window; whatever the arenas held is forgotten.

        In delta form the iterate itself stands in for the mean that there is not yet.
        """
        self.form = form
        if self._used:
            self.previous.zero_()
            self.third.zero_()
        self._used = True
        if form == "delta":
            self._operations.accumulate(self.third, None, first=True)
            self._operations.accumulate(self.running, self.third, first=True)
        else:
            self._operations.accumulate(self.running, None, first=True)

    def accumulate(self, first: bool) -> None:
        """Take one iterate. ``first``: it opens a window."""
        if self.form == "delta":
            # The residual of the mean already lies in the running sum: every step adds.
            self._operations.accumulate(self.running, self.third, first=False)
        else:
            self._operations.accumulate(self.running, None, first=first)

    def close(self, window: int) -> Sums:
        """The window's sums; its running sum becomes the previous one."""
        if self.form == "delta":
            sums = self._operations.close_delta(self.running, self.previous, self.third, window)
            self.running, self.previous = self.previous, self.running
        else:
            sums = self._operations.close_sum(self.running, self.previous, self.third, window)
            self.running, self.previous, self.third = self.third, self.running, self.previous
        return sums

    def rebase(self, window: int) -> None:
        """Measure the next displacement from the parameters as they are now, not from the mean.

        In delta form, right after a close. The last displacement stays, in the upper 24 bits of
        ``previous``.
        """
        self.plan.refresh()
        for elements, at in self.plan.rows():
            parts = [elements, *(getattr(self, role)[at] for role in self.ROLES)]
            slices = (torch.split(part, _SLICE) for part in parts)
            for x, running, previous, third in zip(*slices, strict=True):
                previous.copy_(reference.displacement(previous))
                exact = x.double()
                running.copy_(reference.round_mean(exact, out=third, packed=previous, k=window))

    def to_delta(self, window: int) -> None:
        """From sum to delta form, right after a close."""
        for running, previous, third in self._slices():
            exact = previous.double() / window
            previous.sub_(third)
            running.copy_(reference.round_mean(exact, out=third, packed=previous, k=window))
        self.form = "delta"

    def to_sum(self, window: int) -> None:
        """From delta to sum form, right after a close."""
        for _, previous, third in self._slices():
            newest = reference.exact_mean(third, previous) * window
            third.copy_(newest - reference.displacement(previous).double())
            previous.copy_(newest)
        self.form = "sum"

    def views(self) -> dict[str, dict[str, Tensor]]:
        """The live arenas by parameter name and role, in the parameters' shapes; sampled: flat."""
        return {
            segment.name: {role: segment.shaped(getattr(self, role)) for role in self.ROLES}
            for segment in self.plan.segments
        }

    def named(self) -> dict[str, dict[str, Tensor]]:
        """Clones of the :meth:`views` on the CPU."""
        return {
            name: {role: view.to("cpu", copy=True) for role, view in views.items()}
            for name, views in self.views().items()
        }

    def misfit(self, named: NamedArenas) -> str | None:
        """Why :meth:`load` cannot take these arenas, or None."""
        for segment in self.plan.segments:
            if segment.name not in named:
                return f"{segment.name} is not in it"
            shape, now = named[segment.name]["running"].shape, segment.shape
            if shape != now:
                return f"{segment.name} was {tuple(shape)}, now it is {tuple(now)}"
        return None

    def load(self, form: Form, named: NamedArenas) -> None:
        """Restore what :meth:`named` returned, unless :meth:`misfit` objects to it."""
        self.form = form
        self._used = True
        for segment in self.plan.segments:
            for role in self.ROLES:
                segment.shaped(getattr(self, role)).copy_(named[segment.name][role])

    def _slices(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        running, previous, third = (torch.split(getattr(self, role), _SLICE) for role in self.ROLES)
        return list(zip(running, previous, third, strict=True))
