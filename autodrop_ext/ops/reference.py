"""The three operations in plain PyTorch: the specification of every backend.

Symbols follow the papers. ``x`` are the parameters after an optimizer step, ``k`` is the window
(in steps), ``m_i`` the mean of the parameters over window ``i``, ``s_i = m_i - m_{i-1}`` its
displacement (UAI 2024, Definition 3.3). All tensors of one call are flat and of one length ``n``;
``A``, ``P``, ``PP``, ``S`` and ``M`` are float32, ``x`` has any dtype of :data:`DTYPES`.

Two forms of the same sums:

* **sum form** keeps the sums of three windows: ``A`` (running), ``P`` (previous), ``PP`` (before).
* **delta form** keeps ``A``, the sum of ``x - M``; ``S = k s_{i-1}``; and ``M``, the last mean;
  the low byte of ``S`` holds what rounding took from it.

Every element-wise step is rounded exactly as written here, so that all backends leave the same bits
in the arenas.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Parameter dtypes; the position of a dtype is its code in the tables (``csrc/core/tables.h``)."""

HALF_DTYPES = (torch.float16, torch.bfloat16)


def accumulate(
    A: Tensor, x: Tensor, M: Tensor | None = None, *, first: bool, weight: float = 1.0
) -> None:
    """Take one iterate into the running sum: ``A (=|+=) weight * x``, or ``weight * (x - M)``.

    Args:
        A: running sum, float32 ``[n]``, overwritten if ``first`` and added to otherwise.
        x: parameters, ``[n]``, of any supported dtype.
        M: mean of the last window, float32 ``[n]``, for delta form; None for sum form. It may be
            ``A`` itself: then ``A += weight * (x - A)`` moves a running mean.
        first: the first step of a window in sum form; whatever ``A`` held is not read.
        weight: rounded to float32; the product is rounded before it is added.
    """
    if M is None:
        term = x.to(torch.float32)
    elif x.dtype == torch.float64:
        term = (x - M.double()).float()
    else:
        term = x.to(torch.float32) - M
    if weight != 1.0:
        term = term * weight
    if first:
        A.copy_(term)
    else:
        A.add_(term)


def close_sum(A: Tensor, P: Tensor, PP: Tensor, k: float) -> Tensor:
    """Sums over one tensor at a window's end, sum form.

    Returns:
        float64 ``[4]``: ``<s_i, s_{i-1}>``, ``|s_i|^2``, ``|s_{i-1}|^2``, ``|m_i|^2``.
    """
    s, s_previous, m = (A - P).double(), (P - PP).double(), A.double()
    return torch.stack([s.dot(s_previous), s.dot(s), s_previous.dot(s_previous), m.dot(m)]) / k**2


def close_delta(A: Tensor, S: Tensor, M: Tensor, k: float) -> Tensor:
    """Sums over one tensor at a window's end, delta form; moves the arenas on to the next window.

    ``M`` becomes the new mean, ``A`` the packed displacement that the next close needs, and ``S``
    the start of the next running sum. The caller lets ``A`` and ``S`` take each other's place.

    Returns:
        float64 ``[4]``, as :func:`close_sum`.
    """
    s, s_previous = A.double(), displacement(S).double()
    exact = exact_mean(M, S) + s * (1.0 / k)
    start = round_mean(exact, out=M, packed=A, k=k)
    S.copy_(start)
    m = M.double()
    displacements = torch.stack([s.dot(s_previous), s.dot(s), s_previous.dot(s_previous)]) / k**2
    return torch.cat([displacements, m.dot(m).reshape(1)])


def displacement(S: Tensor) -> Tensor:
    """``k s_{i-1}`` from a packed arena: its upper 24 bits."""
    return (S.view(torch.int32) & ~0xFF).view(torch.float32)


def exact_mean(M: Tensor, S: Tensor) -> Tensor:
    """The mean in float64: ``M`` less the residual in the low bytes of ``S``."""
    code = ((S.view(torch.int32) << 24) >> 24).double()
    return M.double() - code * _residual_unit(M)


def round_mean(exact: Tensor, *, out: Tensor, packed: Tensor, k: float) -> Tensor:
    """Round a mean to float32 and keep what that takes away.

    Where steps are tiny, the residual ``M - m`` is as large as a displacement. It goes into the low
    byte of the displacement, in units of ``|M| 2^-31`` (see ``csrc/core/delta.h``).

    Args:
        exact: mean ``m``, float64 ``[n]``.
        out: receives ``M``, float32 ``[n]``.
        packed: holds ``k s_i``, float32 ``[n]``; its low bytes receive the residual.
        k: window in steps.

    Returns:
        float32 ``[n]``, ``k (M - m)``: what the next running sum starts from.
    """
    out.copy_(exact)
    unit = _residual_unit(out)
    ratio = (out.double() - exact) / unit
    code = ratio.round().clamp(-127, 127).nan_to_num(0.0) + 0.0  # no negative zero
    bits = packed.view(torch.int32)
    bits.add_(0x80).bitwise_and_(~0xFF).bitwise_or_(code.to(torch.int32) & 0xFF)
    return (code * unit * k).float()


def _residual_unit(M: Tensor) -> Tensor:
    return M.double().abs() * 2.0**-31


def write_back(x: Tensor, A: Tensor, scale: float, M: Tensor | None = None) -> None:
    """Set the parameters from the arena: ``x = scale * A``, or ``M + scale * A``.

    Half precision is rounded from float32, as ``Tensor.to`` does (2021, Algorithm 1: averaging).
    """
    value = A.double() * scale
    if M is not None:
        value = M.double() + value
    x.copy_(value if x.dtype == torch.float64 else value.float())
