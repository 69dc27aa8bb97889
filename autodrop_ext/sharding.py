"""A rank's part of one parameter: its weight and the global index of its elements.

One rule gives every layout its weight. A parameter is cut into ``parts`` different parts: the
product of the mesh dimensions that are not ``Replicate`` (1 for a plain tensor, the size of the
shard group for flat shards). If ``ranks_per_copy`` ranks hold one copy of the model together, each
part is on ``ranks_per_copy / parts`` of them. Sums over a local part therefore weigh
``parts / ranks_per_copy``, and every element counts exactly once.

The global index of an element is its position in the whole parameter in row-major order. It does
not depend on the mesh, so that an element meets the same bucket of the table under any sharding.
"""

from __future__ import annotations

import functools
import gc
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .global_index import Cut, Runs, axis_of, no_runs, runs_of
from .memory import is_dense


class LocalShard(NamedTuple):
    """This rank's part of one parameter."""

    name: str  # for messages, and for the hash that spreads the elements over the table
    tensor: Tensor  # elements here, without padding, complex ones as pairs; may be empty
    parts: int  # into how many different parts the parameter is cut
    part: tuple[int, ...]  # which of them this one is; equal on ranks that hold the same elements
    total: int | None  # elements of the whole parameter; None if the engine does not say
    layout: str  # shape, dtype, order in memory and placement; equal on ranks that share it
    origin: Tensor  # the parameter, or the engine's flat tensor, that holds the elements
    offset: int = 0  # elements of a flat tensor before the first one here
    group: int = 0  # index of the param group
    # A flat shard of FSDP1 or ZeRO has no global index: its elements are hashed by part and
    # position, and another number of ranks cannot continue with them.
    flat: bool = False
    staged: bool = False  # not in the order of ``runs`` in memory, and copied at every read
    runs: Runs | None = None  # where the elements are; None if all are here, in order, or if flat

    @property
    def split(self) -> bool:
        """True if this rank may hold less than the whole parameter, or does on several ranks."""
        placements = getattr(self.origin, "placements", ())
        return self.flat or not all(p.is_replicate() for p in placements)

    @property
    def identity(self) -> str:
        """Description of the whole parameter; the same for any sharding unless ``flat``."""
        if not is_dtensor(self.origin):
            return self.layout
        return f"{tuple(self.origin.shape)} {self.origin.dtype}"

    def current(self) -> Tensor:
        """Return ``tensor`` again, in the memory that ``origin`` has now."""
        tensor = as_real(local_tensor(self.origin))
        if not self.flat:
            return tensor
        return tensor.flatten()[self.offset : self.offset + self.tensor.numel()]


