"""One row per rank, one verdict for all: sums that agree, or an error that names who does not.

Every rank gathers the same rows and calls :func:`agree` on them, so that all of them add the same
numbers in the same order, start over together, or raise together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..ops.interface import Sums

REPLICA_TOLERANCE = 1e-6
"""Relative. Replicas of a parameter are equal to the bit, and kernels for different processors sum
them to 1e-12; two stages of a pipeline that are taken for replicas differ by far more."""

COUNT_TOLERANCE = 1e-9
"""Relative: weights such as 1/3 are rounded, once a tensor."""


class Row(NamedTuple):
    """What a rank reports at the end of a window; every entry is a float64.

    Attributes:
        steps: optimizer steps observed.
        windows: windows closed before this one.
        window: steps per window.
        calls: of the scheduler's ``step()``; 0 without a scheduler.
        windows_since_restart: windows since the meter started over, this one included.
        restart: 1 where this rank cannot use the window and has to start over, otherwise 0.
        settings: hash of the settings and the decision state of what decides here.
        rates: hash of the learning rates.
        layout: hash of names, shapes, dtypes and placements of the parameters.
        held: hash of which elements are here.
        stage: stage of the pipeline.
        num_stages: stages of the pipeline.
        numbers: how many numbers a rank has next to its row (error terms, sums of parts).
        elements: weighted number of the elements here.
        concentration: weighted sum over the tensors of ``|s|^4`` over their elements.
        model_elements: elements of the whole model, or of this stage; NaN where the engine does not
            tell.
        replicated: sum of ``|m|^2`` over parameters of which every rank has all.
        dot, norm, previous_norm, mean_norm: weighted sums.
    """

    steps: float
    windows: float
    window: float
    calls: float
    windows_since_restart: float
    restart: float
    settings: float
    rates: float
    layout: float
    held: float
    stage: float
    num_stages: float
    numbers: float
    elements: float
    concentration: float
    model_elements: float
    replicated: float
    dot: float
    norm: float
    previous_norm: float
    mean_norm: float

    @property
    def finite(self) -> bool:
        """Whether the sums are."""
        return all(map(math.isfinite, self[-4:]))


class DisagreementError(RuntimeError):
    """Ranks that should have measured the same did not; raised on all of them alike."""


class Agreement(NamedTuple):
    """What all ranks conclude.

    Attributes:
        sums: totals over all ranks, added in rank order.
        elements: elements that they run over.
        effective_elements: as many as would carry the motion if each carried as much (Kish).
        restart: whether some rank cannot use this window, so that none does.
        not_finite: ranks whose sums are not finite.
    """

    sums: Sums
    elements: float
    effective_elements: float
    restart: bool
    not_finite: list[int]


def agree(rows: Sequence[Row]) -> Agreement:
    """The verdict on the rows of all ranks, in rank order.

    Raises:
        DisagreementError: the ranks did not measure the same; the message names them.
    """
    _check_counting(rows)
    _check_layouts(rows)
    restart = any(row.restart for row in rows)
    restart = restart or len({row.windows_since_restart for row in rows}) > 1
    if not restart:
        _check_numbers(rows)
    not_finite = [rank for rank, row in enumerate(rows) if not row.finite]
    if not restart and not not_finite:
        _check_elements(rows)
        _check_replicas(rows)
    sums = Sums(*add_in_order([row[-4:] for row in rows]))
    elements = _in_order(row.elements for row in rows)
    effective = effective_elements(elements, sums, _in_order(row.concentration for row in rows))
    return Agreement(sums, elements, effective, restart, not_finite)


def effective_elements(elements: float, sums: Sums, concentration: float) -> float:
    """How many elements would carry the motion if each carried as much; all, where none moves.

    Args:
        elements: weighted number of all.
        sums: their totals.
        concentration: see :class:`Row`.
    """
    return min(elements, sums.norm**2 / concentration) if concentration > 0 else elements


def facts_differ(rows: Sequence[Row]) -> bool:
    """Whether ranks decide by other settings or state, or ranks of a stage run at other rates."""
    settings = {row.settings for row in rows}
    rates = {(row.stage, row.rates) for row in rows}
    return len(settings) > 1 or len(rates) > len({row.stage for row in rows})


def check_facts(facts: Sequence[Mapping[str, Any]], stages: Sequence[float]) -> None:
    """Compare by name what the ranks decide from.

    Args:
        facts: for each rank, values by name; those of "lr" need to be equal within a stage only.
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


def add_in_order(rows: Sequence[Sequence[float]]) -> list[float]:
    """Sums of the columns of all ranks' rows, in rank order."""
    return [_in_order(column) for column in zip(*rows, strict=True)]


def _in_order(values: Iterable[float]) -> float:
    """The sum in rank order (Python's own ``sum`` compensates from 3.12 on)."""
    total = 0.0
    for value in values:
        total += value
    return total


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
    stages = _by_stage(rows)
    if len(stages) != rows[0].num_stages:
        raise DisagreementError(
            f"expected ranks in each of {rows[0].num_stages:.0f} pipeline stages, got stages "
            + ", ".join(f"{stage:.0f}" for stage in stages)
        )
    for stage, members in stages.items():
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


def _check_numbers(rows: Sequence[Row]) -> None:
    """What is added up next to the sums must mean the same on all ranks, also between stages."""
    _same(
        rows,
        lambda r: r.numbers,
        "expected meters with the same settings, and with per_group=True as many param groups on "
        "all ranks",
        "{:.0f} numbers next to the sums",
    )


def _by_stage(rows: Sequence[Row]) -> dict[float, list[int]]:
    """Ranks of each pipeline stage, stages in order."""
    stages: dict[float, list[int]] = {}
    for rank, row in enumerate(rows):
        stages.setdefault(row.stage, []).append(rank)
    return dict(sorted(stages.items()))


def _check_elements(rows: Sequence[Row]) -> None:
    """The weights must count every element of the model exactly once."""
    totals = {row.stage: row.model_elements for row in rows}
    expected = sum(totals.values())
    count = _in_order(row.elements for row in rows)
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
    for members in (ranks for ranks in holders.values() if len(ranks) > 1):
        _close(rows, members, lambda r: r.mean_norm, "their parameters")
        _close(rows, members, lambda r: r.norm, "the displacement of their parameters")
    for members in _by_stage(rows).values():
        _close(rows, members, lambda r: r.replicated, "their unsharded parameters")


def _close(rows: Sequence[Row], members: list[int], of: Callable[[Row], float], what: str) -> None:
    values = {rank: of(rows[rank]) for rank in members}
    low, high = min(values.values()), max(values.values())
    if high - low > REPLICA_TOLERANCE * high:
        lowest, highest = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
        raise DisagreementError(
            f"ranks {_listed(members)} hold copies of the same parameters, but {what} differ in "
            f"squared length: {low:.9g} on rank {lowest}, {high:.9g} on rank {highest}; either the "
            "copies have diverged (gradients that are not reduced over these ranks), or they are "
            "not copies: declare pipeline stages with process_group=PipelineStages(stage, "
            "num_stages), and pass a separate process group for each model that is trained"
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
