"""One verdict from the rows of all ranks, or an error that names who differs.

Every rank calls :func:`agree` on the same rows, so that all of them go on, start over together, or
raise together.
"""

from __future__ import annotations

import hashlib
import json
import math
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
    """What a rank reports at the end of a window; every entry is a float64.

    Attributes:
        steps: optimizer steps observed.
        windows: windows closed before this one.
        window: steps per window.
        calls: of the scheduler's ``step()``; 0 without a scheduler.
        windows_since_restart: windows since the meter started over, this one included.
        restart: 1 if this rank cannot use the window and has to start over, otherwise 0.
        incomplete: 1 if this rank has not read the whole window, because it has just resumed.
        not_finite: 1 if the sums of this rank are not finite, otherwise 0.
        settings: :func:`digest` of the settings and the state of what decides here.
        rates: digest of the learning rates.
        layout, held, elements, model_elements: see :class:`~autodrop_ext.ranks.Layout`.
        stage: stage of the pipeline.
        num_stages: stages of the pipeline.
        checksum: squared norm of the table of this rank's sums over the window.
    """

    steps: float
    windows: float
    window: float
    calls: float
    windows_since_restart: float
    restart: float
    incomplete: float
    not_finite: float
    settings: float
    rates: float
    layout: float
    held: float
    stage: float
    num_stages: float
    elements: float
    model_elements: float
    checksum: float


class Agreement(NamedTuple):
    """What all ranks conclude.

    Attributes:
        restart: True if some rank cannot use this window, so that all start over.
        incomplete: True if some rank has not read the whole window, so that all leave it out and
            keep those before it.
        not_finite: ranks whose sums are not finite.
    """

    restart: bool
    incomplete: bool
    not_finite: list[int]


def digest(lines: Iterable[str]) -> float:
    """Return 48 bits of a hash over lines, which a float64 holds exactly."""
    text = "\n".join(lines).encode()
    return float(int.from_bytes(hashlib.sha256(text).digest()[:6], "big"))


def digests_of(facts: Facts) -> tuple[float, float]:
    """Return the digests of settings and of learning rates, for a :class:`Row`."""
    values = dict(facts)
    rates = values.pop("lr", None)
    return digest([json.dumps(values)]), digest([json.dumps(rates)])


def agree(rows: Sequence[Row], compare: Callable[[], object] | None = None) -> Agreement:
    """Return the verdict on the rows of all ranks, in rank order.

    Args:
        rows: of all ranks.
        compare: called if ranks decide from different facts, which it is to name. Replicas are
            looked at afterwards, because other learning rates make them differ.

    Raises:
        DisagreementError: the ranks did not measure the same; the message names them.
    """
    _check_counting(rows)
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
        groups: dict[float, list[int]] = {}
        for rank, stage in enumerate(stages):
            groups.setdefault(stage if name == "lr" else 0.0, []).append(rank)
        for members in groups.values():
            holders: dict[str, list[int]] = {}
            for rank in members:
                holders.setdefault(repr(facts[rank].get(name)), []).append(rank)
            if len(holders) > 1:
                raise DisagreementError(
                    f"{name}: expected the same on all ranks, got "
                    + ", ".join(f"{value} on {_ranks(who)}" for value, who in holders.items())
                    + "; no learning rate was changed"
                )


def _check_counting(rows: Sequence[Row]) -> None:
    _same(rows, lambda r: r.window, "expected the same window on all ranks", "window={:.0f}")
    _same(
        rows,
        lambda r: r.windows,
        "expected all ranks to end the same window; did one start late or load another checkpoint?",
        "window number {:.0f}",
    )
    _same(
        rows,
        lambda r: r.steps,
        "expected all ranks to have observed as many optimizer steps",
        "{:.0f} steps",
    )
    _same(
        rows,
        lambda r: r.calls,
        "a rank skipped optimizer steps: as many were taken over different numbers of calls of "
        "the scheduler's step()",
        "{:.0f} calls",
    )


def _check_layouts(rows: Sequence[Row]) -> None:
    _same(
        rows,
        lambda r: r.num_stages,
        "expected the same number of pipeline stages on all ranks",
        "{:.0f} stages",
    )
    stages: dict[float, list[int]] = {}
    for rank, row in enumerate(rows):
        stages.setdefault(row.stage, []).append(rank)
    if len(stages) != rows[0].num_stages:
        raise DisagreementError(
            f"expected ranks in each of {rows[0].num_stages:.0f} pipeline stages, got stages "
            + ", ".join(f"{stage:.0f}" for stage in sorted(stages))
        )
    for stage, members in sorted(stages.items()):
        _same(
            rows,
            lambda r: (r.layout, r.model_elements),
            "expected the same parameters on all ranks"
            + (f" of stage {stage:.0f}" if len(stages) > 1 else "")
            + ", and meters with the same settings; declare the stages of a pipeline with "
            "process_group=PipelineStages(stage, num_stages), and freeze or thaw parameters on all "
            "ranks alike",
            "{1:,.0f} elements (layout {0:012x})",
            members=members,
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
    holders: dict[tuple[float, float], list[int]] = {}
    for rank, row in enumerate(rows):
        holders.setdefault((row.stage, row.held), []).append(rank)
    for members in holders.values():
        values = {rank: rows[rank].checksum for rank in members}
        lowest, highest = min(members, key=values.__getitem__), max(members, key=values.__getitem__)
        low, high = values[lowest], values[highest]
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
    rows: Sequence[Row],
    of: Callable[[Row], object],
    message: str,
    form: str,
    members: Sequence[int] | None = None,
) -> None:
    members = range(len(rows)) if members is None else members
    if len({of(rows[rank]) for rank in members}) == 1:
        return  # thousands of ranks take milliseconds this way
    groups: dict[object, list[int]] = {}
    for rank in members:
        # NaN, for what is not known, equals itself here.
        groups.setdefault(str(of(rows[rank])), []).append(rank)
    if len(groups) > 1:
        who = []
        for ranks in groups.values():
            value = of(rows[ranks[0]])
            parts = value if isinstance(value, tuple) else (value,)
            parts = tuple(int(p) if isinstance(p, float) and p.is_integer() else p for p in parts)
            who.append(f"{form.format(*parts)} on {_ranks(ranks)}")
        raise DisagreementError(f"{message}; got " + ", ".join(who))


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {_listed(ranks)}"


def _listed(ranks: Sequence[int]) -> str:
    """The first few of possibly thousands."""
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"
