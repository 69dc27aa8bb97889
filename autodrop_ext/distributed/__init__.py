"""How the parameters are spread over ranks, and how the ranks come to one angle."""

from . import deepspeed
from .agreement import Agreement, DisagreementError, Row, add_in_order, agree
from .engines import local_shards, unwrap_optimizer
from .group import (
    Holding,
    PipelineStages,
    Ranks,
    check_group,
    elements_per_rank,
    find_ranks,
    model_elements,
)
from .shards import LocalShard, Sharding, local_tensor

__all__ = [
    "Agreement",
    "DisagreementError",
    "Holding",
    "LocalShard",
    "PipelineStages",
    "Ranks",
    "Row",
    "Sharding",
    "add_in_order",
    "agree",
    "check_group",
    "deepspeed",
    "elements_per_rank",
    "find_ranks",
    "local_shards",
    "local_tensor",
    "model_elements",
    "unwrap_optimizer",
]
