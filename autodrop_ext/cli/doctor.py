"""``autodrop doctor``: versions, the backend of each device, and a self-test.

It needs nothing but torch and numpy, so that it also runs where click and rich are missing.
"""

from __future__ import annotations

import importlib
import math
import os
import platform
import shutil
import sys
import textwrap

import numpy
import torch
from torch import Tensor

import autodrop_ext

from ..meter import AngularVelocity
from ..ops import report
from ..ops.architectures import name_architectures
from ..ops.native import repair

LIMIT = 0.02  # degrees, the package's contract

_WINDOW = 8  # optimizer steps
_WINDOWS = 7
_SHAPES = (
    ((129, 65), torch.float32),
    ((4, 3, 5, 5), torch.float32),
    ((1,), torch.float32),
    ((1000,), torch.bfloat16),
    ((31, 7), torch.float16),
)
_NAMES = 22  # columns up to the end of a line's name
_COLORS = {"PASS": 32, "yes": 32, "used": 32, "FAIL": 31, "NO": 31, "not here": 33}  # of ANSI


def examine() -> int:
    """Print versions and backends, and test that angles are measured correctly.

    Returns:
        The exit status: 1 if the compiled core does not load or a test fails, otherwise 0.
    """
    _heading("Versions")
    _line("autodrop_ext", autodrop_ext.__version__)
    _line("torch", str(torch.__version__))
    _line("CUDA in torch", _cuda())
    _line("numpy", numpy.__version__)
    _line("python", f"{platform.python_version()}, {sys.executable}")
    _heading("Compiled core")
    problems = _describe_core()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    _heading("Which backend serves parameters on which device")
    for device in devices:
        _describe_backends(device)
    if "cuda" not in devices:
        _line("on cuda", "none needed: torch sees no CUDA device")
    _heading(f"Self-test: measured angles against float64 (limit: {LIMIT} degrees apart)")
    for device in devices:
        for name, missing in report(device).items():
            if missing is None:
                problems += _test(name, device)
    verdict = "PASS: the core loads, and every backend here measures correctly"
    if problems:
        verdict = f"FAIL: {'; '.join(problems)}"
    print()
    print(_colored(textwrap.fill(verdict, _width()), verdict[:4]))
    return 1 if problems else 0


def _heading(text: str) -> None:
    print()
    print(f"\033[1m{text}\033[0m" if _in_color() else text)


def _line(name: str, text: str, verdict: str = "") -> None:
    """Print a name and a text, which is folded to the width; the verdict in it gets a colour."""
    room = max(20, _width() - _NAMES)
    rows = [
        r for part in text.split("\n") for r in textwrap.wrap(part, room, break_on_hyphens=False)
    ]
    print(f"  {name}".ljust(_NAMES) + _colored(("\n" + " " * _NAMES).join(rows), verdict))


def _width() -> int:
    return shutil.get_terminal_size().columns


def _in_color() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _colored(text: str, word: str) -> str:
    if not word or not _in_color():
        return text
    return text.replace(word, f"\033[1;{_COLORS[word]}m{word}\033[0m", 1)


def _describe_core() -> list[str]:
    """Print what the compiled core is, and return its problems."""
    try:
        core = importlib.import_module("autodrop_ext._C")
    except ImportError as error:
        _line("loads", f"NO: {error}", "NO")
        _line("to repair it", repair())
        return ["the compiled core does not load"]
    _line("loads", f"yes, version {core.version}", "yes")
    _line("CPU code", f"{core.cpu_isa}, the widest that runs on this processor")
    if core.cuda_built:
        _line("CUDA kernels", f"yes, for {name_architectures(core.cuda_architectures)}", "yes")
    else:
        _line("CUDA kernels", f"no: {core.cuda_reason}")
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


def _describe_backends(device: str) -> None:
    reasons = report(device)
    used = next(name for name, missing in reasons.items() if missing is None)
    for i, (name, missing) in enumerate(reasons.items()):
        label = f"on {device}" if i == 0 else ""
        if name == used:
            _line(label, f"{name}: used", "used")
        elif missing is None:
            _line(label, f"{name}: works too; to use it: backend={name!r}")
        else:
            _line(label, f"{name}: not here: {missing}", "not here")


def _test(name: str, device: str) -> list[str]:
    """Print how a backend measures, and return its problems."""
    label = f"{name}, on {device}"
    try:
        error = largest_error(name, device)
    except Exception as failure:  # Whatever is broken here is what the user wants to know.
        _line(label, f"FAIL: {type(failure).__name__}: {failure}", "FAIL")
        return [f"backend {name} does not run on {device}"]
    if error <= LIMIT:
        _line(label, f"PASS, {error:.1e} degrees apart", "PASS")
        return []
    # also if it is NaN
    _line(label, f"FAIL, {error:.2g} degrees apart", "FAIL")
    return [f"backend {name} on {device} measures angles {error:.2g} degrees off"]


def largest_error(backend: str, device: str) -> float:
    """Return the largest difference between measured angles and those of the definition.

    Parameters of three dtypes move along a random path that turns slowly. Both sides see the same
    roundings of half precision, because both read the parameters as they are.

    Args:
        backend: The name of a backend.
        device: The name of a device, as in ``torch.device``.

    Returns:
        Degrees; infinity if an angle is missing.
    """
    random = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=random).to(device=device, dtype=dtype))
        for shape, dtype in _SHAPES
    ]
    ahead, aside = (
        [0.02 * torch.randn(p.shape, generator=random).to(device) for p in params] for _ in "ab"
    )
    meter = AngularVelocity(params, _WINDOW, backend=backend)
    means: list[Tensor] = []
    error = 0.0
    for window in range(_WINDOWS):
        total = torch.zeros((), dtype=torch.float64)
        reading = None
        for step in range(_WINDOW):
            turn = math.radians(5 * (window * _WINDOW + step))
            for p, a, b in zip(params, ahead, aside, strict=True):
                p.data.add_((math.cos(turn) * a + math.sin(turn) * b).to(p.dtype))
            reading = meter.observe()
            total = total + torch.cat([p.detach().double().cpu().flatten() for p in params])
        means.append(total / _WINDOW)
        if window >= 2:
            expected = _angle(means[-1] - means[-2], means[-2] - means[-3])
            if reading is None or reading.angle is None:
                return math.inf
            error = max(error, abs(reading.angle - expected))
    return error


def _angle(s: Tensor, previous: Tensor) -> float:
    """The definition in float64, which shares no arithmetic with the package."""
    return math.degrees(math.acos(float(s @ previous / (s.norm() * previous.norm()))))
