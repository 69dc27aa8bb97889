#!/usr/bin/env bash
# ema-pytorch never updates integer buffers, so BatchNorm in the average has seen no batches.
#
# Expected (a guess, 60 % sure): buffers that cannot be averaged are copied, so num_batches_tracked
#   of the averaged model equals that of the model.
# Seen: it stays 0 while running_mean and running_var are averaged. With BatchNorm(momentum=None),
#   which weights a batch by that count, a single batch in train mode replaces the averaged
#   statistics whole.
# Versions: ema-pytorch 0.8.3, torch 2.13.0, CPU. Date: 2026-12-01.
# Where: buffer_names in ema_pytorch/ema_pytorch.py holds floating-point and complex buffers only;
#   the README does not mention buffers. https://github.com/lucidrains/ema-pytorch
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q torch==2.13.0 numpy==2.4.6 ema-pytorch==0.8.3
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from ema_pytorch import EMA

torch.manual_seed(0)
for momentum in (0.1, None):
    model = torch.nn.BatchNorm1d(3, momentum=momentum)
    ema = EMA(model, beta=0.9, update_every=1, update_after_step=0)
    for _ in range(20):
        model(torch.randn(8, 3) + 1)
        ema.update()
    averaged = ema.ema_model
    count = int(averaged.num_batches_tracked)
    mean = averaged.running_mean.clone()
    batch = torch.randn(8, 3) + 5
    averaged.train()
    averaged(batch)
    replaced = torch.allclose(averaged.running_mean, batch.mean(0))
    seen = int(model.num_batches_tracked)
    print(f"momentum {momentum}: {seen} batches seen, {count} in the average;")
    print(f"    its mean {mean.tolist()}, after one batch {averaged.running_mean.tolist()}")
    assert seen == 20, seen
    assert count == 0, count
    assert (mean - model.running_mean).abs().max() < 0.5, mean  # the other buffers do follow
    assert mean.abs().min() > 0.3, mean
    assert replaced == (momentum is None)
PYTHON
