"""The papers' tables and figures: what they are made of, and the command that makes them."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_data
import torch
from click.testing import CliRunner
from papers import command, imagenet, making, models, translation
from papers.exhibits import (
    EXHIBITS,
    FIGURE_3_RATES,
    Entry,
    PaperRun,
    accuracy,
    angle_spread,
    best_epoch,
    best_until,
    score,
)
from papers.making import GROUP, Options, base_spec, finished, make_exhibit
from papers.recipes import RECIPES
from papers.sources import SOURCES
from papers.timing import time_steps
from training import command as training_command
from training import run, schedules
from training.ranks import Ranks
from training.schedules import SCHEDULES

PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Image models of a thousandth of the size."""
    run.made_task.cache_clear()
    for name in RECIPES:
        if RECIPES[name].build is not None:
            thin = replace(RECIPES[name], build=lambda classes: models.wide_resnet(10, 1, classes))
            monkeypatch.setitem(RECIPES, name, thin)


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "90"}).invoke(command.cli, [str(a) for a in arguments])


def result(error, **changes):
    """Of a run of four epochs whose error halves in each."""
    curve = [
        {"epoch": e, "step": 10 * e, "loss": 1 / e, "lr": 0.1, "error": error * 2 ** (4 - e)}
        for e in range(1, 5)
    ]
    values = {"error": error, "best_error": error, "diverged": False, "curve": curve, "angles": []}
    return {**values, "steps_per_epoch": 10, "measure": "test error, %", **changes}


# ---- what they are made of ------------------------------------------------------------------


def test_every_table_and_figure_of_both_papers_is_there():
    uai = [f"uai-table-{i}" for i in range(1, 17)] + [f"uai-figure-{i}" for i in range(1, 13)]
    first = ["2021-table-1", "2021-table-2", *(f"2021-figure-{i}" for i in range(1, 13))]
    assert set(EXHIBITS) == set(uai + first)
    assert all(set(e.data) <= set(SOURCES) for e in EXHIBITS.values())


def test_the_documentation_lists_them_all():
    text = (Path(__file__).parents[3] / "docs" / "papers.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:uai|2021)-(?:table|figure)-\d+)`", text))
    assert named == set(EXHIBITS)


@pytest.mark.parametrize("name", [n for n, e in EXHIBITS.items() if e.entries])
def test_entries_are_runs_that_can_be_made(name):
    for entry in EXHIBITS[name].entries:
        run = entry.run
        spec = base_spec(run, Options(None))
        recipe = RECIPES[run.model].recipe
        spec.schedule_settings(recipe)  # raises for an unknown setting
        # One run must not stand under two names: what is the default is left out.
        for key, value in run.settings.items():
            usual = {**SCHEDULES[run.schedule].settings, **recipe.settings.get(run.schedule, {})}
            assert key == "factor" or usual[key] != value
        assert run.lr != recipe.lr


def test_the_papers_numbers_are_printed():
    """Samples of each table, read from the papers' text once more."""
    printed = {
        (name, entry.row, entry.column): entry.printed
        for name, exhibit in EXHIBITS.items()
        for entry in exhibit.entries
    }
    r18, w40, i18 = "ResNet-18, CIFAR-10", "WRN-40-10, CIFAR-100", "ResNet-18, ImageNet"
    ten, m = "smoothed from 10 angles on", "m = 50"
    for key, number in {
        ("uai-table-2", r18, "AutoDrop"): "4.79 ± .99",
        ("uai-table-2", w40, "TLR"): "39.54 ± .48",
        ("uai-table-2", i18, "step decay"): "29.74",
        ("uai-table-15", i18, "k = 640"): "29.24",
        ("uai-table-1", w40, "k = 128"): "24.49 ± .16",
        ("uai-table-4", "Transformer", "AutoDrop"): "20.37",
        ("uai-table-5", "QQP", "linear"): "90.51",
        ("uai-table-5", "CoLA", "constant"): "83.41",
        ("uai-table-6", "rate 0.03", "epochs"): "0.22",
        ("uai-table-7", m, ten): "7.41 ± 0.111",
        ("uai-table-10", "rho = 0.99", ""): "7.36 ± 0.021",
        ("uai-table-13", "m = 20", ten): "23.59 ± 0.22",
        ("uai-table-14", "rho = 0.5", ""): "25.58 ± 0.46",
        ("uai-table-16", "epoch 100", "CLR triangular2"): "5.46",
        ("uai-table-16", "epoch 200", "AutoDrop"): "4.76",
        ("2021-table-1", w40, "AutoDrop, rho = 0.2"): "18.17 ± 0.25",
        ("2021-table-1", i18, "AutoDrop, rho = 0.1"): "29.80",
        ("2021-table-2", "initial rate 0.15", "baseline"): "5.04 ± 0.19",
    }.items():
        assert printed[key] == number, key


