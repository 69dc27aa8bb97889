"""``window="auto"``: the rule, and the papers' choices."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trajectories import Given, noisy_walk, turning

from autodrop_ext import AutoDrop
from autodrop_ext.schedulers.auto_window import window_for


@given(
    st.integers(1, 10**8),
    st.floats(0.1, 0.99),
    st.integers(1, 50),
    st.floats(1e-6, 0.9),
)
def test_the_fastest_decay_is_the_one_asked_for(
    steps: int, factor: float, min_samples: int, total_decay: float
) -> None:
    def lowest(window: int) -> float:
        return float(factor ** (steps / ((min_samples + 1) * window)))

    window = window_for(steps, factor=factor, min_samples=min_samples, total_decay=total_decay)
    assert window >= 1
    # The rule leaves out a billionth, so that whole numbers stay whole.
    assert window == 1 or lowest(window) >= total_decay * (1 - 1e-6)
    assert window == 1 or lowest(window - 1) <= total_decay * (1 + 1e-6)


def test_the_papers_windows() -> None:
    """CIFAR: 200 epochs of 50,000 images; ImageNet: 100 of 1,281,167; batches of 128 and 256.

    The paper does not print its batches; these are those of the schedules that it follows.
    """
    cifar = -(-50_000 // 128) * 200
    imagenet = -(-1_281_167 // 256) * 100
    # 64 and 640 in the paper, among 32, 64, 128, 256 and 64, 256, 512, 640: the nearest by ratio.
    assert window_for(cifar) == 80
    assert window_for(imagenet) == 507
    # The rule's ratio of the two runs against the paper's factor of 10.
    assert window_for(imagenet) / window_for(cifar) == pytest.approx(6.3, abs=0.1)


def test_autodrop_takes_the_window_from_the_length_of_the_run() -> None:
    steps = 880
    scheduler = AutoDrop(
        Given(noisy_walk(steps, 40, 0)),
        "auto",
        factor=0.5,
        threshold=1e9,  # every comparison lowers the rate: as often as it can
        min_samples=3,
        num_steps=steps,
        total_decay=0.5**8,
    )
    assert scheduler.window == 880 // (4 * 8) + 1 == 28 or scheduler.window == 27
    for _ in range(steps):
        scheduler.optimizer.step()
        scheduler.step()
    # Two windows pass before the first angle, and cost one drop here.
    assert scheduler.num_drops == 7
    assert scheduler.get_metrics()["lr"] == 0.5**7


@pytest.mark.parametrize(("steps", "rule"), [(600, 1), (14_000, 15)])
def test_a_window_is_no_shorter_than_16_steps_and_a_warning_says_so(steps: int, rule: int) -> None:
    assert window_for(steps) == rule
    expected = rf"AutoDrop: window='auto' would take {rule} of num_steps={steps} .* It takes 16"
    with pytest.warns(RuntimeWarning, match=expected) as caught:
        assert AutoDrop(Given(turning([90.0])), "auto", num_steps=steps).window == 16
    assert caught[0].filename == __file__


def test_the_rule_that_gives_16_warns_of_nothing() -> None:
    assert window_for(15_000) == 16
    assert AutoDrop(Given(turning([90.0])), "auto", num_steps=15_000).window == 16


def test_the_warm_up_does_not_count() -> None:
    optimizer = Given(turning([90.0]))
    scheduler = AutoDrop(optimizer, "auto", num_steps=100_000, warmup_steps=20_000)
    assert scheduler.window == window_for(80_000)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"window": "auto"}, ValueError, "num_steps: expected the length of the run"),
        ({"window": "auto", "num_steps": 0}, ValueError, "num_steps: expected at least 1, got 0"),
        ({"window": "auto", "num_steps": 1.5}, TypeError, "num_steps: expected an int, got 1.5"),
        (
            {"window": "auto", "num_steps": 10, "warmup_steps": 10},
            ValueError,
            "num_steps: expected at least 11, got 10",
        ),
        (
            {"window": "auto", "num_steps": 10, "total_decay": 1.0},
            ValueError,
            "total_decay: expected a number between 0 and 1, got 1.0",
        ),
        ({"num_steps": 10}, ValueError, "num_steps: expected window='auto' with it, got window=64"),
        ({"window": "long"}, TypeError, "window: expected an int, got 'long'"),
        ({"buckets": "auto"}, TypeError, "buckets: expected an int, got 'auto'"),
    ],
)
def test_wrong_arguments_say_what_was_expected(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AutoDrop(Given(turning([90.0])), **arguments)
