"""What a rank holds of each parameter, and into how many different parts the parameter is cut.

One rule gives every layout its weight. A parameter is cut into ``parts`` different parts: the
product of the mesh dimensions that are not ``Replicate`` (1 for a plain tensor, the size of the
shard group for flat shards). If ``ranks_per_copy`` ranks hold one copy of the model together, each
part is on ``ranks_per_copy / parts`` of them, so that sums over a local part weigh
``parts / ranks_per_copy``, and every element counts exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sharding:
    """How a DTensor is spread: what is needed to make another one like it."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]


class LocalShard(NamedTuple):
    """This rank's part of one parameter.

    Attributes:
        name: for messages and checkpoints.
        tensor: the elements on this rank, without padding; may be empty.
        parts: into how many different parts the parameter is cut.
        part: which of them this one is; ranks that hold the same elements have equal values.
        total: elements of the whole parameter; None where the engine does not tell.
        layout: description of shape and placement; equal on all ranks that share the parameter.
        sharding: of a DTensor; None otherwise.
        flat: a flat shard of FSDP1 or ZeRO, which another number of ranks cannot take over.
        group: index of the param group that it belongs to.
    """

    name: str
    tensor: Tensor
    parts: int
    part: tuple[int, ...]
    total: int | None
    layout: str
    sharding: Sharding | None = None
    flat: bool = False
    group: int = 0

    @property
    def split(self) -> bool:
        """Whether this rank holds less than the whole parameter."""
        return self.flat or self.parts > 1


def is_dtensor(tensor: Tensor) -> bool:
    """Without importing ``torch.distributed.tensor``, which takes a second."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor on this rank; the tensor itself unless it is a DTensor."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():  # with gradients, to_local() would make a view with a history
        return tensor.to_local()  # type: ignore[attr-defined, no-any-return]


def whole(name: str, tensor: Tensor, group: int = 0) -> LocalShard:
    """A parameter of which this rank has every element."""
    n = tensor.numel()
    layout = f"{tuple(tensor.shape)} {tensor.dtype}"
    return LocalShard(name, tensor.detach(), 1, (), n, layout, group=group)


def of_dtensor(name: str, parameter: Any) -> LocalShard:
    """A DTensor on any mesh.

    Raises:
        TypeError: a placement is ``Partial``: not a parameter, but a sum that was not taken yet.
    """
    mesh, placements = parameter.device_mesh, tuple(parameter.placements)
    if any(p.is_partial() for p in placements):
        raise TypeError(
            f"{name}: expected a parameter that is sharded or replicated, got the placements "
            f"{placements}; a Partial placement holds a sum that has not been taken yet"
        )
    cut = [d for d, p in enumerate(placements) if not p.is_replicate()]
    parts = 1
    for d in cut:
        parts *= mesh.size(d)
    coordinate = mesh.get_coordinate()  # None: this rank is outside of the mesh
    local = local_tensor(parameter).detach()
    return LocalShard(
        name,
        local,
        parts=parts,
        part=(-1,) if coordinate is None else tuple(coordinate[d] for d in cut),
        total=parameter.numel(),
        layout=f"{tuple(parameter.shape)} {parameter.dtype} {placements} {tuple(mesh.shape)}",
        sharding=Sharding(mesh, placements, parameter.shape, parameter.stride()),
    )