def test_tables_share_their_runs():
    def runs(name, row):
        return [e.run for e in EXHIBITS[name].entries if e.row == row]

    own = runs("uai-table-2", "ResNet-18, CIFAR-10")[-1]
    assert own == PaperRun("cifar10-resnet18", "autodrop")
    assert own in runs("uai-table-7", "m = 10") and own in runs("uai-table-8", "rho = 0.95")
    assert own in runs("uai-table-15", "ResNet-18, CIFAR-10")
    table_2 = runs("2021-table-2", "initial rate 0.05")
    assert all(run in runs("2021-table-1", "ResNet-18, CIFAR-10") for run in table_2)


def test_values_of_a_run():
    run = result(5.0)
    assert best_epoch(run) == 4.0 and best_epoch(result(5.0, curve=run["curve"][:2])) == 2.0
    assert best_until(2)(run) == 20.0 and best_until(4)(run) == 5.0
    assert best_until(50)(run) is None  # it ended before
    assert score(result(80.0)) == 20.0 and accuracy(result(8.5)) == 91.5
    # Of eight angles the second half: 1, 2, 3, 4 spread by sqrt(5 / 3).
    angles = [[s, a] for s, a in enumerate([9.0, None, 7.0, 8.0, 6.0, 1.0, 2.0, 3.0, 4.0])]
    spread = angle_spread("window_angles")
    assert spread(result(1.0, window_angles=angles)) == pytest.approx(math.sqrt(5 / 3))
    assert Entry("", "", PaperRun("cifar10-resnet18", "step")).value(result(3.0)) == 3.0


# ---- the command ----------------------------------------------------------------------------


def test_without_a_name_all_are_listed(tmp_path):
    listed = invoke("paper", "--output", tmp_path)
    assert listed.exit_code == 0, listed.output
    for name in EXHIBITS:
        assert f"\n{name} " in f"\n{listed.output}"
    assert "All schedules on image models (0 of 192 runs, needs cifar10 and" in listed.output
    for name, source in SOURCES.items():
        assert f"--data {name}=" in listed.output and source.origin in listed.output


def tiny(tmp_path, *names):
    data = tmp_path / "data"
    if not data.exists():
        tiny_data.write_cifar10_binaries(data)
    arguments = ["--data", f"cifar10={data}", "--model", "cifar10-resnet18", "--seeds", 2]
    arguments += [
        "--cache",
        tmp_path / "cache",
        "--epochs",
        2,
        "--subset",
        8,
        "--batch",
        4,
        "--workers",
        0,
        "--device",
        "cpu",
    ]
    return invoke("paper", *names, *arguments, "--output", tmp_path / "out")


def test_a_table_is_run_once_and_printed_next_to_the_papers(tmp_path):
    done = tiny(tmp_path, "2021-table-2")
    assert done.exit_code == 0, done.output
    rows = [line for line in done.output.splitlines() if line.startswith("| initial rate")]
    assert len(rows) == 8
    assert rows[5].startswith("| initial rate 0.05 | AutoDrop, rho = 0.2 | 4.61 ± 0.17 | ")
    assert all(" ± " in row.split(" | ")[3] and row.endswith("| 2 |") for row in rows)
    assert "Not the paper's setting: epochs 2, subset 8, batch 4, at most 2 seeds." in done.output
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("result.json")}
    assert len(stamps) == 16
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["cifar10.cache"]
    # The first table takes the runs that it shares, and lists those without data as not run.
    again = tiny(tmp_path, "2021-table-1")
    assert again.exit_code == 0, again.output
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("result.json")}
    assert {p: after[p] for p in stamps} == stamps
    assert len(after) == 16 + 2 * 2  # AutoDrop at rho = 0.1 and 0.5
    listed = tiny(tmp_path)
    assert "2021-table-2    Initial rates of ResNet-18, CIFAR-10 (16 of 16 runs)" in listed.output


