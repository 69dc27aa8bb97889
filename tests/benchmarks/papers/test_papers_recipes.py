"""Every recipe of the papers end to end on tiny data in the published file formats."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_data
import torch
from papers import imagenet, models, translation
from papers.glue import read_examples
from papers.imagenet import Folder, ImageNetModel
from papers.recipes import RECIPES
from papers.sources import SOURCES
from papers.tasks import MODELS
from papers.translation import Translation, read_pairs
from training import parallel, run
from training.cifar import load_cifar
from training.loop import train
from training.report import write_report
from training.run import CHECKPOINT, LOG, RESULT, RunSpec
from training.schedules import SCHEDULES
from training.tasks import recipe_of

from autodrop_ext import read_log

COMMAND = Path(__file__).parents[3] / "benchmarks" / "papers" / "command.py"


def needs(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; it comes with autodrop_ext[bench]")


class PowerCutError(Exception):
    """Stands for a power cut."""


@pytest.fixture(autouse=True)
def fresh_tasks():
    run.made_task.cache_clear()


@pytest.fixture
def small(monkeypatch):
    """The recipes with narrow ResNets, tiny translators and ImageNet at 32 pixels.

    The full sizes are checked by their numbers of parameters; a step of WRN-40-10 takes seconds.
    """
    for name in RECIPES:
        if RECIPES[name].build is not None:
            thin = replace(RECIPES[name], build=lambda classes: models.wide_resnet(10, 1, classes))
            monkeypatch.setitem(RECIPES, name, thin)
    monkeypatch.setattr(imagenet, "SIDE", 32)
    monkeypatch.setattr(imagenet, "_SHORTER", 40)
    monkeypatch.setattr(translation, "SUBWORDS", 60)
    build = translation.build
    monkeypatch.setattr(translation, "build", lambda n, pad, end, size: build(n, pad, end, "tiny"))


# ---- what recipes say -----------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_name_what_exists(name):
    paper = RECIPES[name]
    assert paper.name == name and paper.data in SOURCES and paper.seeds
    recipe = paper.recipe
    assert MODELS[name].recipe() is recipe and MODELS[name].data == paper.data
    assert recipe.lr in recipe.rates and recipe.batch
    for settings in (recipe.settings, recipe.search):
        for schedule, values in settings.items():
            assert set(values) <= set(SCHEDULES[schedule].settings)
    assert set(recipe.warmed) <= set(SCHEDULES)


def test_worker_processes_know_the_papers_models():
    """A spawned process has imported nothing of papers."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, parallel._start_worker, (MODELS,)) as pool:
        recipe = pool.submit(recipe_of, "cifar10-resnet18").result()
    assert recipe == RECIPES["cifar10-resnet18"].recipe


def test_recipes_are_the_papers():
    """Literals of the papers' text: UAI 2024, sections 4.1 and 6; 2021, Tables 1 and 2."""
    resnet, wide = RECIPES["cifar10-resnet18"].recipe, RECIPES["cifar100-wrn40-10"].recipe
    assert (resnet.lr, resnet.nesterov, resnet.epochs, resnet.window) == (0.05, False, 200, 64)
    assert (wide.lr, wide.nesterov, wide.weight_decay, wide.window) == (0.1, True, 5e-4, 64)
    assert resnet.settings["step"] == {"milestones": (0.3, 0.6, 0.8), "factor": 0.2}
    assert resnet.search["exponential"]["gamma"] == (0.8, 0.9, 0.95, 0.99, 0.999)
    net = RECIPES["imagenet-resnet50"].recipe
    assert (net.epochs, net.window, net.settings["step"]["factor"]) == (100, 640, 0.1)
    bert = RECIPES["glue-cola"].recipe
    assert bert.rates == (1e-7, 1e-6, 1e-5) and set(bert.warmed).isdisjoint({"hd", "tlr"})
    wmt = RECIPES["wmt14-transformer"].recipe
    assert wmt.epochs * translation.STEPS == 10_000 and wmt.optimizer == "adam"
    assert (translation.SOURCE, translation.TARGET) == ("de", "en")


# ---- end to end -----------------------------------------------------------------------------


