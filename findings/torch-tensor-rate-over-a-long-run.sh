#!/usr/bin/env bash
# A float32 tensor learning rate leaves its schedule over a long run of torch's schedulers.
#
# Expected (a guess, 60 % sure): over 100,000 calls of step() every scheduler stays within 1e-3 of
#   the same schedule with a float rate, the worst near 1e-4, since roundings of 6e-8 mostly cancel.
# Seen: ExponentialLR is 0.24 % off after 99,000 steps and 1.6 % off after a million. Each
#   multiplication rounds the factor itself to float32, always the same way, so the error grows in
#   proportion to the steps: it is that of the rounded factor to the power of their number. LinearLR
#   and PolynomialLR are 0.05 % off, CosineAnnealingLR 0.001 %. torch asks for a tensor rate if
#   optimizer.step() is compiled together with a scheduler.
# Versions: torch 2.13.0, CPU. Date: 2026-12-01.
# Where: get_lr in torch/optim/lr_scheduler.py multiplies the present rate of the group.
#   https://docs.pytorch.org/tutorials/recipes/compiling_optimizer_lr_scheduler.html
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LinearLR, PolynomialLR

# The rates alone matter: there is nothing to optimize.
warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")


def final_rate(make, lr, steps):
    optimizer = SGD([torch.nn.Parameter(torch.ones(1))], lr=lr)
    scheduler = make(optimizer)
    for _ in range(steps):
        scheduler.step()
    return float(optimizer.param_groups[0]["lr"])


def off(make, steps):
    """Relative difference of the tensor rate from the float rate after ``steps`` steps."""
    expected = final_rate(make, 0.1, steps)
    return final_rate(make, torch.tensor(0.1), steps) / expected - 1


total, steps = 100_000, 99_000
seen = {
    "ExponentialLR": off(lambda o: ExponentialLR(o, 0.01 ** (1 / total)), steps),
    "LinearLR": off(lambda o: LinearLR(o, 1.0, 0.01, total), steps),
    "PolynomialLR": off(lambda o: PolynomialLR(o, total), steps),
    "CosineAnnealingLR": off(lambda o: CosineAnnealingLR(o, total), steps),
}
for name, difference in seen.items():
    print(f"{name:18} {difference:+.2e} after {steps} steps")
million = off(lambda o: ExponentialLR(o, 0.01**1e-6), 10**6)
print(f"ExponentialLR      {million:+.2e} after 1000000 steps")
assert 1e-3 < abs(seen["ExponentialLR"]) < 1e-2
assert 1e-4 < abs(seen["LinearLR"]) < 1e-3
assert 1e-4 < abs(seen["PolynomialLR"]) < 1e-3
assert abs(seen["CosineAnnealingLR"]) < 1e-4
assert 0.01 < abs(million) < 0.03
PYTHON
