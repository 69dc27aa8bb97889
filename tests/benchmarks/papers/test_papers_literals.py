"""The papers' settings and numbers once more as literals, read from their text."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from papers import translation
from papers.exhibits import EXHIBITS, FIGURE_3_RATES
from papers.recipes import RECIPES
from papers.timing import BATCH, PRINTED, order
from training.schedules import SCHEDULES

STEP_CIFAR = {"step": {"milestones": (0.3, 0.6, 0.8), "factor": 0.2}}
STEP_IMAGENET = {
    "step": {"milestones": (0.3, 0.6, 0.9), "factor": 0.1},
    "epoch-autodrop": {"factor": 0.1, "delay": 20},
}
IMAGES = {
    "exponential": {"gamma": (0.8, 0.9, 0.95, 0.99, 0.999)},
    "clr": {"half_cycle_epochs": (2.0, 5.0, 10.0)},
}
FIELDS = ("nesterov", "weight_decay", "lr", "rates", "epochs", "batch", "window")
CIFAR_RATES, IMAGENET_RATES = (0.025, 0.05, 0.1, 0.2), (0.05, 0.1, 0.2)


@pytest.mark.parametrize(
    ("name", "values", "settings", "seeds"),
    [
        ("cifar10-resnet18", (False, 5e-4, 0.05, CIFAR_RATES, 200, 128, 64), STEP_CIFAR, 4),
        ("cifar10-wrn28-10", (True, 5e-4, 0.1, CIFAR_RATES, 200, 128, 64), STEP_CIFAR, 4),
        ("cifar100-resnet34", (False, 5e-4, 0.05, CIFAR_RATES, 200, 128, 64), STEP_CIFAR, 4),
        ("cifar100-wrn40-10", (True, 5e-4, 0.1, CIFAR_RATES, 200, 128, 64), STEP_CIFAR, 4),
        ("imagenet-resnet18", (False, 1e-4, 0.1, IMAGENET_RATES, 100, 256, 640), STEP_IMAGENET, 1),
        ("imagenet-resnet50", (False, 1e-4, 0.1, IMAGENET_RATES, 100, 256, 640), STEP_IMAGENET, 1),
    ],
)
def test_image_recipes(name, values, settings, seeds):
    recipe = asdict(RECIPES[name].recipe)
    assert tuple(recipe[field] for field in FIELDS) == values
    assert (recipe["optimizer"], recipe["momentum"]) == ("sgd", 0.9)
    assert (recipe["warmup_steps"], recipe["warmup_share"], recipe["warmed"]) == (0, 0.0, ())
    assert recipe["settings"] == settings and recipe["search"] == IMAGES
    assert RECIPES[name].seeds == tuple(range(seeds))


def test_the_translation_recipe():
    assert asdict(RECIPES["wmt14-transformer"].recipe) == {
        "optimizer": "adam",
        "lr": 7e-4,
        "rates": (3.5e-4, 7e-4, 1.4e-3),
        "epochs": 10,
        "window": None,
        "momentum": 0.9,  # SGD's; Adam has its betas
        "nesterov": False,
        "weight_decay": 0.0,
        "betas": (0.9, 0.98),
        "eps": 1e-9,
        "batch": 25_000,
        "settings": {"plateau": {"patience": 1}},
        "search": {},
        "warmup_steps": 4000,
        "warmup_share": 0.0,
        "warmed": ("autodrop", "plateau", "constant", "linear"),
    }
    assert RECIPES["wmt14-transformer"].seeds == (0,)
    assert (translation.STEPS, translation.SUBWORDS) == (1000, 37_000)


@pytest.mark.parametrize("task", ["cola", "mnli", "qnli", "qqp", "sst2"])
def test_glue_recipes(task):
    paper = RECIPES[f"glue-{task}"]
    assert asdict(paper.recipe) == {
        "optimizer": "adam",
        "lr": 1e-5,
        "rates": (1e-7, 1e-6, 1e-5),
        "epochs": 3,
        "window": None,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 0.0,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "batch": 32,
        "settings": {},
        "search": {},
        "warmup_steps": 0,
        "warmup_share": 0.1,
        "warmed": ("autodrop", "constant", "linear"),
    }
    assert paper.classes == (3 if task == "mnli" else 2) and paper.seeds == (0,)


def test_settings_of_the_papers_schedules():
    assert SCHEDULES["autodrop"].settings == {
        "window": None,
        "factor": 0.95,
        "threshold": 0.1,
        "buffer_size": 10,
        "min_samples": 10,
        "kernel": "value",
        "min_lr": 0.0,
    }
    epoch = {"factor": 0.2, "threshold": None, "max_threshold": 1.0, "delay": None, "min_lr": 1e-4}
    assert SCHEDULES["epoch-autodrop"].settings == epoch
    assert SCHEDULES["hd"].search == {"beta": (1e-3, 1e-4, 1e-5)}
    assert SCHEDULES["tlr"].settings == {"gap_epochs": 0.33, "least_gap": 50, "bound": 0.25}


# Each table in the order of the page: rows from top to bottom, columns from left to right.
TABLE_15 = """5.65 ± .15; 4.79 ± .99; 6.08 ± .11; 7.41 ± .24; 4.30 ± .13; 3.73 ± .07; 5.77 ± .13;
    7.36 ± .15; 24.07 ± .44; 21.82 ± .14; 23.11 ± 1.3; 28.33 ± .20; 20.39 ± .08; 19.41 ± .10;
    24.49 ± .16; 28.79 ± .32; 39.22; 31.04; 29.70; 29.24"""
NUMBERS = {
    "uai-table-1": TABLE_15,
    "uai-table-2": """6.78 ± .23; 5.70 ± .19; 5.14 ± .11; 4.86 ± .12; 5.82 ± .10; 4.79 ± .17;
        4.79 ± .99; 9.12 ± .60; 16.70 ± 2.2; 5.48 ± .11; 4.78 ± .16; 6.80 ± .15; 3.77 ± .05;
        3.73 ± .07; 26.89 ± 1.5; 23.91 ± .35; 22.69 ± .30; 22.29 ± .09; 24.29 ± .47; 21.92 ± .34;
        21.82 ± .14; 29.32 ± .46; 39.54 ± .48; 23.61 ± .38; 22.60 ± .66; 23.32 ± .24;
        18.96 ± 0.05; 19.41 ± .10; 30.43; 29.81; 30.48; 30.67; 30.10; 29.74; 29.246; 25.35; 26.51;
        24.15; 27.84; 24.57; 23.76; 23.92""",
    "uai-table-4": "19.07; 19.48; 19.96; 20.37",
    "uai-table-5": """80.44; 78.90; 82.07; 83.41; 82.83; 78.92; 81.43; 83.71; 83.21; 83.76; 90.46;
        91.17; 91.54; 91.32; 91.74; 86.42; 87.33; 90.51; 90.48; 90.04; 91.51; 91.49; 92.66; 91.97;
        92.74""",
    "uai-table-6": "0.17; 0.17; 0.22; 0.22; 0.24; 0.24",  # by two readings each
    # m = 5, 10, 20, 30, 50, by two readings each.
    "uai-table-7": 2 * "5.05 ± 0.096; 4.79 ± 0.99; 5.50 ± 0.169; 6.52 ± 0.092; 7.41 ± 0.111; ",
    "uai-table-9": 2 * "6.76 ± 0.349; 3.73 ± 0.07; 4.63 ± 0.165; 4.11 ± 0.137; 7.85 ± 0.119; ",
    "uai-table-11": 2 * "22.41 ± 0.187; 21.82 ± 0.14; 22.39 ± 0.11; 26.09 ± 0.612; 28.53 ± 0.44; ",
    "uai-table-13": 2 * "19.84 ± 0.21; 19.41 ± 0.10; 23.59 ± 0.22; 25.65 ± 0.17; 28.72 ± 0.42; ",
    # rho = 0.5, 0.8, 0.9, 0.95, 0.99.
    "uai-table-8": "8.85 ± 0.873; 6.62 ± 0.259; 5.48 ± 0.040; 4.79 ± 0.99; 7.65 ± 0.178",
    "uai-table-10": "6.26 ± 0.283; 5.07 ± 0.286; 3.94 ± 0.118; 3.73 ± 0.07; 7.36 ± 0.021",
    "uai-table-12": "30.42 ± 0.430; 25.71 ± 0.561; 23.14 ± 0.464; 21.82 ± 0.14; 30.09 ± 0.192",
    "uai-table-14": "25.58 ± 0.46; 21.03 ± 0.54; 19.96 ± 0.12; 19.41 ± 0.10; 30.23 ± 0.35",
    "uai-table-15": TABLE_15,
    "uai-table-16": """8.87; 6.79; 8.62; 9.56; 6.81; 11.18; 8.76; 6.84; 5.68; 5.46; 8.56; 5.98;
        5.95; 5.87; 6.81; 5.59; 5.3; 8.14; 5.98; 4.95; 4.90; 6.78; 5.48; 5.16; 4.96; 5.95; 4.78;
        4.76""",
    "2021-table-1": """4.87 ± 0.085; 5.07 ± 0.465; 4.61 ± 0.173; 4.71 ± 0.111; 3.77 ± 0.05;
        3.73 ± 0.26; 3.73 ± 0.10; 4.29 ± 1.13; 21.91 ± 0.20; 23.27 ± 0.48; 21.82 ± 0.50;
        21.43 ± 0.29; 19.16 ± 0.11; 18.25 ± 0.33; 18.17 ± 0.25; 23.15 ± 3.43; 29.93; 29.80""",
    "2021-table-2": """5.04 ± 0.19; 4.90 ± 0.20; 4.80 ± 0.12; 4.62 ± 0.14; 4.87 ± 0.09; 4.61 ± 0.17;
        5.07 ± 0.28; 4.73 ± 0.25""",
}


def test_there_are_literals_of_all_tables():
    tables = {name for name, exhibit in EXHIBITS.items() if exhibit.kind == "table"}
    assert set(NUMBERS) == tables


@pytest.mark.parametrize("name", NUMBERS)
def test_printed_numbers(name):
    numbers = [number for part in NUMBERS[name].split(";") if (number := part.strip())]
    assert [entry.printed for entry in EXHIBITS[name].entries] == numbers


SCHEDULES_2 = ["hd", "tlr", "clr", "onecycle", "exponential", "step", "autodrop"]
UAI = ["cifar10-resnet18", "cifar10-wrn28-10", "cifar100-resnet34", "cifar100-wrn40-10"]


def runs(name):
    return [entry.run for entry in EXHIBITS[name].entries]


def test_runs_of_tables():
    """Which run stands next to which number."""
    models = [*UAI, "imagenet-resnet18", "imagenet-resnet50"]
    assert [(r.model, r.schedule) for r in runs("uai-table-2")] == [
        (model, schedule) for model in models for schedule in SCHEDULES_2
    ]
    assert [r.schedule for r in runs("uai-table-4")] == ["hd", "tlr", "plateau", "autodrop"]
    assert [r.schedule for r in runs("uai-table-5")[:5]] == [
        "hd", "tlr", "linear", "constant", "autodrop",
    ]  # fmt: skip
    windows = [r.settings.get("window") for r in runs("uai-table-15")]
    assert windows == 4 * [32, None, 128, 256] + [64, 256, 512, None]
    ms = [
        (r.settings.get("buffer_size"), r.settings.get("min_samples")) for r in runs("uai-table-7")
    ]
    assert ms == [
        *((5, None), (None, None), (20, None), (30, None), (50, None)),
        *((5, 5), (None, None), (20, 20), (30, 30), (50, 50)),
    ]
    factors = [r.settings.get("factor") for r in runs("uai-table-14")]
    assert factors == [0.5, 0.8, 0.9, None, 0.99]
    assert [r.lr for r in runs("uai-table-6")] == [0.1, 0.1, 0.03, 0.03, 0.01, 0.01]
    assert [r.lr for r in runs("2021-table-2")] == [0.15, 0.15, 0.1, 0.1, None, None, 0.03, 0.03]
    first = [(r.model, r.schedule, r.settings.get("factor")) for r in runs("2021-table-1")]
    assert first[:16] == [
        (model, *run)
        for model in UAI
        for run in (("step", None), *(("epoch-autodrop", f) for f in (0.1, 0.2, 0.5)))
    ]
    assert FIGURE_3_RATES == (0.3, 0.1, 0.03, 0.01, 0.003)


@pytest.mark.parametrize("name", ["2021-table-1", "2021-figure-12"])
def test_imagenet_of_2021_drops_after_30_60_and_90_of_105_epochs(name):
    """And its AutoDrop waits for 20 epochs."""
    baseline, autodrop = (r for r in runs(name) if r.model == "imagenet-resnet18")
    assert baseline.epochs == autodrop.epochs == 105
    assert [part * 105 for part in baseline.settings["milestones"]] == pytest.approx([30, 60, 90])
    settings = RECIPES["imagenet-resnet18"].recipe.settings["epoch-autodrop"]
    assert {**settings, **autodrop.settings} == {"factor": 0.1, "delay": 20}


def test_times_of_a_step():
    assert BATCH == 64 and PRINTED == {
        "cifar10-wrn28-10": ("0.21", "0.23", "0.20", "0.20"),
        "cifar100-wrn40-10": ("0.31", "0.31", "0.29", "0.30"),
        "imagenet-resnet50": ("0.42", "0.43", "0.38", "0.40"),
    }
    turns = [order("abc", turn) for turn in range(4)]
    assert turns == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
