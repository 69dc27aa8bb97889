"""What a user would write without this package: window sums with torch's own operations.

Each peer keeps three lists or vectors of float32 sums, 12 bytes a parameter, and its ``close``
returns dot product and norms of the last two displacements. They are checked against float64 before
they are timed, to the accuracy that they are written for.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Foreach:
    """``torch._foreach_*`` over lists of float32 sums, the fastest of torch's own ways.

    The norms that it adds up in float32 are off by up to 4e-5 for ResNet-50, which is less than
    what a table of 2^18 buckets adds.
    """

    accuracy = 2e-4  # relative, of the three numbers

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        self.running, self.previous, self.before = (
            [torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(3)
        )

    def accumulate(self, first: bool = False) -> None:
        if first:
            torch._foreach_copy_(self.running, self.params)
        else:
            torch._foreach_add_(self.running, self.params)

    def close(self, window: int) -> tuple[float, ...]:
        s = torch._foreach_sub(self.running, self.previous)
        s_previous = torch._foreach_sub(self.previous, self.before)
        products = torch._foreach_mul(s, s_previous)
        dot = torch.stack([p.sum() for p in products]).double().sum()
        norms = [
            torch.stack(torch._foreach_norm(x, 2)).double().square().sum() for x in (s, s_previous)
        ]
        self.running, self.previous, self.before = self.before, self.running, self.previous
        return tuple(x.item() / window**2 for x in (dot, *norms))


class ForeachStaged(Foreach):
    """The same for half precision, which is converted first: mixed lists are slow to add."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params)
        self.staging = [torch.empty_like(s) for s in self.running]

    def accumulate(self, first: bool = False) -> None:
        if first:
            torch._foreach_copy_(self.running, self.params)
        else:
            torch._foreach_copy_(self.staging, self.params)
            torch._foreach_add_(self.running, self.staging)


class Flattening:
    """``torch.cat`` into one vector at every step, as the papers' authors do."""

    accuracy = 2e-4

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        n = sum(p.numel() for p in params)
        self.running, self.previous, self.before = (torch.zeros(n) for _ in range(3))

    def accumulate(self, first: bool = False) -> None:
        flat = torch.cat([p.reshape(-1) for p in self.params])
        if first:
            self.running.copy_(flat)
        else:
            self.running.add_(flat)

    def close(self, window: int) -> tuple[float, ...]:
        s, s_previous = self.running - self.previous, self.previous - self.before
        result = (s @ s_previous, s @ s, s_previous @ s_previous)
        self.running, self.previous, self.before = self.before, self.running, self.previous
        return tuple(x.item() / window**2 for x in result)


Peer = Foreach | ForeachStaged | Flattening


class PlainRead:
    """``torch.sum`` of one float32 vector of as many bytes: a read, and next to nothing else."""

    def __init__(self, params: list[Tensor]) -> None:
        size = sum(p.numel() * p.element_size() for p in params)
        self.flat = torch.randn(size // 4)

    def accumulate(self) -> None:
        self.flat.sum()


def against_float64(peer: type[Peer], device: str = "cpu") -> tuple[list[float], list[float]]:
    """A peer's three numbers after three windows of a random walk, and those of float64."""
    params = [torch.randn(3_000_000, device=device), torch.randn(50, 7, device=device).bfloat16()]
    other = peer(params)
    iterates = []
    for step in range(12):
        for p in params:
            p.add_(torch.randn_like(p), alpha=0.1)
        iterates.append(torch.cat([p.double().reshape(-1) for p in params]))
        other.accumulate(first=step % 4 == 0)
        if step % 4 == 3:
            result = other.close(4)
    m = torch.stack(iterates).view(3, 4, -1).mean(dim=1)
    s, s_previous = m[2] - m[1], m[1] - m[0]
    exact = (s @ s_previous, s @ s, s_previous @ s_previous)
    return list(result), [x.item() for x in exact]
