"""``autodrop doctor``: what is installed, what serves which device, and does it measure right."""

from __future__ import annotations

import importlib
import math
import platform
import sys

import click
import numpy
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

import autodrop_ext

from ..meter import AngularVelocity
from ..ops import report

LIMIT = 0.02  # degrees, what the package promises

_WINDOW = 8  # optimizer steps
_WINDOWS = 7
_SHAPES = (
    ((129, 65), torch.float32),
    ((4, 3, 5, 5), torch.float32),
    ((1,), torch.float32),
    ((1000,), torch.bfloat16),
    ((31, 7), torch.float16),
)

_STYLES = {
    "PASS": "bold green",
    "FAIL": "bold red",
    "yes": "green",
    "used": "green",
    "NO": "bold red",
    "not here": "yellow",
}


@click.command()
def doctor() -> None:
    """Show versions and backends, and test that angles are measured correctly.

    The exit status is 1 if the compiled core does not load or a test fails.
    """
    console = Console(highlight=False)
    problems: list[str] = []
    with _Section(console, "Versions") as section:
        section.line("autodrop_ext", autodrop_ext.__version__)
        section.line("torch", str(torch.__version__))
        section.line("CUDA in torch", _cuda())
        section.line("numpy", numpy.__version__)
        section.line("python", f"{platform.python_version()}, {sys.executable}")
    with _Section(console, "Compiled core") as section:
        _describe_core(section, problems)
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    with _Section(console, "Which backend serves parameters on which device") as section:
        for device in devices:
            _describe_backends(section, device)
        if "cuda" not in devices:
            section.line("on cuda", "none needed: torch sees no CUDA device")
    heading = f"Self-test: measured angles against float64 (limit: {LIMIT} degrees apart)"
    with _Section(console, heading) as section:
        for device in devices:
            for name, missing in report(device).items():
                if missing is None:
                    _test(section, name, device, problems)
    console.print()
    if problems:
        console.print(_verdict("FAIL", f": {'; '.join(problems)}"))
        raise SystemExit(1)
    console.print(_verdict("PASS", ": the core loads, and every backend here measures correctly"))


def _describe_core(section: _Section, problems: list[str]) -> None:
    try:
        core = importlib.import_module("autodrop_ext._C")
    except ImportError as error:
        problems.append("the compiled core does not load")
        section.line("loads", _verdict("NO", f": {error}"))
        section.line(
            "to repair it",
            "install a C++17 compiler, then\npip install --force-reinstall --no-deps autodrop_ext",
        )
        return
    section.line("loads", _verdict("yes", f", version {core.version}"))
    section.line("CPU code", f"{core.cpu_isa}, the widest that runs on this processor")
    architectures = f"yes, for {core.cuda_architectures}"
    section.line("CUDA kernels", architectures if core.cuda_built else f"no: {core.cuda_reason}")


def _cuda() -> str:
    if torch.version.cuda is None:
        return "none (a CPU build of torch)"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, but no device is visible"
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"{torch.version.cuda}, devices: {names}"


def _describe_backends(section: _Section, device: str) -> None:
    reasons = report(device)
    used = next(name for name, missing in reasons.items() if missing is None)
    for i, (name, missing) in enumerate(reasons.items()):
        if name == used:
            state = _verdict("used", "")
        elif missing is None:
            state = Text(f"works too; to use it: backend={name!r}")
        else:
            state = _verdict("not here", f": {missing}")
        section.line(f"on {device}" if i == 0 else "", Text(f"{name}: ").append_text(state))


def _test(section: _Section, name: str, device: str, problems: list[str]) -> None:
    label = f"{name}, on {device}"
    try:
        error = largest_error(name, device)
    except Exception as failure:  # whatever is broken here is what the user came to learn
        section.line(label, _verdict("FAIL", f": {type(failure).__name__}: {failure}"))
        problems.append(f"backend {name} does not run on {device}")
        return
    if error <= LIMIT:
        section.line(label, _verdict("PASS", f", {error:.1e} degrees apart"))
    else:  # also where it is NaN
        section.line(label, _verdict("FAIL", f", {error:.2g} degrees apart"))
        problems.append(f"backend {name} on {device} measures angles {error:.2g} degrees off")


class _Section:
    """A heading and lines of a name and a text; long texts go on below themselves."""

    def __init__(self, console: Console, heading: str) -> None:
        self._console = console
        self._heading = heading
        self._grid = Table.grid(padding=(0, 2))
        self._grid.add_column(width=2)
        self._grid.add_column(width=18)
        self._grid.add_column(overflow="fold")

    def line(self, name: str, text: str | Text) -> None:
        self._grid.add_row("", Text(name), Text(text) if isinstance(text, str) else text)

    def __enter__(self) -> _Section:
        return self

    def __exit__(self, *failure: object) -> None:
        self._console.print(Text(f"\n{self._heading}", style="bold"))
        self._console.print(self._grid)


def _verdict(word: str, rest: str) -> Text:
    return Text.assemble((word, _STYLES[word]), rest)


def largest_error(backend: str, device: str) -> float:
    """Largest difference between measured angles and those of the definition.

    Parameters of three dtypes move along a slowly turning random path; both sides see the same
    roundings of half precision, because both read the parameters as they are.

    Args:
        backend: by name.
        device: as in ``torch.device``.

    Returns:
        Degrees; infinity where an angle is missing.
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
    """The definition in float64, independent of the package's own arithmetic."""
    return math.degrees(math.acos(float(s @ previous / (s.norm() * previous.norm()))))
