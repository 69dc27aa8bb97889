"""Sampled meters across checkpoints, changed parameters and other samples."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from autodrop_ext.sampling.auto import FRACTIONS, AutoFraction, foreseen
from torch import nn

from autodrop_ext import AngularVelocity, AutoDrop
from autodrop_ext.sampling.draw import Sample, choose
from autodrop_ext.sampling.error import standard_error
from autodrop_ext.schedulers.saturation import SaturationDetector


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
@pytest.mark.filterwarnings("ignore:AngularVelocity. the saved sums cannot be continued")
@pytest.mark.parametrize(
    "options",
    [{}, {"per_group": True}, {"sample": 1 / 16}, {"sample": "auto"}, {"sample": None, "seed": 5}],
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
@pytest.mark.parametrize("sample", [None, "auto"])
def test_arenas_go_on_whatever_the_seed_if_everything_is_read(
    sample: Any, tmp_path: pathlib.Path
) -> None:
    params, scheduler = make(sample=sample, seed=5)
    train(params, scheduler, range(31))
    rest = kept(params, scheduler.optimizer)
    saved = {"scheduler": scheduler, "arenas": scheduler.arena_state}
    dcp.save(saved, checkpoint_id=str(tmp_path), no_dist=True)
    train(params, scheduler, range(31, 47))

    params, other = make(sample=sample, seed=6)
    dcp.load(
        {"scheduler": other, "arenas": other.arena_state}, checkpoint_id=str(tmp_path), no_dist=True
    )
    put_back(params, other.optimizer, rest)
    train(params, other, range(31, 47))  # a warning would be an error
    assert [d.angle for d in other.history] == [d.angle for d in scheduler.history]


@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_sums_of_other_chunks_are_refused(change: str) -> None:
    """The choice follows from names, shapes and types; equal sizes do not make it the same."""
    p = torch.randn(64, 20_000, generator=torch.Generator().manual_seed(0))
    meter = AngularVelocity([("p", p)], 2, sample=1 / 8)
    for _ in range(21):
        p += 1e-3 * torch.randn(p.shape)
        meter.observe()
    other = p.double() if change == "dtype" else p.T.contiguous().clone()
    resumed = AngularVelocity([("p", other)], 2, sample=1 / 8)
    resumed.load_state_dict(meter.state_dict())
    with pytest.warns(RuntimeWarning, match="the parameters have other shapes, types or parts"):
        resumed.observe()


def test_sizes_are_loaded_from_any_device() -> None:
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
    meter = scheduler.meter
    assert meter._sizes is not None and meter._next is not None
    again, other = make(sample=1 / 4)
    other.load_state_dict(scheduler.state_dict())
    put_back(again, other.optimizer, kept(params, scheduler.optimizer))
    train(again, other, range(5, 30))  # a warning would be an error
    assert other._meter.choices == 1
    assert other._meter._survey is None and other.history[-1].angle is not None


def test_another_threshold_brings_another_tolerance() -> None:
    _, scheduler = make(sample="auto", threshold=0.5)
    _, other = make(sample="auto", threshold=20.0)
    assert other._meter.tolerance == 2.0
    with pytest.warns(RuntimeWarning, match="threshold=0.5"):
        other.load_state_dict(scheduler.state_dict())
    assert other._meter.tolerance == 0.05


def test_other_parameters_are_chosen_for_anew() -> None:
    """Of a small head everything is read; of the body that is thawed later, a part."""
    head, body = nn.Parameter(torch.zeros(1000)), nn.Parameter(torch.zeros(3_000_000))
    body.requires_grad_(False)
    meter = AngularVelocity([head, body], 1, sample="auto", tolerance=1.0)
    with torch.no_grad():
        for _ in range(4):
            head.add_(torch.randn(1000))
            meter.observe()
        assert meter.fraction == 1
        body.requires_grad_()
        with pytest.warns(RuntimeWarning, match="added or frozen"):
            meter.observe()
        assert meter.fraction is not None and meter.fraction <= 1 / 64


def test_a_state_from_before_the_choice_goes_on() -> None:
    params, scheduler = make(sample="auto", threshold=30.0)
    train(params, scheduler, range(5))
    state = scheduler.state_dict()
    assert state["meter"]["sample"]["chosen"] is None
    train(params, scheduler, range(5, 40))
    assert scheduler.meter._auto is not None and scheduler.meter._auto.chosen is not None
    scheduler.load_state_dict(state)
    assert scheduler.meter._auto.chosen is None
    train(params, scheduler, range(5, 40))  # a warning would be an error


def test_a_fall_at_a_new_sample_is_no_saturation() -> None:
    detector = SaturationDetector(-3.0, 10, 3, "value")
    for _ in range(6):
        assert not detector.update(90.0).saturated
    detector.leave(37.0, 5.0)
    assert [detector.update(37.0).saturated for _ in range(4)] == [False] * 4
    # Within the margins, or above, nothing is forgotten.
    detector.leave(33.0, 5.0)
    detector.leave(60.0, 1.0)
    assert detector.update(37.0).smoothed is not None
    detector.leave(37.0, math.nan)  # nothing is known: rather start over
    assert detector.update(20.0).smoothed is None


def test_a_switch_of_the_sample_lowers_no_rate() -> None:
    """Most of the motion lies in a few chunks, which the first sample misses."""
    n = 4 << 20
    p = nn.Parameter(torch.zeros(n))
    # Only a real fall of the smoothed angle by 3 degrees drops.
    scheduler = AutoDrop(
        torch.optim.SGD([p], lr=1.0),
        window=1,
        threshold=-3.0,
        min_samples=2,
        sample=1 / 512,
        seed=1,
    )
    generator = torch.Generator().manual_seed(1)
    p.grad = torch.zeros(n)
    for _ in range(16):
        p.grad.uniform_(-3e-3, 3e-3, generator=generator)
        p.grad[3_000_320:3_010_000] = 1 + 0.5 * torch.randn(9680, generator=generator)
        scheduler.optimizer.step()
        scheduler.step()
    angles = [d.angle for d in scheduler.history if d.angle is not None]
    assert max(angles) - min(angles) > 20  # the samples differ as they should here
    assert scheduler.meter.choices == 1
    assert scheduler.num_drops == 0


def test_a_smaller_part_is_not_foreseen_to_be_as_good() -> None:
    """After the survey strata have two chunks each; a smaller part would have wider ones."""
    generator = torch.Generator().manual_seed(0)
    sizes = [torch.rand(4096, generator=generator).double().numpy()]
    choice = choose([4096 * 1024], ["p"], Sample(1 / 64), sizes)
    scattered = torch.ones(len(choice.taken), 6).double().numpy()
    table = foreseen(scattered, choice, 1 / 64, torch.ones(len(choice.taken)).double().numpy())
    variance = dict(zip(FRACTIONS, table[:, 0], strict=True))
    assert variance[1 / 128] == pytest.approx(2 * variance[1 / 64], rel=0.1)  # less population
    auto = AutoFraction(tolerance=0.05)
    assert auto.start(12e6) == 1 / 64
    # Precise enough at every fraction; less than it began with is not taken.
    moments = [[1e-12] * 6 for _ in FRACTIONS]
    for _ in range(3):
        chosen = auto.take((0.5, 1.0, 1.0), moments)
    assert chosen == 1 / 64


def test_without_memory_for_more_it_goes_on_with_what_it_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params, scheduler = make(sample=1 / 4)
    meter = scheduler.meter
    read = AngularVelocity._read

    def full(self: AngularVelocity, shards: Any) -> Any:
        if self._reader is not None:
            raise RuntimeError("no memory for the arenas: 7 bytes were needed on cpu")
        return read(self, shards)

    monkeypatch.setattr(AngularVelocity, "_read", full)
    with pytest.warns(RuntimeWarning, match="no memory .* goes on with the part that it reads"):
        train(params, scheduler, range(30))
    assert meter.choices == 0 and meter.fraction == 1 / 4
    assert scheduler.history[-1].angle is not None


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


def test_rebasing_leaves_the_survey_alone() -> None:
    sizes = []
    for rebase in (False, True):
        p = torch.zeros(3 << 20)
        meter = AngularVelocity([p], 4, sample=1 / 64, form="delta")
        for step in range(40):
            p += 1e-3
            meter.observe()
            if rebase and step % 4 == 3:
                meter.rebase()
        assert meter._sizes is not None
        sizes.append(next(iter(meter._sizes.values())))
    assert (sizes[0] == sizes[1]).all()


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
    assert meter._next is not None
    choice = meter._next.arenas[0].plan.choice
    assert choice is not None and choice.taken.sum() == 25
