"""One verdict from the rows of all ranks, or an error that names who differs.

Every rank calls :func:`agree` on the same rows, so that all of them go on, start over together, or
raise together.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

REPLICA_TOLERANCE = 1e-6
"""Relative. Replicas of a parameter are equal to the bit, and kernels for different processors sum
them to 1e-12; two stages of a pipeline that are taken for replicas differ by far more."""

COUNT_TOLERANCE = 1e-9
"""Relative: weights such as 1/3 are rounded, once a tensor."""

Facts = Mapping[str, Any]
"""What decisions depend on: plain values by name; "lr" holds the learning rates."""


class DisagreementError(RuntimeError):
    """Ranks that should have measured the same did not; raised on all of them alike."""


class Row(NamedTuple):
    """What a rank reports at the end of a window; every entry is a float64."""

    steps: float  # optimizer steps observed
    windows: float  # closed before this one
    window: float  # steps per window
    calls: float  # of the scheduler's step(); 0 without a scheduler
    windows_since_restart: float  # this one included
    restart: float  # 1 if this rank cannot use the window and has to start over
    incomplete: float  # 1 if it has not read the whole window, because it has just resumed
    not_finite: float  # 1 if its sums are not finite
    settings: float  # digest of the settings and the state of what decides here
    rates: float  # digest of the learning rates
    layout: float  # digest of names, shapes, dtypes, placements and param groups
    held: float  # digest of which elements are here; equal on replicas
    stage: float  # of the pipeline
    num_stages: float  # of the pipeline
    elements: float  # here, weighted
    model_elements: float  # of the model, or of this stage; NaN if an engine does not say
    checksum: float  # squared norm of the table of this rank's sums over the window


class Agreement(NamedTuple):
    """What all ranks conclude."""

    restart: bool  # some rank cannot use this window, so that all start over
    incomplete: bool  # some rank has not read all of it: all leave it out and keep those before it
    not_finite: list[int]  # ranks whose sums are not finite


def digest(lines: Iterable[str]) -> float:
    """Return 48 bits of a hash over lines, which a float64 holds exactly."""
    text = "\n".join(lines).encode()
    return float(int.from_bytes(hashlib.sha256(text).digest()[:6], "big"))


def digests_of(facts: Facts) -> tuple[float, float]:
    """Return the digests of settings and of learning rates, for a :class:`Row`."""
    values = dict(facts)
    rates = values.pop("lr", None)
    return digest([json.dumps(values)]), digest([json.dumps(rates)])


_COUNTS = (
    ("window", "expected the same window on all ranks", "window={:.0f}"),
    (
        "windows",
        "expected all ranks to end the same window; did one start late or load another checkpoint?",
        "window number {:.0f}",
    ),
    ("steps", "expected all ranks to have observed as many optimizer steps", "{:.0f} steps"),
    (
        "calls",
        "a rank skipped optimizer steps: as many were taken over different numbers of calls of "
        "the scheduler's step()",
        "{:.0f} calls",
    ),
    (
        "num_stages",
        "expected the same number of pipeline stages on all ranks",
        "{:.0f} stages",
    ),
)


def agree(rows: Sequence[Row], compare: Callable[[], object] | None = None) -> Agreement:
    """Return the verdict on the rows of all ranks, in rank order.

    Args:
        rows: of all ranks.
        compare: called if ranks decide from different facts, which it is to name. Replicas are
            looked at afterwards, because other learning rates make them differ.

    Raises:
        DisagreementError: the ranks did not measure the same; the message names them.
    """
    for name, message, form in _COUNTS:
        _same(rows, range(len(rows)), (name,), message, form)
    _check_layouts(rows)
    if compare is not None and facts_differ(rows):
        compare()
    restart = any(row.restart for row in rows)
    restart = restart or len({row.windows_since_restart for row in rows}) > 1
    not_finite = [rank for rank, row in enumerate(rows) if row.not_finite]
    incomplete = any(row.incomplete for row in rows)
    if not restart and not incomplete and not not_finite:
        _check_elements(rows)
        _check_replicas(rows)
    return Agreement(restart, incomplete, not_finite)


def facts_differ(rows: Sequence[Row]) -> bool:
    """Return True if ranks decide by other settings or state, or a stage has several rates."""
    settings = {row.settings for row in rows}
    rates = {(row.stage, row.rates) for row in rows}
    return len(settings) > 1 or len(rates) > len({row.stage for row in rows})


def check_facts(facts: Sequence[Facts], stages: Sequence[float]) -> None:
    """Compare by name what the ranks decide from.

    Args:
        facts: of each rank; the values of "lr" need to be equal within a stage only.
        stages: pipeline stage of each rank.

    Raises:
        DisagreementError: a value differs; the message gives its name, the ranks and their values.
    """
    for name in dict.fromkeys(name for values in facts for name in values):
        for members in _ranks_by(stages if name == "lr" else [0.0] * len(facts)).values():
            holders = _ranks_by([repr(facts[rank].get(name)) for rank in members], members)
            if len(holders) > 1:
                raise DisagreementError(
                    f"{name}: expected the same on all ranks, got "
                    + ", ".join(f"{value} on {_ranks(who)}" for value, who in holders.items())
                    + "; no learning rate was changed"
                )


def _check_layouts(rows: Sequence[Row]) -> None:
    stages = _ranks_by([row.stage for row in rows])
    if len(stages) != rows[0].num_stages:
        raise DisagreementError(
            f"expected ranks in each of {rows[0].num_stages:.0f} pipeline stages, got stages "
            + ", ".join(f"{stage:.0f}" for stage in sorted(stages))
        )
    for stage, members in sorted(stages.items()):
        _same(
            rows,
            members,
            ("layout", "model_elements"),
            "expected the same parameters on all ranks"
            + (f" of stage {stage:.0f}" if len(stages) > 1 else "")
            + ", and meters with the same settings; declare the stages of a pipeline with "
            "process_group=PipelineStages(stage, num_stages), and freeze or thaw parameters on all "
            "ranks alike",
            "{1:,.0f} elements (layout {0:.0f})",
        )


def _check_elements(rows: Sequence[Row]) -> None:
    """The weights must count every element of the model exactly once."""
    totals = {row.stage: row.model_elements for row in rows}
    expected = sum(totals.values())
    count = math.fsum(row.elements for row in rows)
    if math.isnan(expected) or abs(count - expected) <= COUNT_TOLERANCE * max(expected, 1.0):
        return
    raise DisagreementError(
        f"expected the ranks to hold {expected:,.0f} elements together, weighted counts give "
        f"{count:,.1f} of {len(rows)} ranks; expected every rank of process_group= to hold part of "
        "the model, and the same parameters to be on equally many ranks of each stage"
    )


def _check_replicas(rows: Sequence[Row]) -> None:
    """Ranks that hold the same elements must have the same sums."""
    for members in _ranks_by([(row.stage, row.held) for row in rows]).values():
        by_checksum = sorted((rows[rank].checksum, rank) for rank in members)
        (low, lowest), (high, highest) = by_checksum[0], by_checksum[-1]
        if high - low > REPLICA_TOLERANCE * high:
            raise DisagreementError(
                f"ranks {_listed(members)} hold copies of the same parameters, but the sums over "
                f"their parameters differ in squared length: {low:.9g} on rank {lowest}, "
                f"{high:.9g} on rank {highest}; either the copies have diverged (gradients that "
                "are not reduced over these ranks), or they are not copies: declare pipeline "
                "stages with process_group=PipelineStages(stage, num_stages), and pass a separate "
                "process group for each model that is trained"
            )


def _same(
    rows: Sequence[Row], members: Sequence[int], names: tuple[str, ...], message: str, form: str
) -> None:
    """Raise an error with the values on each rank unless the members' entries are equal."""
    of = operator.attrgetter(*names)
    values = [of(rows[rank]) for rank in members]
    if len(set(values)) == 1:
        return  # thousands of ranks take milliseconds this way
    # NaN, for what is not known, equals itself as text.
    holders = _ranks_by([str(value) for value in values], members)
    if len(holders) > 1:
        who = []
        for ranks in holders.values():
            entries = [getattr(rows[ranks[0]], name) for name in names]
            who.append(f"{form.format(*entries)} on {_ranks(ranks)}")
        raise DisagreementError(f"{message}; got " + ", ".join(who))


def _ranks_by(keys: Sequence[Any], ranks: Iterable[int] | None = None) -> dict[Any, list[int]]:
    """Return the ranks that have each key, in order."""
    grouped: dict[Any, list[int]] = {}
    for key, rank in zip(keys, range(len(keys)) if ranks is None else ranks, strict=True):
        grouped.setdefault(key, []).append(rank)
    return grouped


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {_listed(ranks)}"


def _listed(ranks: Sequence[int]) -> str:
    """The first few of possibly thousands."""
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"
