"""What a user would write without this package: window sums with torch's own operations.

Each peer keeps three lists or vectors of float32 sums, as the meter does, and its ``close`` returns
the same four numbers. They are checked against float64 before they are timed, to the accuracy that
they are written for.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Foreach:
    """``torch._foreach_*`` over lists of float32 sums; a close adds up in float64, as ours does."""

    dtype: torch.dtype | None = torch.float64
    accuracy = 1e-6  # relative, of the four sums

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
        dot = torch.stack([p.sum(dtype=self.dtype) for p in products]).double().sum()
        norms = [
            torch.stack(torch._foreach_norm(x, 2, self.dtype)).double().square().sum()
            for x in (s, s_previous, self.running)
        ]
        self.running, self.previous, self.before = self.before, self.running, self.previous
        return tuple(x.item() / window**2 for x in (dot, *norms))


class ForeachFloat32(Foreach):
    """The fastest close that ``torch._foreach_*`` gives; its norms miss the accuracy contract."""

    dtype = None
    accuracy = 2e-4


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
        result = (s @ s_previous, s @ s, s_previous @ s_previous, self.running @ self.running)
        self.running, self.previous, self.before = self.before, self.running, self.previous
        return tuple(x.item() / window**2 for x in result)


Peer = Foreach | ForeachFloat32 | Flattening


def against_float64(peer: type[Peer], device: str = "cpu") -> tuple[list[float], list[float]]:
    """A peer's four sums after three windows of a random walk, and those of float64."""
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
    exact = (s @ s_previous, s @ s, s_previous @ s_previous, m[2] @ m[2])
    return list(result), [x.item() for x in exact]
