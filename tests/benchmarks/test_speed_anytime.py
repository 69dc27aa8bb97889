"""The benchmark of what a run of AnytimeAutoDrop reads: its counts, and its tables are whole."""

from __future__ import annotations

import anytime
import pytest

Printed = pytest.CaptureFixture[str]


def test_snapshots_and_closes_of_a_run(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    monkeypatch.setattr(anytime, "LENGTHS", (1_000, 10_000))
    anytime.counts()
    rows = capsys.readouterr().out.splitlines()[2:]
    # 16 + 8 log2(T / 256) windows of 32 snapshots, the first 8 of them of 16.
    assert rows == [
        "| 1,000 | 736 | 756 | 31 | 0.7560 |",
        "| 10,000 | 1,568 | 1,592 | 57 | 0.1592 |",
    ]


def test_the_times_of_a_run(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    monkeypatch.setattr("sys.argv", ["anytime.py", "run", "--steps", "40", "--model", "tiny2000"])
    anytime.main()
    head, _, row = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == head.count("|") - 1
    assert cells[:4] == ["tiny2000", "40", "40", "2"]
    assert all(float(cell) > 0 for cell in cells[4:7])


def test_windows_of_few_snapshots(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    monkeypatch.setattr("sys.argv", ["anytime.py", "window", "--model", "tiny2000"])
    monkeypatch.setattr(anytime, "ROUNDS", 3)
    anytime.main()
    name, ours, theirs, ratio = capsys.readouterr().out.splitlines()[-1].strip("|").split("|")
    assert name.strip() == "tiny2000"
    # To the last printed digit: the times are rounded to 0.1 ms, and ours takes a few of them.
    assert float(ratio.strip(" x")) == pytest.approx(float(theirs) / float(ours), rel=0.2)
