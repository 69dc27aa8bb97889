"""The report's tables and pictures, choosing settings, and the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from training import command
from training.ablations import ablation_specs, runs_of
from training.report import mean_and_std, read_results, write_report
from training.run import RunSpec
from training.schedules import SCHEDULES
from training.table import TUNING_SEED, candidates, chosen, compare
from training.tasks import MODELS


def result(spec, error, loss=0.5, drops=None):
    """As the loop would return it; the error halves with each of four epochs."""
    curve = [
        {"epoch": e, "step": 10 * e, "loss": loss, "lr": 0.1 / e, "error": error * 2 ** (4 - e)}
        for e in range(1, 5)
    ]
    diverged = error != error
    return {
        "spec": json.loads(json.dumps(vars(spec))),
        "measure": "test error, %",
        "initial_lr": 0.1 if spec.lr is None else spec.lr,
        "settings": SCHEDULES[spec.schedule].settings_with(spec.settings),
        "steps_per_epoch": 10,
        "diverged": diverged,
        "error": None if diverged else error,
        "best_error": None if diverged else error,
        "loss": loss,
        "lr": 0.025,
        "drops": drops,
        "curve": curve,
        "machine": "a machine",
    }


def write(folder, results):
    for i, r in enumerate(results):
        (folder / str(i)).mkdir(parents=True)
        (folder / str(i) / "result.json").write_text(json.dumps(r))


def spec(schedule, seed=0, group="table", **changes):
    return RunSpec("digits-convnet", schedule, seed, group=group, **changes)


# ---- numbers --------------------------------------------------------------------------------


def test_mean_and_standard_deviation():
    assert mean_and_std([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    assert mean_and_std([1.5], 1) == "1.5"
    assert mean_and_std([1.0, None, 3.0], 1) == "2.0 ± 1.4 (1 of 3 diverged)"
    assert mean_and_std([None], 1) == "diverged"


def test_report_writes_tables_and_curves(tmp_path):
    runs = [result(spec("constant", seed), error) for seed, error in enumerate((4.0, 6.0))]
    runs += [result(spec("autodrop", seed), e, drops=7) for seed, e in enumerate((1.0, 2.0))]
    runs += [result(spec("prodigy", seed), float("nan")) for seed in (0, 1)]
    tried = [
        result(spec("constant", TUNING_SEED, "tuning", lr=lr), error)
        for lr, error in ((0.1, 3.0), (0.2, 5.0))
    ]
    write(tmp_path / "runs", runs + tried)
    written = write_report([tmp_path / "runs"], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[1] == "| AutoDrop | 0.1 | 1.50 ± 0.71 | 1.50 ± 0.71 | 0.500 ± 0.000 | 0.025 | 7 |"
    assert rows[2] == "| constant | 0.1 | 5.00 ± 1.41 | 5.00 ± 1.41 | 0.500 ± 0.000 | 0.025 | - |"
    assert rows[3].startswith("| Prodigy + cosine | - | diverged | diverged |")
    assert rows[4:] == ["| schedule | 0.1 | 0.2 |", "| constant | 3.00 | 5.00 |"]
    (picture,) = [path for path in written if path.suffix == ".png"]
    assert picture.read_bytes().startswith(b"\x89PNG") and f"({picture.name})" in text
    # A report can be made from an earlier one's results.
    again = write_report([tmp_path / "report" / "results.json"], tmp_path / "again")
    assert (tmp_path / "again" / "report.md").read_text() == text
    assert len(again) == len(written) == 3


def test_report_refuses_what_holds_no_results(tmp_path):
    with pytest.raises(ValueError, match=r"found no result\.json"):
        read_results([tmp_path])
    (tmp_path / "x.json").write_text('{"spec"')
    with pytest.raises(ValueError, match=r"x\.json: expected results"):
        read_results([tmp_path / "x.json"])


# ---- choosing settings ----------------------------------------------------------------------


def test_every_schedule_tries_the_same_rates():
    grid = (0.01, 0.02, 0.04, 0.08)
    for name, schedule in SCHEDULES.items():
        tried = candidates(spec(name, group="runs"))
        assert all(s.seed == TUNING_SEED and s.validation for s in tried)
        rates = sorted({s.lr for s in tried}, key=str)
        assert tuple(rates) == (grid if schedule.rates else (None,))
        extra = 3 if schedule.search else 1
        assert len(tried) == len({str(s) for s in tried}) == extra * len(rates)


def test_the_lowest_held_out_error_is_chosen_and_ties_go_by_loss():
    base = spec("hd")
    tried = candidates(base)[:4]
    errors = [(2.0, 0.9), (1.0, 0.5), (1.0, 0.4), (float("nan"), 0.1)]
    results = [result(s, e, loss) for s, (e, loss) in zip(tried, errors, strict=True)]
    best = chosen(base, results)
    assert (best.lr, best.settings) == (tried[2].lr, tried[2].settings)
    assert (best.seed, best.validation, best.group) == (0, False, "table")


def test_comparison_runs_what_was_chosen():
    titles = []

    def train(specs, title):
        titles.append((title, len(specs)))
        return [result(s, abs((s.lr or 0.01) - 0.02) + 1) for s in specs]

    results = compare(
        spec("constant", group="runs"), ["step", "prodigy"], [0, 1], tune=True, train=train
    )
    assert titles == [("digits-convnet: rates", 4 + 3), ("digits-convnet: table", 4)]
    final = [r["spec"] for r in results if r["spec"]["group"] == "table"]
    assert [(s["schedule"], s["lr"], s["seed"]) for s in final] == [
        ("step", 0.02, 0),
        ("step", 0.02, 1),
        ("prodigy", None, 0),
        ("prodigy", None, 1),
    ]
    assert all(not s["validation"] for s in final)


def test_ablations_vary_one_thing_at_a_time():
    specs = ablation_specs(spec("constant"), ["factor", "buffer_size", "m", "kernel"], [0, 1], 3)
    assert len(specs) == len({str(s) for s in specs}) == 2 * (5 + 4 + 4 + 1)
    results = [result(s, 1.0, drops=0) for s in specs]
    assert {k: len(v) for k, v in runs_of("factor", results).items()} == dict.fromkeys(
        (0.5, 0.8, 0.9, 0.95, 0.99), 2
    )
    assert list(runs_of("m", results)) == list(runs_of("buffer_size", results)) == [
        5, 10, 20, 30, 50,
    ]  # fmt: skip
    assert all(
        r["settings"]["min_samples"] == m for m, runs in runs_of("m", results).items() for r in runs
    )
    assert list(runs_of("kernel", results)) == ["time", "value"]
    assert list(runs_of("window", results)) == [3]


# ---- commands -------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "90"}).invoke(command.cli, [str(a) for a in arguments])


def test_run_and_report(tmp_path):
    arguments = ("run", "--model", "digits-convnet", "--schedule", "autodrop", "--epochs", 1)
    done = invoke(*arguments, "--set", "window=1", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    (line,) = [x for x in done.output.splitlines() if x.startswith("AutoDrop, seed 0: test error")]
    log = line.rpartition("log ")[2]
    assert '"event": "reading"' in Path(log).read_text()
    again = invoke(*arguments, "--set", "window=1", "--output", tmp_path / "out")
    assert again.output.splitlines()[-1] == line
    reported = invoke("report", tmp_path / "out", "--to", tmp_path / "report")
    assert reported.exit_code == 0, reported.output
    assert "AutoDrop (window 1)" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--model", "cifar10-resnet18", "--schedule", "step"), "needs --data"),
        (
            ("run", "--model", command.SMALL[0], "--schedule", "step", "--set", "k=1"),
            "--set: settings:",
        ),
        (("run", "--model", command.SMALL[0], "--schedule", "step", "--set", "k"), "NAME=VALUE"),
        (("run", "--model", command.SMALL[0], "--schedule", "step", "--batch", "8"), "small task"),
        (("table", "--lr", "0.1"), "add --no-tune"),
        (("report", ".", "--to", "x"), "found no result.json"),
    ],
)
def test_commands_say_what_is_wrong(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed = invoke(*arguments)
    assert failed.exit_code != 0 and isinstance(failed.exception, SystemExit)
    assert message in " ".join(failed.output.split())


def test_the_window_of_ablations_counts_no_warm_up(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(
        command, "train_runs", lambda specs, *rest, **options: trained.extend(specs)
    )
    monkeypatch.setattr(command, "_report", lambda *rest: None)
    for warmup in ((), ("--warmup", 1500)):
        done = invoke("ablations", "--vary", "factor", *warmup, "--output", tmp_path)
        assert done.exit_code == 0, done.output
    # 2,980 steps, of which 1,500 are warm-up the second time.
    assert [s.settings["window"] for s in trained] == 15 * [4] + 15 * [2]


def test_help_names_every_command_and_list_every_schedule():
    text = invoke("--help").output
    for name in command.cli.commands:
        assert name in text
        one = invoke(name, "--help")
        assert one.exit_code == 0
        assert all(len(line) <= 90 for line in one.output.splitlines())
    listed = invoke("list").output
    assert listed.startswith(f"models: {', '.join(MODELS)}\n")
    assert all(f"{name}: {s.label}" in listed for name, s in SCHEDULES.items())
