"""The benchmark of what a run of AnytimeAutoDrop costs: its counts, and its table is whole."""

from __future__ import annotations

import anytime
import pytest

Printed = pytest.CaptureFixture[str]


def test_reads_and_closes_of_a_run() -> None:
    # 16 + 8 log2(T / 256) windows of 32 reads, the first 8 of them of 16; at the end one is open.
    assert anytime.counts([1_000, 10_000]) == [(1_000, 756, 31), (10_000, 1_592, 57)]


def test_the_times_of_a_run(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    monkeypatch.setattr("sys.argv", ["anytime.py", "run", "--steps", "40", "--model", "tiny2000"])
    anytime.main()
    head, _, row = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == head.count("|") - 1
    assert cells[:2] == ["tiny2000", "40"]
    meter, with_average, sums = map(float, cells[2:5])
    assert 0 < meter <= with_average
    assert sums > 0
