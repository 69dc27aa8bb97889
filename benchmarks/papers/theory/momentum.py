"""The Unified Momentum method (UAI 2024, equation (9); 2021, equation (7)) as an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from autodrop_ext.checks import at_least_zero, number


def fraction(name: str, value: Any) -> float:
    """Check a momentum, in [0, 1)."""
    return number(name, value, "a number from 0 to below 1", lambda x: 0 <= x < 1)


class UnifiedMomentum(Optimizer):
    """Heavy ball, Nesterov and gradient descent in one update, chosen by ``s``.

    Equation (9), with ``G_t`` the gradient at ``x_t``::

        y_{t+1}  = x_t - lr_t G_t
        ys_{t+1} = x_t - s lr_t G_t
        x_{t+1}  = y_{t+1} + momentum (ys_{t+1} - ys_t)

    ``s = 0`` is heavy ball, ``s = 1`` Nesterov, ``s = 1 / (1 - momentum)`` gradient descent at the
    rate ``lr / (1 - momentum)``. The papers do not say what ``ys_0`` is; as their proof's
    ``p_0 = 0`` in (26), the velocity starts at zero.

    One buffer per parameter suffices: with ``v_t = x_t - x_{t-1} + s lr_{t-1} G_{t-1}``, (25) gives
    ``v_{t+1} = momentum v_t + ((1 - momentum) s - 1) lr_t G_t`` and
    ``x_{t+1} = x_t + v_{t+1} - s lr_t G_t``.

    At a constant rate ``s = 0`` equals ``torch.optim.SGD(momentum=...)`` and ``s = 1`` equals
    ``SGD(momentum=..., nesterov=True)``. Where the rate changes they differ: the buffer here holds
    displacements, as in the papers, torch's holds gradients, so that a drop of the rate scales
    torch's momentum down at once and this one's only as it decays.

    The buffer has the parameter's dtype, as torch's. In float16 a displacement below 6e-8 vanishes
    in it; keep float32 parameters there.

    Args:
        params: as in torch's optimizers: tensors, names with tensors, or dicts with own options.
        lr: ``alpha_t``, a float or a tensor of one element, at least 0.
        momentum: ``beta``, from 0 to below 1.
        s: at least 0.
        weight_decay: ``weight_decay * x`` is added to the gradient, as in ``torch.optim.SGD``. Not
            in the papers.

    Raises:
        ValueError, TypeError: an argument is wrong; the message gives it, what was expected and
            what came.
        RuntimeError: at :meth:`step`, a gradient is sparse.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        s: float = 0.0,
        *,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "s": s, "weight_decay": weight_decay}
        _check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group's own options are checked like the constructor's."""
        if isinstance(param_group, dict):
            _check_options(param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """One update of every parameter that has a gradient.

        Args:
            closure: recomputes the loss and its gradients, and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params in _alike([p for p in group["params"] if p.grad is not None]):
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        lr, momentum, s = float(group["lr"]), group["momentum"], group["s"]
        gradients = [p.grad for p in params if p.grad is not None]
        if any(g.is_sparse for g in gradients):
            raise RuntimeError("UnifiedMomentum: expected dense gradients, got a sparse one")
        if group["weight_decay"] != 0:
            gradients = list(torch._foreach_add(gradients, params, alpha=group["weight_decay"]))
        if momentum != 0:
            velocities = [self._velocity(p) for p in params]
            torch._foreach_mul_(velocities, momentum)
            torch._foreach_add_(velocities, gradients, alpha=((1 - momentum) * s - 1) * lr)
            torch._foreach_add_(params, velocities)
            if s != 0:
                torch._foreach_add_(params, gradients, alpha=-s * lr)
        else:
            torch._foreach_add_(params, gradients, alpha=-lr)  # for every s

    def _velocity(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        velocity: Tensor = state["velocity"]
        return velocity


def _alike(params: list[Tensor]) -> list[list[Tensor]]:
    """Parameters by device and dtype: mixed lists leave the fast path of ``torch._foreach_*``."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in params:
        groups.setdefault((param.device, param.dtype), []).append(param)
    return list(groups.values())


def _check_options(options: dict[str, Any]) -> None:
    lr = options.get("lr")
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr: expected a tensor of one element, got shape {list(lr.shape)}")
        lr = float(lr)
    if lr is not None:
        at_least_zero("lr", lr)
    if "momentum" in options:
        fraction("momentum", options["momentum"])
    if "s" in options:
        number(
            "s",
            options["s"],
            "a finite number of at least 0 (0 heavy ball, 1 Nesterov, 1/(1-momentum) gradient "
            "descent)",
            lambda x: 0 <= x < math.inf,
        )
    if "weight_decay" in options:
        at_least_zero("weight_decay", options["weight_decay"])
