#!/usr/bin/env bash
# torch's schedulers disagree about a parameter group that is added later, to unfreeze layers.
#
# Expected (a guess, 50 % sure): a scheduler applies its factor to the new group or leaves it alone,
#   and at most OneCycleLR raises, since it needs more keys in each group.
# Seen: seven raise at the next step(), five of them from zip(strict=True) with a message that names
#   neither groups nor rates. LinearLR multiplies the new group's rate by what is left of the
#   warm-up, so that it rises to almost five times what the user set: 0.3 becomes 1.41. StepLR,
#   MultiStepLR, ExponentialLR, PolynomialLR, CosineAnnealingLR and ReduceLROnPlateau lower it.
#   add_param_group is documented for fine-tuning, where layers become trainable as training goes
#   on; the pages of the schedulers do not say what happens to such a group.
# Versions: torch 2.13.0, CPU. Date: 2026-12-01.
# Where: LRScheduler._update_lr and each get_lr in torch/optim/lr_scheduler.py.
#   https://docs.pytorch.org/docs/2.13/generated/torch.optim.Optimizer.add_param_group.html
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR

MAKE = {
    "LinearLR": lambda o: LinearLR(o, 0.1, total_iters=8),
    "StepLR": lambda o: StepLR(o, 3),
    "MultiStepLR": lambda o: MultiStepLR(o, [3, 6], 0.5),
    "ExponentialLR": lambda o: ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: PolynomialLR(o, 10),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 10),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, patience=0),
    "CosineAnnealingWarmRestarts": lambda o: CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: CyclicLR(o, 0.01, 0.1, step_size_up=4),
    "LambdaLR": lambda o: LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: MultiplicativeLR(o, lambda epoch: 0.9),
    "SequentialLR": lambda o: SequentialLR(
        o, [LinearLR(o, 0.1, total_iters=3), CosineAnnealingWarmRestarts(o, 3)], [2]
    ),
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=1.0, total_steps=70),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=5),
}


def parameter():
    return torch.nn.Parameter(torch.ones(2))


def later_group(make):
    """The rate of a group added at 0.3 after one step, eight steps later, or the error's name."""
    optimizer = SGD([parameter()], lr=0.1, momentum=0.9)
    scheduler = make(optimizer)

    def step():
        optimizer.step()
        scheduler.step(*[1.0] * isinstance(scheduler, ReduceLROnPlateau))

    step()
    optimizer.add_param_group({"params": [parameter()], "lr": 0.3})
    try:
        for _ in range(8):
            step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return optimizer.param_groups[1]["lr"]


seen = {name: later_group(make) for name, make in MAKE.items()}
for name, result in seen.items():
    print(f"{name:28} {result}")
raised = {name for name, result in seen.items() if isinstance(result, str)}
by_zip = {name for name in raised if seen[name].startswith("ValueError: zip()")}
assert by_zip == {
    "CosineAnnealingWarmRestarts", "CyclicLR", "LambdaLR", "MultiplicativeLR", "SequentialLR"
}, by_zip
assert raised - by_zip == {"OneCycleLR", "SWALR"}, raised
assert abs(seen["LinearLR"] - 0.3 / 0.2125) < 1e-6, seen["LinearLR"]
assert all(seen[name] < 0.3 for name in seen.keys() - raised - {"LinearLR"})
PYTHON
