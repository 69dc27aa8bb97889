"""The meter's sums in checkpoints: what is saved, and when that can be continued."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..ops.device_sums import Arenas, Form, NamedArenas
from ..sampling.draw import FloatArray
from . import LocalShard, find_ranks, local_tensor, model_elements

WINDOWS_FOR_ANGLE = 3  # two displacements need three means

if TYPE_CHECKING:
    from ..meter import AngularVelocity


@dataclass(frozen=True)
class SavedArenas:
    """Arenas on their way from a checkpoint into a meter.

    Attributes:
        form: they are in.
        steps: optimizer steps that the meter had observed.
        arenas: local tensors by parameter name and role.
        sample: fraction of the chunks that they hold, and the seed of the choice.
        drawn: what tells the choice from others.
        sizes: what a survey found, or None.
        sized: whether the sample was drawn by that.
    """

    form: Form
    steps: int
    arenas: NamedArenas
    sample: tuple[float, int] = (1.0, 0)
    drawn: Sequence[str] = ()
    sized: bool = False
    sizes: Mapping[str, FloatArray] | None = None

    def completed(self, apart: SavedArenas | None) -> tuple[SavedArenas, str | None]:
        """These, or where they were saved apart from the counts, those; and what is wrong if any.

        Args:
            apart: what :class:`ArenaState` has loaded.
        """
        if self.arenas:
            return self, None
        if self.sample[0] < 1:
            return self, "sums of a sample are not saved for sharded parameters"
        if apart is None:
            return self, "it was saved without the arenas, which arena_state would hold"
        if apart.steps != self.steps:
            return self, f"its arenas are of step {apart.steps}, its counts of step {self.steps}"
        return apart, None

    def sampled_otherwise(self, fraction: float, seed: int, drawn: Sequence[str]) -> str | None:
        """Why these are not the elements that a meter reads, or None."""
        given, chosen = self.sample
        if given == fraction == 1:
            return None
        if (given, chosen) != (fraction, seed):
            return f"it has sample={given:g} and seed={chosen}, not {fraction:g} and {seed}"
        if list(self.drawn) != list(drawn):
            return "the parameters have other shapes, types or parts, so that others are drawn"
        return None


class ArenaState:
    """The arenas as a ``torch.distributed.checkpoint`` Stateful.

    Every arena of a DTensor is a DTensor with the parameter's mesh and placements, keyed by the
    parameter's name, so that other numbers of ranks can load it. Flat shards (FSDP1, ZeRO) cannot
    be taken over and are left out; a meter that watches some warms up again.

    Arenas of a sample are left out too: they hold other elements for every way to shard.

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
        meter = self._meter
        meter._resharded = SavedArenas(state_dict["form"], state_dict["steps"], arenas)
        if meter._reader is not None:
            # The counts in this meter are older; the next step finds out whether they fit.
            meter._restore = SavedArenas(meter._form, meter.steps, {})
            meter._reader = None

    def _shards(self) -> list[LocalShard]:
        shards = self._meter._source.shards()
        if self._meter._sampled and not self._will_read_everything(shards):
            return []
        return [shard for shard in shards if not shard.flat]

    def _will_read_everything(self, shards: Sequence[LocalShard]) -> bool:
        """Of a meter that chooses the part itself and has not begun."""
        meter = self._meter
        if meter._auto is None or meter._reader is not None:
            return False
        if meter._auto.chosen is not None:
            return meter._auto.chosen == 1
        elements = model_elements(shards, find_ranks(meter._process_group, shards))
        return meter._auto.first(elements) == 1

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


def state_of(meter: AngularVelocity) -> dict[str, Any]:
    """What :meth:`AngularVelocity.state_dict` returns."""
    waiting = meter._restore
    if waiting is not None:
        arenas = dict(waiting.arenas)
    elif meter._holding is not None and meter._holding.sharded:
        arenas = {}
    else:
        arenas = {name: a for part in meter._arenas or () for name, a in part.named().items()}
    return {
        "version": 1,
        "window": meter.window,
        "steps": meter.steps,
        "windows": meter.windows,
        "position": meter._position,
        "usable": meter._usable,
        "fresh": meter._fresh,
        "still": meter._faults.still_windows,
        "variances": list(meter._variances),
        "form": meter.form if waiting is None else waiting.form,
        "sample": _sample_of(meter),
        "arenas": arenas,
    }


