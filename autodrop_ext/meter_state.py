"""The meter's sums in checkpoints: what is saved, and when that can be continued."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arenas import Arenas, Form
from .distributed import LocalShard, find_ranks, local_tensor

if TYPE_CHECKING:
    from .velocity import AngularVelocity

NamedArenas = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class SavedArenas:
    """Arenas on their way from a checkpoint into a meter.

    Attributes:
        form: they are in.
        steps: optimizer steps that the meter had observed.
        arenas: local tensors by parameter name and role.
    """

    form: Form
    steps: int
    arenas: NamedArenas

    def completed(self, apart: SavedArenas | None) -> tuple[SavedArenas, str | None]:
        """These, or where they were saved apart from the counts, those; and what is wrong if any.

        Args:
            apart: what :class:`ArenaState` has loaded.
        """
        if self.arenas:
            return self, None
        if apart is None:
            return self, "it was saved without the arenas, which arena_state would hold"
        if apart.steps != self.steps:
            return self, f"its arenas are of step {apart.steps}, its counts of step {self.steps}"
        return apart, None


class ArenaState:
    """The arenas as a ``torch.distributed.checkpoint`` Stateful.

    Every arena of a DTensor is a DTensor with the parameter's mesh and placements, keyed by the
    parameter's name, so that other numbers of ranks can load it. Flat shards (FSDP1, ZeRO) cannot
    be taken over and are left out; a meter that watches some warms up again.

    ``state_dict`` shows the live arenas, as a model's ``state_dict`` does, and loading writes into
    them; a meter that has none yet shows empty ones for the parameters as they are.
    """

    def __init__(self, meter: AngularVelocity) -> None:
        self._meter = meter

    def state_dict(self) -> dict[str, Any]:
        """``{"form": str, "steps": int, "arenas": {name: {role: tensor}}}``."""
        meter = self._meter
        named = self._named()
        arenas: dict[str, dict[str, Tensor]] = {}
        for shard in self._shards():
            local = named.get(shard.name) or _empty(shard)
            arenas[self._key(shard.name)] = {
                role: _spread(local[role], shard) for role in Arenas.ROLES
            }
        return {"form": meter.form or "delta", "steps": meter.steps, "arenas": arenas}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep the arenas until the meter's next step; its counts may be loaded before or after.

        Raises:
            ValueError: not a state of this class; nothing has been changed then.
        """
        missing = [key for key in ("form", "steps", "arenas") if key not in state_dict]
        if missing:
            raise ValueError(f"state_dict: expected a state of ArenaState, got no {missing[0]!r}")
        arenas = {
            shard.name: {role: local_tensor(t).clone() for role, t in saved.items()}
            for shard in self._shards()
            if (saved := state_dict["arenas"].get(self._key(shard.name))) is not None
        }
        self._meter._take_arenas(SavedArenas(state_dict["form"], state_dict["steps"], arenas))

    def _shards(self) -> list[LocalShard]:
        return [shard for shard in self._meter._source.shards() if not shard.flat]

    def _named(self) -> NamedArenas:
        """The local arenas by parameter name: live ones, or those that wait for the next step."""
        live = self._meter._arenas
        if live is not None:
            return {name: tensors for arenas in live for name, tensors in arenas.views().items()}
        waiting = self._meter._resharded or self._meter._restore
        return {} if waiting is None else waiting.arenas

    def _key(self, name: str) -> str:
        """Parameters of two pipeline stages may have the same name."""
        ranks = find_ranks(self._meter._process_group, self._meter._source.shards())
        return name if ranks is None or ranks.num_stages == 1 else f"stage {ranks.stage}: {name}"


def _empty(shard: LocalShard) -> dict[str, Tensor]:
    local = torch.view_as_real(shard.tensor) if shard.tensor.is_complex() else shard.tensor
    return {role: torch.zeros_like(local, dtype=torch.float32) for role in Arenas.ROLES}


def _spread(local: Tensor, shard: LocalShard) -> Tensor:
    """A local arena as a DTensor like its parameter."""
    sharding = shard.sharding
    if sharding is None:
        return local
    from torch.distributed.tensor import DTensor

    shape, stride = sharding.shape, sharding.stride
    if shard.tensor.is_complex():  # real and imaginary parts on a last axis
        shape, stride = torch.Size([*shape, 2]), (*(2 * s for s in stride), 1)
    return DTensor.from_local(
        local, sharding.mesh, sharding.placements, run_check=False, shape=shape, stride=stride
    )


def problem_of(state: Any) -> str | None:
    """Why a meter cannot load a state, or None."""
    if not isinstance(state, Mapping):
        return type(state).__name__
    if state.get("version") != 1:
        return f"version {state.get('version')!r} (this release reads version 1)"
    kinds: dict[str, type | tuple[type, ...]] = {
        "window": int,
        "steps": int,
        "windows": int,
        "position": int,
        "usable": int,
        "fresh": bool,
        "still": int,
        "variances": (list, tuple),
        "form": (str, type(None)),
        "arenas": Mapping,
    }
    for key, kind in kinds.items():
        if key not in state:
            return f"no entry {key!r}"
        if not isinstance(state[key], kind):
            return f"{key}={state[key]!r}"
    return None