def test_runs_of_other_settings_are_counted_apart(tmp_path):
    """A run of a part of the data is no run of the paper, and the list does not fail over it."""
    tiny(tmp_path, "2021-table-2")
    arguments = ("--model", "cifar10-resnet18", "--seeds", 2, "--epochs", 2)
    listed = invoke("paper", *arguments, "--output", tmp_path / "out")
    assert listed.exit_code == 0, listed.output
    assert "CIFAR-10 (0 of 16 runs, 16 more under other settings, needs cifar10)" in listed.output
    failed = invoke("paper", "2021-table-2", "--finished", *arguments, "--output", tmp_path / "out")
    assert failed.exit_code == 1 and isinstance(failed.exception, SystemExit)
    assert "subset (expected None, found 8)" in failed.output


def test_a_changed_recipe_is_noticed(tmp_path, monkeypatch):
    tiny(tmp_path, "2021-table-2")
    changed = replace(RECIPES["cifar10-resnet18"].recipe, weight_decay=1e-3)
    other = replace(RECIPES["cifar10-resnet18"], recipe=changed)
    monkeypatch.setitem(RECIPES, "cifar10-resnet18", other)
    run.made_task.cache_clear()
    assert "(0 of 16 runs, 16 more under other settings)" in tiny(tmp_path).output
    again = tiny(tmp_path, "2021-table-2")
    assert again.exit_code == 1
    assert "the recipe's weight_decay (expected 0.001, found 0.0005)" in " ".join(
        again.output.split()
    )


def test_missing_data_are_described(tmp_path):
    done = invoke("paper", "uai-table-2", "--model", "cifar100-resnet34", "--output", tmp_path)
    assert done.exit_code == 0, done.output
    assert "- --data cifar100=FOLDER: CIFAR-100; the published pickles (train, test)" in done.output
    assert "www.cs.toronto.edu" in done.output
    assert "imagenet" not in done.output and "--data cifar10=" not in done.output
    listed = invoke("paper", "--model", "cifar100-resnet34", "--output", tmp_path)
    assert "All schedules on image models (0 of 39 runs, needs cifar100)" in listed.output


@pytest.mark.parametrize(
    ("name", "model", "schedule", "write"),
    [
        ("uai-figure-11", "imagenet-resnet50", "step", tiny_data.write_imagenet),
        ("uai-table-4", "wmt14-transformer", "plateau", tiny_data.write_parallel_text),
        ("uai-table-5", "glue-sst2", "tlr", tiny_data.write_glue),
    ],
)
def test_the_other_data_sets(tmp_path, monkeypatch, name, model, schedule, write):
    needed = {"uai-table-4": "tokenizers", "uai-table-5": "accelerate"}.get(name)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed; it comes with autodrop_ext[bench]")
    monkeypatch.setattr(imagenet, "SIDE", 32)
    monkeypatch.setattr(imagenet, "_SHORTER", 40)
    monkeypatch.setattr(translation, "SUBWORDS", 60)
    monkeypatch.setattr(translation, "STEPS", 2)
    build = translation.build
    monkeypatch.setattr(translation, "build", lambda n, pad, end, size: build(n, pad, end, "tiny"))
    recipe = RECIPES[model].recipe
    write(tmp_path / "data")
    arguments = ["--data", f"{RECIPES[model].data}={tmp_path / 'data'}"]
    if name == "uai-table-5":
        tiny_data.write_bert(tmp_path / "bert")
        arguments += ["--data", f"bert={tmp_path / 'bert'}"]
    arguments += ["--model", model, "--schedule", schedule, "--epochs", 2, "--subset", 12]
    arguments += ["--batch", 50 if model.startswith("wmt") else 4, "--workers", 0]
    arguments += ["--device", "cpu", "--cache", tmp_path / "cache", "--output", tmp_path / "out"]
    done = invoke("paper", name, *arguments)
    assert done.exit_code == 0, done.output
    (path,) = (tmp_path / "out").rglob("result.json")
    found = json.loads(path.read_text())
    assert found["spec"]["schedule"] == schedule and len(found["curve"]) == 2
    assert found["initial_lr"] == recipe.lr and found["error"] is not None
    if name == "uai-figure-11":
        assert (tmp_path / "out" / "uai-figure-11.png").read_bytes().startswith(PNG)
    else:
        (row,) = [line for line in done.output.splitlines() if line.endswith("| 1 |")]
        error = found["best_error" if name == "uai-table-5" else "error"]
        assert float(row.split(" | ")[3]) == pytest.approx(100 - error, abs=0.01)
    assert not list((tmp_path / "out").rglob("checkpoint*"))
    listed = invoke("paper", *arguments)
    assert "(1 of 1 runs)" in listed.output