def train_killed_and_resumed(spec, root, monkeypatch):
    """Two epochs of two steps, whole, and killed in the last step and resumed: the same bits."""
    whole = train(spec, root / "whole")
    task = type(spec.task())
    loss, calls = task.loss, 0

    def failing(self, model, random):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise PowerCutError
        return loss(self, model, random)

    with monkeypatch.context() as patch:
        patch.setattr(task, "loss", failing)
        with pytest.raises(PowerCutError):
            train(spec, root / "killed")
    assert not (spec.folder(root / "killed") / RESULT).exists()
    resumed = train(spec, root / "killed")
    assert resumed == whole and calls == 4
    ends = [torch.load(spec.folder(root / n) / CHECKPOINT)["model"] for n in ("whole", "killed")]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    assert [r["step"] for r in whole["curve"]] == [2, 4]
    assert all(0 <= r["error"] <= 100 for r in whole["curve"] if r["error"] is not None)
    assert whole["curve"][-1]["test_loss"] > 0
    write_report([root / "killed"], root / "report")
    assert f"## {spec.model}" in (root / "report" / "report.md").read_text()
    return whole


@pytest.mark.parametrize(
    ("model", "write"),
    [
        ("cifar10-resnet18", tiny_data.write_cifar10_binaries),
        ("cifar10-wrn28-10", tiny_data.write_cifar10_binaries),
        ("cifar100-resnet34", tiny_data.write_cifar100_pickles),
        ("cifar100-wrn40-10", tiny_data.write_cifar100_binaries),
    ],
)
@pytest.mark.usefixtures("small")
def test_cifar_recipes(tmp_path, monkeypatch, model, write):
    write(tmp_path / "data")
    spec = RunSpec(
        model, "autodrop", data=str(tmp_path / "data"), subset=8, batch=4, epochs=2, angles=1
    )
    result = train_killed_and_resumed(spec, tmp_path, monkeypatch)
    assert result["settings"]["window"] == 64  # the recipe's
    assert len(result["angles"]) == 2  # four windows of one step
    labels = load_cifar(tmp_path / "data", RECIPES[model].classes).train_labels
    assert int(labels.max()) < RECIPES[model].classes


@pytest.mark.parametrize(("model", "schedule"), [
    ("imagenet-resnet18", "epoch-autodrop"), ("imagenet-resnet50", "step"),
])  # fmt: skip
@pytest.mark.usefixtures("small")
def test_imagenet_recipes(tmp_path, monkeypatch, model, schedule):
    tiny_data.write_imagenet(tmp_path / "data")
    # Every epoch's condition is met, so that the average and its statistics are made, too.
    settings = {"threshold": 180.0, "max_threshold": 180.0, "delay": 1}
    spec = RunSpec(
        model,
        schedule,
        data=str(tmp_path / "data"),
        subset=8,
        batch=4,
        epochs=2,
        settings=settings if schedule == "epoch-autodrop" else {},
    )
    train_killed_and_resumed(spec, tmp_path, monkeypatch)


@pytest.mark.parametrize("schedule", ["autodrop", "plateau"])
@pytest.mark.usefixtures("small")
def test_translation_recipe(tmp_path, monkeypatch, schedule):
    needs("sacrebleu", "tokenizers", "transformers")
    tiny_data.write_parallel_text(tmp_path / "data")
    spec = RunSpec(
        "wmt14-transformer",
        schedule,
        data=str(tmp_path / "data"),
        batch=50,
        subset=12,
        epochs=2,
        warmup_steps=2,
    )
    monkeypatch.setattr(translation, "STEPS", 2)
    result = train_killed_and_resumed(spec, tmp_path, monkeypatch)
    assert result["measure"] == "100 - BLEU"


GLUE = ("glue-cola", "glue-mnli", "glue-qnli", "glue-qqp", "glue-sst2")


