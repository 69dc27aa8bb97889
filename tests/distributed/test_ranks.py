"""What ranks conclude from each other's rows, and what they add up."""

from __future__ import annotations

import datetime
import math
import os
import pathlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import TIMEOUT, run
from torch.distributed.device_mesh import init_device_mesh

from autodrop_ext.agreement import (
    Agreement,
    DisagreementError,
    Row,
    agree,
    check_facts,
    digests_of,
    facts_differ,
)
from autodrop_ext.ranks import PipelineStages, Ranks, check_group, find_group
from autodrop_ext.sharding import local_shards

ROW = Row(
    steps=12,
    windows=2,
    window=4,
    calls=13,
    windows_since_restart=3,
    restart=0,
    incomplete=0,
    not_finite=0,
    settings=15,
    rates=16,
    layout=17,
    held=18,
    stage=0,
    num_stages=1,
    elements=5,
    model_elements=10,
    checksum=4,
)


# ---- the verdict ------------------------------------------------------------------------------


def test_ranks_that_agree() -> None:
    assert agree([ROW, ROW]) == Agreement(restart=False, incomplete=False, not_finite=[])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 8}, r"same window .* window=4 on rank 0, window=8 on rank 1"),
        ({"windows": 1}, r"end the same window.* window number 2 on rank 0, .* 1 on rank 1"),
        ({"steps": 11}, r"as many optimizer steps; got 12 steps on rank 0, 11 steps on rank 1"),
        ({"calls": 14}, r"skipped optimizer steps.* 13 calls on rank 0, 14 calls on rank 1"),
        ({"layout": 5}, r"same parameters .*PipelineStages.*layout 17\) on rank 0, .* on rank 1"),
        ({"model_elements": 7}, r"same parameters on all ranks.* 7 elements .* on rank 1"),
        ({"num_stages": 2}, r"number of pipeline stages .* 1 stages on rank 0, 2 stages on rank 1"),
        ({"elements": 9}, r"hold 10 elements together, weighted counts give 14.0 of 2 ranks"),
        ({"checksum": 4.001}, r"ranks 0, 1 hold copies .* 4 on rank 0, 4.001 on rank 1; either"),
    ],
)
def test_disagreements_name_the_ranks(change: dict[str, Any], message: str) -> None:
    for rows in ([ROW, ROW._replace(**change)], [ROW._replace(**change), ROW]):
        with pytest.raises(DisagreementError):
            agree(rows)
    with pytest.raises(DisagreementError, match=message):
        agree([ROW, ROW._replace(**change)])


def test_only_ranks_with_the_same_elements_are_replicas() -> None:
    assert not agree([ROW, ROW._replace(held=1, checksum=9.0)]).restart


def test_replicas_may_differ_by_the_order_of_additions() -> None:
    assert not agree([ROW, ROW._replace(checksum=4 * (1 + 1e-12))]).restart


def test_stages_are_compared_within_themselves() -> None:
    stages = ROW._replace(num_stages=2, model_elements=5)
    other = stages._replace(stage=1, layout=99, checksum=7.0)
    assert not agree([stages, other]).restart
    with pytest.raises(DisagreementError, match=r"expected ranks in each of 2 .* got stages 0"):
        agree([stages, stages])


def test_unknown_totals_are_not_compared() -> None:
    unknown = ROW._replace(model_elements=math.nan)
    assert not agree([unknown, unknown]).restart


def test_one_that_starts_over_makes_all_start_over() -> None:
    assert agree([ROW, ROW._replace(windows_since_restart=1, checksum=9.0)]).restart
    assert agree([ROW, ROW._replace(restart=1, windows_since_restart=0, checksum=9.0)]).restart
    assert agree([ROW._replace(restart=1)] * 2).restart


def test_a_window_that_one_rank_has_not_read_is_left_out_by_all() -> None:
    late = ROW._replace(incomplete=1, checksum=1.0)
    assert agree([ROW, late]) == Agreement(restart=False, incomplete=True, not_finite=[])
    assert agree([ROW._replace(restart=1), late]).restart


def test_a_rank_that_is_not_finite_is_named() -> None:
    bad = ROW._replace(not_finite=1, checksum=math.nan)
    assert agree([ROW, ROW, bad]) == Agreement(restart=False, incomplete=False, not_finite=[2])
    assert agree([bad, ROW._replace(restart=1)]) == Agreement(
        restart=True, incomplete=False, not_finite=[0]
    )


def test_thousands_of_ranks_are_not_all_listed() -> None:
    with pytest.raises(DisagreementError, match=r"window=4 on ranks 0, 1, .* and 9991 more"):
        agree([*[ROW] * 9_999, ROW._replace(window=8)])


