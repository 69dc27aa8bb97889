"""Memory of a process: it does not grow with the model, nor with the steps."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from oracle import LARGE, count

GROWTH = """
import json, resource, sys, warnings
import torch
from autodrop_ext import AutoDrop

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

torch.set_num_threads(1)
millions = int(sys.argv[1])
small = torch.nn.Parameter(torch.zeros(300_000))
for parameters in ([small], [torch.nn.Parameter(torch.zeros(10**6)) for _ in range(millions)]):
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scheduler = AutoDrop(optimizer, window=2)  # the first one loads what every one needs
    before = resident()
    for step in range(8):
        for p in parameters:
            p.grad = torch.zeros(()).expand_as(p)
        optimizer.step()
        scheduler.step()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    scheduler.close()
print(json.dumps(grown))
"""

STEPS = """
import json, resource, sys
import torch
from autodrop_ext import AutoDrop

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

torch.set_num_threads(1)
first, more = map(int, sys.argv[1:])
parameters = [torch.nn.Parameter(torch.randn(50)) for _ in range(4)]
optimizer = torch.optim.SGD(parameters, lr=1e-3)
scheduler = AutoDrop(optimizer, window=1, threshold=-1e9)
for step in range(first + more):
    for p in parameters:
        p.grad = torch.randn(50)
    optimizer.step()
    scheduler.step()
    if step == first:
        before = resident()
print(json.dumps([len(scheduler.history), resident() - before]))
"""


def output(script: str, *arguments: int) -> object:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_grows_by_the_tables_whatever_the_model() -> None:
    """Three tables of 2 MiB, and tables of the plan: 32 bytes for 4,096 elements."""
    small, large = (output(GROWTH, millions) for millions in (10, count(20, 100)))
    assert isinstance(small, int) and isinstance(large, int)
    assert 4 * 2**20 <= large <= 48 * 2**20
    # 10 million elements more are 40 MB; malloc's own way of growing is 4 MiB.
    assert abs(large - small) < 4 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_steps_add_nothing_once_the_history_is_full() -> None:
    first, more = (20_000, 40_000) if LARGE else (10_500, 3_000)
    history, grown = output(STEPS, first, more)  # type: ignore[misc]
    assert history == 10_000
    # A leak of 200 bytes a step would show; the allocator's noise is below.
    assert grown < more * 200
