"""The comparison of one setting at many lengths, in small."""

from __future__ import annotations

import json
import math
import pathlib
import statistics
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training import lengths, regret, studies

from autodrop_ext import AnytimeAutoDrop

pytest.importorskip("schedulefree", reason="needs the extra bench")

SHORT = (20, 40)
SCHEDULES = (*lengths.OPEN, *lengths.WARMED, *lengths.KNOWN, *lengths.OTHERS)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """``train`` sets one thread and oneDNN, which are those of a process to itself."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.backends.mkldnn.enabled = True


def rows_of(schedule: str, seed: int, task: str = "quadratic") -> list[dict[str, float]]:
    return lengths.train(task, schedule, lengths.STUDIES[task].good, seed, SHORT)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_is_read_at_each_length(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "WARM_UP_STEPS", 8)
    rows = rows_of(schedule, 0)
    assert [r["steps"] for r in rows if r["schedule"] == schedule] == list(SHORT)
    assert all(math.isfinite(r["value"]) for r in rows)
    # The loss starts at 100,500; schedule-free's mean still holds that at these lengths, and the
    # automatic warm-up starts at 1/32 of the rate.
    assert rows[-1]["value"] < 50_000
    assert rows_of(schedule, 0)[-1]["value"] == rows[-1]["value"]
    assert rows_of(schedule, 1)[-1]["value"] != rows[-1]["value"]


def test_schedules_of_a_seed_see_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates of a warmup-stable-decay are constant until the last fifth, as AutoDrop's are."""
    assert (
        lengths.train("quadratic", "wsd", 0.06, 3, (16, 20))[0]["value"]
        == (lengths.train("quadratic", "autodrop", 0.06, 3, (16, 20))[0]["value"])
    )


@pytest.mark.parametrize("warm_up", [0, 8])
def test_a_constant_rate_has_the_average_of_a_schedule_that_never_drops(
    warm_up: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The windows are read at every step until step 512, then at every second one, and so on."""
    never = lambda optimizer, **options: AnytimeAutoDrop(optimizer, critical=-1.0, **options)  # noqa: E731
    monkeypatch.setattr(lengths, "AnytimeAutoDrop", never)
    monkeypatch.setattr(lengths, "WARM_UP_STEPS", warm_up)
    steps = (100, 700, 1_300)
    one, other = (
        lengths.train("quadratic", name + lengths.WARM_UP, 0.03, 0, steps)
        for name in ("anytime", "constant+average")
    )
    assert [r["value"] for r in one] == [r["value"] for r in other]
    assert one[-1]["lr"] == other[-1]["lr"] == 0.03


def test_rates_after_a_warm_up() -> None:
    model = nn.Linear(1, 1)
    name, steps = "sqrt300+average, warm-up", 20
    optimizer, scheduler = lengths.make_schedule("digits", name, model, 0.5, steps, warm_up=4)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    warming = [0.125, 0.25, 0.375, 0.5]
    assert rates == pytest.approx(warming + [0.5 * math.sqrt(300 / (t + 300)) for t in range(16)])
    optimizer, scheduler = lengths.make_schedule(
        "digits", "cosine, warm-up", model, 0.5, 8, warm_up=4
    )
    rates = [scheduler.lr_lambdas[0](t) for t in range(9)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0])


def test_a_run_that_diverges_has_no_values() -> None:
    rows = lengths.train("quadratic", "cosine", 10.0, 0, (1, 200, 300))
    assert [r["value"] is None for r in rows] == [False, False, True, True, True, True]


def test_averaged_and_last_parameters_are_both_read() -> None:
    rows = rows_of("anytime", 0)
    assert [r["schedule"] for r in rows] == ["anytime", "anytime, last"] * 2
    assert rows[-1]["value"] != rows[-2]["value"]


@pytest.mark.parametrize("task", ["digits", "bytes"])
def test_the_other_tasks(task: str) -> None:
    for schedule in ("anytime", "schedule-free", "cosine"):
        assert math.isfinite(rows_of(schedule, 0, task)[-1]["value"])


def test_statistics_come_from_all_classes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of images is read class by class, so that its first images are of one class."""
    grey = torch.arange(10, dtype=torch.uint8).repeat_interleave(120) * 25
    images = grey.view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    labels = torch.arange(10).repeat_interleave(120)
    data = SimpleNamespace(
        train_images=images, train_labels=labels, test_images=images, test_labels=labels
    )
    monkeypatch.setenv("CIFAR10", str(tmp_path))
    monkeypatch.setattr(studies, "load_cifar", lambda *arguments: data)
    torch.manual_seed(0)
    task = studies.SmallCifar()
    model = task.model()
    convolution, norm = model[0], model[1]
    before = norm.running_mean.clone()
    with task.statistics(model), torch.no_grad():
        normalised = (images.float() - images.float().mean()) / images.float().std()
        expected = convolution(normalised).mean((0, 2, 3))
        # One image in 12 stands for all, and each class has ten of its 120. Means of channels_last
        # tensors are sums of 102,400 values in float32; one class instead of ten is off by 0.1.
        torch.testing.assert_close(norm.running_mean, expected, rtol=0, atol=1e-3)
    assert torch.equal(norm.running_mean, before)


def test_what_is_missing_is_trained_and_rows_stay(tmp_path: pathlib.Path) -> None:
    known = {"task": "bytes", "rate": 0.003, "seed": 0, "steps": 640, "schedule": "cosine"}
    (tmp_path / "rows.jsonl").write_text(json.dumps({**known, "value": 3.0}) + "\n")
    lengths.run_all(tmp_path, ["bytes"], workers=1, until=0.0)
    assert lengths.read(tmp_path) == [{**known, "value": 3.0}]
    left = [run for _, run in lengths.missing(tmp_path, ["bytes"])]
    runs = [run for _, run in lengths.runs(["bytes"])]
    assert set(runs) - set(left) == {("bytes", "cosine", 0.003, 0, (640,))}
    assert ("bytes", "anytime", 0.003, 0, (640, 1_920)) in runs
    assert [run.schedule for run in runs if run.rate == 0.024] == ["anytime, auto"] * 3
    assert len(runs) == len(set(runs)) == 3 + 12 * (11 + 2 * 2 + 1 + 3 * 2)
    stages = [stage for stage, _ in lengths.runs(list(lengths.STUDIES))]
    assert stages == sorted(stages)
    assert set(stages) == set(range(len(lengths.STAGES)))


def test_every_row_of_a_report_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "WARM_UP_STEPS", 8)
    rows = {r["schedule"] for schedule in SCHEDULES for r in rows_of(schedule, 0)}
    assert rows <= set(studies.NAMES)
    assert set(studies.NAMES) - rows == {"exponential, 1/1000", "exponential, 1/10000"}


