"""``autodrop doctor``: versions, the backend of each device, and a self-test."""

from __future__ import annotations

import importlib
import math
import platform
import sys

import numpy
import torch
from torch import Tensor

import autodrop_ext

from ..meter import AngularVelocity
from ..ops import report
from ..ops.native import repair

EXACT_LIMIT = 1e-6  # degrees
SKETCH_LIMIT = 4.0  # standard errors; one reading in 16,000 is further off
_BUCKETS = 4096  # fewer than the elements of the test

_SHAPES = (((129, 65), torch.float32), ((1000,), torch.bfloat16), ((31, 7), torch.float16))


def examine() -> int:
    """Print versions and backends, and test that angles are measured correctly.

    Returns:
        The exit status: 1 if the compiled core does not load or a test fails, otherwise 0.
    """
    print("Versions")
    _line("autodrop_ext", autodrop_ext.__version__)
    _line("torch", str(torch.__version__))
    _line("CUDA in torch", _cuda())
    _line("numpy", numpy.__version__)
    _line("python", f"{platform.python_version()}, {sys.executable}")
    print("\nCompiled core")
    problems = _describe_core()
    print("\nBackends, the first that works is used")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        for name, missing in report(device).items():
            _line(f"{name}, on {device}", "works" if missing is None else f"not here: {missing}")
    print(
        f"\nSelf-test: exact angles within {EXACT_LIMIT:g} degrees, sketched within "
        f"{SKETCH_LIMIT:g} standard errors"
    )
    for device in devices:
        for name, missing in report(device).items():
            if missing is None:
                problems += _test(name, device)
    verdict = "PASS: the core loads, and every backend here measures correctly"
    print(f"\nFAIL: {'; '.join(problems)}" if problems else f"\n{verdict}")
    return 1 if problems else 0


def _line(name: str, text: str) -> None:
    print(f"  {name:<20}{text}")


def _describe_core() -> list[str]:
    """Print what the compiled core is, and return its problems."""
    try:
        core = importlib.import_module("autodrop_ext._C")
    except ImportError as error:
        _line("loads", f"NO: {error}")
        _line("to repair it", repair())
        return ["the compiled core does not load"]
    _line("loads", f"yes, version {core.version}")
    _line("CPU code", f"{core.cpu_isa}, the best that runs on this processor")
    built = f"yes, for {core.cuda_architectures}" if core.cuda_built else f"no: {core.cuda_reason}"
    _line("CUDA kernels", built)
    return []


def _cuda() -> str:
    if torch.version.cuda is None:
        return "none (a CPU build of torch)"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, but no device is visible"
    names = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        names.append(f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    return f"{torch.version.cuda}, devices: {', '.join(names)}"


def _test(name: str, device: str) -> list[str]:
    """Print how a backend measures, and return its problems."""
    label = f"{name}, on {device}"
    try:
        exact = largest_error(name, device, None)
        sketched = largest_error(name, device, _BUCKETS)
    except Exception as failure:  # Whatever is broken here is what the user wants to know.
        _line(label, f"FAIL: {type(failure).__name__}: {failure}")
        return [f"backend {name} does not run on {device}"]
    found = f"{exact:.1e} degrees and {sketched:.1f} standard errors apart"
    if exact <= EXACT_LIMIT and sketched <= SKETCH_LIMIT:  # False if one is NaN
        _line(label, f"PASS, {found}")
        return []
    _line(label, f"FAIL, {found}")
    return [f"backend {name} on {device} measures angles that are {found}"]


def largest_error(backend: str, device: str, buckets: int | None) -> float:
    """Return the largest difference between measured angles and those of the definition.

    Parameters of three dtypes move along a random path that turns slowly. Both sides see the same
    roundings of half precision, because both read the parameters as they are.

    Args:
        backend: The name of a backend.
        device: The name of a device, as in ``torch.device``.
        buckets: Of the meter; None for exact angles.

    Returns:
        Degrees if angles are exact, otherwise standard errors; infinity if an angle is missing.
    """
    random = torch.Generator().manual_seed(0)
    params = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in _SHAPES]
    ahead, aside = (
        [0.02 * torch.randn(p.shape, generator=random).to(device) for p in params] for _ in "ab"
    )
    meter = AngularVelocity(params, window=8, backend=backend, buckets=buckets)
    means: list[Tensor] = []
    error, sums = 0.0, torch.zeros((), dtype=torch.float64)
    for step in range(1, 7 * meter.window + 1):
        turn = math.radians(5 * step)
        for p, a, b in zip(params, ahead, aside, strict=True):
            p.add_((math.cos(turn) * a + math.sin(turn) * b).to(p.dtype))
        reading = meter.observe()
        sums = sums + torch.cat([p.double().cpu().flatten() for p in params])
        if step % meter.window:
            continue
        means, sums = [*means[-2:], sums / meter.window], torch.zeros_like(sums)
        if len(means) == 3:
            s, previous = means[2] - means[1], means[1] - means[0]
            cosine = float(s @ previous / (s.norm() * previous.norm()))
            if reading is None or reading.angle is None:
                return math.inf
            difference = abs(reading.angle - math.degrees(math.acos(cosine)))
            error = max(error, difference / (reading.standard_error or 1.0))
    return error
