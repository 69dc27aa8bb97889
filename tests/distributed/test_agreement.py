"""What ranks conclude from each other's rows."""

from __future__ import annotations

import math
from typing import Any

import pytest

from autodrop_ext.distributed import DisagreementError, Row, agree

ROW = Row(
    steps=12,
    windows=2,
    window=4,
    calls=13,
    usable=3,
    layout=17,
    held=18,
    stage=0,
    num_stages=1,
    numbers=0,
    elements=5,
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
    assert not total.start_over
    assert total.not_finite == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 8}, r"same window .* window=4 on rank 0, window=8 on rank 1"),
        ({"numbers": 9}, r"same settings, .* 0 numbers beside the sums on rank 0, 9 numbers"),
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
    assert agree([ROW, ROW._replace(usable=1, norm=9.0)]).start_over
    assert agree([ROW._replace(usable=-1)] * 2).start_over


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_named(value: float) -> None:
    assert agree([ROW, ROW, ROW._replace(dot=value)]).not_finite == [2]


def test_thousands_of_ranks_are_not_all_listed() -> None:
    with pytest.raises(DisagreementError, match=r"window=4 on ranks 0, 1, .* and 9991 more"):
        agree([*[ROW] * 9_999, ROW._replace(window=8)])
