"""loggers: the real TensorBoard and Weights & Biases (offline), and what is said without them."""

from __future__ import annotations

import importlib
import math
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from material import SETTINGS, digit_batches, digit_model, needs
from torch.nn.functional import cross_entropy

from autodrop_ext import AutoDrop, Decision, EpochDecision
from autodrop_ext.integrations import TensorBoardLog, WandbLog
from autodrop_ext.integrations.loggers import to_scalars


def train(sink: Any) -> AutoDrop:
    """200 steps with a loss every tenth."""
    model = digit_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = AutoDrop(optimizer, **SETTINGS, on_reading=sink)
    for step, (images, labels) in enumerate(digit_batches(200), start=1):
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 10 == 0:
            sink.metrics(step, loss=loss.item())
    assert scheduler.num_drops >= 1
    return scheduler


@needs("tensorboard", "sklearn")
def test_tensorboard(tmp_path: pathlib.Path) -> None:
    from test_transformers import scalars_of
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        scheduler = train(TensorBoardLog(writer, prefix="a/"))
    board = scalars_of(tmp_path)
    for decision in scheduler.history:
        for name, value in to_scalars(decision, "a/").items():
            # TensorBoard keeps float32.
            assert board[name][decision.step] == pytest.approx(value, rel=1e-7)
    assert sorted(board["loss"]) == list(range(10, 201, 10))


@needs("wandb", "sklearn")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # wandb's own
def test_wandb_offline(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own values with ``step=`` next to ours, and nothing of either is lost."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(dir=tmp_path, project="test")
    rows: list[tuple[dict[str, Any], Any]] = []
    log = run.log
    monkeypatch.setattr(
        run, "log", lambda row, step=None: (rows.append((dict(row), step)), log(row, step=step))
    )
    scheduler = train(WandbLog(run))
    summary = dict(run.summary)
    run.finish()
    ours = [row for row, _ in rows if "autodrop/angle" in row]
    assert [row["autodrop/angle"] for row in ours] == [d.angle for d in scheduler.history]
    assert [row["autodrop/step"] for row in ours] == [d.step for d in scheduler.history]
    assert all(step is None for _, step in rows)
    assert [row["autodrop/step"] for row, _ in rows if "loss" in row] == list(range(10, 201, 10))
    assert summary["autodrop/lr"] == scheduler.history[-1].lr[0]
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_scalars_of_decisions() -> None:
    def decision(**values: Any) -> Decision:
        plain: dict[str, Any] = {"step": 12, "window": 2, "angle": 92.0, "cosine": 0.1}
        plain |= {"norm": 1.0, "previous_norm": 2.0, "lr": (0.1,)}
        return Decision(**(plain | values))

    one = to_scalars(decision(dropped=True, smoothed=None, rise=math.inf))
    assert one["angle"] == 92.0
    assert (one["lr"], one["dropped"], one["window"]) == (0.1, 1.0, 2.0)
    assert not {"smoothed", "rise", "step"} & set(one)
    assert all(type(value) is float for value in one.values())
    several = to_scalars(decision(lr=(0.1, 0.2)))
    assert (several["lr/0"], several["lr/1"]) == (0.1, 0.2)
    assert "lr" not in several
    epoch = EpochDecision(**vars(decision()) | {"change": 0.5, "threshold": 0.01, "waited": 0})
    assert (to_scalars(epoch)["change"], to_scalars(epoch)["waited"]) == (0.5, 0.0)


def test_objects_that_are_no_loggers_are_refused() -> None:
    with pytest.raises(TypeError, match="writer: expected a SummaryWriter, got"):
        TensorBoardLog(3)
    with pytest.raises(TypeError, match=r"run: expected what wandb\.init\(\) returns, got"):
        WandbLog(3)


def test_only_the_first_rank_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Written(list):  # type: ignore[type-arg]
        def add_scalar(self, *arguments: Any) -> None:
            self.append(arguments)

        def log(self, row: dict[str, Any]) -> None:
            self.append(row)

        def define_metric(self, *arguments: Any, **options: Any) -> None:
            self.append(arguments)

    written = Written()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    for sink in (TensorBoardLog(written), WandbLog(written)):
        sink.metrics(1, loss=1.0)
    assert written == []
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    TensorBoardLog(written).metrics(1, loss=1.0)
    assert written == [("loss", 1.0, 1)]


@pytest.mark.parametrize("library", ["transformers", "lightning"])
def test_a_missing_library_names_its_extra(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = [library] if library == "transformers" else ["lightning.pytorch", "pytorch_lightning"]
    for name in (library, *hidden):
        monkeypatch.setitem(sys.modules, name, None)
    module = f"autodrop_ext.integrations.{library}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'autodrop_ext\[{library}\]'"):
        importlib.import_module(module)


def test_the_sinks_need_no_library_before_they_are_made() -> None:
    script = "import sys, autodrop_ext.integrations; print([m for m in sys.modules if m in {!r}])"
    libraries = ("tensorboard", "wandb", "transformers", "lightning", "pytorch_lightning")
    done = subprocess.run(
        [sys.executable, "-c", script.format(libraries)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.filterwarnings(r"ignore:AutoDrop. step\(epoch=32\) sets last_epoch")
def test_a_call_that_fails_and_is_repeated_decides_once() -> None:
    """DeepSpeed swallows a TypeError in ``step()`` and calls it again with another argument."""
    seen = []

    def fails(decision: Any) -> None:
        seen.append(decision)
        raise TypeError("of the user's own")

    model = digit_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = AutoDrop(optimizer, **SETTINGS, on_reading=fails)
    for images, labels in digit_batches(40):
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        try:
            scheduler.step()
        except TypeError:
            scheduler.step(32)
    assert len(seen) == len(scheduler.history) == 40 // 5 - 2
    assert scheduler.meter.steps == 40
