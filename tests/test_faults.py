"""Every single-process row of the fault table: what happens, and the message it comes with."""

from __future__ import annotations

import copy
import importlib.util
import pathlib
import pickle
import re
import subprocess
import sys
import textwrap
import types
import warnings
from collections.abc import Callable
from typing import Any

import independent
import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import autodrop_ext.meter
from autodrop_ext import AngularVelocity, AutoDrop

SETTINGS: dict[str, Any] = {"window": 2, "factor": 0.5, "buffer_size": 2, "min_samples": 2}


def small_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


class Training:
    """A model, an optimizer and a scheduler, trained one step at a time on noise."""

    def __init__(self, optimizer: str = "SGD", model: Any = None, lr: Any = 0.1, **options: Any):
        self.model = small_model() if model is None else model
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


def freeze(run: Training) -> None:
    run.model[0].weight.requires_grad_(False)


def unfreeze(run: Training) -> None:
    run.model[0].bias.requires_grad_(True)


def add_group(run: Training) -> None:
    extra = torch.nn.Parameter(torch.randn(3))
    run.optimizer.add_param_group({"params": [extra], "lr": 0.1})


def replace_data(run: Training) -> None:
    run.model[0].weight.data = run.model[0].weight.data.clone()


def convert(run: Training) -> None:
    run.model.to(torch.float64).to(torch.float32)


def transpose(run: Training) -> None:
    weight = run.model[0].weight
    weight.data = weight.data.t().contiguous().t()


def assign(run: Training) -> None:
    run.model.load_state_dict(copy.deepcopy(run.model.state_dict()), assign=True)
    run.optimizer.param_groups[0]["params"] = list(run.model.parameters())


@pytest.mark.parametrize(
    "change", [freeze, unfreeze, add_group, replace_data, convert, transpose, assign]
)
@pytest.mark.parametrize("in_the_middle", [False, True])
def test_changed_parameters_are_noticed_and_the_window_discarded(
    change: Callable[[Training], None], in_the_middle: bool
) -> None:
    run = Training()
    run.model[0].bias.requires_grad_(False)
    run.step(10 + in_the_middle)
    readings, drops = len(run.angles), run.scheduler.num_drops
    change(run)
    message = "moved, replaced, added or frozen; the window is discarded"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        run.step(2 - in_the_middle)
    assert len([w for w in caught if message in str(w.message)]) == 1
    # Two windows of the new memory are complete, and the third one brings an angle.
    run.step(4 if in_the_middle else 2)
    assert all(angle is None for angle in run.angles[readings:])
    assert run.scheduler.num_drops == drops
    run.step(2)
    assert run.angles[-1] is not None
    expected = sum(p.requires_grad for g in run.optimizer.param_groups for p in g["params"])
    assert len(run.meter.state_dict()["arenas"]) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        change(run)
        run.step(4)


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
    """The plan keeps the old memory alive until it has noticed that the parameter left it."""
    run = Training()
    run.step(3)
    run.model[0].weight.data = torch.randn(8, 4)
    with pytest.warns(RuntimeWarning, match="window is discarded"):
        run.step(1)


def test_everything_frozen_later_is_not_an_error() -> None:
    run = Training()
    run.step(4)
    for p in run.model.parameters():
        p.requires_grad_(False)
    with pytest.warns(RuntimeWarning, match="window is discarded"):
        for _ in range(4):
            run.optimizer.step()
            run.scheduler.step()
    assert run.angles[-1] is None


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
    arenas = meter.state_dict()["arenas"]
    names = [f"param_groups[0]['params'][{i}]" for i in (0, 1, 3)]
    assert {name: roles["running"].numel() for name, roles in arenas.items()} == dict(
        zip(names, (16, 4, 4), strict=True)
    )


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
    with pytest.raises(TypeError, match="ghost: expected a parameter with data"):
        meter.observe()


# ---- half precision -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vanishing_half_precision_steps_warn_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, generator=generator).to(dtype)
    meter = AngularVelocity([x], 4)
    with pytest.warns(
        RuntimeWarning, match="4,000 of 4,000 half-precision .* master weights"
    ) as caught:
        for _ in range(24):
            x += (1e-6 * torch.randn(4000, generator=generator)).to(dtype)
            meter.observe()
    assert len([w for w in caught if "master weights" in str(w.message)]) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_steps_that_are_resolved_do_not_warn(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, generator=generator).to(dtype)
    meter = AngularVelocity([x], 4)
    for _ in range(24):
        x += (0.02 * torch.randn(4000, generator=generator)).to(dtype)
        reading = meter.observe()
    assert reading is not None and reading.angle is not None


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
    assert [d.angle for d in scheduler.history] == pytest.approx(expected, abs=0.02)


# ---- memory, copies -------------------------------------------------------------------------


def test_missing_memory_says_how_much_was_needed() -> None:
    """In a process of its own whose address space is limited for real."""
    script = textwrap.dedent(
        """
        import resource, torch
        from autodrop_ext import AngularVelocity
        x = torch.zeros(100_000_000)
        meter = AngularVelocity([x])
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
        meter.observe()
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert (
        "RuntimeError: no memory on cpu: 1,200,000,000 bytes were needed; the sums take 12 bytes"
        in done.stderr
    )
    assert "100,000,000 parameters" in done.stderr
    assert "sample=" in done.stderr


def test_no_memory_for_a_survey_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator refuses the copy of 500,000 elements, whatever else it may give."""
    meter = AngularVelocity([torch.zeros(500_000)], 1, sample=1 / 8)
    real = torch.Tensor.clone

    def clone(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == 500_000:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "clone", clone)
    expected = "no memory on cpu: 2,000,000 bytes were needed; a survey of the parameters copies"
    with pytest.raises(RuntimeError, match=expected):
        meter.observe()


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
    def gather_text(text: str) -> list[str]:
        raise RuntimeError("connection closed by peer")

    ranks = types.SimpleNamespace(rank=1, size=4, stage=0, num_stages=1, gather_text=gather_text)
    monkeypatch.setattr(autodrop_ext.meter, "find_group", lambda group, shards: ranks)
    with pytest.raises(RuntimeError, match=r"^AutoDrop on rank 1: its settings could not be"):
        Training().step()
