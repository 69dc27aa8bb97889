"""AnalyticAutoDrop: literal learning-rate tables of Algorithm 2, checkpoints, other schedulers."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from papers.theory import UnifiedMomentum, VelocityModel, algorithm_2, learning_rate
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, LinearLR, SequentialLR

from autodrop_ext import AnalyticAutoDrop
from autodrop_ext.schedulers.analytic import AnalyticDrop

MODEL: dict[str, float] = {"gamma": 1.0, "epsilon": 0.1, "tau0": 1.9}


def make(lr: Any = 1.0, **options: Any) -> tuple[torch.optim.Optimizer, AnalyticAutoDrop]:
    param = torch.nn.Parameter(torch.zeros(1))
    param.grad = torch.zeros(1)
    optimizer = torch.optim.SGD([param], lr=lr)
    return optimizer, AnalyticAutoDrop(optimizer, **(MODEL | options))


def rates(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
    """The rate that each optimizer step runs at."""
    used = []
    for _ in range(steps):
        used.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return used


# Gaps by hand for gamma = 1, epsilon = 0.1: tau0 = 1.9 never binds, so that
# k = (sqrt(pi (1 + alpha / 10)) - 1) / alpha, rounded up.
# alpha   1: 0.859, 2^(-2/3): 1.314, 3^(-2/3): 1.694, 4^(-2/3): 2.034, 5^(-2/3): 2.347
#         1, 2, 2, 3, 3
THEOREM = [1.0] * 2 + [0.6299605] * 2 + [0.4807499] * 2 + [0.3968503] * 3 + [0.3419952] * 3
# alpha   1/2: 1.632, 1/3: 2.405, 1/4: 3.178, 1/5: 3.950
#         2, 3, 4, 4
PROOF = [1 / 2] * 3 + [1 / 3] * 3 + [1 / 4] * 4 + [1 / 5] * 4 + [1 / 6]


# ---- the table ------------------------------------------------------------------------------


def test_the_theorems_rates():
    # As printed, a step is taken before the test, so that the first rate has one step more.
    assert rates(*make(), len(THEOREM)) == pytest.approx(THEOREM, abs=1e-7)


def test_the_proofs_rates_exactly():
    assert rates(*make(0.5, rates="proof"), len(PROOF)) == PROOF


def test_tau0_delays_drops():
    # tau0 = 0.1 binds for alpha = 1: k = sqrt(1.1 pi / 0.2) - 1 = 3.157, rounded up
    assert rates(*make(tau0=0.1), 7) == pytest.approx([1.0] * 5 + [0.6299605] * 2, abs=1e-7)


@pytest.mark.parametrize("base", [1.0, 0.3])
@pytest.mark.parametrize("sequence", ["theorem", "proof"])
def test_drops_where_algorithm_2_says(base, sequence):
    optimizer, scheduler = make(base, gamma=0.2, tau0=0.01, rates=sequence)
    scale = base / learning_rate(0, sequence)
    alphas = [scale * learning_rate(i, sequence) for i in range(9)]
    phases = list(algorithm_2(VelocityModel(0.2, 0.1), 0.01, alphas))
    rates(optimizer, scheduler, phases[-1].start + 1)
    # Iteration t is step t + 1.
    assert [d.step for d in scheduler.history] == [phase.start + 1 for phase in phases[1:]]
    assert [d.gap for d in scheduler.history] == [phase.gap for phase in phases[:-1]]
    assert [d.index for d in scheduler.history] == list(range(8))
    assert [d.lr[0] for d in scheduler.history] == pytest.approx(alphas[1:])


def test_every_group_falls_by_the_same_ratio_and_the_first_gives_the_models_rate():
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "lr": 10.0}]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    scheduler = AnalyticAutoDrop(optimizer, **MODEL, rates="proof")
    assert rates(optimizer, scheduler, 5) == PROOF[:5]
    assert scheduler.get_last_lr() == pytest.approx([1 / 3, 20 / 3])


def test_a_group_added_later_falls_too():
    optimizer, scheduler = make(0.5, rates="proof")
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 6.0})
    rates(optimizer, scheduler, 3)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(4.0)


def test_tensor_rates_change_in_place():
    lr = torch.tensor(0.5)
    optimizer, scheduler = make(lr, rates="proof")
    held = optimizer.param_groups[0]["lr"]
    # float32: 6e-8 relative for each value, written again at each drop
    assert rates(optimizer, scheduler, len(PROOF)) == pytest.approx(PROOF, rel=1e-7)
    assert optimizer.param_groups[0]["lr"] is held


def test_a_rate_changed_by_something_else_is_multiplied():
    optimizer, scheduler = make(0.5, rates="proof")
    optimizer.param_groups[0]["lr"] = 0.05
    used = rates(optimizer, scheduler, 7)
    assert used == pytest.approx([lr / 10 for lr in PROOF[:7]])


# ---- next to other schedulers ---------------------------------------------------------------


def test_built_in_warmup():
    optimizer, scheduler = make(0.5, rates="proof", warmup_steps=4)
    assert rates(optimizer, scheduler, 10) == [0.125, 0.25, 0.375, 0.5, *PROOF[:6]]
    assert scheduler.history[0].step == 7


def test_after_a_warmup_in_sequential_lr():
    optimizer, _ = make(0.5)
    warmup = LinearLR(optimizer, start_factor=0.5, total_iters=3)
    after = AnalyticAutoDrop(optimizer, **MODEL, rates="proof")
    sequential = SequentialLR(optimizer, [warmup, after], milestones=[3])
    used = rates(optimizer, sequential, 10)
    assert used[:3] == pytest.approx([0.25, 1 / 3, 5 / 12])
    assert used[3:] == pytest.approx(PROOF[:7])


def test_in_a_chain_the_rates_multiply():
    optimizer, scheduler = make(0.5, rates="proof")
    halved = ConstantLR(optimizer, factor=0.5, total_iters=100)
    used = rates(optimizer, ChainedScheduler([scheduler, halved]), 7)
    assert used == pytest.approx([lr / 2 for lr in PROOF[:7]])


def test_closed_form_is_the_rate_after_all_drops():
    optimizer, scheduler = make(0.5, rates="proof")
    rates(optimizer, scheduler, 8)
    assert scheduler._get_closed_form_lr() == [optimizer.param_groups[0]["lr"]] == [0.25]


def test_skipped_and_zero_rate_steps_do_not_count():
    optimizer, scheduler = make(0.5, rates="proof")
    for _ in range(20):
        scheduler.step()  # no optimizer step: GradScaler skipped it
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    scheduler.step()
    optimizer.param_groups[0]["lr"] = 0.5
    assert rates(optimizer, scheduler, len(PROOF)) == PROOF


def test_with_the_optimizer_that_the_papers_analyse():
    x = torch.nn.Parameter(torch.full((3,), 2.0))
    optimizer = UnifiedMomentum([x], lr=0.5, momentum=0.5, s=1.0)
    scheduler = AnalyticAutoDrop(optimizer, **MODEL, rates="proof")
    for lr in PROOF:
        assert optimizer.param_groups[0]["lr"] == lr
        optimizer.zero_grad()
        x.square().sum().backward()
        optimizer.step()
        scheduler.step()
    assert x.abs().max().item() < 0.1


# ---- looking --------------------------------------------------------------------------------


def test_history_callback_and_metrics():
    drops: list[AnalyticDrop] = []
    optimizer, scheduler = make(0.5, rates="proof", on_drop=drops.append)
    rates(optimizer, scheduler, 3)
    # gamma alpha = 1/2, two steps: half of 90 (1 + 0.05) degrees
    angle = pytest.approx(90 * 1.05 / 2)
    assert scheduler.history == [AnalyticDrop(step=3, index=0, gap=2, angle=angle, lr=(1 / 3,))]
    assert drops == scheduler.history
    rates(optimizer, scheduler, 1)
    metrics = scheduler.get_metrics()
    assert metrics == {
        "lr": 1 / 3,
        "num_drops": 1,
        # one step at gamma alpha = 1/3: a quarter of 90 (1 + 1/30)
        "angular_velocity": pytest.approx(90 * (1 + 1 / 30) / 4),
        "steps_to_drop": 2,
    }
    assert all(type(value) is float for value in metrics.values())


def test_history_is_bounded(monkeypatch):
    monkeypatch.setattr("autodrop_ext.schedulers.base.HISTORY", 5)
    optimizer, scheduler = make()
    rates(optimizer, scheduler, 60)
    assert len(scheduler.history) == 5
    assert scheduler.history[-1].index == scheduler.num_drops - 1 > 5


def test_plot_draws_the_drops(tmp_path):
    optimizer, scheduler = make()
    scheduler.plot()  # before the first step too
    rates(optimizer, scheduler, 12)
    figure = scheduler.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    (curve,) = figure.axes[0].lines
    starts = [x for x, y in zip(curve.get_xdata(), curve.get_ydata(), strict=True) if y == 0]
    assert starts[1:] == [drop.step for drop in scheduler.history]
    (marks,) = [c for c in figure.axes[0].collections if c.get_gid() == "marks"]
    assert len(marks.get_segments()) == scheduler.num_drops


def test_close_takes_the_hook_off():
    optimizer, scheduler = make()
    scheduler.close()
    assert not optimizer._optimizer_step_post_hooks
    assert rates(optimizer, optimizer_only(), 5) == [1.0] * 5


def optimizer_only() -> Any:
    class Nothing:
        def step(self) -> None:
            pass

    return Nothing()


# ---- state ----------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 2, 3, 17])
def test_resumes_exactly_from_a_plain_checkpoint(at):
    straight = rates(*make(gamma=0.3, warmup_steps=2), 60)
    optimizer, scheduler = make(gamma=0.3, warmup_steps=2)
    assert rates(optimizer, scheduler, at) == straight[:at]
    buffer = io.BytesIO()
    torch.save([optimizer.state_dict(), scheduler.state_dict()], buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    resumed_optimizer, resumed = make(gamma=0.3, warmup_steps=2)
    resumed_optimizer.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    assert rates(resumed_optimizer, resumed, 60 - at) == straight[at:]
    rates(optimizer, scheduler, 60 - at)
    assert resumed.state_dict() == scheduler.state_dict()
    assert resumed.history == scheduler.history


def test_a_checkpoints_settings_replace_those_given():
    _, scheduler = make(0.5, rates="proof")
    _, other = make(1.0, tau0=0.5)
    with pytest.warns(RuntimeWarning, match=r"tau0=1.9 \(was 0.5\), rates='proof' \(was 'theorem'"):
        other.load_state_dict(scheduler.state_dict())
    # The rates themselves are the optimizer's, whose state was not loaded.
    assert other.state_dict() | {"lrs": [0.5]} == scheduler.state_dict()


def test_pickles_with_its_optimizer():
    optimizer, scheduler = make(0.5, rates="proof")
    rates(optimizer, scheduler, 4)
    copied = pickle.loads(pickle.dumps(scheduler))
    assert rates(copied.optimizer, copied, len(PROOF) - 4) == PROOF[4:]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "^state_dict: expected a dict, got NoneType"),
        ({"version": 1, "scheduler": "AutoDrop"}, "expected 'AnalyticAutoDrop', got 'AutoDrop'"),
        ({"version": 1, "scheduler": "AnalyticAutoDrop"}, "state_dict: no entry 'settings'"),
        (
            {"version": 1, "scheduler": "AnalyticAutoDrop", "settings": {"epsilon": 0.1}},
            r"state_dict\['settings'\]: no entry 'gamma'",
        ),
    ],
)
def test_a_foreign_state_is_refused(state, message):
    _, scheduler = make()
    before = scheduler.state_dict()
    with pytest.raises(ValueError, match=message):
        scheduler.load_state_dict(state)
    assert scheduler.state_dict() == before


# ---- arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gamma": 0.0}, ValueError, "gamma: expected a finite number above 0, got 0.0"),
        ({"gamma": "1"}, TypeError, "gamma: .* got '1'"),
        ({"epsilon": 0.34}, ValueError, r"epsilon: expected a number below 1 / \(3 lr\)"),
        ({"epsilon": -0.1}, ValueError, "epsilon: expected a finite number above 0"),
        ({"tau0": 2.0}, ValueError, "tau0: expected a number between 0 and 2, got 2.0"),
        ({"rates": "lemma"}, ValueError, "rates: expected 'theorem' or 'proof', got 'lemma'"),
        ({"rates": [2.0, 1.0]}, ValueError, "rates: expected 'theorem' or 'proof', got"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps: expected at least 0"),
        ({"on_drop": 1}, TypeError, "on_drop: expected a function or None, got 1"),
        ({"lr": 0.0}, ValueError, "lr: expected a finite number above 0, got 0.0"),
    ],
)
def test_wrong_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_the_optimizer_must_be_one():
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\.Optimizer, got str"):
        AnalyticAutoDrop("SGD", **MODEL)  # type: ignore[arg-type]
