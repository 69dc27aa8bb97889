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
from training import lengths

pytest.importorskip("schedulefree", reason="needs the extra bench")

SHORT = (20, 40)
SCHEDULES = (*lengths.OPEN, *lengths.KNOWN)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """``train`` sets one thread, which is for a process to itself."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rows_of(schedule: str, seed: int, task: str = "quadratic") -> list[dict[str, float]]:
    rate = next(iter(lengths.STUDIES[task].seeds))
    return lengths.train(task, schedule, rate, seed, SHORT)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_is_read_at_each_length(schedule: str) -> None:
    rows = rows_of(schedule, 0)
    assert [r["steps"] for r in rows if r["schedule"] == schedule] == list(SHORT)
    assert all(math.isfinite(r["value"]) for r in rows)
    # The loss starts at 100,500; schedule-free's mean still holds that at these lengths.
    assert rows[-1]["value"] < 20_000
    assert rows_of(schedule, 0)[-1]["value"] == rows[-1]["value"]
    assert rows_of(schedule, 1)[-1]["value"] != rows[-1]["value"]


def test_schedules_of_a_seed_see_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates of a warmup-stable-decay are constant until the last fifth, as AutoDrop's are."""
    assert (
        lengths.train("quadratic", "wsd", 0.06, 3, (16, 20))[0]["value"]
        == (lengths.train("quadratic", "autodrop", 0.06, 3, (16, 20))[0]["value"])
    )


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
    monkeypatch.setattr(lengths, "load_cifar", lambda *arguments: data)
    torch.manual_seed(0)
    task = lengths.SmallCifar()
    model = task.model()
    convolution, norm = model[0], model[1]
    before = norm.running_mean.clone()
    with task.statistics(model), torch.no_grad():
        normalised = (images.float() - images.float().mean()) / images.float().std()
        expected = convolution(normalised).mean((0, 2, 3))
        # One image in 12 stands for all, and each class has ten of its 120.
        torch.testing.assert_close(norm.running_mean, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(norm.running_mean, before)


def test_what_is_missing_is_trained_and_rows_stay(tmp_path: pathlib.Path) -> None:
    known = {"task": "bytes", "rate": 0.006, "seed": 0, "steps": 640, "schedule": "cosine"}
    (tmp_path / "rows.jsonl").write_text(json.dumps({**known, "value": 3.0}) + "\n")
    lengths.run_all(tmp_path, ["bytes"], workers=1, until=0.0)
    assert lengths.read(tmp_path) == [{**known, "value": 3.0}]
    runs = lengths.runs(["bytes"])
    assert ("bytes", "cosine", 0.006, 0, (640,)) in runs
    assert ("bytes", "anytime", 0.006, 0, (640, 1_920)) in runs
    assert len(runs) == len(set(runs)) == 9 * (len(lengths.OPEN) + 2 * len(lengths.KNOWN))


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
