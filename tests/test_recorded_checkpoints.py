"""Checkpoints of version 1: their counts, decisions and rates go on, and the meter warms up again.

An earlier release wrote the files, with ``tools/replay.py``. They are not to be written again: a
new version gets files under its name.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from replay import continued, read_checkpoint

FOLDER = pathlib.Path(__file__).parent / "data" / "checkpoints"
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
METERS = ["meter", "meter-sum", "sampled"]
SCHEDULERS = ["autodrop", "per-group", "epoch", "analytic"]
COUNTS = ("last_epoch", "step_count", "optimizer_steps", "stepped", "num_drops", "base_lrs")


def loaded(name: str) -> tuple[dict[str, Any], Any]:
    """A checkpoint and the run that continues from it; a meter's warns, once."""
    saved = read_checkpoint(FOLDER / f"{name}.pt.gz")
    for argument in ("form", "sample", "seed"):  # arguments of then
        saved["spec"]["settings"].pop(argument, None)
    if name == "analytic":
        return saved, continued(saved)
    with pytest.warns(RuntimeWarning, match="the meter warms up again") as caught:
        run = continued(saved)
    assert len(caught) == 1
    return saved, run


@pytest.mark.parametrize("name", METERS)
def test_a_recorded_meter_keeps_its_counts_and_warms_up_again(name: str) -> None:
    saved, run = loaded(name)
    state, meter = saved["state"], run.meter
    assert (state["version"], meter.state_dict()["version"]) == (1, 2)
    counts = ("window", "steps", "windows")
    assert {key: getattr(meter, key) for key in counts} == {key: state[key] for key in counts}
    run.run()  # without another warning: filterwarnings makes each one an error
    assert meter.steps == saved["spec"]["steps"]
    angles = [reading.angle is None for reading in meter.history]
    assert angles == [True, True] + [False] * (len(angles) - 2)
    assert len(angles) > 2


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_recorded_scheduler_keeps_counts_decisions_and_rates(name: str) -> None:
    saved, run = loaded(name)
    state, scheduler = saved["state"], run.scheduler
    now = scheduler.state_dict()
    assert (state["version"], now["version"]) == (1, 2)
    assert {key: now[key] for key in COUNTS} == {key: state[key] for key in COUNTS}
    settings = state["settings"]
    assert {key: now[key] for key in settings} == settings
    columns = set(state["history"]) - {"rounding_error", "margin"}
    assert {key: now["history"][key] for key in columns} == {
        key: state["history"][key] for key in columns
    }
    assert scheduler.get_last_lr() == state["last_lr"]
    before, readings = scheduler.num_drops, len(scheduler.history)
    run.run()
    assert scheduler.num_drops > before, "drops follow"
    if name != "analytic":
        angles = [d.angle is None for d in scheduler.history[readings:]]
        assert angles[:1] == [True] and not any(angles[3:])


def test_a_recorded_analytic_schedule_continues_to_the_bit() -> None:
    """It follows from counts alone."""
    from replay import brief

    _, run = loaded("analytic")
    rates = [record["rates"] for record in brief(run.run()) if "rates" in record]
    assert rates == [record["rates"] for record in EXPECTED["analytic"] if "rates" in record]


def test_the_recorded_checkpoints_hold_what_they_are_for() -> None:
    epoch = read_checkpoint(FOLDER / "epoch.pt.gz")["state"]
    assert epoch["waited"] == 2 and epoch["mean"]["snapshots"] == 2  # in the middle of a delay
    for name in ("autodrop", "per-group", "epoch", "analytic"):
        rates = [record["rates"] for record in EXPECTED[name] if "rates" in record]
        assert len({tuple(r) for r in rates}) > 2, name  # drops follow
    assert {p.name for p in FOLDER.iterdir()} == {f"{n}.pt.gz" for n in EXPECTED} | {
        "expected.json"
    }
