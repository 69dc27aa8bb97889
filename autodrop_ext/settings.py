"""A setting: its name, default, check, help and use in states and titles, declared once.

Argument checks, saved states, the header of a log, titles of pictures and the comparison of ranks
all follow from the declarations below.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from . import checks
from .checks import Check, at_least, choice, none_or
from .saved import Form, Later

REQUIRED = inspect.Parameter.empty
"""The default of an argument that has none."""


@dataclass(frozen=True)
class Setting:
    """An argument of a constructor that decisions depend on.

    Attributes:
        name: of the argument, of the attribute, and of the entry of a state.
        default: of the argument.
        check: takes a name for messages and a value, and returns the value converted.
        help: one line.
        saved: whether a scheduler's state holds it, and replaces it when it is loaded. The others
            are the meter's.
        always: whether a picture's title has it even if it is the default.
        unit: of the value, in titles.
        at_least: name of the setting that it must not be below.
        late: whether states of earlier releases lack it; it has its default there.
        fixed: whether what a state has gathered depends on it, so that it cannot change on resume.
    """

    name: str
    default: Any
    check: Check
    help: str
    saved: bool = True
    always: bool = False
    unit: str = ""
    at_least: str | None = None
    late: bool = False
    fixed: bool = False


Settings = tuple[Setting, ...]


def check_arguments(settings: Settings, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked settings among the arguments of a constructor."""
    values = {s.name: s.check(s.name, arguments[s.name]) for s in settings}
    check_together(settings, values, "{}")
    return values


def check_together(settings: Settings, values: Mapping[str, Any], called: str) -> None:
    """Check settings against each other; ``called.format(name)`` is a setting in messages."""
    for s in settings:
        if s.at_least is not None and values[s.name] < values[s.at_least]:
            raise ValueError(
                f"{called.format(s.name)}: expected at least {s.at_least}="
                f"{values[s.at_least]!r}, got {values[s.name]!r}"
            )


def form_of(settings: Settings) -> Form:
    """Return the form of the settings in a saved state."""
    return {s.name: Later(s.check, s.default) if s.late else s.check for s in settings if s.saved}


def usual_values(name: str) -> list[Any]:
    """Return the defaults of a setting that a title leaves out."""
    return [s.default for s in _declared() if s.name == name and not s.always]


def unit_of(name: str) -> str:
    """Return the unit of a setting, to be put after its value."""
    return next((s.unit for s in _declared() if s.name == name), "")


def _declared() -> Iterable[Setting]:
    return (*AUTODROP, *ANYTIME, *EPOCH, *ANALYTIC, *METER)


def _degrees(name: str, value: Any) -> float:
    return checks.finite(name, value, "a finite number of degrees")


def degrees_above_0(name: str, value: Any) -> float:
    """A threshold."""
    degrees = "a finite number of degrees above 0"
    return checks.number(name, value, degrees, lambda x: 0 < x < math.inf)


WINDOW = Setting(
    "window", 64, at_least(1), "``k``, optimizer steps per window", always=True, fixed=True
)
SNAPSHOTS = Setting(
    "snapshots",
    None,
    none_or(at_least(1)),
    "how many times a window the parameters are read",
    saved=False,
)
BUCKETS = Setting(
    "buckets", 2**18, checks.buckets, "float64 sums in a table; None for exact angles", saved=False
)
PER_TENSOR = Setting(
    "per_tensor", False, checks.flag, "whether there are angles of each parameter", saved=False
)
PER_GROUP = Setting(
    "per_group",
    False,
    checks.flag,
    "whether every param group is on its own",
    late=True,
    fixed=True,
)
FACTOR = Setting("factor", 0.95, checks.between_0_and_1, "``rho``, in (0, 1)", always=True)
MIN_LR = Setting("min_lr", 0.0, checks.one_or_several, "lower bound of the rate")
WARMUP_STEPS = Setting(
    "warmup_steps", 0, at_least(0), "optimizer steps of linear warm-up", fixed=True
)
WARMUP = dataclasses.replace(WARMUP_STEPS, check=checks.steps_or_auto)

AVERAGE = Setting(
    "average", False, checks.flag, "whether parameters are averaged over the run", late=True
)

METER: Settings = (WINDOW, SNAPSHOTS, BUCKETS, PER_TENSOR, PER_GROUP)

AUTODROP: Settings = (
    WINDOW,
    FACTOR,
    Setting("threshold", 0.1, _degrees, "degrees per window", always=True, unit="°"),
    Setting("buffer_size", 10, at_least(1), "``m``, angles that are smoothed over"),
    Setting("min_samples", 10, at_least(1), "angles since the last drop before smoothing starts"),
    Setting("kernel", "value", choice("value", "time"), "what the Gaussian filter weighs by"),
    MIN_LR,
    WARMUP,
    PER_GROUP,
    AVERAGE,
    *(SNAPSHOTS, BUCKETS, PER_TENSOR),
)

ANYTIME: Settings = (
    Setting(
        "min_window", 16, at_least(1), "length of the first windows, optimizer steps", fixed=True
    ),
    # With 1, the window would double before it has had an angle.
    Setting(
        "windows", 8, at_least(2), "``N``: the window doubles after ``2 N`` windows", fixed=True
    ),
    Setting("snapshots", 32, at_least(1), SNAPSHOTS.help, fixed=True),
    Setting("critical", 0.25, checks.cosine, "cosine below which rates fall"),
    Setting("gain", 5.0, checks.number, "exponent for each unit of cosine below ``critical``"),
    Setting("max_power", 0.5, checks.number, "largest exponent"),
    Setting("cosines", 8, at_least(1), "how many of the newest cosines are averaged"),
    MIN_LR,
    WARMUP,
    dataclasses.replace(AVERAGE, default=True),
    BUCKETS,
)

EPOCH: Settings = (
    Setting("factor", 0.2, FACTOR.check, FACTOR.help, always=True),
    Setting(
        "threshold",
        0.01,
        degrees_above_0,
        "``theta`` until the first drop, degrees",
        always=True,
        unit="°",
    ),
    Setting(
        "max_threshold",
        1.0,
        degrees_above_0,
        "upper bound of ``theta``, degrees",
        unit="°",
        at_least="threshold",
    ),
    Setting("delay", 20, at_least(0), "``n_d``, epochs between condition and drop", always=True),
    Setting("average", True, checks.flag, "whether parameters are averaged over the delay"),
    MIN_LR,
    dataclasses.replace(BUCKETS, default=None),
)

ANALYTIC: Settings = (
    Setting("gamma", REQUIRED, checks.number, "curvature of the model", always=True),
    Setting("epsilon", REQUIRED, checks.number, "of the model's limit", always=True),
    Setting("tau0", REQUIRED, checks.tau0, "threshold of the derivative, radians", always=True),
    Setting("rates", "theorem", choice("theorem", "proof"), "``r_i``, the rates one by one"),
    WARMUP_STEPS,
)


Function = TypeVar("Function", bound=Callable[..., Any])


def removed(**advice: str) -> Callable[[Function], Function]:
    """Refuse arguments of earlier releases.

    Args:
        advice: what to do instead, by the name of the argument.

    Returns:
        A decorator of a constructor, which then raises TypeError for such an argument.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name in advice:
                    raise TypeError(f"{name}: expected no such argument; {advice[name]}")
            return function(*args, **kwargs)

        return cast(Function, wrapped)

    return decorate


USE_BUCKETS = (
    "every parameter is read now, and added to a table of constant size; buckets= sets its size"
)