def test_several_ranks_leave_out_what_takes_one(tmp_path, monkeypatch):
    """And the first of them alone writes, draws and measures."""

    class Two(Ranks):
        def __init__(self, rank):
            self.rank, self.size, self.first = rank, 2, rank == 0

    data = tmp_path / "data"
    tiny_data.write_cifar10_binaries(data)
    options = Options(tmp_path / "out", {"cifar10": str(data)}, models=["cifar10-resnet18"])

    def train(specs, title):
        raise AssertionError("CIFAR takes one process")

    for rank in (1, 0):
        monkeypatch.setattr(making, "Ranks", lambda rank=rank: Two(rank))
        monkeypatch.setattr(making, "_theory", lambda *rest: ["drawn"])
        monkeypatch.setattr(making, "_times", lambda *rest: ["measured"])
        names = ("2021-table-2", "uai-figure-1", "uai-table-3")
        written = [make_exhibit(name, options, train) for name in names]
        assert bool(list((tmp_path / "out").iterdir())) == (rank == 0)
        if rank:
            assert written == [[], [], []]
    assert written[1] == ["drawn"]
    text = written[0][0].read_text()
    assert "it takes one process: ResNet-18, CIFAR-10. Run it again without torchrun" in text


def test_failures_end_in_words(tmp_path, monkeypatch):
    def full(*rest, **options):
        raise torch.cuda.OutOfMemoryError("tried to allocate 2 GiB")

    for place, arguments in ((making, ("uai-table-3",)), (training_command, ("uai-table-6",))):
        name = "time_steps" if place is making else "train_all"
        monkeypatch.setattr(place, name, full)
        (tmp_path / "data").mkdir(exist_ok=True)
        options = ("--data", f"cifar10={tmp_path / 'data'}", "--output", tmp_path)
        failed = invoke("paper", *arguments, *options)
        assert failed.exit_code == 1 and isinstance(failed.exception, SystemExit)
        assert "give a smaller --batch" in " ".join(failed.output.split())


def test_searches_come_first_and_curves_are_drawn(tmp_path, monkeypatch):
    recipe = replace(
        RECIPES["cifar10-resnet18"].recipe, search={"exponential": {"gamma": (0.5, 0.9)}}
    )
    thin = replace(RECIPES["cifar10-resnet18"], recipe=recipe)
    monkeypatch.setitem(RECIPES, "cifar10-resnet18", thin)
    done = tiny(tmp_path, "uai-figure-6", "--schedule", "exponential", "--schedule", "step")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "uai-figure-6.png").read_bytes().startswith(PNG)
    tried = list((tmp_path / "out" / "paper-search").rglob("result.json"))
    assert len(tried) == 2
    assert all(json.loads(p.read_text())["spec"]["validation"] for p in tried)
    counted = list((tmp_path / "out" / GROUP).rglob("result.json"))
    assert len(counted) == 4  # two schedules, two seeds
    gammas = {json.loads(p.read_text())["spec"]["settings"].get("gamma") for p in counted}
    assert len(gammas - {None}) == 1 and gammas - {None} <= {0.5, 0.9}


def test_figure_3_and_table_6_come_from_the_same_runs(tmp_path):
    done = tiny(tmp_path, "uai-figure-3", "uai-table-6")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "uai-figure-3.png").read_bytes().startswith(PNG)
    assert len(list((tmp_path / "out").rglob("result.json"))) == len(FIGURE_3_RATES)
    # Two epochs have no angle: it takes three. Nor has a run of four steps a window of 64.
    assert done.output.count("| not run | 0 |") == 6


