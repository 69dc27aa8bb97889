"""Whole parameters that FSDP has gathered and keeps, after the shards have been written to."""

from __future__ import annotations

import gc
import sys
from typing import Any


def discard_gathered() -> None:
    """Let FSDP gather the parameters of its modules from their shards at the next forward pass.

    The outermost module keeps its whole parameters after a forward pass until a backward pass,
    which does not come where a model is evaluated. Forward passes would go on with these, whatever
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
