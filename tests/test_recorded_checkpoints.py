"""Checkpoints that earlier versions wrote: they continue to the bit.

``python tools/replay.py tests/data/checkpoints`` wrote the files, with the version of
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
    assert_same(brief(run.run()), EXPECTED[name])


def assert_same(now: list[dict[str, Any]], then: list[dict[str, Any]]) -> None:
    """Equal to the bit, until a bound on the rounding error changes the form of the sums.

    The bounds have become wider since, so that a meter turns to the exact form earlier; from there
    on angles and norms agree within both bounds. Rates and drops are equal in any case.
    """
    measured = {"angle", "norm", "rounding_error"}
    assert len(now) == len(then)
    exact = True
    for a, b in zip(now, then, strict=True):
        assert {k: v for k, v in a.items() if k not in measured} == {
            k: v for k, v in b.items() if k not in measured
        }
        if a.get("rounding_error") is None or a.get("angle") is None:
            assert a.get("angle") == b.get("angle")
            continue
        bounds = [float.fromhex(r["rounding_error"]) for r in (a, b)]
        if exact:
            assert (a["angle"], a["norm"]) == (b["angle"], b["norm"])
        assert abs(float.fromhex(a["angle"]) - float.fromhex(b["angle"])) <= sum(bounds)
        exact = exact and max(bounds) < 0.005  # degrees; forms change from there on


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
    if not any("cannot be continued" in str(w.message) for w in caught):
        assert_same(records, EXPECTED["sampled"])
    assert run.state()["steps"] == 70
    assert [r for r in records if r.get("angle") is not None]
