"""Parameters that ``FullyShardedDataParallel`` has flattened, with either ``use_orig_params``.

Nothing leads from such a parameter to the handle that knows the number of parts and the padding,
and the tensor itself does not tell whether it is whole. So the handles are looked for among all
living Python objects, once per plan (0.2 s), and only where a parameter is marked as flattened.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .shards import LocalShard


def is_flattened(parameter: Tensor) -> bool:
    """Whether FSDP1 manages the parameter."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def flattened_shards(named: Sequence[tuple[str, Tensor]]) -> dict[int, LocalShard]:
    """What this rank holds of those parameters that FSDP1 manages, by ``id`` of the parameter.

    Raises:
        RuntimeError: FSDP1 manages a parameter but its handle is gone.
    """
    names = {id(p): name for name, p in named if is_flattened(p)}
    if not names:
        return {}
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    shards: dict[int, LocalShard] = {}
    for handle in (o for o in gc.get_objects() if type(o) is FlatParamHandle):
        for parameter, total, padding in _parameters(handle):
            if id(parameter) in names:
                name = names[id(parameter)]
                shards[id(parameter)] = _shard(name, parameter, handle, total, padding)
    if missing := [name for i, name in names.items() if i not in shards]:
        raise RuntimeError(
            f"{missing[0]}: expected the FullyShardedDataParallel module that flattened this "
            "parameter to exist while it is trained, found none"
        )
    return shards


def _parameters(handle: Any) -> list[tuple[Tensor, int, int]]:
    """Of one handle: parameter, elements of the whole, padding at the end of the local part."""
    parameter = handle.flat_param
    originals = getattr(parameter, "_params", None)
    if originals is not None:  # use_orig_params=True: views without padding
        return [(p, n, 0) for p, n in zip(originals, parameter._numels, strict=True)]
    padding = parameter._shard_numel_padded if handle.uses_sharded_strategy else 0
    return [(parameter, sum(parameter._numels), padding)]


def _shard(name: str, parameter: Tensor, handle: Any, total: int, padding: int) -> LocalShard:
    parts = handle.world_size if handle.uses_sharded_strategy else 1
    tensor = parameter.detach()
    if padding:
        tensor = tensor[: tensor.numel() - padding]
    return LocalShard(
        name,
        tensor,
        parts=parts,
        part=(handle.rank,) if parts > 1 else (),
        total=total,
        layout=f"{total} {parameter.dtype} in {parts}",
        flat=parts > 1,
    )
