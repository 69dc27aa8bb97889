"""Every single-process row of the fault table: what happens, and the message it comes with."""

from __future__ import annotations

import copy
import importlib.util
import pathlib
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import independent
import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import autodrop_ext.meter
from autodrop_ext import AngularVelocity, AutoDrop, EpochAutoDrop
from autodrop_ext.ranks import Ranks

SETTINGS: dict[str, Any] = {"window": 2, "factor": 0.5, "buffer_size": 2, "min_samples": 2}


def small_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


class Training:
    """A model, an optimizer and a scheduler, trained one step at a time on noise."""

    def __init__(
        self,
        optimizer: str = "SGD",
        model: Any = None,
        lr: Any = 0.1,
        *,
        frozen: bool = False,
        **options: Any,
    ):
        self.model = small_model() if model is None else model
        self.model[0].bias.requires_grad_(not frozen)
        self.optimizer = getattr(torch.optim, optimizer)(self.model.parameters(), lr=lr, **options)
        self.scheduler = AutoDrop(self.optimizer, **SETTINGS)
        self.scaler: torch.amp.GradScaler | None = None
        self.poison = False

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            x = torch.randn(16, 4)
            loss = (self.model(x) - x[:, :2]).square().mean()
            if self.poison:
                loss = loss * float("inf")
            self.optimizer.zero_grad()
            if self.scaler is None:
                loss.backward()
                self.optimizer.step()
            else:
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
            self.scheduler.step()

    @property
    def meter(self) -> AngularVelocity:
        return self.scheduler.meter

    @property
    def angles(self) -> list[float | None]:
        return [d.angle for d in self.scheduler.history]


# ---- NaN and infinity -----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_decide_nothing_and_are_named_once(bad: float) -> None:
    run = Training()
    run.step(6)
    lr = run.optimizer.param_groups[0]["lr"]
    with torch.no_grad():
        weight = run.model[2].weight
        saved = weight.clone()
        weight[0, 0] = bad
    with pytest.warns(
        RuntimeWarning, match=r"param_groups\[0\]\['params'\]\[[0-3]\] held NaN"
    ) as caught:
        run.step(8)
    assert len([w for w in caught if "held NaN" in str(w.message)]) == 1
    assert run.angles[-4:] == [None] * 4
    assert run.optimizer.param_groups[0]["lr"] == lr
    with torch.no_grad():
        run.model.load_state_dict(small_model().state_dict())
        weight.copy_(saved)
    run.step(6)
    assert run.angles[-3:-1] == [None, None]
    assert run.angles[-1] is not None


def test_the_first_tensor_with_nan_is_named() -> None:
    tensors = [("a", torch.zeros(3)), ("b", torch.zeros(3)), ("c", torch.zeros(3))]
    meter = AngularVelocity(tensors, 1)
    meter.observe()
    tensors[1][1][2] = float("nan")
    tensors[2][1][0] = float("nan")
    with pytest.warns(
        RuntimeWarning, match="AngularVelocity: b held NaN or infinity during window 1"
    ):
        meter.observe()


def test_a_hashed_table_with_nan_names_its_tensor() -> None:
    """All that its buckets know is that an element was not finite; the tensors are looked at."""
    tensors = [(name, torch.randn(100_000)) for name in ("a", "b", "c")]
    meter = AngularVelocity(tensors, 1)
    for _ in range(4):
        for _, tensor in tensors:
            tensor += 0.01 * torch.randn(100_000)
        reading = meter.observe()
    assert reading is not None and reading.angle is not None and reading.standard_error > 0
    tensors[1][1][70_000] = float("inf")
    with pytest.warns(RuntimeWarning, match="b held NaN or infinity during window 4"):
        reading = meter.observe()
    assert reading is not None and reading.angle is None
    tensors[1][1][70_000] = 0.0
    for t in range(3):
        for _, tensor in tensors:
            tensor += 0.01 * torch.randn(100_000)
        reading = meter.observe()
        assert reading is not None and (reading.angle is None) == (t < 2)


