"""Backends, and the choice between them.

``auto`` takes, for each device, the first of :data:`BACKENDS` that serves it, and logs that
choice once; as a warning if only the reference is left, which takes a call of torch for each
tensor and operation. A backend named by the user is used or refused, never replaced.
"""

from __future__ import annotations

import functools
import logging

import torch

from .backends import Backend, CpuBackend, ReferenceBackend, table_device
from .cuda import CudaBackend
from .triton import TritonBackend

__all__ = ["BACKENDS", "Backend", "report", "select", "table_device"]

logger = logging.getLogger("autodrop_ext")

BACKENDS: dict[str, Backend] = {
    b.name: b for b in (CpuBackend(), CudaBackend(), TritonBackend(), ReferenceBackend())
}


def select(name: str, device: torch.device | str) -> Backend:
    """Return the backend for a device.

    Args:
        name: "auto" or the name of a backend.
        device: where the parameters are; "cuda" alone stands for the current GPU. No other device
            is touched.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the named backend does not serve the device; the message says why.
    """
    check_name(name)
    device = _with_index(device)
    if name == "auto":
        return _best(device)
    reason = BACKENDS[name].missing(device)
    if reason is not None:
        raise RuntimeError(
            f"backend {name!r} cannot be used for {device.type} parameters: {reason}. "
            "`autodrop doctor` (python -m autodrop_ext doctor) shows what works here"
        )
    return BACKENDS[name]


def check_name(name: str) -> None:
    """Raise ValueError unless ``name`` is "auto" or the name of a backend."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {sorted(BACKENDS)}, got {name!r}")


def report(device: torch.device | str) -> dict[str, str | None]:
    """Return, for every backend in order of preference, why it does not serve a device, or None."""
    device = _with_index(device)
    return {name: backend.missing(device) for name, backend in BACKENDS.items()}


def _with_index(device: torch.device | str) -> torch.device:
    """Return the same device; a GPU without an index is the current one."""
    device = torch.device(device)
    if str(device) == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


@functools.cache
def _best(device: torch.device) -> Backend:
    reasons = report(device)
    name = next(name for name, reason in reasons.items() if reason is None)
    passed = "; ".join(f"not {n}: {r}" for n, r in reasons.items() if r is not None)
    level = logging.WARNING if name == "reference" else logging.INFO
    logger.log(level, "backend for %s: %s (%s)", device, name, passed)
    return BACKENDS[name]
