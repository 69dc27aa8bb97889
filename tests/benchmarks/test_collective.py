"""The benchmark of a window's collectives: rows such as ranks send, and whole tables."""

from __future__ import annotations

import json
import math
import pathlib

import collective
import pytest

from autodrop_ext.agreement import agree, facts_differ


@pytest.mark.parametrize("layout", collective.LAYOUTS)
@pytest.mark.parametrize("ranks", [2, 24, 100])
def test_synthetic_rows_agree(layout: str, ranks: int) -> None:
    """They pass every check, so that agree does all of its work; some stages have more ranks."""
    rows = collective.LAYOUTS[layout](ranks, min(collective.STAGES, ranks))
    verdict = agree(rows)
    assert not verdict.restart and not verdict.not_finite and not facts_differ(rows)
    assert not verdict.incomplete
    count = math.fsum(row.elements for row in rows)
    assert count == pytest.approx(2**33, rel=1e-12)  # one rounding a rank
    assert len({row.held for row in rows}) == (1 if layout == "replicas" else ranks)


def test_bytes_on_paper() -> None:
    last = collective.measure_agree(10)
    assert last["received_bytes"] == 9 * collective.ROW_BYTES
    assert min(last[f"agree_{layout}_s"] for layout in collective.LAYOUTS) > 0


@pytest.mark.slow
def test_the_tables(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From processes of this machine; the JSON holds what the tables show."""
    output = tmp_path / "collective.json"
    command = f"collective.py --ranks 2 --windows 5 --many 8 16 --json {output}"
    monkeypatch.setattr("sys.argv", command.split())
    collective.main()
    printed, data = capsys.readouterr().out, json.loads(output.read_text())
    assert "gloo on one machine" in printed
    assert data["backend"] == "gloo on one machine"
    (measured,) = data["measured"]
    assert (measured["ranks"], measured["received_bytes"]) == (2, collective.ROW_BYTES)
    assert min(measured["gather_s"], measured["agree_s"], measured["add_up_s"]) > 0
    assert f"| 2 | {collective.ROW_BYTES} | {measured['gather_s'] * 1e3:.2f} |" in printed
    assert [row["ranks"] for row in data["extrapolated"]] == [8, 16]
    assert "| 16 | 2,040 | 32 | 32,640 |" in printed