def _sample_of(meter: AngularVelocity) -> dict[str, Any]:
    """Which part the arenas hold.

    The same entries for all meters, because ``torch.distributed.checkpoint`` loads only into what
    has the structure of what was saved; of ``sizes`` it loads those that are there.
    """
    waiting, reader = meter._restore, meter._reader
    saved = SavedArenas("delta", meter.steps, {}, (meter.fraction or 1.0, meter._seed))
    if waiting is not None:
        saved = waiting
    elif reader is not None and not reader.holding.sharded:
        saved = dataclasses.replace(
            saved, drawn=reader.drawn, sized=reader.sizes is not None, sizes=meter._sizes
        )
    # As exact in float32: the survey has rounded them.
    sizes = {k: torch.from_numpy(v.astype(np.float32)) for k, v in (saved.sizes or {}).items()}
    return {
        "fraction": saved.sample[0],
        "seed": saved.sample[1],
        "chosen": None if meter._auto is None else meter._auto.chosen,
        "drawn": list(saved.drawn),
        "sized": saved.sized,
        "sizes": sizes,
    }


_EVERYTHING: dict[str, Any] = {
    "fraction": 1.0,
    "seed": 0,
    "chosen": None,
    "drawn": [],
    "sized": False,
    "sizes": {},
}


def load_state(meter: AngularVelocity, state: Mapping[str, Any]) -> None:
    """What :meth:`AngularVelocity.load_state_dict` does."""
    problem = problem_of(state)
    if problem is not None:
        raise ValueError(f"state_dict: expected a state of AngularVelocity, got {problem}")
    sample = state.get("sample") or _EVERYTHING
    sizes = {name: size.cpu().double().numpy() for name, size in sample["sizes"].items()} or None
    meter._reader = meter._restore = None
    meter._forget()
    meter._exchange.restart()
    if meter._auto is not None:
        meter._auto.chosen = sample["chosen"]
        meter._fraction = None if sample["chosen"] is None else sample["fraction"]
    meter.window = state["window"]
    meter.steps = state["steps"]
    meter.windows = state["windows"]
    if state["fresh"]:
        return
    meter._restore = SavedArenas(
        state["form"],
        meter.steps,
        state["arenas"],
        (sample["fraction"], sample["seed"]),
        sample["drawn"],
        sample["sized"] and sizes is not None,
        sizes,
    )
    meter._form = state["form"]
    meter._fresh = False
    meter._position = state["position"]
    meter._usable = state["usable"]
    meter._faults.still_windows = state["still"]
    before, last = state["variances"]
    meter._variances = (before, last)


def load_arenas(meter: AngularVelocity, saved: SavedArenas) -> None:
    """Fill a meter's new arenas with saved ones, or start over where they do not fit."""
    assert meter._reader is not None
    saved, problem = saved.completed(meter._resharded)
    problem = problem or saved.sampled_otherwise(
        meter.fraction or 1.0, meter._seed, meter._reader.drawn
    )
    problem = problem or next(
        (p for a in meter._reader.arenas if (p := a.misfit(saved.arenas)) is not None), None
    )
    if problem is None:
        meter._reader.resume(saved.form, saved.arenas)
        return
    meter._faults.cannot_continue(problem, WINDOWS_FOR_ANGLE)
    position = meter._position
    meter._forget()
    if meter.fraction is None:  # another fraction was chosen already
        meter._build()
    if meter._ranks is not None:
        # The other ranks may be able to go on: end the window with them, and say so then.
        meter._position, meter._usable = position, -2


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
    sample = state.get("sample")  # states of the first release have none
    if sample is not None and not (isinstance(sample, Mapping) and set(_EVERYTHING) <= set(sample)):
        return f"sample={sample!r}"
    for key, kind in kinds.items():
        if key not in state:
            return f"no entry {key!r}"
        if not isinstance(state[key], kind):
            return f"{key}={state[key]!r}"
    return None
