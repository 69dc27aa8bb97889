"""log: what is written, what is read back, after crashes and resumes too."""

from __future__ import annotations

import json
import math
import pathlib
import pickle
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import autodrop_ext
from autodrop_ext import AutoDrop, Decision, JsonLinesLog, read_log
from autodrop_ext import log as log_module
from autodrop_ext.log import LoggedRun
from autodrop_ext.plotting.titles import describe


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
    pickle.loads(pickle.dumps(log))(written[1])  # a copy appends
    readings, metrics, _ = read_log(tmp_path / "run.jsonl")
    as_read = [json.loads(json.dumps({"event": "reading", **d.as_dict()})) for d in written]
    assert readings == as_read
    assert readings[1]["rise"] is None
    assert metrics == [{"event": "metrics", "step": 13, "loss": 0.5, "gap": None}]


@pytest.mark.parametrize("end", [b'{"event": "rea', b'{"ev', b"{", b"", b"[" * 100_000])
def test_a_line_that_a_killed_run_left_is_skipped(end: bytes, tmp_path: pathlib.Path) -> None:
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
    JsonLinesLog(path)(decision(12))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert steps(read_log(path)[0]) == [12]
    JsonLinesLog(path)(decision(16))
    assert steps(read_log(path)[0]) == [12, 16]