def local_shards(
    named: Iterable[tuple[str, Tensor]], group_of: Mapping[int, int]
) -> list[LocalShard]:
    """Return what this rank holds of the given parameters; a tensor given twice counts once.

    Args:
        named: names and parameters.
        group_of: index of the param group by ``id`` of the parameter; 0 for others.

    Raises:
        TypeError: a DTensor has a placement that is neither sharded nor replicated.
        RuntimeError: FSDP1 flattened a parameter, and its module is gone; or a DTensor's local
            tensor does not have the shape that its placements give.
    """
    distinct: dict[int, tuple[str, Tensor]] = {}
    for name, parameter in named:
        distinct.setdefault(id(parameter), (name, parameter))
    flattened = _fsdp1_shards(list(distinct.values()))
    shards = []
    for key, (name, parameter) in distinct.items():
        if key in flattened:
            shard = flattened[key]
        elif is_dtensor(parameter):
            shard = _of_dtensor(name, parameter)
        else:
            shard = _whole(name, parameter)
        group = group_of.get(key, 0)
        shards.append(shard._replace(group=group) if group else shard)
    return shards


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the outermost optimizer inside of wrappers whose ``step()`` runs torch's hooks.

    Anything else, and an optimizer that has several others for its param groups, is returned as
    it is.
    """
    for one in stepped_optimizers(optimizer):
        if len(one.param_groups) == len(optimizer.param_groups):
            return one
    return optimizer


def stepped_optimizers(optimizer: Any) -> list[Optimizer]:
    """Return the optimizers whose ``step()`` runs torch's hooks: this one, and those it holds.

    Wrappers hold others in any attribute (accelerate, DeepSpeed, ``PostLocalSGDOptimizer``,
    differential privacy, sharpness-aware and offloading optimizers). One takes part if all its
    param groups are groups of ``optimizer``, the same dicts.
    """
    groups = _param_groups(optimizer)
    known = set(map(id, groups))
    waiting, seen = [optimizer], set()
    found: list[Optimizer] = []
    while waiting:
        one = waiting.pop(0)
        own = {id(group) for group in _param_groups(one)}
        if id(one) in seen or not own or not own <= known:
            continue
        seen.add(id(one))
        # torch wraps the class's step() when Optimizer.__init__ is called.
        if hasattr(one, "_optimizer_step_post_hooks") and hasattr(type(one).step, "hooked"):
            found.append(one)
        waiting += _held_by(one)
    return found


def _param_groups(optimizer: Any) -> Sequence[Any]:
    groups = getattr(optimizer, "param_groups", None)
    return groups if isinstance(groups, list | tuple) else ()


def _held_by(wrapper: Any) -> list[Any]:
    """Return the values of the attributes, and those in lists and dicts among them."""
    held = [getattr(wrapper, "optimizer", None)]  # may be a property
    for value in getattr(wrapper, "__dict__", {}).values():
        if isinstance(value, Mapping):
            held += value.values()
        elif isinstance(value, list | tuple):
            held += value
        else:
            held.append(value)
    return held


def is_dtensor(tensor: Tensor) -> bool:
    """Return True for a DTensor; ``torch.distributed.tensor`` takes a second to import."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def is_cut(tensor: Any) -> bool:
    """Return True for a DTensor of which a rank has only a part."""
    if not is_dtensor(tensor):
        return False
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return any(size > 1 and not placement.is_replicate() for size, placement in sizes)


def is_flattened(parameter: Tensor) -> bool:
    """Return True if FSDP1 has flattened the parameter."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a tensor on this rank: the tensor itself unless it is a DTensor."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():  # with gradients, to_local() would make a view with a history
        return tensor.to_local()  # type: ignore[attr-defined, no-any-return]


def as_real(tensor: Tensor) -> Tensor:
    """Return the tensor without its history; complex elements as pairs of real ones."""
    tensor = tensor.detach()
    if not tensor.is_complex():
        return tensor
    if tensor.is_conj():
        # The memory holds the conjugates; angles and norms are the same for both.
        tensor = tensor.conj()
    return torch.view_as_real(tensor)


def discard_gathered() -> None:
    """Let FSDP gather the parameters of its modules from their shards at the next forward pass.

    The outermost module keeps its whole parameters after a forward pass until a backward pass,
    which does not come while a model is evaluated. Forward passes would go on with these, whatever
    was written to the shards since. Nothing leads from a shard to its module, so all living modules
    of FSDP give their copies back (0.2 s); one that did not have to gathers once more.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    for found in gc.get_objects():
        if issubclass(type(found), fsdp.FSDPModule):
            found.reshard()
        elif type(found) is FlatParamHandle and found.uses_sharded_strategy:
            handle: Any = found  # torch's methods have no types
            handle.reshard(free_unsharded_flat_param=True)
            handle.post_reshard()


def _whole(name: str, parameter: Tensor) -> LocalShard:
    """Return the shard of a parameter of which this rank has every element.

    A dense tensor in another order than row-major, such as ``channels_last``, is read in the order
    of its memory.
    """
    tensor = as_real(parameter)
    order: tuple[int, ...] | None = None
    staged = not is_dense(tensor)
    if not staged and not tensor.is_contiguous():
        long = [d for d, size in enumerate(tensor.shape) if size > 1]
        order = tuple(sorted(long, key=tensor.stride().__getitem__, reverse=True))
    layout = _described(parameter.shape, parameter.dtype, order)
    return LocalShard(name, tensor, 1, (), tensor.numel(), layout, parameter, staged=staged)


