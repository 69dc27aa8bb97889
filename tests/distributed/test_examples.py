"""The example scripts, started as their documentation says."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.skipif(
    not EXAMPLES.exists(), reason="the examples are not next to the installed package"
)
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed"
)


class Ended(NamedTuple):
    """What a run printed."""

    steps: int
    lr: float
    drops: int
    losses: dict[int, float]
    output: str


def launch(script: str, ranks: int, *options: object) -> Ended:
    """Run an example with torchrun; all ranks must have ended well, and alike."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(EXAMPLES / script), *map(str, options)]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,  # against deadlocks: the runs take ten to twenty seconds
    )
    assert done.returncode == 0, done.stdout
    # Not line by line: the ranks write into one pipe.
    ends = re.findall(r"rank (\d) ended at step (\d+): lr ([\d.e-]+), (\d+) drops", done.stdout)
    assert sorted(end[0] for end in ends) == [str(rank) for rank in range(ranks)], done.stdout
    assert len({end[1:] for end in ends}) == 1, done.stdout
    losses = re.findall(r"step (\d+): loss ([\d.]+)", done.stdout)
    _, steps, lr, drops = ends[0]
    return Ended(
        int(steps), float(lr), int(drops), {int(k): float(v) for k, v in losses}, done.stdout
    )


def assert_dropped(run: Ended, steps: int, lr: float) -> None:
    """It took the steps, and the rate is the initial one times the factor for each drop."""
    assert run.steps == steps
    assert run.drops >= 1
    assert run.output.count("lr down to") == run.drops
    assert run.lr == pytest.approx(lr * 0.8**run.drops, rel=1e-12)  # rounded once a drop


def assert_goes_on(script: str, ranks: int, folder: pathlib.Path, before: Ended) -> None:
    """Resumed without a warm-up, and with every drop of the first run."""
    after = launch(script, ranks, "--steps", before.steps + 50, "--checkpoint", folder, "--resume")
    assert after.steps == before.steps + 50
    assert "AngularVelocity:" not in after.output  # the meter's warnings
    assert "AutoDrop:" not in after.output
    # A buffer of ten angles is filled up to where the last run ended: in 50 steps, 12 windows, at
    # least one more drop is due where angles saturate as they do here.
    drops = before.drops + after.output.count("lr down to")
    assert after.drops == drops > before.drops
    assert after.lr == pytest.approx(before.lr * 0.8 ** (drops - before.drops), rel=1e-12)


@needs_digits
def test_ddp(tmp_path: pathlib.Path) -> None:
    run = launch("ddp.py", 2, "--steps", 102, "--checkpoint", tmp_path)
    assert_dropped(run, 102, 0.04)
    assert run.losses[100] < 1.5  # ln(10) = 2.3 is chance
    assert (tmp_path / ".metadata").exists()


@needs_digits
@pytest.mark.slow
def test_ddp_goes_on(tmp_path: pathlib.Path) -> None:
    run = launch("ddp.py", 2, "--steps", 102, "--checkpoint", tmp_path)
    assert_goes_on("ddp.py", 3, tmp_path, run)


def test_fsdp2() -> None:
    run = launch("fsdp2.py", 2, "--steps", 70)
    assert_dropped(run, 70, 0.003)
    assert run.losses[50] < 4  # ln(256) = 5.5 is chance


@pytest.mark.slow
def test_fsdp2_goes_on_with_another_number_of_processes(tmp_path: pathlib.Path) -> None:
    """From the middle of a window."""
    run = launch("fsdp2.py", 2, "--steps", 70, "--checkpoint", tmp_path)
    assert_goes_on("fsdp2.py", 3, tmp_path, run)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "tensor_parallel"), [(2, 1), (4, 2)])
def test_fsdp2_tensor_parallel(ranks: int, tensor_parallel: int, tmp_path: pathlib.Path) -> None:
    options = ("--steps", 70, "--tensor-parallel", tensor_parallel, "--checkpoint", tmp_path)
    run = launch("fsdp2_tensor_parallel.py", ranks, *options)
    assert_dropped(run, 70, 0.003)
    assert run.losses[50] < 4  # ln(256) = 5.5 is chance
    if ranks == 4:
        # On two: one replica instead of two, each layer cut in two as before.
        assert_goes_on("fsdp2_tensor_parallel.py", 2, tmp_path, run)


@needs_deepspeed
@needs_digits
@pytest.mark.slow
def test_deepspeed_zero2(tmp_path: pathlib.Path) -> None:
    run = launch("deepspeed_zero2.py", 2, "--steps", 102, "--checkpoint", tmp_path)
    assert_dropped(run, 102, 0.04)
    assert run.losses[100] < 1.5  # ln(10) = 2.3 is chance
    options = ("--steps", 152, "--checkpoint", tmp_path, "--resume")
    after = launch("deepspeed_zero2.py", 2, *options)
    assert after.steps == 152
    assert after.drops >= run.drops
    assert after.lr == pytest.approx(0.04 * 0.8**after.drops, rel=1e-12)
    # Rank 0's state is good for both ranks, because there are as many as before.
    assert "the meter warms up again" not in after.output


def test_the_table_names_every_example() -> None:
    named = re.findall(r"examples/(\w+\.py)`", (EXAMPLES / "README.md").read_text())
    assert sorted(named) == sorted(path.name for path in EXAMPLES.glob("*.py"))
