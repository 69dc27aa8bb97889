"""Sampled meters and schedulers across checkpoints, and faults of samples."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from autodrop_ext import AngularVelocity, AutoDrop
from autodrop_ext.angle import standard_error


def make(lr: float = 0.1, **options: Any) -> tuple[list[nn.Parameter], AutoDrop]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(64, 300, generator=generator)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": [p]} for p in params], lr=lr)
    return params, AutoDrop(optimizer, window=2, **options)


def train(params: list[nn.Parameter], scheduler: AutoDrop, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        scheduler.optimizer.step()
        scheduler.step()


def put_back(
    params: list[nn.Parameter], optimizer: torch.optim.Optimizer, saved: tuple[Any, Any]
) -> None:
    values, state = saved
    optimizer.load_state_dict(state)
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)


def kept(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    return [p.detach().clone() for p in params], optimizer.state_dict()


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.filterwarnings("ignore:AutoDrop. the saved sums cannot be continued")
@pytest.mark.filterwarnings("ignore:AutoDrop. the learning rates are")  # no optimizer is loaded
@pytest.mark.parametrize(
    "options",
    [{}, {"per_group": True}, {"sample": 1 / 16}, {"sample": None, "seed": 5}],
    ids=str,
)
def test_a_fresh_scheduler_loads_a_distributed_checkpoint(
    options: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    params, scheduler = make(**options)
    train(params, scheduler, range(31))
    dcp.save({"scheduler": scheduler}, checkpoint_id=str(tmp_path), no_dist=True)
    params, other = make(**options)
    dcp.load({"scheduler": other}, checkpoint_id=str(tmp_path), no_dist=True)
    assert [d.angle for d in other.history] == [d.angle for d in scheduler.history]
    assert other.group_drops == scheduler.group_drops
    train(params, other, range(31, 47))
    assert other.history[-1].angle is not None


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_arenas_go_on_whatever_the_seed_if_everything_is_read(tmp_path: pathlib.Path) -> None:
    params, scheduler = make(seed=5)
    train(params, scheduler, range(31))
    rest = kept(params, scheduler.optimizer)
    saved = {"scheduler": scheduler, "arenas": scheduler.arena_state}
    dcp.save(saved, checkpoint_id=str(tmp_path), no_dist=True)
    train(params, scheduler, range(31, 47))

    params, other = make(seed=6)
    dcp.load(
        {"scheduler": other, "arenas": other.arena_state}, checkpoint_id=str(tmp_path), no_dist=True
    )
    put_back(params, other.optimizer, rest)
    train(params, other, range(31, 47))  # a warning would be an error
    assert [d.angle for d in other.history] == [d.angle for d in scheduler.history]


@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_sums_of_other_chunks_are_refused(change: str) -> None:
    """What is drawn follows from names, shapes and types; equal sizes do not make it the same."""
    p = torch.randn(64, 20_000, generator=torch.Generator().manual_seed(0))
    meter = AngularVelocity([("p", p)], 2, sample=1 / 8)
    for _ in range(21):
        p += 1e-3 * torch.randn(p.shape)
        meter.observe()
    assert meter.state_dict()["sample"]["sized"]
    other = p.double() if change == "dtype" else p.T.contiguous().clone()
    resumed = AngularVelocity([("p", other)], 2, sample=1 / 8)
    resumed.load_state_dict(meter.state_dict())
    with pytest.warns(RuntimeWarning, match="the parameters have other shapes, types or parts"):
        resumed.observe()


def test_the_motion_is_loaded_from_any_device() -> None:
    class Elsewhere(torch.Tensor):
        """Like a tensor on a GPU, numpy cannot have it."""

        def numpy(self, *, force: bool = False) -> Any:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

        def cpu(self) -> torch.Tensor:  # type: ignore[override]
            return self.as_subclass(torch.Tensor)

    params, scheduler = make(sample=1 / 4)
    train(params, scheduler, range(30))
    state = scheduler.state_dict()
    sizes = state["meter"]["sample"]["sizes"]
    assert len(sizes) == 3
    for name, size in sizes.items():
        sizes[name] = size.as_subclass(Elsewhere)
    again, other = make(sample=1 / 4)
    other.load_state_dict(state)
    put_back(again, other.optimizer, kept(params, scheduler.optimizer))
    for pair in ((params, scheduler), (again, other)):
        train(*pair, range(30, 40))
    assert other.history[-1].angle == scheduler.history[-1].angle


def test_a_survey_that_is_over_is_not_repeated() -> None:
    """Also where the sample that it led to still gathers its first windows."""
    params, scheduler = make(sample=1 / 4)
    train(params, scheduler, range(5))  # the survey took the first window
    state = scheduler.meter.state_dict()
    assert state["sample"]["sized"] and not scheduler.history
    again, other = make(sample=1 / 4)
    other.load_state_dict(scheduler.state_dict())
    put_back(again, other.optimizer, kept(params, scheduler.optimizer))
    for pair in ((params, scheduler), (again, other)):
        train(*pair, range(5, 30))  # a warning would be an error
    assert other.history[-1].angle == scheduler.history[-1].angle is not None
    after = other.meter.state_dict()["sample"]
    assert after["drawn"] == state["sample"]["drawn"]
    assert all((after["sizes"][n] == m).all() for n, m in state["sample"]["sizes"].items())


def test_names_of_two_tensors_are_told_apart() -> None:
    a, b, tied = torch.randn(19_000), torch.randn(57_000), torch.randn(5)
    given = [("w", a), ("w", b), ("tied", tied), ("tied", tied)]
    meter = AngularVelocity(given, 1, sample=1 / 2, per_tensor=True)
    for _ in range(8):
        for x in (a, b, tied):
            x += torch.randn(x.shape)
        reading = meter.observe()
    assert reading is not None and reading.per_tensor is not None
    assert list(reading.per_tensor) == ["w", "w (2)", "tied"]
    assert len(meter.state_dict()["arenas"]) == 3


def test_a_sample_that_stands_still_does_not_blame_the_optimizer() -> None:
    p = torch.zeros(64 * 1024)
    meter = AngularVelocity([p], 1, sample=1 / 16)
    meter.observe()
    with pytest.warns(RuntimeWarning, match="no parameter of the sample moved"):
        for _ in range(9):
            meter.observe()


def test_error_terms_that_are_not_finite_are_no_certainty() -> None:
    assert math.isnan(standard_error(0.5, 1.0, 1.0, [math.nan] * 6))
    assert math.isnan(standard_error(0.5, 1.0, 1.0, [math.inf, -math.inf, 0, 0, 0, 0]))


def test_a_survey_of_training_that_diverges_still_draws_a_sample() -> None:
    p = torch.zeros(200 * 1024)
    meter = AngularVelocity([p], 1, sample=1 / 8)
    for _ in range(3):
        p += 1e18
        meter.observe()
    assert meter.state_dict()["sample"]["sized"]
    assert meter.device_bytes == 12 * 25 * 1024
