"""How the parameters are spread over ranks, and how the ranks come to one angle."""

from . import deepspeed
from .agreement import Agreement, DisagreementError, Row, agree
from .engines import local_shards, unwrap_optimizer
from .ranks import Holding, PipelineStages, Ranks, check_group, find_ranks
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
    "agree",
    "check_group",
    "deepspeed",
    "find_ranks",
    "local_shards",
    "local_tensor",
    "unwrap_optimizer",
]
