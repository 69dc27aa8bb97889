"""log: what is written, what is read back, after crashes and resumes too."""

from __future__ import annotations

import json
import math
import pathlib
import pickle
from typing import Any

import pytest
import torch

from autodrop_ext import Decision, EpochDecision, JsonLinesLog, TeeLog, read_log
from autodrop_ext import log as log_module
from autodrop_ext.log import LogReader, of_epochs, to_scalars


def decision(step: int, **values: Any) -> Decision:
    plain: dict[str, Any] = {"window": step // 4 - 1, "angle": 80.0 + step, "cosine": 0.1}
    plain |= {"norm": 1.0, "previous_norm": 2.0, "lr": (0.1,)}
    return Decision(step=step, **(plain | values))


def steps(records: list[dict[str, Any]]) -> list[int]:
    return [record["step"] for record in records]


def test_what_is_written_is_read_back(tmp_path: pathlib.Path) -> None:
    log = JsonLinesLog(tmp_path / "run.jsonl")
    written = [decision(12), decision(16, angle=None, rise=math.nan, dropped=True)]
    log(written[0])
    log.metrics(13, loss=0.5, gap=math.inf)
    log.close()
    pickle.loads(pickle.dumps(log))(written[1])  # a copy appends
    readings, metrics = read_log(tmp_path / "run.jsonl")
    as_read = [json.loads(json.dumps({"event": "reading", **d.as_dict()})) for d in written]
    assert readings == as_read
    assert readings[1]["rise"] is None
    assert metrics == [{"event": "metrics", "step": 13, "loss": 0.5, "gap": None}]


@pytest.mark.parametrize("end", [b'{"event": "rea', b'{"ev', b"{", b""])
def test_a_line_that_a_killed_run_left_is_cut_off(end: bytes, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "run.jsonl"
    JsonLinesLog(path)(decision(12))
    whole = path.read_bytes()
    path.write_bytes(whole + end)
    assert steps(read_log(path)[0]) == [12]
    JsonLinesLog(path)(decision(16))
    assert steps(read_log(path)[0]) == [12, 16]
    assert path.read_bytes().startswith(whole)


def test_a_line_that_lacks_only_its_end_is_kept(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "run.jsonl"
    JsonLinesLog(path)(decision(12, lr=(0.1,) * 3000))  # longer than the part that is looked at
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert steps(read_log(path)[0]) == [12]
    JsonLinesLog(path)(decision(16))
    assert steps(read_log(path)[0]) == [12, 16]


def test_a_file_that_is_no_log_is_left_alone(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("first\nmy notes")
    with pytest.raises(ValueError, match="expected a log to append to, got a file that ends in"):
        JsonLinesLog(path)(decision(12))
    assert path.read_text() == "first\nmy notes"


def test_what_a_resumed_run_repeats_is_there_once(tmp_path: pathlib.Path) -> None:
    log = JsonLinesLog(tmp_path / "run.jsonl")
    for step in (12, 16, 20, 24):
        log(decision(step, angle=1.0))
        log.metrics(step, loss=1.0)
        log.metrics(step // 4, accuracy=0.5)  # counts epochs: a clock of its own
    for step in (16, 20):  # from a checkpoint of step 14
        log(decision(step, angle=2.0))
        log.metrics(step, loss=2.0)
    readings, metrics = read_log(log.path)
    assert [(r["step"], r["angle"]) for r in readings] == [(12, 1.0), (16, 2.0), (20, 2.0)]
    losses = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    assert losses == [(12, 1.0), (16, 2.0), (20, 2.0)]
    assert [m["step"] for m in metrics if "accuracy" in m] == [3, 4, 5, 6]


def test_only_the_first_rank_writes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (1, 0):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        assert log_module.is_first_rank() == (rank == 0)
        JsonLinesLog(tmp_path / f"{rank}.jsonl")(decision(12))
    assert [path.name for path in tmp_path.iterdir()] == ["0.jsonl"]


def test_a_growing_log_is_read_as_far_as_it_goes(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "run.jsonl"
    reader = LogReader(path)
    assert not reader.poll()
    log = JsonLinesLog(path)
    log(decision(12))
    assert reader.poll()
    assert not reader.poll()
    whole = json.dumps({"event": "reading", **decision(16).as_dict()}) + "\n"
    with path.open("a") as file:
        file.write(whole[:20])
        file.flush()
        assert not reader.poll()
        file.write(whole[20:])
    assert reader.poll()
    assert steps(reader.readings) == [12, 16]
    path.unlink()
    JsonLinesLog(path)(decision(8))  # another run's
    reader.poll()
    assert steps(reader.readings) == [8]
    path.unlink()
    assert not reader.poll()
    assert reader.readings == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"run\.jsonl:2: expected a JSON object"),
        ("[]", r"run\.jsonl:2: expected a reading or metrics"),
        ('{"event": "reading"}', r"run\.jsonl:2: expected a number as 'step', got None"),
    ],
)
def test_a_broken_line_is_named(line: str, message: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"event": "metrics", "step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_log(path)
    with pytest.raises(FileNotFoundError):
        read_log(tmp_path / "none.jsonl")


def test_several_sinks_together(tmp_path: pathlib.Path) -> None:
    seen: list[Decision] = []
    log = JsonLinesLog(tmp_path / "run.jsonl")
    tee = TeeLog(log, seen.append)
    tee(decision(12))
    tee.metrics(12, loss=1.0)  # the list takes none
    tee.close()
    assert [d.step for d in seen] == [12]
    assert log._file is None
    readings, metrics = read_log(log.path)
    assert (steps(readings), steps(metrics)) == ([12], [12])
    with pytest.raises(TypeError, match=r"sinks\[1\]: expected a function of a Decision, got 3"):
        TeeLog(log, 3)  # type: ignore[arg-type]


def test_scalars_of_decisions() -> None:
    one = to_scalars(decision(12, dropped=True, smoothed=None, rise=math.inf))
    assert one["angle"] == 92.0
    assert (one["lr"], one["dropped"], one["window"]) == (0.1, 1.0, 2.0)
    assert not {"smoothed", "rise", "step"} & set(one)
    assert all(type(value) is float for value in one.values())
    several = to_scalars(decision(12, lr=(0.1, 0.2)))
    assert (several["lr/0"], several["lr/1"]) == (0.1, 0.2)
    assert "lr" not in several
    epoch = EpochDecision(**vars(decision(12)), change=0.5, threshold=0.01, waited=0)
    assert (to_scalars(epoch)["change"], to_scalars(epoch)["waited"]) == (0.5, 0.0)
    assert of_epochs([epoch.as_dict()])
    assert not of_epochs([decision(12).as_dict()])