@pytest.mark.parametrize(
    ("model", "schedule"),
    [*((model, "autodrop") for model in GLUE), *((GLUE[0], s) for s in ("hd", "tlr", "linear"))],
)
def test_glue_recipes(tmp_path, model, schedule):
    needs("accelerate", "transformers")
    tiny_data.write_glue(tmp_path / "data")
    tiny_data.write_bert(tmp_path / "bert")
    spec = RunSpec(
        model,
        schedule,
        data=str(tmp_path / "data"),
        checkpoint=str(tmp_path / "bert"),
        batch=8,
        epochs=2,
        lr=1e-3,
        warmup_steps=1,
        settings={"autodrop": {"window": 1}, "tlr": {"least_gap": 1}}.get(schedule, {}),
    )
    whole = train(spec, tmp_path / "whole")

    def kill(epoch, epochs, record):
        if epoch == 2:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        train(spec, tmp_path / "killed", on_epoch=kill)
    assert not (spec.folder(tmp_path / "killed") / RESULT).exists()
    resumed = train(spec, tmp_path / "killed")
    assert resumed == whole
    assert [r["step"] for r in whole["curve"]] == [2, 4]
    assert all(r["loss"] > 0 and 0 <= r["error"] <= 100 for r in whole["curve"])
    if schedule == "autodrop":
        logs = [spec.folder(tmp_path / n) / LOG for n in ("whole", "killed")]
        lines, resumed_lines = (log.read_text().splitlines() for log in logs)
        header = lines[0]
        assert '"event": "settings"' in header and header not in lines[1:]
        # The process that resumed wrote the header again, before its first epoch.
        assert resumed_lines.count(header) == 2
        assert [line for line in resumed_lines if line != header] == lines[1:]
        # Of four steps the first is warm-up: three windows of one step, and one angle.
        assert [r["step"] for r in read_log(logs[0])[0]] == [4]
    assert train(spec, tmp_path / "whole") == whole  # finished: read, not run


