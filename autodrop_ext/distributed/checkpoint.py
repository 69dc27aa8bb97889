"""The state of a meter in checkpoints, also of sharded training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..checks import choice, none_or
from ..ops.device_sums import ROLES, NamedArenas
from ..ops.interface import Form
from ..ops.window_sums import EVERYTHING
from ..saved import Form as SavedForm
from ..saved import Later, dict_of, exactly, inside, list_of, load
from .shards import LocalShard, Sharding, local_tensor


@dataclass(frozen=True)
class SavedSums:
    """Sums on their way from a checkpoint into a meter.

    Attributes:
        form: form that they are in.
        steps: optimizer steps that the meter had observed.
        arenas: local tensors by parameter name and role; empty if they were not saved.
        drawn: state of what the elements were drawn by; see ``WindowSums.state``.
    """

    form: Form
    steps: int
    arenas: NamedArenas
    drawn: Mapping[str, Any] = field(default_factory=lambda: EVERYTHING)

    def completed(self, apart: SavedSums | None) -> tuple[SavedSums, str | None]:
        """These, or those that were saved apart from the counts; and what is wrong, if anything.

        Args:
            apart: what :class:`ArenaState` has loaded.
        """
        if self.arenas:
            return self, None
        if self.drawn["fraction"] < 1:
            return self, "sums of a sample are not saved for sharded parameters"
        if apart is None:
            return self, "it was saved without the arenas, which arena_state would hold"
        if apart.steps != self.steps:
            return self, f"its arenas are of step {apart.steps}, its counts of step {self.steps}"
        return apart, None


class SavedMeter(NamedTuple):
    """What a checkpoint says of a meter, checked."""

    window: int
    snapshots: int | None
    steps: int
    windows: int
    position: int
    windows_since_restart: int
    spoiled: bool
    still_windows: int
    variances: tuple[float, float]
    form: Form
    sums: SavedSums | None


def read_meter(state: Any, name: str) -> SavedMeter:
    """Return the state of a meter, checked; raise ValueError if an entry is missing or wrong."""
    saved = load(state, _METER, name)
    window, steps, position = saved["window"], saved["steps"], saved["position"]
    if position >= window or position > steps:
        raise ValueError(
            f"{name}['position']: expected less than window={window} and at most steps={steps}, "
            f"got {position}"
        )
    form: Form = saved["form"] or "delta"
    spoiled = saved["usable"] < 0 or saved["spoiled"]
    sums = None
    if not saved["fresh"] and not spoiled:
        sums = SavedSums(form, steps, saved["arenas"], saved["sample"])
    return SavedMeter(
        window,
        saved["snapshots"],
        steps,
        saved["windows"],
        position,
        max(saved["usable"], 0),
        spoiled,
        saved["still"],
        (saved["variances"][0], saved["variances"][1]),
        form,
        sums,
    )


class ArenaState:
    """The meter's sums as a ``torch.distributed.checkpoint`` Stateful.

    Every arena of a DTensor is a DTensor with the parameter's mesh and placements, keyed by the
    parameter's name, so that other numbers of ranks can load it. Flat shards (FSDP1, ZeRO) cannot
    be taken over and are left out; a meter that watches some of them warms up again. Arenas of a
    sample are left out too: they hold other elements for every way to shard.

    ``state_dict`` shows the live arenas, as a model's ``state_dict`` does, and loading replaces
    them; a meter that has none yet shows empty ones for the parameters as they are.

    Args:
        shards: returns the parameters whose sums are saved, by key.
        now: returns the sums as they are now, with the live arenas by parameter name.
        keep: takes loaded sums, which the meter continues at its next step.
    """

    def __init__(
        self,
        shards: Callable[[], Mapping[str, LocalShard]],
        now: Callable[[], SavedSums],
        keep: Callable[[SavedSums], None],
    ) -> None:
        self._shards = shards
        self._now = now
        self._keep = keep

    def state_dict(self) -> dict[str, Any]:
        """``{"form": str, "steps": int, "arenas": {name: {role: tensor}}}``."""
        now = self._now()
        arenas: dict[str, dict[str, Tensor]] = {}
        for key, shard in self._shards().items():
            local = now.arenas.get(shard.name) or _empty(shard)
            arenas[key] = {role: _spread(local[role], shard) for role in ROLES}
        return {"form": now.form, "steps": now.steps, "arenas": arenas}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep the arenas until the meter's next step; its counts may be loaded before or after.

        Raises:
            ValueError: not a state of this class; nothing has been changed then.
        """
        missing = [key for key in ("form", "steps", "arenas") if key not in state_dict]
        if missing:
            raise ValueError(f"state_dict: expected a state of ArenaState, got no {missing[0]!r}")
        shards = self._shards()
        form = {**_ARENA_STATE, "arenas": inside({key: Later(_ROLES, None) for key in shards})}
        saved = load(state_dict, form)
        arenas = {
            shards[key].name: {role: arena.clone() for role, arena in roles.items()}
            for key, roles in saved["arenas"].items()
            if roles is not None
        }
        self._keep(SavedSums(saved["form"], saved["steps"], arenas))