def test_finished_runs_alone_are_taken_on_demand(tmp_path):
    nothing = invoke("paper", "2021-figure-7", "--finished", "--output", tmp_path)
    assert nothing.exit_code == 0 and nothing.output.count("| not run | 0 |") == 8
    options = Options(tmp_path)
    for model, epochs in (("cifar10-resnet18", 4), ("cifar100-resnet34", 2)):
        run = next(e.run for e in EXHIBITS["2021-figure-7"].entries if e.run.model == model)
        spec = base_spec(run, options)
        folder = spec.folder(tmp_path)
        folder.mkdir(parents=True)
        recipe = spec.recipe_in_use(RECIPES[model].recipe)
        found = result(5.0, spec=vars(spec), recipe=recipe, machine="a machine")
        found["curve"] = found["curve"][:epochs]
        (folder / "result.json").write_text(json.dumps(found))
    (text, picture) = make_exhibit("2021-figure-7", options, None)
    assert "| ResNet-18, CIFAR-10 | baseline | - | 4.0 | 1 |" in text.read_text()
    assert "| ResNet-34, CIFAR-100 | baseline | - | 2.0 | 1 |" in text.read_text()
    assert picture.read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match=r"another run: subset \(expected 8, found None\)"):
        finished(replace(spec, subset=8), tmp_path)


def test_steps_are_timed_in_turns():
    schedules = ("hd", "tlr", "step", "autodrop")
    options = {"device": "cpu", "bf16": False, "rounds": 2, "steps": 1, "batch": 2}
    seconds = time_steps("cifar10-wrn28-10", schedules, **options)
    assert set(seconds) == set(schedules)
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in seconds.values())
    with pytest.raises(ValueError, match="expected an image model, got 'wmt14-transformer'"):
        time_steps("wmt14-transformer", schedules, **options)


@pytest.mark.parametrize("model", ["cifar10-wrn28-10", "imagenet-resnet50"])
def test_timed_rounds_hold_all_that_schedules_do(model, monkeypatch):
    """A window of AutoDrop, and a change of TLR's rate, in each of three rounds."""
    changed, windows = [], []
    autodrop = schedules.AutoDrop
    monkeypatch.setattr(
        schedules, "AutoDrop", lambda *a, **k: windows.append(k["window"]) or autodrop(*a, **k)
    )
    monkeypatch.setattr(
        schedules.TrainableLearningRate,
        "_relative_step",
        lambda self, *rest: changed.append(self.steps) or 0.0,
    )
    options = {"device": "cpu", "bf16": False, "rounds": 3, "steps": 2, "batch": 2, "side": 32}
    time_steps(model, ("tlr", "autodrop"), **options)
    assert windows == [2]
    assert changed == [4, 6, 8]  # not in the round that is not counted


def test_the_table_of_times_is_measured(tmp_path):
    arguments = ("--model", "cifar10-wrn28-10", "--rounds", 1, "--steps", 1, "--device", "cpu")
    done = invoke("paper", "uai-table-3", *arguments, "--output", tmp_path)
    assert done.exit_code == 0, done.output
    rows = [line.split(" | ") for line in done.output.splitlines() if "WRN-28-10" in line]
    assert [row[1:3] for row in rows] == [
        ["hd", "0.21"], ["tlr", "0.23"], ["step", "0.20"], ["autodrop", "0.20"],
    ]  # fmt: skip
    assert all(float(row[3].split()[0]) > 0 for row in rows)


def test_figures_of_the_theory_are_drawn(tmp_path):
    done = invoke("paper", "uai-figure-5", "--output", tmp_path)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "uai-figure-5.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("paper", "uai-table-99"), "expected names that the command without one lists"),
        (("paper", "--data", "cifar=."), "expected one of cifar10"),
        (("paper", "--data", "cifar10=nowhere"), "cifar10: expected a folder, got 'nowhere'"),
        (("table", "--search", "exponential.k=1"), "exponential has the settings gamma; got k"),
        (("table", "--search", "gamma=1"), "expected SCHEDULE.NAME=VALUE,VALUE"),
        (("table", "--no-tune", "--search", "hd.beta=1e-3"), "no meaning with --no-tune"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed = invoke(*arguments)
    assert failed.exit_code != 0 and isinstance(failed.exception, SystemExit)
    assert message in " ".join(failed.output.split())
