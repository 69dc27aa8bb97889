"""The arenas of all devices over one choice of elements: all of them, or a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ..distributed import Holding, LocalShard, Ranks
from ..parts import Details
from ..sampling.draw import FloatArray, Sample
from . import Sums, select
from .device_sums import Arenas, Form, NamedArenas
from .plan import Plan


class Wanted(NamedTuple):
    """What a meter was asked for beside the total.

    Attributes:
        per_tensor: readings of each tensor.
        per_group: readings of each param group.
        groups: how many of those there are.
        room: what the numbers beside the total have room for, see :class:`Details`.
        settings: in words; ranks whose settings differ must not add their numbers.
    """

    per_tensor: bool
    per_group: bool
    groups: int
    room: tuple[bool, bool]
    settings: str


class Reader:
    """Reads one choice of elements from its first window on.

    Args:
        shards: what lies on this rank.
        ranks: who decides together, or None.
        backend: "auto" or a name.
        sample: None for all elements.
        wanted: beside the total.
        sizes: by name of the tensor, how far each of its chunks moves; the sample is drawn by that.
        foresee: whether the error under other fractions is wanted.

    Attributes:
        sample: as given.
        sizes: as given.
        arenas: one for each device.
        drawn: what tells the choice of chunks apart from others, a word for each device.
        holding: what this rank holds.
        details: the numbers beside the total.
        windows: closed since the first step.

    Raises:
        TypeError: a parameter is on the device "meta".
        ValueError: readings of each tensor are wanted, and ranks hold different ones.
        RuntimeError: no memory for the arenas.
    """

    def __init__(
        self,
        shards: Sequence[LocalShard],
        ranks: Ranks | None,
        backend: str,
        sample: Sample | None,
        wanted: Wanted,
        *,
        sizes: Mapping[str, FloatArray] | None = None,
        foresee: bool = False,
    ) -> None:
        if wanted.per_tensor and ranks is not None and ranks.num_stages > 1:
            raise ValueError(
                "per_tensor: expected a model that is not cut into pipeline stages, whose ranks "
                f"hold different parameters, got {ranks.num_stages} stages"
            )
        self.sample = sample
        self.sizes = sizes
        by_device: dict[torch.device, list[LocalShard]] = {}
        for shard in shards:
            if shard.tensor.is_meta:
                raise TypeError(
                    f"{shard.name}: expected a parameter with data, got one on device 'meta'"
                )
            by_device.setdefault(shard.tensor.device, []).append(shard)
        self.arenas: list[Arenas] = []
        kept = []
        for device, members in by_device.items():
            plan = Plan(
                [(shard.name, shard.tensor) for shard in members],
                device,
                [1.0 if ranks is None else ranks.weight(shard) for shard in members],
                sample=sample,
                labels=[f"{s.name}|{s.layout}|{s.part}" for s in members],
                sizes=sizes,
            )
            self.arenas.append(Arenas(plan, select(backend, device)))
            kept.append([members[segment.index] for segment in plan.segments])
        choices = [arenas.plan.choice for arenas in self.arenas]
        drawn = [choice.digest for choice in choices if choice is not None]
        self.drawn = drawn
        self.holding = Holding(kept, ranks, wanted.settings, drawn)
        self.details = Details(
            self.arenas,
            kept,
            wanted.groups,
            sampled=sample is not None,
            room=wanted.room,
            per_tensor=wanted.per_tensor,
            per_group=wanted.per_group,
            foresee=foresee,
        )
        self.windows = 0
        self._begun = False

    @property
    def device_bytes(self) -> int:
        """Bytes of the arenas on all devices together."""
        return sum(12 * arenas.plan.arena_elements for arenas in self.arenas)

    def take(self, form: Form, *, first: bool) -> None:
        """Take one iterate. ``first``: it opens a window."""
        for arenas in self.arenas:
            if self._begun:
                arenas.accumulate(first)
            else:
                arenas.begin(form)
        self._begun = True

    def close(self, window: int) -> Sums:
        """This rank's weighted sums at a window's end."""
        self.windows += 1
        total = Sums(0.0, 0.0, 0.0, 0.0)
        for arenas in self.arenas:
            total += arenas.close(window)
        return total

    def forget(self) -> None:
        """Start over with the next iterate."""
        self.windows = 0
        self._begun = False

    def resume(self, form: Form, named: NamedArenas) -> None:
        """Go on with arenas of a checkpoint, unless one of ours objects to them as misfits."""
        for arenas in self.arenas:
            arenas.load(form, named)
        self._begun = True

    def convert(self, form: Form, window: int) -> None:
        """Hold the sums in another form, right after a close."""
        for arenas in self.arenas:
            (arenas.to_delta if form == "delta" else arenas.to_sum)(window)
