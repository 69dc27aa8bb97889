"""Backends, and the choice between them.

``auto`` takes, for each type of device, the first of :data:`PREFERENCE` that serves it, and logs
that choice once. A backend named by the user is used or refused, never replaced.
"""

from __future__ import annotations

import functools
import logging

from .cpu import CpuBackend
from .cuda import CudaBackend
from .eager import ReferenceBackend
from .interface import Backend, Operations, Sums
from .triton import TritonBackend

__all__ = ["BACKENDS", "Backend", "Operations", "Sums", "report", "select"]

logger = logging.getLogger("autodrop_ext")

PREFERENCE = ("cpu", "cuda", "triton", "reference")
BACKENDS: dict[str, Backend] = {
    b.name: b for b in (CpuBackend(), CudaBackend(), TritonBackend(), ReferenceBackend())
}


def select(name: str, device_type: str) -> Backend:
    """The backend for a device type.

    Args:
        name: "auto" or the name of a backend.
        device_type: as in ``torch.device.type``.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the named backend does not serve the device type; the message says why.
    """
    check_name(name)
    if name == "auto":
        return _best(device_type)
    reason = BACKENDS[name].missing(device_type)
    if reason is not None:
        raise RuntimeError(
            f"backend {name!r} cannot be used for {device_type} parameters: {reason}. "
            "`autodrop doctor` (python -m autodrop_ext doctor) shows what works here"
        )
    return BACKENDS[name]


def check_name(name: str) -> None:
    """Raises ValueError unless ``name`` is "auto" or the name of a backend."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {sorted(BACKENDS)}, got {name!r}")


def report(device_type: str) -> dict[str, str | None]:
    """For every backend in order of preference, why it does not serve a device type, or None."""
    return {name: BACKENDS[name].missing(device_type) for name in PREFERENCE}


@functools.cache
def _best(device_type: str) -> Backend:
    reasons = report(device_type)
    name = next(name for name in PREFERENCE if reasons[name] is None)
    passed = "; ".join(f"not {n}: {r}" for n, r in reasons.items() if r is not None)
    logger.info("backend for %s: %s%s", device_type, name, f" ({passed})" if passed else "")
    return BACKENDS[name]