def _empty(shard: LocalShard) -> dict[str, Tensor]:
    local = torch.view_as_real(shard.tensor) if shard.tensor.is_complex() else shard.tensor
    return {role: torch.zeros_like(local, dtype=torch.float32) for role in ROLES}


def _spread(local: Tensor, shard: LocalShard) -> Tensor:
    """A local arena as a DTensor like its parameter."""
    if shard.sharding is None:
        return local
    sharding: Sharding = shard.sharding
    from torch.distributed.tensor import DTensor

    shape, stride = sharding.shape, sharding.stride
    if shard.tensor.is_complex():  # real and imaginary parts on a last axis
        shape, stride = torch.Size([*shape, 2]), (*(2 * s for s in stride), 1)
    return DTensor.from_local(
        _own_storage(local),
        sharding.mesh,
        sharding.placements,
        run_check=False,
        shape=shape,
        stride=stride,
    )


def _own_storage(view: Tensor) -> Tensor:
    """The same memory as the beginning of a storage: ``dcp.async_save`` copies whole storages."""
    size = view.element_size()
    begin = view.storage_offset() * size
    span = 1 + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))
    end = begin + (span if view.numel() else 0) * size
    storage = view.untyped_storage()[begin:end]
    empty = torch.empty(0, dtype=view.dtype, device=view.device)
    return empty.set_(storage, 0, view.shape, view.stride())


def _check_arena(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a float32 tensor, got {value!r}")
    arena = local_tensor(value)
    if arena.dtype != torch.float32 or arena.layout != torch.strided or arena.is_meta:
        raise ValueError(
            f"{name}: expected a dense float32 tensor with data, got {arena.dtype}, "
            f"{arena.layout} on {arena.device}"
        )
    return arena


def _check_fraction(name: str, value: Any) -> float:
    return checks.number(name, value, "a number above 0 and at most 1", lambda x: 0 < x <= 1)


def _check_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a string, got {value!r}")
    return value


def _check_motion(name: str, value: Any) -> Tensor:
    good = isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 1
    if not good or not bool(((value >= 0) & value.isfinite()).all()):
        raise ValueError(f"{name}: expected a vector of finite numbers of at least 0")
    vector: Tensor = value
    return vector.cpu()


def _check_drawn(name: str, value: Any) -> Mapping[str, Any]:
    """Return what saved sums were drawn by; see ``WindowSums.state``."""
    drawn = load(value, _DRAWN, name)
    return {**drawn, "sized": drawn["sized"] and len(drawn["sizes"]) > 0}


_ROLES = inside(dict.fromkeys(ROLES, _check_arena))
_DRAWN: SavedForm = {
    "fraction": _check_fraction,
    "seed": checks.at_least(-(2**63)),
    "drawn": list_of(_check_text),
    "sized": checks.flag,
    "sizes": dict_of(_check_motion),
}
_METER: SavedForm = {
    "version": exactly(1),
    "window": checks.at_least(1),
    "snapshots": Later(none_or(checks.at_least(1)), None),
    "steps": checks.at_least(0),
    "windows": checks.at_least(0),
    "position": checks.at_least(0),
    "usable": checks.at_least(-2),
    "spoiled": Later(checks.flag, False),
    "fresh": checks.flag,
    "still": checks.at_least(0),
    "variances": list_of(checks.at_least_zero, 2),
    "form": none_or(choice("sum", "delta")),
    "sample": Later(_check_drawn, EVERYTHING),
    "arenas": dict_of(_ROLES),
}
_ARENA_STATE: SavedForm = {"form": choice("sum", "delta"), "steps": checks.at_least(0)}
