"""Hypergradient descent and the trainable learning rate against examples worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from training.baselines import HypergradientAdamW, HypergradientSGD, TrainableLearningRate

# Literals have nine or more digits and the arithmetic is float64: only their rounding differs.
TIGHT = 1e-9


def parameter(*values):
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def steps_on_half_square(optimizer, x, count=3, after=lambda: None):
    """Minimise ``x^2 / 2``, whose gradient is ``x``: the rate used and where each step led."""
    path = []
    for _ in range(count):
        x.grad = x.detach().clone()
        optimizer.step()
        path.append((optimizer.param_groups[0]["lr"], x.item()))
        after()
    return path


# ---- hypergradient descent ------------------------------------------------------------------
# x_0 = 1, alpha_0 = 0.1, beta = 0.01. By hand, without momentum: the first step has no past, so
# alpha = 0.1 and x_1 = 1 - 0.1. Then g = 0.9, d_0 = 1: alpha = 0.1 + 0.01 * 0.9 = 0.109,
# x_2 = 0.9 - 0.109 * 0.9 = 0.8019. Then alpha = 0.109 + 0.01 * 0.8019 * 0.9 = 0.1162171 and
# x_3 = 0.8019 * (1 - 0.1162171).
PLAIN = [(0.1, 0.9), (0.109, 0.8019), (0.1162171, 0.70870550751)]
# Momentum 0.5: buffers 1, 1.4, 1.4474, which are the directions.
HEAVY_BALL = [(0.1, 0.9), (0.109, 0.7474), (0.1194636, 0.57448838536)]
# Nesterov: buffers 1, 1.35, 1.35305625 and directions g + 0.5 buffer.
NESTEROV = [(0.1, 0.85), (0.11275, 0.67805625), (0.1230903578125, 0.5113199745940283)]


@pytest.mark.parametrize(
    ("momentum", "nesterov", "expected"),
    [(0.0, False, PLAIN), (0.5, False, HEAVY_BALL), (0.5, True, NESTEROV)],
)
def test_hypergradient_sgd_takes_three_steps_as_by_hand(momentum, nesterov, expected):
    x = parameter(1.0)
    optimizer = HypergradientSGD([x], 0.1, 0.01, momentum=momentum, nesterov=nesterov)
    for got, wanted in zip(steps_on_half_square(optimizer, x), expected, strict=True):
        assert got == pytest.approx(wanted, abs=TIGHT)


def test_hypergradient_adam_takes_three_steps_as_by_hand():
    # Moments m and v with betas 0.5 and 0.75, eps 0. Step 1: both corrected moments are 1, d_0 = 1.
    # Step 2: g = 0.9, alpha = 0.1 + 0.01 * 0.9; m = 0.25 + 0.45 = 0.7, corrected by 1 - 0.5^2:
    # 14/15; v = 0.75 * 0.25 + 0.25 * 0.81 = 0.39, corrected by 1 - 0.75^2 = 0.4375; d_1 is
    # (14/15) / sqrt(0.39 / 0.4375) = 0.98854... Step 3 in the same way from g = x_2.
    x = parameter(1.0)
    optimizer = HypergradientAdamW([x], 0.1, 0.01, betas=(0.5, 0.75), eps=0.0, weight_decay=0.0)
    d1 = (14 / 15) / math.sqrt(0.39 / 0.4375)
    x2 = 0.9 - 0.109 * d1
    m3, v3 = 0.35 + 0.5 * x2, 0.75 * 0.39 + 0.25 * x2**2
    d2 = (m3 / (1 - 0.5**3)) / math.sqrt(v3 / (1 - 0.75**3))
    alpha3 = 0.109 + 0.01 * x2 * d1
    expected = [(0.1, 0.9), (0.109, x2), (alpha3, x2 - alpha3 * d2)]
    for got, wanted in zip(steps_on_half_square(optimizer, x), expected, strict=True):
        assert got == pytest.approx(wanted, abs=TIGHT)


@pytest.mark.parametrize(
    ("make", "reference"),
    [
        (
            lambda p, lr, beta: HypergradientSGD(p, lr, beta, momentum=0.9, weight_decay=0.01),
            lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.01),
        ),
        (
            lambda p, lr, beta: HypergradientSGD(p, lr, beta, momentum=0.9, nesterov=True),
            lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
        ),
        (
            lambda p, lr, beta: HypergradientAdamW(p, lr, beta, weight_decay=0.0),
            lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.0),
        ),
    ],
    ids=["momentum and weight decay", "nesterov", "adam"],
)
class TestHypergradient:
    def test_is_the_derivative_of_the_next_loss_by_the_rate(self, make, reference):
        # Central difference of the loss after the fourth step; h^2 = 1e-10 against values near 1.
        curvature = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
        h, beta, lr = 1e-5, 1e-3, 0.05

        def loss(x):
            return (curvature * x**2 / 2).sum()

        def after(optimizer, x, count, last_lr=lr):
            for t in range(count):
                optimizer.param_groups[0]["lr"] = last_lr if t == count - 1 else lr
                x.grad = torch.autograd.grad(objective(x), x)[0]
                if isinstance(optimizer, HypergradientSGD):
                    x.grad -= decay * x.detach()  # it adds the decay to the gradient itself
                optimizer.step()
            return objective(x).item()

        probe = reference([parameter(1.0, -2.0, 0.5)], lr)
        decay = probe.param_groups[0]["weight_decay"] if isinstance(probe, torch.optim.SGD) else 0.0

        def objective(x):
            return loss(x) + decay * (x**2).sum() / 2

        ends = []
        for last_lr in (lr - h, lr + h):
            x = parameter(1.0, -2.0, 0.5)
            ends.append(after(make([x], lr, 0.0), x, 4, last_lr))
        derivative = (ends[1] - ends[0]) / (2 * h)

        x = parameter(1.0, -2.0, 0.5)
        optimizer = make([x], lr, 0.0)
        after(optimizer, x, 4)
        optimizer.beta = beta
        x.grad = torch.autograd.grad(objective(x), x)[0] - decay * x.detach()
        optimizer.step()
        measured = (lr - optimizer.param_groups[0]["lr"]) / beta
        assert measured == pytest.approx(derivative, rel=1e-6)

    def test_without_beta_it_is_torchs_optimizer(self, make, reference):
        ends = []
        for optimizer_of in (lambda p: make(p, 0.05, 0.0), lambda p: reference(p, 0.05)):
            x = parameter(1.0, -2.0, 0.5)
            steps_on = optimizer_of([x])
            for _ in range(5):
                x.grad = x.detach() ** 3
                steps_on.step()
            ends.append(x.detach())
        assert torch.equal(*ends)

    def test_continues_from_its_state(self, make, reference):
        def train(x, optimizer, count):
            for _ in range(count):
                x.grad = x.detach() ** 3
                optimizer.step()

        whole = parameter(1.0, -2.0, 0.5)
        optimizer = make([whole], 0.05, 0.01)
        train(whole, optimizer, 6)
        first = parameter(1.0, -2.0, 0.5)
        saved = make([first], 0.05, 0.01)
        train(first, saved, 3)
        second = parameter(*first.tolist())
        resumed = make([second], 0.05, 0.01)
        resumed.load_state_dict(saved.state_dict())
        train(second, resumed, 3)
        assert torch.equal(second, whole)
        assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 0.05


def test_hypergradient_refuses_what_has_no_meaning():
    with pytest.raises(ValueError, match="expected one param group, got 2"):
        HypergradientSGD([{"params": [parameter(1.0)]}, {"params": [parameter(1.0)]}], 0.1, 0.01)
    with pytest.raises(ValueError, match="beta: expected a finite number"):
        HypergradientAdamW([parameter(1.0)], 0.1, math.nan)


# ---- trainable learning rate ----------------------------------------------------------------


def trainable(lr, *values, **options):
    x = parameter(*values)
    optimizer = torch.optim.SGD([x], lr)
    return x, optimizer, TrainableLearningRate(optimizer, 1, **options)


def test_trainable_rate_takes_three_steps_as_by_hand():
    # x^2 / 2 from x = 1 at 1.1, where every step overshoots. u_0 = 1 leads to x = -0.1, u_1 = -0.1
    # to x = 0.01: <u_0, u_1> = -0.1, <u_0, u_0> = 1, r = -0.1 / 1.1 and 1.1 * (1 + r) = 1, the
    # rate that ends a quadratic in one step. Step 3 runs at 1 and leads to 0; u_2 = 0.01,
    # <u_1, u_2> = -0.001, <u_1, u_1> = 0.01, r = -0.001 / 0.011, so that 1 becomes 10 / 11.
    x, optimizer, rate = trainable(1.1, 1.0)
    path = steps_on_half_square(optimizer, x, after=rate.step)
    assert [lr for lr, _ in path] == pytest.approx([1.1, 1.1, 1.0], abs=TIGHT)
    assert [point for _, point in path] == pytest.approx([-0.1, 0.01, 0.0], abs=TIGHT)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(10 / 11, abs=TIGHT)


@pytest.mark.parametrize(
    ("lr", "changes"),
    [
        # Steps that go the same way: r = 0.9 / (1 - 0.9) = 9, bounded by 1/4.
        (0.1, 1.25),
        # Steps that nearly undo each other: r = -0.9 / 1.9 = -0.47, bounded by -1/4.
        (1.9, 0.75),
        # u grows, so that the curvature along it is negative: up by the bound, as the slope says.
        (-0.1, 1.25),
    ],
)
def test_trainable_rate_is_bounded(lr, changes):
    x = parameter(1.0)
    optimizer = torch.optim.SGD([x], abs(lr))
    optimizer.param_groups[0]["lr"] = lr
    rate = TrainableLearningRate(optimizer, 1)
    steps_on_half_square(optimizer, x, 2, rate.step)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(lr * changes, abs=TIGHT)


def test_trainable_rate_changes_once_a_gap_and_all_groups_alike():
    params = [parameter(1.0), parameter(2.0)]
    groups = [{"params": [params[0]], "lr": 0.1}, {"params": [params[1]], "lr": 0.2}]
    optimizer = torch.optim.SGD(groups)
    rate = TrainableLearningRate(optimizer, 3)
    changed = []
    for step in range(1, 13):
        before = [group["lr"] for group in optimizer.param_groups]
        for p in params:
            p.grad = p.detach().clone()
        optimizer.step()
        rate.step()
        after = [group["lr"] for group in optimizer.param_groups]
        assert after[1] == pytest.approx(2 * after[0])
        if after != before:
            changed.append(step)
    assert changed == [6, 9, 12]  # the first gap has nothing to be compared with


def test_trainable_rate_stays_where_nothing_moves_or_all_is_lost():
    x, optimizer, rate = trainable(0.1, 1.0)
    for gradient in (0.0, 0.0, math.nan, math.nan):
        x.grad = torch.full_like(x, gradient)
        optimizer.step()
        rate.step()
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_trainable_rate_continues_from_its_state():
    x, optimizer, rate = trainable(0.1, 1.0, -2.0)
    steps_on_half_square_of_many(optimizer, x, rate, 5)
    y, again, resumed = trainable(0.1, *x.tolist())
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(rate.state_dict())
    steps_on_half_square_of_many(optimizer, x, rate, 4)
    steps_on_half_square_of_many(again, y, resumed, 4)
    assert torch.equal(x, y)
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 0.1


def steps_on_half_square_of_many(optimizer, x, rate, count):
    for _ in range(count):
        x.grad = x.detach().clone()
        optimizer.step()
        rate.step()


@pytest.mark.parametrize(("gap", "bound", "named"), [(0, 0.25, "gap"), (1, 1.0, "bound")])
def test_trainable_rate_refuses_wrong_arguments(gap, bound, named):
    optimizer = torch.optim.SGD([parameter(1.0)], 0.1)
    with pytest.raises(ValueError, match=f"{named}: expected"):
        TrainableLearningRate(optimizer, gap, bound=bound)
