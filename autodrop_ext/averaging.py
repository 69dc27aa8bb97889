"""Averages of parameters: over snapshots (2021, Algorithm 1), and for the time of a block."""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .messages import Warnings
from .ops import Operations, check_name, select
from .ops.device_sums import DeviceSums
from .ops.memory import Named, needing
from .ops.plan import Plan
from .parameters import ParameterSource
from .saved import Form, dict_of, exactly, load

_DOUBLES = (torch.float64, torch.complex128)
_SLICE = 1 << 24  # elements looked at for NaN at a time: 16 MiB of booleans


class ParameterAverage:
    """The mean ``sum_j w_j x_j / sum_j w_j`` of parameters ``x_j``, without a list of them.

    One float32 arena holds the mean of the snapshots so far, and a snapshot moves it by
    ``a += (w_j / sum_{i<=j} w_i) (x_j - a)``: one accumulate operation with the arena in both
    places. Against the weighted sum that Algorithm 1 prints (``z += k x``, divided at the end) this
    costs nothing more, keeps parameters that do not move to the bit (but for the sign of a zero),
    and cannot overflow where the mean does not. Float64 parameters are averaged in float64 by
    torch, 8 bytes a parameter: through float32 they would lose half their digits.

    The arena is taken at the first :meth:`add` and freed by :meth:`write_back`.

    Args:
        params: whose average is taken; forms as in :class:`AngularVelocity`.
        backend: "auto", or the name of one (``autodrop doctor`` lists them).

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.

    Attributes:
        snapshots: how many have been added since the last :meth:`write_back`.
    """

    def __init__(self, params: Any, backend: str = "auto") -> None:
        check_name(backend)
        self._source = ParameterSource(params)
        self._source.check()  # wrong arguments fail here, not at the first snapshot
        self._backend = backend
        self._warnings = Warnings("ParameterAverage")
        self._restore: Mapping[str, Tensor] | None = None
        self.reset()

    def warn_through(self, warnings: Warnings) -> None:
        """Give warnings to the object that uses this average; it decides when to release them."""
        self._warnings = warnings

    def reset(self) -> None:
        """Forget all snapshots and free the arena."""
        self.snapshots = 0
        self._total = 0.0
        self._parts: list[_Part] | None = None
        self._sharded = False
        self._restore = None

    @property
    def device_bytes(self) -> int:
        """Bytes of the arenas on all devices together; 0 between two averages."""
        return sum(part.arena.nbytes for part in self._parts or ())

    def add(self, weight: float = 1.0) -> None:
        """Take a snapshot of the parameters as they are now.

        Where they are not the tensors of the last snapshot, the average starts over with this one,
        and a warning says so once.

        Args:
            weight: ``w_j``, in proportion to those of the other snapshots.

        Raises:
            ValueError: the weight is not a positive number.
            RuntimeError: no memory for the arena.
        """
        if not 0 < weight < math.inf:
            raise ValueError(f"weight: expected a positive number, got {weight!r}")
        self._follow_parameters()
        if self._parts is None:
            self._build()
        self.snapshots += 1
        self._total += weight
        for part in self._parts or ():
            part.add(weight / self._total)

    def write_back(self) -> bool:
        """Set the parameters to their average, in place, and start over.

        Returns:
            Whether it was done. An average that is not finite is not written: the parameters stay
            as they are, and a warning names the first tensor. Without snapshots nothing happens.
        """
        self._follow_parameters()
        parts = self._parts
        self.reset()
        if parts is None:
            return False
        for part in parts:
            name = part.not_finite()
            if name is not None:
                self._warnings.once(
                    "mean nonfinite",
                    f"the average of {name} is not finite; the parameters stay as they are",
                )
                return False
        for part in parts:
            part.write_back()
        return True

    # ---- following the parameters -----------------------------------------------------------

    def _follow_parameters(self) -> None:
        """Continue a restored average; drop the average of tensors that are watched no longer."""
        if self._restore is not None:
            self._continue(self._restore)
        if self._parts is not None and not self._source.unchanged():
            self._warnings.once(
                "mean changed",
                "the averaged parameters were moved, replaced, added or frozen; the average starts "
                "over",
            )
            self.reset()

    def _build(self) -> None:
        groups: dict[tuple[torch.device, bool], list[Named]] = {}
        shards = self._source.shards()
        self._source.watch(shards)
        self._sharded = any(shard.split for shard in shards)
        for shard in shards:
            key = (shard.tensor.device, shard.tensor.dtype in _DOUBLES)
            groups.setdefault(key, []).append((shard.name, shard.tensor))
        parts = []
        for (device, doubles), named in groups.items():
            plan = Plan(named, device)
            operations = None if doubles else select(self._backend, device).bind(plan)
            parts.append(_Part(plan, operations))
        self._parts = parts

    def _continue(self, saved: Mapping[str, Tensor]) -> None:
        self._build()
        self._restore = None
        problems = [part.misfit(saved) for part in self._parts or ()]
        problem = next((p for p in problems if p is not None), None)
        if problem is None:
            for part in self._parts or ():
                part.load(saved)
        else:
            self._cannot_continue(problem)

    def _cannot_continue(self, problem: str) -> None:
        self._warnings.once(
            "mean restart", f"the saved average cannot be continued ({problem}); it starts over"
        )
        self.reset()

    # ---- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Number and total weight of the snapshots and their mean, by parameter name on the CPU.

        Plain values and tensors only, so that ``torch.load(weights_only=True)`` reads it. Of
        sharded parameters the mean is not part of it: the other ranks' parts would be missing.
        """
        return {
            "version": 1,
            "snapshots": self.snapshots,
            "total": self._total,
            "means": self._named_means(),
        }

    def _named_means(self) -> dict[str, Tensor]:
        if self._restore is not None:
            return dict(self._restore)
        if self._sharded:
            return {}
        return {name: mean for part in self._parts or () for name, mean in part.named().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, bit for bit.

        Where the means do not fit the parameters, the average starts over, and a warning says so.

        Raises:
            ValueError: not a state of this class; nothing has been changed then.
        """
        self.restore(self.checked("state_dict", state_dict))

    @staticmethod
    def checked(name: str, value: Any) -> dict[str, Any]:
        """Return a state for :meth:`restore`; raise ValueError if an entry is missing or wrong."""
        saved = load(value, _FORM, name)
        if saved["snapshots"] and not saved["total"]:
            raise ValueError(f"{name}['total']: expected a finite number above 0, got 0")
        return saved

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continue what :meth:`checked` has returned."""
        self.reset()
        if saved["snapshots"] == 0:
            return
        if not saved["means"]:
            self._cannot_continue("it was saved without the means")
            return
        self.snapshots = saved["snapshots"]
        self._total = saved["total"]
        # The tensors are looked for at the next call: they may yet be moved or loaded.
        self._restore = dict(saved["means"])

    def __getstate__(self) -> dict[str, Any]:
        # A copy finds its own tensors: the plan's addresses are those of the original.
        means = self._named_means() if self.snapshots else None
        return {**self.__dict__, "_parts": None, "_restore": means}


class _Part:
    """The running mean of one plan: all dtypes but float64 in float32, or all of it float64."""

    def __init__(self, plan: Plan, operations: Operations | None) -> None:
        self.plan = plan
        self._operations = operations
        dtype = torch.float64 if operations is None else torch.float32
        advice = (
            f"the average takes {dtype.itemsize} bytes for each of {plan.num_elements:,} "
            "parameters. EpochAutoDrop does not need it with average=False"
        )
        with needing(plan.arena_elements, dtype, plan.device, advice):
            self.arena = torch.zeros(plan.arena_elements, dtype=dtype, device=plan.device)

    def add(self, share: float) -> None:
        """Move the mean by ``share`` of its distance from the parameters; 1 sets it to them."""
        if self._operations is None:
            self.plan.refresh()
            for segment in self.plan.segments:
                segment.in_arena(self.arena).lerp_(segment.flat, share)
        elif share == 1.0:
            self._operations.accumulate(self.arena, None, first=True)
        else:
            self._operations.accumulate(self.arena, self.arena, first=False, weight=share)

    def write_back(self) -> None:
        if self._operations is None:
            for segment in self.plan.segments:
                segment.flat.copy_(segment.in_arena(self.arena))
            self.plan.publish()
        else:
            self._operations.write_back(self.arena, None, 1.0)
        for segment in self.plan.segments:
            # Kernels write past autograd, which tells by the version that saved tensors are stale.
            if not segment.alias.is_inference():
                torch.autograd.graph.increment_version(segment.alias)

    def not_finite(self) -> str | None:
        """Name of the first tensor whose mean holds NaN or infinity, or None."""
        if _all_finite(self.arena):
            return None
        bad = (s.name for s in self.plan.segments if not _all_finite(s.in_arena(self.arena)))
        return next(bad, None)

    def named(self) -> dict[str, Tensor]:
        """Clones on the CPU by parameter name, in the parameters' shapes."""
        return {s.name: s.shaped(self.arena).to("cpu", copy=True) for s in self.plan.segments}

    def misfit(self, named: Mapping[str, Tensor]) -> str | None:
        """Why :meth:`load` cannot take these means, or None."""
        for segment in self.plan.segments:
            if segment.name not in named:
                return f"{segment.name} is not in it"
            saved, now = named[segment.name], segment.alias
            if saved.shape != now.shape:
                return f"{segment.name} was {tuple(saved.shape)}, now it is {tuple(now.shape)}"
            if saved.dtype != self.arena.dtype:
                return f"{segment.name} was averaged in {saved.dtype}, not in {self.arena.dtype}"
        return None

    def load(self, named: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`named` returned, unless :meth:`misfit` objects to it."""
        for segment in self.plan.segments:
            segment.shaped(self.arena).copy_(named[segment.name])


def _all_finite(arena: Tensor) -> bool:
    pieces: Sequence[Tensor] = torch.split(arena, _SLICE)
    return all(bool(piece.isfinite().all()) for piece in pieces)


def _check_mean(name: str, value: Any) -> Tensor:
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    if not dense or not value.is_floating_point():
        raise ValueError(f"{name}: expected a dense floating-point tensor, got {value!r}")
    tensor: Tensor = value
    return tensor


_FORM: Form = {
    "version": exactly(1),
    "snapshots": checks.at_least(0),
    "total": checks.at_least_zero,
    "means": dict_of(_check_mean),
}


@contextlib.contextmanager
def own_bits_after(
    devices: Sequence[DeviceSums], found: Callable[[], Mapping[str, Tensor]]
) -> Iterator[None]:
    """Keep a copy of the parameters, and give them their bits back at the block's end.

    Args:
        devices: whose parameters.
        found: asked at the block's end; returns by name the memory of parameters that may have
            been moved within it, as complex ones are seen by ``view_as_real``.
    """
    segments = [segment for device in devices for segment in device.plan.segments]
    aliases = [segment.alias for segment in segments]
    copies = [alias.clone() for alias in aliases]
    try:
        yield
    finally:
        with torch.no_grad():
            # Python looks for signals between its own instructions, and here there are none.
            collections.deque(map(Tensor.copy_, aliases, copies), maxlen=0)
            now = found()
            for segment, copy in zip(segments, copies, strict=True):
                moved = now.get(segment.name)
                if moved is not None and moved.shape == copy.shape:
                    moved.copy_(copy)
