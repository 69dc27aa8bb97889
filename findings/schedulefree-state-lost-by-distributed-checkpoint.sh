#!/usr/bin/env bash
# Schedule-Free AdamW resumed through torch.distributed.checkpoint loses its state silently.
#
# Expected (a guess, 55 % sure): get_state_dict, dcp.save, dcp.load and set_state_dict, in the train
#   mode that Schedule-Free asks for, go on bit for bit like an uninterrupted run. Those of Prodigy
#   and Muon do.
# Seen: z and exp_avg_sq of the checkpoint never arrive. train() of the fresh optimizer reads
#   optimizer.state[p], a defaultdict, and leaves an empty entry. get_state_dict takes a state that
#   is not empty for an initialized one, so the dict to load into has no tensors, and dcp.load fills
#   only what it finds there. Step counts and rates do arrive, so a log shows nothing wrong. Without
#   train() the same call raises "Optimizer was not in train mode". state_dict() with
#   load_state_dict() is exact.
# Versions: torch 2.13.0, schedulefree 1.4.1, CPU. Date: 2026-12-01.
# Where: _init_optim_state in torch/distributed/checkpoint/state_dict.py, and train in
#   schedulefree/adamw_schedulefree.py.
#   https://docs.pytorch.org/docs/2.13/distributed.checkpoint.html
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q torch==2.13.0 numpy==2.4.6 schedulefree==1.4.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import copy
import warnings

import schedulefree
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

warnings.filterwarnings("ignore", message=".*torch.distributed is")  # one process suffices
random = torch.Generator().manual_seed(1)
inputs = torch.randn(10, 16, 8, generator=random)


def fresh(train=True):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4, bias=False)
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01)
    if train:
        optimizer.train()
    return model, optimizer


def steps(model, optimizer, batches):
    for x in batches:
        optimizer.zero_grad()
        (model(x) - x[:, :4]).pow(2).mean().backward()
        optimizer.step()


model, optimizer = fresh()
steps(model, optimizer, inputs[:5])
weights, state = get_state_dict(model, optimizer)
saved = sorted(state["state"]["weight"])
dcp.save({"model": weights, "optimizer": state}, checkpoint_id="checkpoint", no_dist=True)
plain = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
steps(model, optimizer, inputs[5:])

weights, state = get_state_dict(*fresh())
target = {"model": weights, "optimizer": state}
dcp.load(target, checkpoint_id="checkpoint", no_dist=True)
again = fresh()
set_state_dict(*again, model_state_dict=target["model"], optim_state_dict=target["optimizer"])
loaded = sorted(again[1].state[again[0].weight])
count = again[1].param_groups[0]["k"]
steps(*again, inputs[5:])
apart = (again[0].weight - model.weight).abs().max().item()

control = fresh()
for part, part_state in zip(control, plain):
    part.load_state_dict(part_state)
steps(*control, inputs[5:])
exact = torch.equal(control[0].weight, model.weight)

try:
    get_state_dict(*fresh(train=False))
    message = "nothing raised"
except Exception as error:
    message = str(error)

print(f"saved: {saved}; loaded: {loaded}; steps counted: {count}")
print(f"weights differ by {apart:.4f} five steps later; by load_state_dict equal: {exact}")
print(f"without train(): {message}")
assert saved == ["exp_avg_sq", "z"], saved
assert loaded == [], loaded
assert count == 5, count
assert apart > 1e-3, apart
assert exact
assert "not in train mode" in message, message
PYTHON
