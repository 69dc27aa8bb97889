"""DeepSpeed ZeRO: the optimizer steps flat float32 partitions of all parameters together.

The wrapped torch optimizer holds them only in part (stages 1 and 2, where they look like whole
tensors) or not at all outside of its step (stage 3), and does not lead to the engine's optimizer.
So that one is looked for among all living Python objects, once per plan (0.2 s), and only where
DeepSpeed has been imported.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .shards import LocalShard

_MODULES = "deepspeed.runtime."


def zero_optimizer_of(optimizer: Optimizer) -> Any:
    """The ZeRO optimizer that steps ``optimizer``, or None."""
    if not any(name.startswith(_MODULES) for name in sys.modules):
        return None
    for candidate in gc.get_objects():
        if (
            str(type(candidate).__module__).startswith(_MODULES)
            and getattr(candidate, "optimizer", None) is optimizer
            and (_is_stage_three(candidate) or hasattr(candidate, "real_dp_process_group"))
        ):
            return candidate
    return None


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 manages the parameter: its data are then elsewhere."""
    return hasattr(parameter, "ds_id")


def zero_tensors(zero: Any) -> list[Tensor]:
    """The float32 partitions on this rank."""
    if _is_stage_three(zero):
        return list(zero.fp32_partitioned_groups_flat)
    return [p for group in zero.optimizer.param_groups for p in group["params"]]


def zero_shards(zero: Any) -> list[LocalShard]:
    """The parts on this rank, without padding, whose content is arbitrary.

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
    here = tensor[: tensor.numel() - paddings[i]]
    name = f"ZeRO partition of param_groups[{i}]"
    return _part(name, here, zero.real_dp_process_group[i], total, group=i)


def _stage_three(zero: Any, i: int, tensor: Tensor) -> list[LocalShard]:
    """The parts of the parameters that one partition holds, one after the other."""
    if tensor is None or tensor.numel() == 0:
        raise RuntimeError(
            f"params: expected the float32 partition {i} of ZeRO-3 in GPU or host memory, got none "
            "(offloaded to NVMe?)"
        )
    ranks = zero.dp_process_group
    shards = []
    offset = 0
    for p in zero.fp16_groups[i]:
        size = p.ds_tensor.ds_numel  # every rank's part is as large, the last ones are padded
        here = min(max(p.ds_numel - ranks.rank() * size, 0), size)
        name = f"ZeRO-3 parameter {p.ds_id} in partition {i}"
        group = zero.sub_group_to_group_id[i]
        shards.append(_part(name, tensor[offset : offset + here], ranks, p.ds_numel, group))
        offset += size
    return shards


def _part(name: str, tensor: Tensor, ranks: Any, total: int | None, group: int) -> LocalShard:
    parts = ranks.size()
    return LocalShard(
        name,
        tensor.detach(),
        parts=parts,
        part=(ranks.rank(),),
        total=total,
        layout=f"{total} {tensor.dtype} in {parts}",
        flat=parts > 1,
        group=group,
    )