def test_a_log_whose_first_line_was_cut_off_goes_on(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"ev')
    JsonLinesLog(path)(decision(12))
    assert steps(read_log(path)[0]) == [12]


@pytest.mark.parametrize("text", ["first\nmy notes", "first\nmy notes\n"])
def test_a_file_that_is_no_log_is_left_alone(text: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(
        ValueError, match="path: expected a log, got a file that begins with b'first"
    ):
        JsonLinesLog(path)
    assert path.read_text() == text


def test_a_bad_path_is_noticed_before_the_training(tmp_path: pathlib.Path) -> None:
    with pytest.raises(IsADirectoryError, match="path: expected a file that can be written, got"):
        JsonLinesLog(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"path: expected .* got '.*/file/run\.jsonl'"):
        JsonLinesLog(tmp_path / "file" / "run.jsonl")
    with pytest.raises(OSError, match="File name too long"):
        JsonLinesLog(tmp_path / ("x" * 300))
    with pytest.raises(TypeError):
        JsonLinesLog(3)  # type: ignore[arg-type]
    log = JsonLinesLog(tmp_path / "new" / "folder" / "run.jsonl")
    assert log.path.read_bytes() == b""


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """As on a full disk, a write stores what there is room for, and the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_warned_of_once_and_the_run_goes_on(tmp_path: pathlib.Path) -> None:
    log = JsonLinesLog(tmp_path / "run.jsonl")
    log(decision(12))
    with no_file_longer_than(log.path.stat().st_size + 20):
        message = r"^JsonLinesLog: a line could not be written.*File too large"
        with pytest.warns(RuntimeWarning, match=message) as caught:
            log(decision(16))
        assert [w.filename for w in caught] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            log(decision(20))
            log.metrics(20, loss=1.0)
    log(decision(24))
    assert steps(read_log(log.path)[0]) == [12, 24]


def test_a_folder_that_disappears_ends_no_run(tmp_path: pathlib.Path) -> None:
    log = JsonLinesLog(tmp_path / "runs" / "run.jsonl")
    log.path.unlink()
    log.path.parent.rmdir()
    with pytest.warns(RuntimeWarning, match="No such file or directory"):
        log(decision(12))


SETTINGS = {"scheduler": "AutoDrop", "window": 4, "threshold": 0.5, "min_lr": [0.0, math.inf]}


def test_a_header_has_version_and_settings(tmp_path: pathlib.Path) -> None:
    log = JsonLinesLog(tmp_path / "run.jsonl")
    for _ in range(2):  # The second one says nothing new.
        log.begin(SETTINGS)
    log(decision(12))
    log.begin(SETTINGS | {"threshold": np.float32(2.0)})  # after a checkpoint was loaded
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["settings", "reading", "settings"]
    run = read_log(log.path)
    assert run.settings == {
        "version": autodrop_ext.__version__,
        "scheduler": "AutoDrop",
        "window": 4,
        "threshold": 2.0,
        "min_lr": [0.0, None],
    }
    assert steps(run.readings) == [12]
    pickle.loads(pickle.dumps(log)).begin(SETTINGS)  # a copy in another process
    assert read_log(log.path).settings["threshold"] == 0.5
    with pytest.raises(TypeError, match="settings: expected a number, got"):
        log.begin({"kernel": print})


def trained(folder: pathlib.Path, **settings: Any) -> tuple[AutoDrop, LoggedRun]:
    """Ten steps of a scheduler with a log, and what it holds."""
    parameter = torch.nn.Parameter(torch.randn(50))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    log = JsonLinesLog(folder / "run.jsonl")
    scheduler = AutoDrop(optimizer, window=2, on_reading=log, **settings)
    train(scheduler, 10)
    return scheduler, read_log(log.path)


def train(scheduler: AutoDrop, count: int) -> None:
    (parameter,) = scheduler.optimizer.param_groups[0]["params"]
    for _ in range(count):
        parameter.grad = torch.randn(50)
        scheduler.optimizer.step()
        scheduler.step()


def test_a_header_has_what_the_meter_was_given(tmp_path: pathlib.Path) -> None:
    given = {"buckets": 8192, "snapshots": 1, "per_tensor": True}
    _, run = trained(tmp_path, **given)
    assert {name: run.settings[name] for name in given} == given
    assert "cooldown" not in run.settings


def test_a_cooldown_is_logged(tmp_path: pathlib.Path) -> None:
    scheduler, _ = trained(tmp_path)
    scheduler.cooldown(8, "sqrt")
    settings = read_log(tmp_path / "run.jsonl").settings
    assert settings["cooldown"] == {"begin": 10, "num_steps": 8, "shape": "sqrt"}
    assert "cooldown begin 10 num_steps 8 shape sqrt" in describe(settings)


def test_readings_keep_the_threshold_that_they_were_compared_with(tmp_path: pathlib.Path) -> None:
    scheduler, _ = trained(tmp_path, threshold=0.1)
    state = scheduler.state_dict()
    state["threshold"] = 15.0
    with pytest.warns(RuntimeWarning, match="settings replace those given"):
        scheduler.load_state_dict(state)
    train(scheduler, 10)
    readings = read_log(tmp_path / "run.jsonl").readings
    assert [r["threshold"] for r in readings] == [0.1] * 3 + [15.0] * 5
    assert [d.threshold for d in scheduler.history] == [0.1] * 3 + [15.0] * 5
    rise = scheduler.plot().axes[1]
    (limit,) = [line for line in rise.lines if line.get_label() == "threshold"]
    assert list(limit.get_ydata()) == [0.1] * 3 + [15.0] * 5


def test_a_log_without_a_header_is_read(tmp_path: pathlib.Path) -> None:
    log = JsonLinesLog(tmp_path / "run.jsonl")
    log(decision(12))
    assert read_log(log.path).settings == {}
    log.begin(SETTINGS)
    assert read_log(log.path).settings["window"] == 4


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([[2.0]]), 2.0),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.tensor([3]), 3),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (Fraction(1, 4), 0.25),
        (torch.tensor(math.nan), None),
        (10**400, None),
    ],
)
def test_metrics_take_every_kind_of_number(
    value: Any, expected: Any, tmp_path: pathlib.Path
) -> None:
    log = JsonLinesLog(tmp_path / "run.jsonl")
    log.metrics(np.int64(3), loss=value)  # type: ignore[arg-type]
    (metrics,) = read_log(log.path)[1]
    assert metrics == {"event": "metrics", "step": 3, "loss": expected}
    assert type(metrics["loss"]) is type(expected)


def test_metrics_refuse_what_is_no_number(tmp_path: pathlib.Path) -> None:
    log = JsonLinesLog(tmp_path / "run.jsonl")
    for value in ("0.5", None, [1.0], 1j, torch.zeros(2), np.zeros(2)):
        with pytest.raises(TypeError, match="loss: expected a number, got"):
            log.metrics(1, loss=value)
    with pytest.raises(ValueError, match="metrics: expected another name than 'event'"):
        log.metrics(1, event=2)
    with pytest.raises(ValueError, match="step: expected a finite number, got nan"):
        log.metrics(math.nan, loss=1.0)  # type: ignore[arg-type]
    assert log.path.read_bytes() == b""


def test_what_a_resumed_run_repeats_is_there_once(tmp_path: pathlib.Path) -> None:
    log = JsonLinesLog(tmp_path / "run.jsonl")
    for step in (12, 16, 20, 24):
        log(decision(step, angle=1.0))
        log.metrics(step, loss=1.0)
        log.metrics(step // 4, accuracy=0.5)  # counts epochs: a clock of its own
    for step in (16, 20):  # from a checkpoint of step 14
        log(decision(step, angle=2.0))
        log.metrics(step, loss=2.0)
    readings, metrics, _ = read_log(log.path)
    assert [(r["step"], r["angle"]) for r in readings] == [(12, 1.0), (16, 2.0), (20, 2.0)]
    losses = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    assert losses == [(12, 1.0), (16, 2.0), (20, 2.0)]
    assert [m["step"] for m in metrics if "accuracy" in m] == [3, 4, 5, 6]


def test_a_warning_about_the_disk_points_to_the_users_step(tmp_path: pathlib.Path) -> None:
    log = JsonLinesLog(tmp_path / "run.jsonl")
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scheduler = AutoDrop(optimizer, window=1, on_reading=log)
    with no_file_longer_than(1), pytest.warns(RuntimeWarning, match="JsonLinesLog") as caught:
        parameter.grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
    assert [w.filename for w in caught] == [__file__]


def test_only_the_first_rank_writes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (1, 0):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        assert log_module.is_first_rank() == (rank == 0)
        JsonLinesLog(tmp_path / f"{rank}.jsonl")(decision(12))
    assert [path.name for path in tmp_path.iterdir()] == ["0.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", r"run\.jsonl:2: expected a reading or metrics"),
        ('{"event": "reading"}', r"run\.jsonl:2: expected a number as 'step', got None"),
        ('{"event": "reading", "step": 1e999}', r"run\.jsonl:2: expected a number as 'step'"),
        ('{"event": "settings", "settings": 3}', r"run\.jsonl:2: expected a reading or metrics"),
        ("9" * 4_000, r"run\.jsonl:2: expected a reading or metrics, got 9+\.\.\.9+$"),
    ],
)
def test_a_line_of_something_else_is_named(line: str, message: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"event": "metrics", "step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_log(path)
    with pytest.raises(FileNotFoundError):
        read_log(tmp_path / "none.jsonl")
