"""Checkpoints that earlier versions wrote: they continue to the bit.

``python tools/replay.py checkpoints tests/data/checkpoints`` wrote the files, with the version of
the commit that added them. They are not to be written again: a new version gets files of its own.
"""

from __future__ import annotations

import json
import pathlib
import warnings
from typing import Any

import pytest
from replay import brief, continued, read_checkpoint

FOLDER = pathlib.Path(__file__).parent / "data" / "checkpoints"
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
EXACT = [name for name in EXPECTED if name != "sampled"]


@pytest.mark.parametrize("name", EXACT)
def test_a_recorded_checkpoint_continues_to_the_bit(name: str) -> None:
    saved = read_checkpoint(FOLDER / f"{name}.pt.gz")
    run = continued(saved)
    # Without a warning: filterwarnings makes each one an error.
    assert brief(run.run()) == EXPECTED[name]


def test_the_recorded_checkpoints_hold_what_they_are_for() -> None:
    epoch = read_checkpoint(FOLDER / "epoch.pt.gz")["state"]
    assert epoch["waited"] == 2 and epoch["mean"]["snapshots"] == 2  # in the middle of a delay
    for name in ("autodrop", "per-group", "epoch", "analytic"):
        rates = [record["rates"] for record in EXPECTED[name] if "rates" in record]
        assert len({tuple(r) for r in rates}) > 2, name  # drops follow
    assert {p.name for p in FOLDER.iterdir()} == {f"{n}.pt.gz" for n in EXPECTED} | {
        "expected.json"
    }


def test_a_recorded_checkpoint_of_a_sample() -> None:
    """Samples may be drawn by another rule: then the meter says so and measures again."""
    saved = read_checkpoint(FOLDER / "sampled.pt.gz")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = continued(saved)
        records = brief(run.run())
    said = " ".join(str(w.message) for w in caught)
    assert records == EXPECTED["sampled"] or "cannot be continued" in said
    assert run.state()["steps"] == 70
    assert [r for r in records if r.get("angle") is not None]
