"""Memory that moves inside a window, and changed defaults of torch: no crash, no false angle.

Each attack runs in a process of its own, whose exit status is part of what is tested.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from oracle import LARGE

from autodrop_ext import AngularVelocity

FOLDER = pathlib.Path(__file__).parent


def script(name: str, *arguments: str) -> list[str]:
    """The problems that a script prints; its death is one."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / name), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        # Freed memory goes back to the system at once, so that reading it crashes, and what does
        # not is overwritten.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_PERTURB_": "85"},
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [""]
        return [f"{' '.join(arguments)}: exit status {done.returncode}, {last[0]}"]
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return [f"{' '.join(arguments)}: {problem}" for problem in found]


MOVED = [
    ("share_memory", "meter"),
    ("resize", "meter"),
    ("freed", "meter"),
    ("pickle", "AutoDrop"),
    ("resize", "hashed"),
    ("share_memory", "averaging"),
]
MORE = [
    ("freed", "hashed"),
    ("resize", "averaging"),
    ("share_memory", "EpochAutoDrop"),
    ("freed", "EpochAutoDrop"),
    ("grow", "per_group"),
    ("worker", "AutoDrop"),
]


@pytest.mark.parametrize(("way", "kind"), MOVED + MORE if LARGE else MOVED)
def test_memory_that_moves_inside_a_window(way: str, kind: str) -> None:
    assert script("moving.py", way, kind) == []


@pytest.mark.parametrize("calls", [4, 5, 6, 7])
@pytest.mark.parametrize("shrunk", ["data", "storage", "set"])
def test_a_parameter_that_shrinks_inside_a_window(shrunk: str, calls: int) -> None:
    """Nothing is read beyond its end; one warning, and angles come again."""
    meter = AngularVelocity([x := torch.randn(100_000), torch.randn(5)], 4)
    noise = torch.Generator().manual_seed(calls)
    readings = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in range(32):
            if call == calls and shrunk == "data":
                x.data = x.data[:10].clone()
            elif call == calls and shrunk == "set":
                x.set_(torch.randn(7))
            elif call == calls:
                x.untyped_storage().resize_(40)
            if x.untyped_storage().nbytes() >= 4 * x.numel():
                x += torch.randn(x.shape, generator=noise)
            elif call == calls + 5:
                x.untyped_storage().resize_(400_000)
                x.zero_()
            readings.append(meter.observe())
    (message,) = {str(w.message) for w in caught}
    assert "were replaced, added, resized or unfrozen; the window is discarded" in message
    after = [r.angle for r in readings if r is not None and r.step > calls + 24 - 4]
    assert after and all(angle is not None for angle in after)


@pytest.mark.parametrize("change", ["meta", "context", "float64", "bfloat16", "inference"])
def test_other_defaults_of_torch_change_nothing(change: str) -> None:
    if not LARGE and change not in ("meta", "float64"):
        pytest.skip("runs with AUTODROP_ATTACKS=1")
    kinds = "meter,per_group,hashed,EpochAutoDrop" if LARGE else "meter,EpochAutoDrop"
    assert script("defaults.py", change, kinds, "before,inside") == []


def _with_fsdp1(rank: int, use_orig_params: bool) -> list[tuple[Any, ...]]:
    """FSDP1 frees and refills flat parameters; all of them are gathered in windows' middles."""
    import torch
    import torch.distributed as dist
    from driven import SETTINGS, WINDOW, Driven, optimizer_of
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel

    from autodrop_ext import AutoDrop

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = FullyShardedDataParallel(
        Driven(), device_mesh=mesh, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    optimizer = optimizer_of(model)
    scheduler = AutoDrop(optimizer, **SETTINGS)
    for t in range(10 * WINDOW):
        model(t).backward()
        optimizer.step()
        optimizer.zero_grad()
        if t % WINDOW == 1:
            with FullyShardedDataParallel.summon_full_params(model):
                scheduler.step()
        else:
            scheduler.step()
        if t % WINDOW == 2:
            with FullyShardedDataParallel.summon_full_params(model, writeback=False):
                pass
    return [(d.step, d.angle, d.lr) for d in scheduler.history]


@pytest.mark.parametrize("use_orig_params", [False, True] if LARGE else [True])
def test_fsdp1_with_gathered_parameters(use_orig_params: bool) -> None:
    """Angles are those of one process, or there are none."""
    from driven import alone
    from launch import run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranks = run(2, _with_fsdp1, use_orig_params)
        expected = alone(40)
    assert ranks[0] == ranks[1]
    true = dict(zip(expected.steps, expected.cosines, strict=True))
    import math

    for step, angle, _ in ranks[0]:
        truth = true[step]
        if angle is not None and truth is not None:
            # The two runs drop at other steps once a window was discarded: only the first ones.
            assert step > 20 or math.isclose(math.cos(math.radians(angle)), truth, abs_tol=1e-6)