# ---- skipped steps --------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_gradscaler_skips_are_not_counted(fused: bool) -> None:
    run = Training(fused=fused)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    run.step(3)
    position, before = run.meter.steps, [p.clone() for p in run.model.parameters()]
    run.poison = True
    run.step(5)
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), before, strict=True))
    assert run.meter.steps == position == 3
    run.poison = False
    run.step(1)
    assert run.meter.steps == 4


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)])
def test_steps_at_a_rate_of_zero_are_ignored(rate: Any) -> None:
    run = Training(optimizer="AdamW", lr=rate)
    get_optimizer_state_dict(run.model, run.optimizer)  # runs a step at lr=0 on a fresh optimizer
    run.scheduler.step()
    assert run.meter.steps == 0
    assert float(run.optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)
    run.step(2)
    assert run.meter.steps == 2
    for group in run.optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(0.0)
        else:
            group["lr"] = 0.0
    run.step(3)
    assert run.meter.steps == 2


def test_zero_displacement_decides_nothing_and_warns_after_five_windows() -> None:
    x = torch.randn(10)
    meter = AngularVelocity([x], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        readings = [meter.observe() for _ in range(5)]
    assert [r.angle for r in readings[2:] if r] == [None, None, None]
    with pytest.warns(RuntimeWarning, match="no parameter moved during the last 5 windows"):
        meter.observe()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        meter.observe()


def test_an_unrelated_optimizer_is_pointed_out() -> None:
    run = Training()
    with pytest.warns(
        RuntimeWarning, match="called 100 times without an optimizer step in between"
    ):
        for _ in range(1001):
            run.scheduler.step()


def test_calling_once_an_epoch_is_pointed_out() -> None:
    run = Training()
    step = run.scheduler.step
    run.scheduler.step = lambda: None  # type: ignore[method-assign]
    with pytest.warns(RuntimeWarning, match=r"25 optimizer steps passed .* 'interval': 'step'"):
        for _ in range(3):
            run.step(25)
            step()


# ---- parameters that change -----------------------------------------------------------------


def unfreeze(run: Training) -> None:
    run.model[0].bias.requires_grad_(True)


def add_group(run: Training) -> None:
    extra = torch.nn.Parameter(torch.randn(3))
    run.optimizer.add_param_group({"params": [extra], "lr": 0.1})


def change_shape(run: Training) -> None:
    bias = run.model[0].bias
    bias.data = bias.data.clone().reshape(2, -1) if bias.ndim == 1 else bias.data.flatten()


def change_dtype(run: Training) -> None:
    bias = run.model[2].bias
    bias.data = bias.data.to(torch.float64 if bias.dtype == torch.float32 else torch.float32)


def change_memory_order(run: Training) -> None:
    weight = run.model[0].weight
    order = weight.data.t() if weight.is_contiguous() else weight.data
    weight.data = order.contiguous().t() if weight.is_contiguous() else order.contiguous()


def assign(run: Training) -> None:
    run.model.load_state_dict(copy.deepcopy(run.model.state_dict()), assign=True)
    run.optimizer.param_groups[0]["params"] = list(run.model.parameters())


def train_on_noise(run: Training) -> None:
    """A step that takes parameters of any shape and dtype."""
    for group in run.optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p) if p.requires_grad else None
    run.optimizer.step()
    run.scheduler.step()


