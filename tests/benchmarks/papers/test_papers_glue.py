"""GLUE's runs where something goes wrong: divergence, a kill while saving, several GPUs."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace

import pytest
import tiny_data
from papers.glue import train_glue
from papers.tasks import MODELS
from training.loop import train
from training.run import RESULT, RunSpec

for _package in ("accelerate", "transformers"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"{_package} is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    tiny_data.write_glue(folder / "data")
    tiny_data.write_bert(folder / "bert")
    return folder


@pytest.fixture
def spec(files):
    return RunSpec(
        "glue-cola",
        "constant",
        data=str(files / "data"),
        checkpoint=str(files / "bert"),
        batch=8,
        epochs=3,
        lr=1e-3,
    )


class KilledError(Exception):
    """Stands for a kill."""


def test_a_run_that_diverges_ends_and_says_so(spec, tmp_path):
    spec = replace(spec, lr=1e30, warmup_steps=0)
    result = train(spec, tmp_path)
    assert result["diverged"] and result["error"] is result["best_error"] is None
    assert len(result["curve"]) < 3 and result["curve"][-1]["loss"] is None
    text = (spec.folder(tmp_path) / RESULT).read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == result


def test_a_kill_while_saving_is_survived(spec, tmp_path, monkeypatch):
    """The newest checkpoint is a part, and the one before it is whole."""
    import transformers

    whole = train(spec, tmp_path / "whole")
    saved = transformers.Trainer._save_optimizer_and_scheduler

    def killed(self, folder):
        if folder.endswith("checkpoint-4"):
            raise KilledError
        saved(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "_save_optimizer_and_scheduler", killed)
        with pytest.raises(KilledError):
            train(spec, tmp_path / "killed")
    trainer = spec.folder(tmp_path / "killed") / "trainer"
    assert {p.name for p in trainer.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    seen = []
    resumed = train(spec, tmp_path / "killed", on_epoch=lambda epoch, *rest: seen.append(epoch))
    assert resumed == whole and seen == [2, 3]


def test_checkpoints_go_unless_they_are_to_stay(spec, tmp_path):
    train(spec, tmp_path, keep_checkpoint=False)
    assert [p.name for p in spec.folder(tmp_path).iterdir() if p.is_dir()] == []
    shutil.rmtree(spec.folder(tmp_path))
    train(spec, tmp_path)
    assert len(list((spec.folder(tmp_path) / "trainer").glob("checkpoint-*"))) == 2


def test_the_warm_up_is_a_tenth_of_the_run(spec, tmp_path):
    recipe = MODELS["glue-cola"].recipe()
    steps = {"cola": 804, "mnli": 36_816, "qnli": 9_822, "qqp": 34_113, "sst2": 6_315}
    warm = {"cola": 80, "mnli": 3682, "qnli": 982, "qqp": 3411, "sst2": 632}
    assert {task: spec.warmup(recipe, n) for task, n in steps.items()} == warm
    assert replace(spec, schedule="hd").warmup(recipe, 804) == 0
    assert replace(spec, warmup_steps=7).warmup(recipe, 804) == 7
    # 30 steps, of which 3 are warm-up: the first epoch of 2 ends within.
    curve = train(replace(spec, epochs=15), tmp_path)["curve"]
    assert curve[0]["lr"] < 1e-3 and curve[1]["lr"] == pytest.approx(1e-3)


def test_what_has_no_meaning_is_refused(spec, tmp_path, monkeypatch):
    import transformers

    with pytest.raises(ValueError, match="angles: glue-cola is trained by Trainer"):
        train_glue(replace(spec, angles=2), tmp_path)
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"one GPU for each process, .* got 2; .* torchrun"):
        train_glue(spec, tmp_path)
