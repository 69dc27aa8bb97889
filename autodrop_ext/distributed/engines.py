"""From what an optimizer holds to what this rank holds, whichever engine shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .fsdp1 import flattened_shards
from .shards import LocalShard, is_dtensor, of_dtensor, whole


def local_shards(
    named: Iterable[tuple[str, Tensor]], group_of: Mapping[int, int]
) -> list[LocalShard]:
    """What this rank holds of the given parameters; the same tensor given twice counts once.

    Args:
        named: names and parameters.
        group_of: index of the param group by ``id`` of the parameter; 0 for others.

    Raises:
        TypeError: a DTensor has a ``Partial`` placement.
        RuntimeError: FSDP1 flattened a parameter, and its module is gone.
    """
    distinct: dict[int, tuple[str, Tensor]] = {}
    for name, parameter in named:
        distinct.setdefault(id(parameter), (name, parameter))
    parameters = list(distinct.values())
    flattened = flattened_shards(parameters)
    shards = []
    for name, parameter in parameters:
        group = group_of.get(id(parameter), 0)
        if id(parameter) in flattened:
            shards.append(flattened[id(parameter)]._replace(group=group))
        elif is_dtensor(parameter):
            shards.append(of_dtensor(name, parameter)._replace(group=group))
        else:
            shards.append(whole(name, parameter, group))
    return shards


def unwrap_optimizer(optimizer: Any) -> Any:
    """The ``torch.optim.Optimizer`` inside of accelerate's and DeepSpeed's wrappers."""
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, Optimizer) and inner is not optimizer:
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    return optimizer
