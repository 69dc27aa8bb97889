"""theory.momentum: equation (9), torch.optim.SGD where they coincide, and what torch expects."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from papers.theory import UnifiedMomentum
from torch import Tensor

BETA = 0.9


def network(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    return torch.nn.Sequential(*layers).to(dtype)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 100) -> None:
    data = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(16, 5, generator=data, dtype=torch.float64).to(dtype)
        loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def apart(first: torch.nn.Module, second: torch.nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


SAME = {
    "heavy ball": ({"s": 0.0}, {"momentum": BETA}, 0.01),
    "Nesterov": ({"s": 1.0}, {"momentum": BETA, "nesterov": True}, 0.01),
    "gradient descent": ({"s": 1 / (1 - BETA)}, {"lr": 0.01 / (1 - BETA)}, 0.01),
    "no momentum": ({"s": 0.7, "momentum": 0.0}, {}, 0.05),
    "weight decay": (
        {"s": 1.0, "weight_decay": 0.1},
        {"momentum": BETA, "nesterov": True, "weight_decay": 0.1},
        0.01,
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_equals_torchs_sgd_over_100_steps(name):
    ours, torchs, lr = SAME[name]
    # Rounding alone, on parameters of about 1: 1e-15 and 7e-7 seen after 100 steps.
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        first, second = network(dtype), network(dtype)
        train(first, UnifiedMomentum(first.parameters(), **({"lr": lr, "momentum": BETA} | ours)))
        train(second, torch.optim.SGD(second.parameters(), **({"lr": lr} | torchs)))
        assert apart(first, second) < tolerance
        assert apart(first, network(dtype)) > 0.1  # something was trained


@pytest.mark.parametrize("s", [0.0, 0.4, 1.0, 3.0, 1 / (1 - BETA)])
def test_equals_equation_9_while_the_rate_changes(s):
    a = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
    x = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer = UnifiedMomentum([x], lr=0.02, momentum=BETA, s=s)
    expected = x.detach().clone()
    before = expected.clone()  # ys_0 = x_0: the velocity starts at zero
    for t in range(60):
        lr = 0.02 / (1 + t // 7)
        optimizer.param_groups[0]["lr"] = lr
        gradient = a * expected
        y, ys = expected - lr * gradient, expected - s * lr * gradient
        expected = y + BETA * (ys - before)
        before = ys
        x.grad = a * x.detach()
        optimizer.step()
        # Sixty steps of float64 rounding on values of about 1.
        assert torch.allclose(x.detach(), expected, rtol=0, atol=1e-13)


def test_differs_from_torch_after_a_drop_of_the_rate():
    """Torch's buffer holds gradients: its momentum drops with the rate, the papers' does not."""
    x = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = UnifiedMomentum([x], lr=1.0, momentum=0.5)
    x.grad = torch.ones(1, dtype=torch.float64)
    optimizer.step()  # x = -1
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()  # -1 - 0.5 - 0.1; torch: -1 - 0.1 * 1.5
    assert x.item() == pytest.approx(-1.6)


def test_each_group_has_its_own_options():
    first, second = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    groups = [{"params": [first], "lr": 0.5, "momentum": 0.0}, {"params": [second], "s": 1.0}]
    optimizer = UnifiedMomentum(groups, lr=0.1, momentum=0.5)
    for p in (first, second):
        p.grad = torch.ones(1)
    optimizer.step()
    assert first.item() == pytest.approx(0.5)
    # v = ((1 - 0.5) - 1) 0.1 = -0.05; x = 1 - 0.05 - 0.1
    assert second.item() == pytest.approx(0.85)
    assert set(optimizer.state) == {second}  # no buffer without momentum


def test_resumes_bit_for_bit_from_a_plain_checkpoint():
    straight, first, second = network(), network(), network()
    options = {"lr": 0.02, "momentum": BETA, "s": 1.0}
    data = torch.randn(10, 16, 5, generator=torch.Generator().manual_seed(2))

    def go(model, optimizer, batches):
        for x in batches:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    go(straight, UnifiedMomentum(straight.parameters(), **options), data)
    optimizer = UnifiedMomentum(first.parameters(), **options)
    go(first, optimizer, data[:4])
    buffer = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    second.load_state_dict(state["model"])
    resumed = UnifiedMomentum(second.parameters(), lr=1.0)
    resumed.load_state_dict(state["optimizer"])
    assert resumed.param_groups[0]["s"] == 1.0
    go(second, resumed, data[4:])
    assert apart(straight, second) == 0


def test_takes_a_closure_and_leaves_parameters_without_gradients_alone():
    x, idle = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = UnifiedMomentum([("x", x), ("idle", idle)], lr=0.25, momentum=0.0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert x.tolist() == [0.5, 0.5]
    assert idle.tolist() == [1.0, 1.0]
    assert UnifiedMomentum([idle]).step() is None


def test_mixed_dtypes_tensor_rates_and_memory_formats():
    params = [
        torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        torch.nn.Parameter(torch.ones(3, dtype=torch.float64)),
        torch.nn.Parameter(torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)),
        torch.nn.Parameter(torch.ones(2, dtype=torch.complex64)),
        torch.nn.Parameter(torch.ones(())),
    ]
    optimizer = UnifiedMomentum(params, lr=torch.tensor(0.5), momentum=0.5, s=1.0)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    # v: -0.25, -0.375; x: 1 - 0.75 - 0.875 = -0.625, exact in every dtype
    for p in params:
        assert torch.equal(p.detach(), torch.full_like(p, -0.625))
        assert optimizer.state[p]["velocity"].dtype == p.dtype
    assert optimizer.state[params[2]]["velocity"].is_contiguous(memory_format=torch.channels_last)


def test_survives_deepcopy_and_works_with_torchs_schedulers():
    model = network()
    optimizer = UnifiedMomentum(model.parameters(), lr=0.1)
    # Cycles "momentum" too, which it looks for by that name.
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    train(model, optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["momentum"] < 0.95
    assert len(copy.deepcopy(optimizer).state) == len(optimizer.state) == 4


def options(**changed: Any) -> dict[str, Any]:
    return {"lr": 0.1} | changed


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (options(lr=-0.1), ValueError, "lr: expected a finite number of at least 0, got -0.1"),
        (options(lr=math.nan), ValueError, "lr: .* got nan"),
        (options(lr="0.1"), TypeError, "lr: .* got '0.1'"),
        (options(lr=torch.ones(2)), ValueError, r"lr: expected a tensor of one element, .* \[2\]"),
        (options(momentum=1.0), ValueError, "momentum: expected a number from 0 to below 1, got 1"),
        (options(s=-1.0), ValueError, "s: expected a finite number of at least 0 .*, got -1.0"),
        (options(s=True), TypeError, "s: .* got True"),
        (options(weight_decay=-1), ValueError, "weight_decay: .* got -1"),
    ],
)
def test_wrong_arguments_are_named(given, error, message):
    with pytest.raises(error, match=message):
        UnifiedMomentum([torch.nn.Parameter(torch.ones(1))], **given)
    group = {"params": [torch.nn.Parameter(torch.ones(1))]} | given
    with pytest.raises(error, match=message):
        UnifiedMomentum([torch.nn.Parameter(torch.ones(1))]).add_param_group(group)


def test_sparse_gradients_are_refused():
    x = torch.nn.Parameter(torch.ones(3))
    x.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="expected dense gradients"):
        UnifiedMomentum([x]).step()
    x.grad = Tensor([1.0, 0.0, 0.0])
    assert UnifiedMomentum([x]).step() is None
