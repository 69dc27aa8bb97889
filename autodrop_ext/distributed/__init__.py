"""How the parameters are spread over ranks, and how the ranks come to one angle."""

from .agreement import DisagreementError
from .engines import unwrap_optimizer
from .group import PipelineStages

__all__ = ["DisagreementError", "PipelineStages", "unwrap_optimizer"]