@functools.lru_cache(1000)  # formatting one takes longer than everything else
def _described(shape: torch.Size, dtype: torch.dtype, order: tuple[int, ...] | None) -> str:
    return f"{tuple(shape)} {dtype}" + ("" if order is None else f" in memory order {order}")


# ---- DTensors ---------------------------------------------------------------------------------


def _of_dtensor(name: str, parameter: Any) -> LocalShard:
    mesh, placements = parameter.device_mesh, tuple(parameter.placements)
    cut = [d for d, p in enumerate(placements) if not p.is_replicate()]
    if any(placements[d].is_partial() or not hasattr(placements[d], "dim") for d in cut):
        raise TypeError(
            f"{name}: expected a parameter that is sharded or replicated, got the placements "
            f"{placements}; a Partial placement holds a sum that has not been taken yet"
        )
    parts = math.prod(mesh.size(d) for d in cut)
    coordinate = mesh.get_coordinate()  # None: this rank is outside of the mesh
    tensor = as_real(local_tensor(parameter))
    shape = tuple(parameter.shape) + ((2,) if parameter.is_complex() else ())
    runs: Runs | None = no_runs()
    if coordinate is not None:
        cuts: list[list[Cut]] = [[] for _ in shape]
        for d in cut:
            factor = getattr(placements[d], "split_factor", 1)
            cuts[placements[d].dim].append(Cut(mesh.size(d), coordinate[d], factor))
        local = tuple(tensor.shape) if tensor.ndim == len(shape) else (-1,) * len(shape)
        axes = [axis_of(*given) for given in zip(shape, cuts, local, strict=True)]
        if any(axis is None for axis in axes):
            raise RuntimeError(
                f"{name}: expected the local shape that {placements} gives to a parameter of shape "
                f"{shape} on this rank, got {tuple(tensor.shape)}"
            )
        runs = runs_of(shape, [axis for axis in axes if axis is not None])
    return LocalShard(
        name,
        tensor,
        parts=parts,
        part=(-1,) if coordinate is None else tuple(coordinate[d] for d in cut),
        total=math.prod(shape),
        layout=f"{tuple(parameter.shape)} {parameter.dtype} {placements} {tuple(mesh.shape)}",
        origin=parameter,
        staged=not tensor.is_contiguous(),
        runs=runs,
    )


# ---- FSDP1 ------------------------------------------------------------------------------------


def _fsdp1_shards(named: Sequence[tuple[str, Tensor]]) -> dict[int, LocalShard]:
    """Return what this rank holds of those parameters that FSDP1 manages, by their ``id``.

    Nothing leads from such a parameter to the handle that knows the number of parts and the
    padding, and the tensor itself does not show if it is whole. So the handles are looked for among
    all living Python objects (0.2 s), and only if a parameter is marked as flattened.
    """
    names = {id(p): name for name, p in named if is_flattened(p)}
    if not names:
        return {}
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    shards: dict[int, LocalShard] = {}
    for handle in (o for o in gc.get_objects() if type(o) is FlatParamHandle):
        flat, sharded = handle.flat_param, handle.uses_sharded_strategy
        parts = handle.world_size if sharded else 1
        originals = getattr(flat, "_params", None)  # with use_orig_params: views without padding
        totals = flat._numels if originals is not None else [sum(flat._numels)]
        padding = flat._shard_numel_padded if originals is None and sharded else 0
        for parameter, total in zip(originals or [flat], totals, strict=True):
            if id(parameter) in names:
                size = parameter.numel() - padding
                name = names[id(parameter)]
                shards[id(parameter)] = _flat(name, parameter, 0, size, parts, handle.rank, total)
    if missing := [name for i, name in names.items() if i not in shards]:
        raise RuntimeError(
            f"{missing[0]}: expected the FullyShardedDataParallel module that flattened this "
            "parameter to exist while it is trained, found none"
        )
    return shards


def _flat(
    name: str,
    origin: Tensor,
    offset: int,
    size: int,
    parts: int,
    rank: int,
    total: int | None,
    group: int = 0,
) -> LocalShard:
    """Return the shard of an engine's flat tensor; a whole parameter if there is one part."""
    whole = as_real(origin)
    here = whole if size == whole.numel() else whole.flatten()[offset : offset + size]
    return LocalShard(
        name,
        here,
        parts=parts,
        part=(rank,) if parts > 1 else (),
        total=total,
        layout=f"{total} {origin.dtype} in {parts}",
        origin=origin,
        offset=offset,
        group=group,
        flat=parts > 1 or here is not whole,
    )


