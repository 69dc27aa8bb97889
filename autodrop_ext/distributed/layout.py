"""What this rank holds, in the few numbers that ranks compare."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

from ..ops.window_sums import WindowSums
from .group import Group
from .shards import LocalShard


def elements_here(shard: LocalShard, group: Group) -> float | None:
    """About how many elements of a parameter each rank has; None where ranks could differ."""
    if shard.total is None or group.num_stages > 1:
        return None
    return shard.total / shard.parts


class Layout:
    """What this rank holds.

    Args:
        shards: those that are summed, for each device.
        group: who decides together.

    Attributes:
        shards: all of them, device after device.
        layout: 48 bits of a hash over names, shapes, dtypes, placements and param groups.
        elements: weighted number of the elements here.
        model_elements: elements of the whole model, or of this stage; NaN where an engine does not
            tell.
        sharded: whether no rank alone can save or restore everything.
    """

    def __init__(self, shards: Sequence[Sequence[LocalShard]], group: Group) -> None:
        every = [shard for device in shards for shard in device]
        self.shards = every
        self.layout = digest(f"{s.name}|{s.layout}|{s.group}" for s in every)
        self.elements = sum(s.tensor.numel() * group.weight(s) for s in every)
        self.model_elements = float(sum(math.nan if s.total is None else s.total for s in every))
        self.sharded = any(s.split for s in every) or group.num_stages > 1
        self._whole = [[i for i, s in enumerate(device) if not s.split] for device in shards]
        self._mixed = 0 < sum(map(len, self._whole)) < len(every)
        self._held: tuple[list[str], float] | None = None

    def held(self, drawn: list[str]) -> float:
        """48 bits of a hash over which elements are read here.

        Args:
            drawn: what tells samples apart; ranks that hold the same elements but read others of
                them are not compared.
        """
        if self._held is None or self._held[0] != drawn:
            parts = (f"{s.name}|{s.layout}|{s.part}" for s in self.shards)
            self._held = (drawn, digest([*drawn, *parts]))
        return self._held[1]

    def replicated(self, sums: WindowSums) -> float:
        """Sum of ``|m|^2`` over the parameters that are on this rank completely.

        It is 0 where all of them are or none is, because the total then says the same, and for a
        sample.
        """
        if not self._mixed or sums.fraction < 1:
            return 0.0
        pairs = zip(sums.per_tensor(), self._whole, strict=True)
        return sum(float(table[whole, 3].sum()) for table, whole in pairs)


def digest(lines: Iterable[str]) -> float:
    """48 bits of a hash over lines, which a float64 holds exactly."""
    text = "\n".join(lines).encode()
    return float(int.from_bytes(hashlib.sha256(text).digest()[:6], "big"))