@pytest.mark.parametrize(
    "change", [unfreeze, add_group, assign, change_shape, change_dtype, change_memory_order]
)
@pytest.mark.parametrize("in_the_middle", [False, True])
def test_changed_parameters_are_noticed_and_the_window_discarded(
    change: Callable[[Training], None], in_the_middle: bool
) -> None:
    run = Training(frozen=change is unfreeze)
    for _ in range(10 + in_the_middle):
        train_on_noise(run)
    readings, drops = len(run.angles), run.scheduler.num_drops
    change(run)
    message = "replaced, added, resized or unfrozen; the window is discarded"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        for _ in range(2 - in_the_middle):
            train_on_noise(run)
    assert len([w for w in caught if message in str(w.message)]) == 1
    # Two windows of the new parameters are complete, and the third one brings an angle.
    for _ in range(4):
        train_on_noise(run)
    assert all(angle is None for angle in run.angles[readings:])
    assert run.scheduler.num_drops == drops
    for _ in range(2):
        train_on_noise(run)
    assert run.angles[-1] is not None
    expected = [p for g in run.optimizer.param_groups for p in g["params"] if p.requires_grad]
    running = run.meter.state_dict()["tables"]["running"]
    assert running.numel() == sum(p.numel() for p in expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        change(run)
        for _ in range(4):
            train_on_noise(run)


def test_parameters_that_are_frozen_later_stay_measured() -> None:
    """They stand still, which changes no window."""
    run = Training()
    run.step(7)
    run.model[0].weight.requires_grad_(False)
    run.step(6)
    assert None not in run.angles
    run.model[0].weight.requires_grad_(True)
    run.step(6)
    assert None not in run.angles


@pytest.mark.parametrize("window", [6, 7])
def test_adapters_that_are_trained_in_turn_are_all_measured(window: int) -> None:
    """If the turns divide the window, each of its ends finds the same one trained."""
    generator = torch.Generator().manual_seed(0)
    adapters = [nn.Parameter(torch.zeros(4), requires_grad=False) for _ in range(3)]
    scheduler = AutoDrop(torch.optim.SGD(adapters, lr=0.1), window=window)
    meter = AngularVelocity([p.detach() for p in adapters], window=window)
    angles = []
    with pytest.warns(RuntimeWarning, match="replaced, added, resized or unfrozen") as caught:
        for t in range(20 * window):
            for i, p in enumerate(adapters):
                p.requires_grad_(i == t % 3)
                p.grad = torch.randn(4, generator=generator) - 1 if i == t % 3 else None
            scheduler.optimizer.step()
            scheduler.step()
            if (reading := meter.observe()) is not None:
                angles.append(reading.angle)
    assert len(caught) == 1
    measured = [decision.angle for decision in scheduler.history]
    assert len(measured) >= 16
    assert measured == angles[-len(measured) :]  # to the bit: the same values in the same order


def test_adapters_that_are_trained_in_turn_within_an_epoch_are_all_measured() -> None:
    """Neither the beginning nor the end of an epoch finds the second one trained."""
    generator = torch.Generator().manual_seed(0)
    adapters = [nn.Parameter(torch.zeros(4), requires_grad=False) for _ in range(3)]
    scheduler = EpochAutoDrop(torch.optim.SGD(adapters, lr=0.1))
    meter = AngularVelocity([p.detach() for p in adapters], window=1)
    angles = []
    with pytest.warns(RuntimeWarning, match="replaced, added, resized or unfrozen") as caught:
        for _ in range(12):
            for turn in range(3):
                for i, p in enumerate(adapters):
                    p.requires_grad_(i == turn)
                    p.grad = torch.randn(4, generator=generator) - 1 if i == turn else None
                scheduler.optimizer.step()
            scheduler.step()
            if (reading := meter.observe()) is not None:
                angles.append(reading.angle)
    assert len(caught) == 1
    measured = [decision.angle for decision in scheduler.history][-8:]
    assert None not in measured
    assert measured == angles[-8:]  # to the bit: the same values in the same order


@pytest.mark.parametrize("kind", [AutoDrop, EpochAutoDrop])
def test_parameters_without_gradients_of_their_own_are_measured(kind: Any) -> None:
    """As master weights whose gradients are copied from the model's and deleted after the step."""
    generator = torch.Generator().manual_seed(0)
    master = nn.Parameter(torch.zeros(4), requires_grad=False)
    scheduler = kind(
        torch.optim.SGD([master], lr=0.1), **({"window": 1} if kind is AutoDrop else {})
    )
    for _ in range(8):
        master.grad = torch.randn(4, generator=generator) - 1
        scheduler.optimizer.step()
        scheduler.optimizer.zero_grad()
        scheduler.step()
    assert [d.angle is not None for d in scheduler.history[-6:]] == [True] * 6


# ---- memory that moves ------------------------------------------------------------------------


def replace_data(run: Training) -> None:
    run.model[0].weight.data = run.model[0].weight.data.clone()


def convert(run: Training) -> None:
    run.model.to(torch.float64).to(torch.float32)


def share(run: Training) -> None:
    run.model.share_memory()


def resize(run: Training) -> None:
    """As FSDP does: the memory is freed and taken again."""
    weight = run.model[0].weight.data
    values, size = weight.clone(), weight.untyped_storage().size()
    weight.untyped_storage().resize_(0)
    weight.untyped_storage().resize_(size)
    weight.copy_(values)


@pytest.mark.parametrize("move", [replace_data, convert, share, resize])
def test_parameters_are_read_from_the_memory_that_they_have(
    move: Callable[[Training], None],
) -> None:
    moved, still = Training(), Training()
    for _ in range(11):
        for run in (moved, still):
            torch.manual_seed(run.meter.steps)
            train_on_noise(run)
        move(moved)
    assert moved.angles == still.angles  # to the bit: the same values in the same order
    assert moved.angles[-1] is not None
    assert moved.optimizer.param_groups[0]["lr"] == still.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("buckets", [2**18, 4096])
def test_memory_that_is_new_at_every_step_is_measured_as_if_copied(buckets: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(80, 70, generator=generator)
    replaced, copied = (torch.nn.Parameter(values.clone()) for _ in range(2))
    one, other = (AngularVelocity([("w", p)], 3, buckets=buckets) for p in (replaced, copied))
    angles = []
    for _ in range(30):
        update = 0.01 * torch.randn(80, 70, generator=generator)
        replaced.data = replaced.data * 0.99 + update
        with torch.no_grad():
            copied.copy_(copied * 0.99 + update)
        reading, wanted = one.observe(), other.observe()
        assert reading == wanted  # to the bit
        angles += [reading.angle] if reading is not None else []
    assert len(angles) == 8 and None not in angles


def test_load_state_dict_in_place_is_no_change() -> None:
    run = Training()
    run.step(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.model.load_state_dict(copy.deepcopy(run.model.state_dict()))
        run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        run.step(5)
    assert run.angles[-1] is not None


def test_freed_memory_is_never_read() -> None:
    """A parameter without memory at a read spoils the window, and the next one is whole again."""
    run = Training()
    run.step(7)
    weight = run.model[0].weight
    values, size = weight.data.clone(), weight.untyped_storage().size()
    weight.untyped_storage().resize_(0)
    with pytest.warns(RuntimeWarning, match="window is discarded"):
        run.optimizer.zero_grad()
        run.optimizer.step()
        run.scheduler.step()
    weight.untyped_storage().resize_(size)
    weight.data.copy_(values)
    run.step(6)
    assert run.angles[-3:-1] == [None, None]
    assert run.angles[-1] is not None


@pytest.mark.parametrize("in_the_middle", [False, True])
def test_everything_frozen_later_is_not_an_error(in_the_middle: bool) -> None:
    run = Training()
    run.step(4 + in_the_middle)
    for p in run.model.parameters():
        p.requires_grad_(False)
    with pytest.warns(RuntimeWarning, match="no parameter moved during the last 5 windows"):
        for _ in range(14):
            run.optimizer.zero_grad()
            run.optimizer.step()
            run.scheduler.step()
    assert run.angles[-3:] == [None] * 3
    assert run.scheduler.num_drops == 0


# ---- parameters that cannot be watched ------------------------------------------------------


def test_nothing_to_watch_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="params: expected at least one trainable parameter, got none"
    ):
        AngularVelocity([torch.nn.Parameter(torch.zeros(2), requires_grad=False)]).observe()


def test_tied_weights_count_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = torch.nn.Parameter(model[0].weight.data)  # two parameters, one storage
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    meter = AngularVelocity(optimizer, 1)
    meter.observe()
    assert meter.state_dict()["tables"]["running"].numel() == 16 + 4 + 4
    alone = AngularVelocity([*model[0].parameters(), model[1].bias], 1)
    for _ in range(4):
        with torch.no_grad():
            for p in alone.named_parameters():
                p[1].add_(torch.randn(p[1].shape))
        reading, wanted = meter.observe(), alone.observe()
    assert reading is not None and wanted is not None and reading.angle is not None
    assert reading.angle == pytest.approx(wanted.angle, abs=1e-9)  # float64 sums
    assert reading.norm == pytest.approx(wanted.norm, rel=1e-12)


def test_partly_shared_memory_is_an_error_that_names_both() -> None:
    storage = torch.randn(10)
    meter = AngularVelocity([("head", storage[:6]), ("tail", storage[5:])], 1)
    with pytest.raises(ValueError, match="head and tail overlap in memory"):
        meter.observe()


def sparse() -> torch.Tensor:
    return torch.eye(3).to_sparse()


@pytest.mark.parametrize(
    ("parameter", "kind"),
    [
        (sparse, "layout torch.sparse_coo"),
        (lambda: torch.zeros(3, dtype=torch.int8), "dtype torch.int8"),
        (lambda: torch.zeros(3).to(torch.float8_e4m3fn), "dtype torch.float8_e4m3fn"),
    ],
)
def test_parameters_without_a_dense_float_layout_are_named(
    parameter: Callable[[], torch.Tensor], kind: str
) -> None:
    dense = torch.zeros(3)
    expected = f"odd: expected a dense floating-point or complex parameter, got {kind}"
    with pytest.raises(TypeError, match=re.escape(expected)):
        AngularVelocity([("dense", dense), ("odd", parameter())])
    frozen = torch.nn.Parameter(parameter(), requires_grad=False)
    AngularVelocity([("dense", dense), ("odd", frozen)], 1).observe()


def test_meta_parameters_are_named() -> None:
    meter = AngularVelocity([("ghost", torch.zeros(3, device="meta"))])
    with pytest.raises(RuntimeError, match="ghost: expected a parameter with data"):
        meter.observe()


# ---- half precision -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vanishing_half_precision_steps_warn_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, generator=generator).to(dtype)
    meter = AngularVelocity([x], 4)
    message = "half-precision parameters hardly move: .* 0.00.* master weights"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        for _ in range(24):
            x += (1e-6 * torch.randn(4000, generator=generator)).to(dtype)
            meter.observe()
    assert len([w for w in caught if "master weights" in str(w.message)]) == 1


def test_vanishing_steps_of_a_hashed_model_warn_once() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300_000, generator=generator).bfloat16()
    meter = AngularVelocity([x], 2)
    with pytest.warns(RuntimeWarning, match="pass float32 master weights, or") as caught:
        for _ in range(12):
            x[:300] += (0.005 * torch.randn(300, generator=generator)).bfloat16()
            meter.observe()
    assert len(caught) == 1


@pytest.mark.parametrize("window", [1, 4, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [0.5, 2.0])
def test_half_precision_steps_warn_below_eps(dtype: torch.dtype, window: int, steps: float) -> None:
    """A random walk, of whose steps the threshold is exact."""
    generator = torch.Generator().manual_seed(0)
    size = steps * torch.finfo(dtype).eps
    x = torch.randn(4000, generator=generator).to(dtype)
    meter = AngularVelocity([x], window)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6 * window):
            x.copy_(x.float() + size * torch.randn(4000, generator=generator))
            reading = meter.observe()
    assert reading is not None and reading.angle is not None
    assert len(caught) == (steps < 1)


def kahan(parameters: list[torch.Tensor], state: dict[Any, Any], update: torch.Tensor) -> None:
    """As the Kahan summation of optimizers: parameter plus compensation is the float32 weight."""
    for p in parameters:
        c = state.setdefault(p, {"kahan_comp": torch.zeros_like(p)})["kahan_comp"]
        c += update.to(p.dtype)
        before = p.detach().clone()
        p.add_(c)
        c += before - p


@pytest.mark.parametrize("buckets", [2**18, 4096])
@pytest.mark.parametrize("made", ["at every call", "in place"])
def test_parameters_plus_compensation_have_the_angle_of_the_float32_weights(
    made: str, buckets: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    drift = torch.randn(90, 70, generator=generator)
    weight = torch.randn(90, 70, generator=generator).bfloat16().float()
    half, state = weight.bfloat16(), {}
    kept = weight.clone()

    def compensated() -> list[torch.Tensor]:
        c = state[half]["kahan_comp"] if half in state else torch.zeros_like(half)
        if made == "at every call":
            return [half.float() + c.float()]
        kept.copy_(half.float() + c.float())
        return [kept]

    meters = [AngularVelocity(x, 8, buckets=buckets) for x in (compensated, [weight], [half])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(80):
            update = 1e-4 * (0.4 * drift + torch.randn(90, 70, generator=generator))
            weight += update
            kahan([half], state, update)
            for meter in meters:
                meter.observe()
    assert ["hardly move" in str(w.message) for w in caught] == [True]  # of the third meter
    both, true, alone = ([r.angle or 0.0 for r in meter.history] for meter in meters)
    # The compensation has 8 bits of its own, and keeps 1e-5 of the parameters.
    assert both == pytest.approx(true, abs=0.5)
    assert alone[-1] - true[-1] > 20


def test_master_weights_can_be_watched_instead() -> None:
    model = small_model().to(torch.bfloat16)
    masters = [p.detach().float().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = AutoDrop(optimizer, params=masters, **SETTINGS)
    generator = torch.Generator().manual_seed(0)
    iterates = []
    for _ in range(20):
        for master, p in zip(masters, model.parameters(), strict=True):
            master += 1e-6 * torch.randn(master.shape, generator=generator)
            p.data.copy_(master)
        iterates.append(torch.cat([master.flatten() for master in masters]).numpy())
        optimizer.step()
        scheduler.step()
    # Of roundings to bfloat16, a thousand times as long as the steps, the angles would be others.
    expected = independent.angles(np.stack(iterates), SETTINGS["window"])
    # Float64 sums of numbers below 1 next to displacements of 1e-6 lose 1e-10 of a right angle.
    assert [d.angle for d in scheduler.history] == pytest.approx(expected, abs=1e-6)


# ---- copies ---------------------------------------------------------------------------------


def test_an_optimizer_without_its_hook_gets_it_back() -> None:
    run = Training()
    run.step(3)
    run.scheduler.optimizer = run.optimizer = pickle.loads(pickle.dumps(run.optimizer))
    run.model = None
    params = run.optimizer.param_groups[0]["params"]
    with pytest.warns(RuntimeWarning) as caught:
        for _ in range(9):
            for p in params:
                p.grad = torch.randn_like(p)
            run.optimizer.step()
            run.scheduler.step()
    assert any("lost its step hook" in str(w.message) for w in caught)
    assert run.meter.steps == 3 + 8


def test_a_copied_pair_works_on() -> None:
    run = Training()
    run.step(5)
    model, optimizer, scheduler = copy.deepcopy((run.model, run.optimizer, run.scheduler))
    assert scheduler.optimizer is optimizer
    run.model, run.optimizer, run.scheduler = model, optimizer, scheduler
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.step(5)
    assert run.meter.steps == 10


# ---- where a warning points to --------------------------------------------------------------

USERS_MODULE = """
import torch
from autodrop_ext import AutoDrop

def train():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.randn(4))], lr=0.1)
    scheduler = AutoDrop(optimizer)
    for _ in range(1001):
        scheduler.step()
"""


def test_a_users_folder_called_torch_is_not_torch(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "torch" / "mine.py"
    path.parent.mkdir()
    path.write_text(USERS_MODULE)
    spec = importlib.util.spec_from_file_location("mine", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.warns(RuntimeWarning, match="without an optimizer step") as caught:
        module.train()
    assert [w.filename for w in caught] == [str(path)]


def test_a_library_that_calls_step_is_not_blamed() -> None:
    """It is where packages are installed, next to torch."""
    path = pathlib.Path(torch.__file__).parents[1] / "accelerate" / "scheduler.py"
    namespace: dict[str, Any] = {}
    exec(compile(USERS_MODULE, str(path), "exec"), namespace)
    with pytest.warns(RuntimeWarning, match="without an optimizer step") as caught:
        namespace["train"]()
    assert [w.filename for w in caught] == [__file__]


def test_a_lost_rank_is_reported_with_the_name_of_the_scheduler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("connection closed by peer")

    def found(group: Any, shards: Any, owner: str) -> Ranks:
        return Ranks(group="a group of four", size=4, rank=1, owner=owner)

    monkeypatch.setattr(torch.distributed, "all_gather_object", fail)
    monkeypatch.setattr(autodrop_ext.meter, "find_group", found)
    monkeypatch.setattr(autodrop_ext.meter, "is_alone", lambda process_group: False)
    with pytest.raises(RuntimeError, match=r"^AutoDrop on rank 1: its settings could not be"):
        Training().step()