# ---- DeepSpeed ZeRO ---------------------------------------------------------------------------

_DEEPSPEED = "deepspeed.runtime."


def zero_optimizer_of(optimizer: Optimizer) -> Any:
    """Return the ZeRO optimizer that steps ``optimizer``, or None.

    The torch optimizer inside holds the flat float32 partitions only in part (stages 1 and 2,
    where they look like whole tensors) or not at all outside of its step (stage 3), and does not
    lead to the engine's optimizer. So that one is looked for among all living Python objects
    (0.2 s), and only if DeepSpeed has been imported.
    """
    if not any(name.startswith(_DEEPSPEED) for name in sys.modules):
        return None
    for candidate in gc.get_objects():
        if (
            str(type(candidate).__module__).startswith(_DEEPSPEED)
            and getattr(candidate, "optimizer", None) is optimizer
            and (_is_stage_three(candidate) or hasattr(candidate, "real_dp_process_group"))
        ):
            return candidate
    return None


def is_partitioned(parameter: Tensor) -> bool:
    """Return True if ZeRO-3 manages the parameter: its data are then elsewhere."""
    return hasattr(parameter, "ds_id")


def zero_tensors(zero: Any) -> list[Tensor]:
    """Return the float32 partitions on this rank."""
    if _is_stage_three(zero):
        return list(zero.fp32_partitioned_groups_flat)
    return [p for group in zero.optimizer.param_groups for p in group["params"]]


def zero_shards(zero: Any) -> list[LocalShard]:
    """Return the parts on this rank, without padding, whose content is arbitrary.

    Raises:
        RuntimeError: a partition is not in memory.
    """
    tensors = zero_tensors(zero)
    if not _is_stage_three(zero):
        return [_stage_one_or_two(zero, i, tensor) for i, tensor in enumerate(tensors)]
    return [shard for i, tensor in enumerate(tensors) for shard in _stage_three(zero, i, tensor)]


def _is_stage_three(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _stage_one_or_two(zero: Any, i: int, tensor: Tensor) -> LocalShard:
    # Two classes, by the dtypes in use: DeepSpeedZeroOptimizer and BF16_Optimizer.
    paddings = zero.groups_padding if hasattr(zero, "groups_padding") else zero.group_paddings
    groups = zero.bit16_groups if hasattr(zero, "bit16_groups") else zero.bf16_groups
    # Padding between parameters is not recorded by rank; the total then cannot be compared.
    aligned = any(map(any, getattr(zero, "round_robin_bit16_padding", ())))
    total = None if aligned else sum(p.numel() for p in groups[i])
    ranks, size = zero.real_dp_process_group[i], tensor.numel() - paddings[i]
    name = f"ZeRO partition of param_groups[{i}]"
    return _flat(name, tensor, 0, size, ranks.size(), ranks.rank(), total, group=i)


def _stage_three(zero: Any, i: int, tensor: Tensor) -> list[LocalShard]:
    """Return the parts of the parameters that one partition holds, one after the other."""
    if tensor is None or tensor.numel() == 0:
        raise RuntimeError(
            f"params: expected the float32 partition {i} of ZeRO-3 in GPU or host memory, got none "
            "(offloaded to NVMe?)"
        )
    ranks = zero.dp_process_group
    group = zero.sub_group_to_group_id[i]
    shards = []
    offset = 0
    for p in zero.fp16_groups[i]:
        size = p.ds_tensor.ds_numel  # every rank's part is as large, the last ones are padded
        here = min(max(p.ds_numel - ranks.rank() * size, 0), size)
        name = f"ZeRO-3 parameter {p.ds_id} in partition {i}"
        total = p.ds_numel
        shards.append(
            _flat(name, tensor, offset, here, ranks.size(), ranks.rank(), total, group=group)
        )
        offset += size
    return shards