def test_settings_are_compared_on_all_ranks_and_rates_within_a_stage() -> None:
    assert not facts_differ([ROW, ROW])
    assert facts_differ([ROW, ROW._replace(settings=99)])
    assert facts_differ([ROW, ROW._replace(rates=99)])
    other_stage = ROW._replace(stage=1, rates=99)
    assert not facts_differ([ROW, other_stage])
    assert facts_differ([ROW, other_stage, other_stage._replace(rates=98)])
    settings, rates = digests_of({"factor": 0.5, "lr": [0.1]})
    assert digests_of({"factor": 0.5, "lr": [0.2]}) == (settings, digests_of({"lr": [0.2]})[1])
    assert digests_of({"factor": 0.6, "lr": [0.1]})[1] == rates
    assert digests_of({"factor": 0.6})[0] != settings


@pytest.mark.parametrize(
    ("facts", "stages", "message"),
    [
        (
            [{"factor": 0.5}, {"factor": 0.9}],
            [0, 0],
            "factor: expected the same on all ranks, got 0.5 on rank 0, 0.9 on rank 1; "
            "no learning rate was changed",
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


# ---- who decides together ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "num_stages", "error", "message"),
    [
        (2, 2, ValueError, "stage: expected less than num_stages=2, got 2"),
        (-1, 2, ValueError, "stage: expected at least 0"),
        ("a", 2, TypeError, "stage: expected an int, got 'a'"),
        (0, 2.0, TypeError, "num_stages: expected an int, got 2.0"),
    ],
)
def test_wrong_stages(stage: Any, num_stages: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        PipelineStages(stage, num_stages)


def test_wrong_groups() -> None:
    check_group(None)
    check_group(PipelineStages(0, 2))
    with pytest.raises(TypeError, match=r"process_group: expected None, .* got 'world'"):
        check_group(PipelineStages(0, 2, "world"))


def test_pipeline_stages_of_several_ranks() -> None:
    """Six ranks, three stages: two ranks hold each stage."""
    shards = local_shards([("x", torch.zeros(4))], {})
    ranks = Ranks(None, 6, 0, stage=0, num_stages=3)
    assert ranks.weight(shards[0]) == 0.5
    assert ranks.layout(shards)["elements"] == 2.0


def test_a_process_alone_has_no_collectives() -> None:
    ranks = find_group(None, [], "AutoDrop")
    assert ranks == Ranks(owner="AutoDrop")
    shards = local_shards([("x", torch.zeros(4))], {})
    layout = ranks.layout(shards)
    assert (layout["elements"], layout["model_elements"]) == (4, 4)
    assert ranks.gather(ROW) == [ROW]
    assert ranks.gather_objects({"a": 1}) == [{"a": 1}]
    table = torch.arange(3, dtype=torch.float64)
    ranks.add_up(table)
    assert table.tolist() == [0, 1, 2]
    alone = ROW._replace(elements=10)
    assert ranks.agree(alone, {}) == Agreement(restart=False, incomplete=False, not_finite=[])


def test_layouts_tell_names_groups_and_parts_apart() -> None:
    ranks = Ranks()
    (shard,) = local_shards([("x", torch.zeros(4))], {})
    layout = ranks.layout([shard])
    for changed in (shard._replace(name="y"), shard._replace(layout="(5,)")):
        other = ranks.layout([changed])
        assert other["layout"] != layout["layout"] and other["held"] != layout["held"]
    assert ranks.layout([shard._replace(group=1)])["layout"] != layout["layout"]
    part = ranks.layout([shard._replace(part=(1,))])
    assert part["layout"] == layout["layout"] and part["held"] != layout["held"]
    assert layout["layout"] == int(layout["layout"]) < 2**48
    assert math.isnan(ranks.layout([shard._replace(total=None), shard])["model_elements"])


def added(ranks: Ranks, *numbers: float) -> list[float]:
    """The sums of numbers over all ranks."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    ranks.add_up(sums)
    return list(sums.tolist())


# ---- collectives ------------------------------------------------------------------------------


def adding(rank: int) -> tuple[bytes, list[float], float]:
    """Numbers of all sizes, whose float64 sum depends on the order."""
    ranks = find_group(None, [])
    world = dist.get_world_size()
    tables = [
        torch.randn(3, 4096, generator=torch.Generator().manual_seed(r), dtype=torch.float64)
        * 10.0 ** torch.arange(-6, 6, dtype=torch.float64).repeat(1024).view(3, 4096)
        for r in range(world)
    ]
    table = tables[rank].clone()
    ranks.add_up(table)
    exact = torch.stack(tables).sum(0)
    size = torch.stack(tables).abs().sum(0)
    error = float(((table - exact).abs() / size).max())
    numbers = added(ranks, 0.1 * (rank + 1), 1e300 if rank else -1e300)
    return table.numpy().tobytes(), numbers, error


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_get_the_same_bits(world: int) -> None:
    results = run(world, adding)
    assert len({(bits, *numbers) for bits, numbers, _ in results}) == 1
    # A float64 sum of two or three numbers is rounded at most twice.
    assert max(error for _, _, error in results) < 4e-16
    assert math.isclose(results[0][1][0], 0.1 * sum(range(1, world + 1)), rel_tol=1e-15)


def gathering(rank: int) -> tuple[list[Row], list[Any], str]:
    ranks = find_group(None, [], "AutoDrop")
    rows = ranks.gather(ROW._replace(held=2.0**48 - 1 - rank, checksum=math.nan if rank else 1))
    objects = ranks.gather_objects({"rank": rank, "text": "é" * 1000 * rank})
    facts = {"factor": 0.5, "threshold": 0.1 * (1 + rank), "lr": [0.1]}
    settings, rates = digests_of(facts)
    try:
        ranks.agree(ROW._replace(settings=settings, rates=rates), facts)
    except DisagreementError as error:
        return rows, objects, str(error)
    return rows, objects, ""


def test_rows_and_objects_arrive_in_rank_order() -> None:
    results = run(2, gathering)
    for rows, objects, message in results:
        assert [row.held for row in rows] == [2.0**48 - 1, 2.0**48 - 2]  # exact
        assert rows[0].checksum == 1 and math.isnan(rows[1].checksum)
        assert objects == [{"rank": 0, "text": ""}, {"rank": 1, "text": "é" * 1000}]
        assert message == (
            "threshold: expected the same on all ranks, got 0.1 on rank 0, 0.2 on rank 1; "
            "no learning rate was changed"
        )


def meeting_again(rank: int, folder: str) -> list[tuple[int, int, list[float]]]:
    """The default group is destroyed and made again, of the same size and of another."""
    seen = []
    for i, world in enumerate((3, 3, 2)):
        if i:
            dist.destroy_process_group()
            if rank >= world:
                break
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store{i}",
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=TIMEOUT),
            )
        ranks = find_group(None, [])
        seen.append((ranks.size, ranks.rank, added(ranks, 1.0, float(rank))))
        dist.barrier()
    return seen


def test_a_group_that_was_made_again(tmp_path: pathlib.Path) -> None:
    results = run(3, meeting_again, str(tmp_path))
    for rank, seen in enumerate(results):
        expected = [(3, rank, [3.0, 3.0]), (3, rank, [3.0, 3.0]), (2, rank, [2.0, 1.0])]
        assert seen == expected[: 3 if rank < 2 else 2]


def without_a_default_group(rank: int, store: str) -> tuple[list[float], list[int], list[float]]:
    """A process group that ``torch.distributed`` does not know."""
    from torch.distributed import _dist2

    dist.destroy_process_group()
    timeout, cpu = datetime.timedelta(seconds=TIMEOUT), torch.device("cpu")
    group = _dist2._BACKENDS["gloo"](dist.FileStore(store, 2), rank, 2, timeout, cpu)
    ranks = find_group(group, [])
    rows = ranks.gather(ROW._replace(steps=rank))
    return [row.steps for row in rows], ranks.gather_objects(rank), added(ranks, 1.0)


def test_without_a_default_group(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torch.distributed._dist2", reason="torch before 2.8 has no such groups")
    for result in run(2, without_a_default_group, str(tmp_path / "store")):
        assert result == ([0.0, 1.0], [0, 1], [2.0])


def stages(rank: int) -> list[tuple[int, int, int]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    found = [find_group(given, []) for given in (None, mesh, mesh["dp"], PipelineStages(1, 4))]
    with pytest.raises(ValueError, match="as many ranks in each of 3 pipeline stages, got 4"):
        find_group(PipelineStages(0, 3), [])
    return [(r.size, r.stage, r.num_stages) for r in found]


def test_stages_of_a_mesh_or_declared() -> None:
    for rank, found in enumerate(run(4, stages)):
        # A mesh cut out of one with "pp" has its stages, and the ranks of its own group.
        assert found == [(4, 0, 1), (4, rank // 2, 2), (2, rank // 2, 2), (4, 1, 4)]


def dying(rank: int, call: str) -> str:
    ranks = find_group(None, [], "AutoDrop")
    added(ranks, 1.0)  # all are there
    if rank == 1:
        os._exit(1)
    calls = {
        "gather": lambda: ranks.gather(ROW),
        "objects": lambda: ranks.compare({"factor": 0.5}),
        "table": lambda: ranks.add_up(torch.zeros(8, dtype=torch.float64)),
    }
    with pytest.raises(RuntimeError) as caught:
        calls[call]()
    assert isinstance(caught.value.__cause__, RuntimeError)
    return str(caught.value)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ("gather", "window 2 ended after 12 optimizer steps, but its sums could not be exchanged"),
        ("objects", "its settings could not be compared"),
        ("table", "its sums could not be added up"),
    ],
)
def test_a_dead_rank_ends_in_an_error_that_says_so(call: str, problem: str) -> None:
    message, _ = run(2, dying, call, timeout=5, may_die=(1,))
    assert message == (
        f"AutoDrop on rank 0: {problem} with the other 1 ranks: one of them is dead, late, or "
        "counts fewer steps; no learning rate was changed"
    )
