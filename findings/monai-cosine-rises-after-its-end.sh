#!/usr/bin/env bash
# MONAI's WarmupCosineSchedule returns to the full rate if training goes on after t_total.
#
# Expected (a guess, 55 % sure): end_lr is documented as the final learning rate, so the rate stays
#   there after t_total steps.
# Seen: the cosine goes on. With t_total 20 the rate is at end_lr at step 20 only, and at step 35 it
#   is the full rate again, without a warning. end_lr is a lower bound of a cosine that ends at 0,
#   not the value that the cosine ends at: with end_lr 0.25 the last third of the run is flat.
# Versions: monai 1.6.1, torch 2.13.0, CPU. Date: 2026-12-01.
# Where: lr_lambda and get_lr of WarmupCosineSchedule in monai/optimizers/lr_scheduler.py.
#   https://docs.monai.io/en/stable/optimizers.html
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q torch==2.13.0 numpy==2.4.6 monai==1.6.1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from monai.optimizers import WarmupCosineSchedule


def rates(end_lr, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = WarmupCosineSchedule(optimizer, warmup_steps=5, t_total=20, end_lr=end_lr)
    seen = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


low = rates(0.01, 35)
flat = rates(0.25, 20)
print("end_lr 0.01, steps 18 to 35:", [round(rate, 3) for rate in low[18:]])
print("end_lr 0.25, steps 13 to 20:", [round(rate, 3) for rate in flat[13:]])
assert low[20] == 0.01, low[20]
assert all(before < after for before, after in zip(low[20:35], low[21:36])), low[20:]
assert low[35] == 1.0, low[35]
assert flat[13] > 0.25 + 1e-3 and all(abs(rate - 0.25) < 1e-9 for rate in flat[15:]), flat[13:]
PYTHON