def test_the_report_pairs_seeds(tmp_path: pathlib.Path) -> None:
    anytime, cosine = [3.0, 5.0, 4.0], [4.0, 7.0, 4.5]
    rows = [
        {"task": "bytes", "rate": 0.006, "seed": s, "steps": 640, "schedule": name, "value": v}
        for name, values in (("anytime", anytime), ("cosine", cosine))
        for s, v in enumerate(values)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths.report(tmp_path, tmp_path / "to")
    table = (tmp_path / "to" / "lengths.md").read_text()
    pairs = [a - c for a, c in zip(anytime, cosine, strict=True)]
    error = statistics.stdev(pairs) / math.sqrt(3)
    assert f"| AnytimeAutoDrop | 4.00 ({statistics.mean(pairs):+.2g} ± {error:.2g}, 3) |" in table
    assert "| cosine, set for each | 5.17 (3) |" in table
    assert (tmp_path / "to" / "lengths.png").stat().st_size > 10_000
    assert (tmp_path / "to" / "rows.jsonl").read_text() == (tmp_path / "rows.jsonl").read_text()


def row(task: str, rate: float, schedule: str, seed: int, value: float | None) -> dict[str, object]:
    cell = {"task": task, "rate": rate, "steps": 1_000}
    return {**cell, "schedule": schedule, "seed": seed, "value": value}


def test_regret_is_paired_with_the_best_that_needs_no_length(tmp_path: pathlib.Path) -> None:
    values = {
        "anytime": [3.0, 5.0, 4.0],
        "constant+average": [2.0, 3.5, 3.5],
        "schedule-free": [1.0],  # of one seed, so that it takes no part
        "cosine": [0.0, 0.0, 0.0],  # needs the length
        "anytime, auto": [2.0, 3.5, None],
    }
    rows = [
        row("digits", 0.02, name, s, v) for name, vs in values.items() for s, v in enumerate(vs)
    ]
    found = {r.schedule: r for r in regret.regrets(regret.by_cell(rows))}
    assert set(found) == {"anytime", "constant+average", "anytime, auto"}
    assert {r.best for r in found.values()} == {"constant+average"}
    assert found["constant+average"].mean == 0
    assert not found["constant+average"].is_behind
    assert found["anytime"].mean == pytest.approx(1.0)
    assert found["anytime"].error == pytest.approx(0.5 / math.sqrt(3))
    assert found["anytime"].is_behind
    assert found["anytime, auto"].mean == pytest.approx((90 - 3.5) / 3)  # chance is 90 %
    assert found["anytime, auto"].diverged == 1
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    lengths.report(tmp_path, tmp_path / "to")
    text = (tmp_path / "to" / "lengths.md").read_text()
    assert "| AnytimeAutoDrop | 1 | 1 ± 0.3 | 1 ± 0.3 | 1 ± 0.3 | 0.02, 1,000 steps |  |" in text
    assert "| 0.02 | 1,000 | 1 ± 0.3 | 29 ± 29 | **3.00** |" in text
    assert "| digits | 0.02 | 1,000 | AnytimeAutoDrop | 4.00 | constant, averaged | 3.00 |" in text
    assert "| 31.8 (1 of 3 diverged) |" in text


def test_regret_of_the_quadratic_is_that_of_logarithms() -> None:
    values = {"anytime": [1.0, 10.0], "constant+average": [None, None], "schedule-free": [0.1, 0.1]}
    rows = [
        row("quadratic", 0.12, name, s, v) for name, vs in values.items() for s, v in enumerate(vs)
    ]
    found = {r.schedule: r for r in regret.regrets(regret.by_cell(rows))}
    assert found["anytime"].differences == pytest.approx({0: 1.0, 1: 2.0})
    assert found["constant+average"].mean == math.inf
    assert found["constant+average"].is_behind
