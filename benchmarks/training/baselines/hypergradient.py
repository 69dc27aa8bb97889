"""Hypergradient descent (HD): Baydin et al., ICLR 2018, for SGD, momentum, Nesterov and Adam.

An update ``u_t(alpha) = -alpha d_t`` is linear in the learning rate, so that the loss after it
changes with the rate by ``h_t = -<g_t, d_{t-1}>``, where ``g_t`` is the gradient found there. HD
descends that hypergradient before each step: ``alpha_t = alpha_{t-1} - beta h_t``, the paper's
additive rule. Nothing keeps the rate positive, as in the paper.

Both classes are torch's optimizers with one more line in ``step()``; at ``beta=0`` they are them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class HypergradientSGD(torch.optim.SGD):
    """SGD-HD: ``d`` is the gradient, the momentum buffer, or with Nesterov ``g + momentum buffer``.

    The gradient contains the weight decay, which SGD adds to it.

    Args:
        params: of one group.
        lr: ``alpha_0``.
        beta: step size of the learning rate itself.
        momentum, nesterov, weight_decay: as in ``torch.optim.SGD``.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        beta: float,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay
        )
        self.beta = _checked(self, beta)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Change the rate, then take SGD's step."""
        loss = _evaluate(closure)
        (group,) = self.param_groups
        momentum, decay = group["momentum"], group["weight_decay"]
        params = [p for p in group["params"] if p.grad is not None]
        gradients = [p.grad.add(p, alpha=decay) if decay else p.grad for p in params]
        group["lr"] -= self.beta * _hypergradient(
            (g, self._direction(p, momentum > 0 and not group["nesterov"]))
            for p, g in zip(params, gradients, strict=True)
        )
        super().step()
        if group["nesterov"] or not momentum:
            for p, g in zip(params, gradients, strict=True):
                d = g.clone()
                if momentum:
                    d.add_(self.state[p]["momentum_buffer"], alpha=momentum)
                self.state[p]["direction"] = d
        return loss

    def _direction(self, p: Tensor, heavy_ball: bool) -> Tensor | None:
        # Heavy ball keeps the direction of its last step anyway: no copy.
        return self.state[p].get("momentum_buffer" if heavy_ball else "direction")


class HypergradientAdamW(torch.optim.AdamW):
    """Adam-HD: ``d = m / (sqrt(v) + eps)``, both moments corrected for their bias.

    Decoupled weight decay is taken as AdamW takes it and left out of ``d``: the paper's Adam has
    none.

    Args:
        params: of one group.
        lr: ``alpha_0``.
        beta: step size of the learning rate itself.
        betas, eps, weight_decay: as in ``torch.optim.AdamW``.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        beta: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.beta = _checked(self, beta)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Change the rate, then take AdamW's step."""
        loss = _evaluate(closure)
        (group,) = self.param_groups
        group["lr"] -= self.beta * _hypergradient(
            (p.grad, self._direction(p, group)) for p in group["params"] if p.grad is not None
        )
        super().step()
        return loss

    def _direction(self, p: Tensor, group: dict[str, Any]) -> Tensor | None:
        state = self.state[p]
        if not state:
            return None
        beta1, beta2 = group["betas"]
        t = float(state["step"])
        scale = math.sqrt(1 - beta2**t)
        below = (state["exp_avg_sq"].sqrt() / scale).add_(group["eps"])
        return (state["exp_avg"] / (1 - beta1**t)).div_(below)


def _hypergradient(pairs: Iterable[tuple[Tensor, Tensor | None]]) -> float:
    """``-<g_t, d_{t-1}>``; one value is read from the device a step, and 0 before the first."""
    products = [(g * d).sum() for g, d in pairs if d is not None]
    return -float(torch.stack(products).sum()) if products else 0.0


def _checked(optimizer: torch.optim.Optimizer, beta: float) -> float:
    if len(optimizer.param_groups) != 1:
        raise ValueError(
            "params: hypergradient descent has one learning rate, so expected one param group, "
            f"got {len(optimizer.param_groups)}"
        )
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta: expected a finite number, at least 0, got {beta!r}")
    return beta


def _evaluate(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