def test_imagenet_on_two_ranks(tmp_path):
    """What torchrun starts: two processes that share batches end with one log and one result."""
    tiny_data.write_imagenet(tmp_path / "data")
    arguments = ["--data", tmp_path / "data", "--subset", 4, "--batch", 4, "--epochs", 2]
    script = [COMMAND, "run", "--model", "imagenet-resnet18", "--schedule", "autodrop"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments += ["--set", "window=1", "--output", tmp_path / "out"]
    ended = subprocess.run(
        [str(argument) for argument in (*torchrun, *script, *arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob(RESULT)
    result = json.loads(path.read_text())
    assert [r["step"] for r in result["curve"]] == [1, 2]
    metrics = read_log(path.parent / LOG).metrics
    assert [m["step"] for m in metrics] == [1, 1, 2, 2]  # each step once, and each epoch
    # Four test images, whichever rank has read them.
    assert all(r["error"] % 25 == 0 for r in result["curve"])


# ---- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write", [tiny_data.write_cifar100_pickles, tiny_data.write_cifar100_binaries]
)
def test_cifar100_has_its_fine_labels(tmp_path, write):
    labels = write(tmp_path)
    data = load_cifar(tmp_path, 100)
    assert data.classes == 100
    assert data.train_labels.tolist() == labels["train"]
    assert data.test_labels.tolist() == labels["test"]
    assert data.train_images.shape == (24, 3, 32, 32)
    with pytest.raises(FileNotFoundError, match=r"data_batch_1 \.\.\. and test_batch of CIFAR-10 "):
        load_cifar(tmp_path, 10, tmp_path / "other.npy")
    with pytest.raises(ValueError, match=r"cifar100-uint8\.npy: expected labels of 10 classes"):
        load_cifar(tmp_path, 10, tmp_path / "cifar100-uint8.npy")


def test_a_cache_of_cifar10_is_not_taken_for_cifar100(tmp_path):
    tiny_data.write_cifar10_binaries(tmp_path)
    load_cifar(tmp_path, 10)
    with pytest.raises(ValueError, match=r"expected labels of 100 classes, .* not CIFAR-100"):
        load_cifar(tmp_path, 100, tmp_path / "cifar10-uint8.npy")


def test_a_folder_with_another_number_of_classes_is_refused(tmp_path):
    tiny_data.write_imagenet(tmp_path, classes=3)
    with pytest.raises(ValueError, match=r"train: expected 1000 folders, .* got 3"):
        RunSpec("imagenet-resnet18", "step", data=str(tmp_path)).task()
    (tmp_path / "val").rename(tmp_path / "test")
    with pytest.raises(ValueError, match=r"train: expected 100 folders, .* got 3; .* CIFAR-100"):
        load_cifar(tmp_path, 100)


def test_imagenet_crops(tmp_path):
    """A crop of a flat image is flat; a crop of a ramp is a piece of it, and mirrors occur."""
    from PIL import Image

    place = tmp_path / "n0"
    place.mkdir()
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    Image.fromarray(ramp).convert("RGB").save(place / "ramp.png")
    data = Folder(tmp_path, 1, train=True)
    crops = torch.stack([data[seed, 0][0] for seed in range(50)]).float()
    assert crops.shape == (50, 3, imagenet.SIDE, imagenet.SIDE)
    rises = crops[:, 0, 100, -1] - crops[:, 0, 100, 0]
    assert 10 < int((rises < 0).sum()) < 40  # half of 50 are mirrored: 3 sigma is 11
    # A crop covers 8 to 100 % of the area at ratios to 4/3: at least a fifth of the width.
    assert rises.abs().min() > 0.2 * 255 * 0.9 and rises.abs().max() <= 255
    assert torch.equal(data[7, 0][0], data[7, 0][0])
    test = Folder(tmp_path, 1, train=False)[0, 0][0].float()
    # 256 of 341 pixels high and wide after scaling; the central 224 begin at 58 of 341.
    assert test[0, 0, 0] == pytest.approx(255 * 58 / 341, abs=4)  # one grey step and antialiasing


def test_workers_read_the_same_batches(tmp_path):
    """In two epochs, with the test images between them, from workers that stay."""
    tiny_data.write_imagenet(tmp_path)
    paper = RECIPES["imagenet-resnet18"]
    read = []
    for workers in (0, 1):
        task = ImageNetModel(
            paper, tmp_path, device=torch.device("cpu"), batch=2, subset=4, workers=workers
        )
        random = torch.Generator().manual_seed(0)
        batches = []
        for _ in range(2):
            task.start_epoch(random)
            batches += list(task._batches)
            batches += list(task._read(task._test, [[(0, 1), (0, 2)]]))
        read.append(batches)
    assert len(read[0]) == 6 and not torch.equal(read[0][0][0], read[0][3][0])
    for one, other in zip(*read, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_parallel_text_is_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected train\.de and train\.en"):
        read_pairs(tmp_path, "train")
    (tmp_path / "train").mkdir()
    for name, lines in (("a", 2), ("b", 1)):
        for language in ("de", "en"):
            text = "".join(f"{name}{i}\u2028{language}\n" for i in range(lines))
            (tmp_path / "train" / f"{name}.{language}").write_text(text, encoding="utf-8")
    sources, targets = read_pairs(tmp_path, "train")
    assert sources == ["a0\u2028de", "a1\u2028de", "b0\u2028de"] and len(targets) == 3
    (tmp_path / "train" / "b.en").write_text("one\ntwo\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"b\.en: expected 1 lines, as in b\.de, got 2"):
        read_pairs(tmp_path, "train")


@pytest.mark.usefixtures("small")
def test_a_trained_translator_translates(tmp_path):
    """Word by word German is learned, so that subwords, masks, shifts and beams fit together."""
    needs("sacrebleu", "tokenizers", "transformers")
    tiny_data.write_parallel_text(tmp_path, n=300)
    task = Translation(
        RECIPES["wmt14-transformer"], tmp_path, device=torch.device("cpu"), batch=200, subwords=200
    )
    torch.manual_seed(0)
    model = task.model()
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        task.start_epoch(random)
        for _ in range(task.steps_per_epoch):
            loss = task.loss(model, random)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    before = task.scores(task.model().eval())
    after = task.scores(model.eval())
    # Untrained 0 BLEU. Trained it was 95 of 100; one wrong word of these 37 costs some 5.
    assert before.error > 95 and after.error < 50
    assert after.test_loss < 0.5 * before.test_loss
    assert Path(tmp_path / "subwords.json").exists()


@pytest.mark.usefixtures("small")
def test_a_batch_counts_the_tokens_of_each_language(tmp_path):
    """As Vaswani et al. 2017: so many source tokens, and as many target tokens."""
    needs("sacrebleu", "tokenizers", "transformers")
    tiny_data.write_parallel_text(tmp_path, n=100)
    task = Translation(
        RECIPES["wmt14-transformer"], tmp_path, device=torch.device("cpu"), batch=200, subwords=60
    )
    task.start_epoch(torch.Generator().manual_seed(0))
    filled = []
    for part in task._order:
        for side in task._train:
            ids, mask = task._padded([side[i] for i in part])
            assert ids.numel() <= 200 and int(mask.sum()) == sum(len(side[i]) for i in part)
        filled.append(max(side.lengths[part].max() for side in task._train) * len(part))
    assert np.median(filled) > 100  # both languages together would be more than 200
    cut = np.concatenate(task._cut(np.argsort(task._sizes)))
    assert sorted(cut.tolist()) == list(range(len(task._train[0])))


@pytest.mark.usefixtures("small")
def test_encoded_sentences_are_kept(tmp_path, monkeypatch):
    needs("sacrebleu", "tokenizers", "transformers")
    tiny_data.write_parallel_text(tmp_path, n=25)
    monkeypatch.setattr(translation, "_ENCODED", 10)  # three blocks
    paper = RECIPES["wmt14-transformer"]

    def made(subset=None):
        options = {"device": torch.device("cpu"), "batch": 60, "subwords": 60, "subset": subset}
        return Translation(paper, tmp_path, **options)

    task = made()
    lines = (tmp_path / "train.de").read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        ids = task._vocabulary.encode(line).ids
        assert task._train[0][i].tolist() == [*ids, task._end]
    stamp = (tmp_path / "subwords.json.train.npz").stat().st_mtime_ns
    again = made()
    assert (tmp_path / "subwords.json.train.npz").stat().st_mtime_ns == stamp
    for side, other in zip(task._train, again._train, strict=True):
        assert np.array_equal(side.ids, other.ids) and np.array_equal(side.lengths, other.lengths)
    assert len(made(subset=7)._train[0]) == 7  # other sentences: encoded again


def test_translations_are_searched_as_in_the_paper(tmp_path):
    """Vaswani et al. 2017, section 6.1: beams of 4, a length penalty of 0.6, 50 more tokens."""
    needs("sacrebleu", "tokenizers", "transformers")
    tiny_data.write_parallel_text(tmp_path)
    task = Translation(
        RECIPES["wmt14-transformer"], tmp_path, device=torch.device("cpu"), batch=60, subwords=60
    )
    asked = []

    class Model:
        def generate(self, **options):
            asked.append(options)
            return options["input_ids"]

    assert len(task.translate(Model())) == 6
    (options,) = asked
    width = options["input_ids"].shape[1]
    assert {k: options[k] for k in ("num_beams", "length_penalty", "max_new_tokens")} == {
        "num_beams": 4,
        "length_penalty": 0.6,
        "max_new_tokens": width + 50,
    }
    assert not options["do_sample"] and task.evaluate_every == 1
    model = translation.build(60, 0, 1, "base")
    assert (model.config.d_model, model.config.dropout, model.config.encoder_layers) == (
        512,
        0.1,
        6,
    )
    assert translation._SMOOTHING == 0.1


def test_glue_files_are_checked(tmp_path):
    tiny_data.write_glue(tmp_path)
    cola = read_examples(tmp_path, "glue-cola", train=True)
    assert cola.texts[1] == ('the "film" number 1 is good',) and cola.labels[:3] == [0, 1, 0]
    mnli = read_examples(tmp_path, "glue-mnli", train=False)
    assert len(mnli.texts[0]) == 2 and mnli.labels[:4] == [0, 1, 2, 0]
    qqp = tmp_path / "QQP" / "train.tsv"
    qqp.write_text(qqp.read_text() + "17\t1\n")  # the published file has such lines
    assert len(read_examples(tmp_path, "glue-qqp", train=True).labels) == 16
    (tmp_path / "SST-2" / "dev.tsv").write_text("text\tlabel\n")
    with pytest.raises(ValueError, match=r"dev\.tsv: expected columns sentence, label, got text"):
        read_examples(tmp_path, "glue-sst2", train=False)
    (tmp_path / "QNLI" / "dev.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="expected GLUE's QNLI"):
        read_examples(tmp_path, "glue-qnli", train=False)
    with pytest.raises(ValueError, match="GLUE's tasks have autodrop, linear"):
        train(RunSpec("glue-cola", "cosine", data="x", checkpoint="y"), tmp_path)
