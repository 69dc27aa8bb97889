"""What ranks conclude from each other's rows."""

from __future__ import annotations

import math
from typing import Any

import pytest

from autodrop_ext.distributed import DisagreementError
from autodrop_ext.distributed.agreement import Row, agree, check_facts, facts_differ

ROW = Row(
    steps=12,
    windows=2,
    window=4,
    calls=13,
    windows_since_restart=3,
    restart=0,
    settings=15,
    rates=16,
    layout=17,
    held=18,
    stage=0,
    num_stages=1,
    numbers=0,
    elements=5,
    concentration=0,
    model_elements=10,
    replicated=0,
    dot=1,
    norm=2,
    previous_norm=3,
    mean_norm=4,
)


def test_sums_and_elements_are_added() -> None:
    total = agree([ROW, ROW])
    assert total.sums == (2, 4, 6, 8)
    assert total.elements == 10
    assert not total.restart
    assert total.not_finite == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 8}, r"same window .* window=4 on rank 0, window=8 on rank 1"),
        ({"numbers": 9}, r"same settings, .* 0 numbers next to the sums on rank 0, 9 numbers"),
        ({"windows": 1}, r"end the same window.* window number 2 on rank 0, .* 1 on rank 1"),
        ({"steps": 11}, r"as many optimizer steps; got 12 steps on rank 0, 11 steps on rank 1"),
        ({"calls": 14}, r"skipped optimizer steps.* 13 calls on rank 0, 14 calls on rank 1"),
        ({"layout": 5}, r"same parameters .*PipelineStages.*0011\) on rank 0, .* on rank 1"),
        ({"model_elements": 7}, r"same parameters on all ranks.* 7 elements .* on rank 1"),
        ({"num_stages": 2}, r"number of pipeline stages .* 1 stages on rank 0, 2 stages on rank 1"),
        ({"elements": 9}, r"hold 10 elements together, weighted counts give 14.0 of 2 ranks"),
        ({"mean_norm": 4.001}, r"ranks 0, 1 hold copies .* 4 on rank 0, 4.001 on rank 1; either"),
        ({"norm": 2.1}, r"displacement of their parameters differ .* 2 on rank 0, 2.1 on rank 1"),
        ({"replicated": 1.0}, r"unsharded parameters differ .* 0 on rank 0, 1 on rank 1"),
    ],
)
def test_disagreements_name_the_ranks(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DisagreementError, match=message):
        agree([ROW, ROW._replace(**change)])


def test_only_ranks_with_the_same_elements_are_replicas() -> None:
    assert agree([ROW, ROW._replace(held=1, norm=9.0, mean_norm=9.0)]).sums[1] == 11


def test_replicas_may_differ_by_the_order_of_additions() -> None:
    assert agree([ROW, ROW._replace(norm=2 * (1 + 1e-12))]).sums[1] == pytest.approx(4)


def test_stages_are_compared_within_themselves() -> None:
    stages = ROW._replace(num_stages=2, model_elements=5)
    other = stages._replace(stage=1, layout=99, norm=7.0)
    assert agree([stages, other]).elements == 10
    with pytest.raises(DisagreementError, match=r"expected ranks in each of 2 .* got stages 0"):
        agree([stages, stages])


def test_unknown_totals_are_not_compared() -> None:
    unknown = ROW._replace(model_elements=math.nan)
    assert agree([unknown, unknown]).elements == 10


def test_one_that_starts_over_makes_all_start_over() -> None:
    assert agree([ROW, ROW._replace(windows_since_restart=1, norm=9.0)]).restart
    assert agree([ROW, ROW._replace(restart=1, windows_since_restart=0, norm=9.0)]).restart
    assert agree([ROW._replace(restart=1)] * 2).restart


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_named(value: float) -> None:
    assert agree([ROW, ROW, ROW._replace(dot=value)]).not_finite == [2]


def test_thousands_of_ranks_are_not_all_listed() -> None:
    with pytest.raises(DisagreementError, match=r"window=4 on ranks 0, 1, .* and 9991 more"):
        agree([*[ROW] * 9_999, ROW._replace(window=8)])


def test_elements_count_by_their_share_of_the_motion() -> None:
    """As Kish counts unequal weights: 5 elements on each of two ranks."""
    ranks = [ROW._replace(norm=3.0), ROW._replace(norm=1.0, held=19)]
    assert agree(ranks).effective_elements == 10  # nothing is known
    equal = [row._replace(norm=3.0, concentration=3.0**2 / 5) for row in ranks]
    assert agree(equal).effective_elements == pytest.approx(10)
    one = [ranks[0]._replace(concentration=3.0**2 / 1), ranks[1]._replace(norm=0.0)]
    assert agree(one).effective_elements == pytest.approx(1)  # one element moves
    # More than there are cannot carry it.
    many = [row._replace(concentration=1e-9) for row in ranks]
    assert agree(many).effective_elements == 10


def test_settings_are_compared_on_all_ranks_and_rates_within_a_stage() -> None:
    assert not facts_differ([ROW, ROW])
    assert facts_differ([ROW, ROW._replace(settings=99)])
    assert facts_differ([ROW, ROW._replace(rates=99)])
    other_stage = ROW._replace(stage=1, rates=99)
    assert not facts_differ([ROW, other_stage])
    assert facts_differ([ROW, other_stage, other_stage._replace(rates=98)])


@pytest.mark.parametrize(
    ("facts", "stages", "message"),
    [
        (
            [{"factor": 0.5}, {"factor": 0.9}],
            [0, 0],
            "factor: expected the same on all ranks, got 0.5 on rank 0, 0.9 on rank 1; no learning",
        ),
        ([{"a": 1, "b": 2}, {"a": 1}], [0, 0], "b: .* got 2 on rank 0, None on rank 1"),
        (
            [{"lr": [1.0]}] * 3 + [{"lr": [2.0]}],
            [0, 0, 1, 1],
            r"lr: .* \[1.0\] on rank 2, \[2.0\] on",
        ),
    ],
)
def test_facts_that_differ_are_named(
    facts: list[dict[str, Any]], stages: list[float], message: str
) -> None:
    with pytest.raises(DisagreementError, match=message):
        check_facts(facts, stages)


def test_rates_may_differ_between_stages() -> None:
    check_facts([{"lr": [1.0], "window": 4}, {"lr": [2.0], "window": 4}], [0, 1])
