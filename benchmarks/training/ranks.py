"""One process, or several that torchrun has started, behind one face."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Ranks:
    """The processes of this run; with one process every method does nothing.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        first: whether this process writes logs, checkpoints and results.
    """

    def __init__(self) -> None:
        started = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if started else 0
        self.size = dist.get_world_size() if started else 1
        self.first = self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, or with several ranks one that averages their gradients."""
        return DistributedDataParallel(model) if self.size > 1 else model

    def share_buffers(self, model: nn.Module) -> None:
        """Give every rank the first one's buffers, such as the statistics of batch norm."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of the ranks' values."""
        return self.sum(value) / self.size

    def sum(self, value: Tensor) -> Tensor:
        """The sum of the ranks' values; the argument stays as it is."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()


def start_ranks() -> str | None:
    """Join the other processes where torchrun has started this one.

    Returns:
        "cuda", which then means this process's GPU, or "cpu"; None where torchrun has started none.
    """
    if "LOCAL_RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return device
