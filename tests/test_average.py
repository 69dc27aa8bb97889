"""Averages of parameters: formula, swap in and out, interrupts, memory, state."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import math
import pathlib
import pickle
import weakref
from typing import Any

import pytest
import torch
from interrupter import Interrupter
from torch import Tensor, nn

from autodrop_ext import average as module
from autodrop_ext.average import ParameterAverage

KAPPA = 8.0
SPACINGS = (1, 1, 1, 2, 4, 4, 1, 7)  # optimizer steps between updates


class Model:
    """Named parameters of every dtype and memory layout; copies of it have their own."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        complex_ = torch.randn(4, 3, generator=g, dtype=torch.complex64)
        tensors = {
            "float32": torch.randn(5, 7, generator=g),
            "channels_last": torch.randn(4, 6, 5, 3, generator=g).to(
                memory_format=torch.channels_last
            ),
            "every second": torch.randn(20, 20, generator=g)[:, ::2],
            "transposed": torch.randn(9, 4, generator=g).t(),
            "bfloat16": torch.randn(9, generator=g).bfloat16(),
            "float16": torch.randn(3, 3, generator=g).half(),
            "bfloat16 strided": torch.randn(6, 6, generator=g).bfloat16()[::2, ::3],
            "float64": torch.randn(9, generator=g).double(),
            "complex64": complex_,
            "complex128": complex_.to(torch.complex128),
            "scalar": torch.randn((), generator=g),
            "scalar bfloat16": torch.randn((), generator=g).bfloat16(),
            "empty": torch.empty(0, 3),
        }
        self.parameters = {name: nn.Parameter(t) for name, t in tensors.items()}
        assert not self.parameters["every second"].is_contiguous()

    def named(self) -> list[tuple[str, Tensor]]:
        """Those that are trained, as an optimizer's."""
        return [(name, p) for name, p in self.parameters.items() if p.requires_grad]

    def train(self, step: int) -> None:
        g = torch.Generator().manual_seed(100 + step)
        with torch.no_grad():
            for p in self.parameters.values():
                p += 0.1 * torch.randn(p.shape, generator=g).to(p.dtype)

    def values(self) -> dict[str, Tensor]:
        return {name: exact(p) for name, p in self.parameters.items()}

    def bits(self) -> list[bytes]:
        return [bits(p) for p in self.parameters.values()]


def exact(t: Tensor) -> Tensor:
    return t.detach().to(torch.complex128 if t.is_complex() else torch.float64, copy=True)


def bits(t: Tensor) -> bytes:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def averaged(model: Model, spacings: tuple[int, ...] = SPACINGS) -> ParameterAverage:
    average = ParameterAverage(model.named, KAPPA)
    for step, d in enumerate(spacings):
        model.train(step)
        assert average.update(d) is None
    return average


def assert_close(average: ParameterAverage, expected: dict[str, Tensor]) -> None:
    for name, a in average.state_dict()["tensors"].items():
        # Three roundings at each of eight updates, of values below 4; the average is kept in
        # float32 also for half-precision parameters, whose own values are exact in it.
        tolerance = 8 * 3 * 4 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(exact(a), expected[name], rtol=0, atol=tolerance)


# ---- formula --------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1 << 18, 8])
def test_updates_follow_the_recursion_in_float64(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_ON_CPU", piece)  # 8: half-precision tensors are cut
    model = Model()
    average = ParameterAverage(model.named)
    a: dict[str, Tensor] = {}
    t = 0
    for step, d in enumerate(SPACINGS):
        model.train(step)
        assert average.update(d) is None
        t += d
        c = 1 - ((t - d) / t) ** KAPPA
        x = model.values()
        a = {name: a[name] + c * (x[name] - a[name]) if a else x[name] for name in x}
    assert (average.steps, average.updates) == (sum(SPACINGS), len(SPACINGS))
    assert_close(average, a)
    for name, average_tensor in average.state_dict()["tensors"].items():
        dtype = model.parameters[name].dtype
        kept = dtype in (torch.float64, torch.complex64, torch.complex128)
        assert average_tensor.dtype == (dtype if kept else torch.float32)
        assert not average_tensor.requires_grad


def test_updates_have_the_explicit_weights() -> None:
    """The snapshot of step ``s`` weighs ``(s^kappa - (s - d)^kappa) / t^kappa``."""
    model = Model()
    average = ParameterAverage(model.named)
    t = sum(SPACINGS)
    total = {name: torch.zeros_like(x) for name, x in model.values().items()}
    s = 0
    for step, d in enumerate(SPACINGS):
        model.train(step)
        average.update(d)
        weight = ((s + d) ** KAPPA - s**KAPPA) / t**KAPPA
        total = {name: total[name] + weight * x for name, x in model.values().items()}
        s += d
    assert_close(average, total)


def test_shares_give_the_weights_of_algorithm_1() -> None:
    """Weights 1, 2, ..., n of 2021, Algorithm 1, written to the parameters at the end."""
    model = Model()
    average = ParameterAverage(model.named)
    total = {name: torch.zeros_like(x) for name, x in model.values().items()}
    for k in range(1, 6):
        model.train(k)
        average.add(k / (k * (k + 1) / 2))
        total = {name: total[name] + k / 15 * x for name, x in model.values().items()}
    assert_close(average, total)
    versions = {name: p._version for name, p in model.named()}
    assert average.write_back()
    for name, x in model.values().items():
        # Half a unit in the last place of the parameter's dtype comes on top, for values below 4.
        tolerance = (2 + 8 * 3 * 4) * torch.finfo(model.parameters[name].dtype).eps
        torch.testing.assert_close(x, total[name], rtol=0, atol=tolerance)
    assert all(p._version > versions[name] for name, p in model.named())
    assert average.updates == 0 and held_bytes(average) == 0
    assert not average.write_back()


def test_constant_parameters_stay_constant_to_the_bit() -> None:
    model = Model()
    before = model.bits()
    average = ParameterAverage(model.named)
    for d in SPACINGS:
        average.update(d)
    assert average.write_back()
    assert model.bits() == before


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["float32", "bfloat16", "float16", "float64", "complex64", "every second", "scalar"]
)
def test_parameters_that_are_not_finite_are_left_out(name: str, bad: float) -> None:
    model = Model()
    average = averaged(model)
    before = {n: a.clone() for n, a in average.state_dict()["tensors"].items()}
    good = model.parameters[name].detach().clone()
    with torch.no_grad():
        model.parameters[name].view(-1)[-1:] = bad if name != "every second" else 0
        if name == "every second":
            model.parameters[name][0, -1] = bad
    assert average.update(3) == f"{name} is not finite; the average leaves these parameters out"
    assert (average.steps, average.updates) == (sum(SPACINGS), len(SPACINGS))
    assert all(torch.equal(a, before[n]) for n, a in average.state_dict()["tensors"].items())
    with torch.no_grad():
        model.parameters[name].copy_(good)
    assert average.update(2) is None
    assert average.steps == sum(SPACINGS) + 2


def test_parameters_that_are_not_finite_do_not_begin_an_average() -> None:
    x = torch.tensor([1.0, math.nan])
    average = ParameterAverage(lambda: [("x", x)])
    assert average.update() is not None
    with average.swapped() as swapped:
        assert not swapped
    x[1] = 2.0
    assert average.update() is None
    with average.swapped() as swapped:
        assert swapped and x.tolist() == [1.0, 2.0]


def held_bytes(average: ParameterAverage) -> int:
    """Bytes of all tensors that the object refers to, parameters excepted."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()

    def visit(thing: Any) -> None:
        if isinstance(thing, nn.Parameter) or id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found[id(thing)] = thing
        elif isinstance(thing, dict | list | tuple):
            for item in thing.values() if isinstance(thing, dict) else thing:
                visit(item)

    visit(vars(average))
    return sum(t.untyped_storage().nbytes() for t in found.values())


def test_memory_is_4_bytes_a_parameter() -> None:
    p = {
        "float32": nn.Parameter(torch.randn(1000, 30)),
        "bfloat16": nn.Parameter(torch.randn(1000, 50).bfloat16()),
    }
    average = ParameterAverage(lambda: list(p.items()))
    assert held_bytes(average) == 0
    for _ in range(3):
        average.update()
        assert held_bytes(average) == 4 * 80_000
    with average.swapped():
        assert held_bytes(average) == 4 * 80_000 + 4 * 30_000 + 2 * 50_000
    assert held_bytes(average) == 4 * 80_000
    average.reset()
    assert held_bytes(average) == 0


def test_half_precision_is_converted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """No single temporary is larger than a piece, whatever the shapes and strides."""
    piece = 1 << 10
    monkeypatch.setattr(module, "PIECE_ON_CPU", piece)
    largest = 0
    empty_like = torch.empty_like

    def watched(t: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, t.numel())
        return empty_like(t)

    p = [torch.randn(s).bfloat16() for s in ((3, 5000), (5000, 3), (70, 80), (5,), (9000,))]
    p.append(torch.randn(8, 8, 9, 9).bfloat16().to(memory_format=torch.channels_last))
    average = ParameterAverage(lambda: [(str(i), t) for i, t in enumerate(p)])
    average.update()
    monkeypatch.setattr(torch, "empty_like", watched)
    average.update()
    assert 0 < largest <= piece


# ---- swap -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("mode", ["grad", "inference", "frozen", "moved"])
def test_every_bit_comes_back(mode: str, ending: type[BaseException] | None) -> None:
    model = Model()
    average = averaged(model)
    p = model.parameters["float32"]
    with torch.no_grad():
        p[0, 0] = math.nan
        p.view(torch.int32)[0, 1] = 0x7FC0BEEF  # a NaN with a payload
        p[0, 2] = -0.0
    before = model.bits()
    tensors = average.state_dict()["tensors"]
    expected = contextlib.nullcontext() if ending is None else pytest.raises(ending)
    inference = torch.inference_mode() if mode == "inference" else contextlib.nullcontext()
    versions = {name: p._version for name, p in model.named()}
    if mode == "frozen":
        for _, q in model.named():
            q.requires_grad_(False)
        assert not model.named()
    with expected, inference, average.swapped() as swapped:
        assert swapped
        for name, q in model.parameters.items():
            assert torch.equal(q, tensors[name].to(q.dtype)), name
        if mode == "moved":
            for q in model.parameters.values():
                q.data = q.data.clone() + 1
        if ending is not None:
            raise ending
    assert model.bits() == before
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    if mode != "moved":  # assigning .data replaces the counter too
        assert all(q._version >= versions[n] + 2 for n, q in model.parameters.items())


def test_a_graph_from_before_the_block_is_not_used_with_other_values() -> None:
    x = nn.Parameter(torch.ones(3))
    average = ParameterAverage(lambda: [("x", x)])
    average.update()
    loss = (x * x).sum()
    with average.swapped(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors_are_swapped() -> None:
    with torch.inference_mode():
        x = torch.ones(3)
    average = ParameterAverage(lambda: [("x", x)])
    average.update()
    with torch.inference_mode():
        x += 2
        average.update()  # the average itself is a normal tensor
    average.update()
    with average.swapped() as swapped:
        assert swapped and x[0] < 3
    assert x.tolist() == [3.0] * 3


def test_a_block_within_a_block_ends_both() -> None:
    model = Model()
    average = averaged(model)
    before = model.bits()
    with average.swapped():
        inside = model.bits()
        with average.swapped() as swapped:
            assert swapped
            assert model.bits() == inside != before
        assert model.bits() == before
    assert model.bits() == before


ENDINGS = {
    "update": lambda average: average.update(),
    "add": lambda average: average.add(0.5),
    "state_dict": lambda average: average.state_dict(),
    "load_state_dict": lambda average: average.load_state_dict(average.state_dict()),
    "restore": lambda average: average.restore(),
}


@pytest.mark.parametrize("call", ENDINGS)
def test_any_other_call_ends_the_block(call: str) -> None:
    """Parameters of a training step are averaged, and never their average."""
    model = Model()
    average = averaged(model)
    before = model.bits()
    with average.swapped():
        assert model.bits() != before
        said = ENDINGS[call](average)
        assert model.bits() == before
    assert model.bits() == before
    assert call not in ("update", "add") or said == module.HELD
    assert average.update() is None


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("inside", [True, False])
def test_copies_are_usable(way: str, inside: bool) -> None:
    model = Model()
    average = averaged(model)
    before = model.bits()
    with average.swapped() if inside else contextlib.nullcontext():
        if way == "deepcopy":
            other, other_model = copy.deepcopy((average, model))
        else:
            other, other_model = pickle.loads(pickle.dumps((average, model)))
    assert other_model.named()[0][1] is not model.named()[0][1]
    other.restore()
    assert other_model.bits() == model.bits() == before
    for m, a in ((model, average), (other_model, other)):
        m.train(99)
        assert a.update() is None
    ours, others = average.state_dict(), other.state_dict()
    assert ours["steps"] == others["steps"]
    assert all(torch.equal(ours["tensors"][n], a) for n, a in others["tensors"].items())
    with other.swapped() as swapped:
        assert swapped and other_model.bits() != model.bits()


def test_a_copy_made_within_a_block_takes_its_own_bits_by_itself() -> None:
    model = Model()
    average = averaged(model)
    before = model.bits()
    with average.swapped():
        other, other_model = copy.deepcopy((average, model))
    assert other.update() == module.HELD
    assert other_model.bits() == before


def test_batch_normalisation_is_measured_again_in_the_block() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    average = ParameterAverage(lambda: list(network.named_parameters()))
    data = [torch.randn(32, 4) for _ in range(4)]
    for _ in range(5):
        average.update()
        with torch.no_grad():
            network[0].weight += 1.0
    statistics = copy.deepcopy(network[1].state_dict())
    with average.swapped():
        torch.optim.swa_utils.update_bn(data, network)
        with torch.no_grad():
            expected = torch.cat([network[0](x) for x in data]).mean(0)
        # update_bn adds four means of batches, in float32.
        torch.testing.assert_close(network[1].running_mean, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(network[1].running_mean, statistics["running_mean"])


# ---- interrupts -----------------------------------------------------------------------------


FILES = (str(pathlib.Path(module.__file__)), contextlib.__file__)


class Few:
    """Four parameters, so that trying every instruction takes seconds."""

    def __init__(self, updates: int = 3) -> None:
        dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float32)
        self.parameters = [
            nn.Parameter(torch.full((3,), 1.0 + i).to(t)) for i, t in enumerate(dtypes)
        ]
        self.average = ParameterAverage(self.named)
        for step in range(3):
            if step < updates:
                self.average.update()
            self.train()

    def named(self) -> list[tuple[str, Tensor]]:
        return [(str(i), p) for i, p in enumerate(self.parameters)]

    def train(self) -> None:
        with torch.no_grad():
            for p in self.parameters:
                p += 1

    def bits(self) -> list[bytes]:
        return [bits(p) for p in self.parameters]


def interrupted(
    call: Any, at: int | None, updates: int = 3
) -> tuple[Few, Interrupter, list[bytes]]:
    few = Few(updates)
    before = few.bits()
    with Interrupter(at, lambda code: code.co_filename in FILES) as interrupter:
        try:  # noqa: SIM105 (contextlib.suppress would be interrupted, too)
            call(few)
        except KeyboardInterrupt:
            pass
    assert at is None or interrupter.where, "the interrupt did not happen"
    return few, interrupter, before


def evaluated(few: Few) -> None:
    with few.average.swapped():
        pass


NEXT = {
    "update": lambda few: few.average.update(),
    "swapped": evaluated,
    "restore": lambda few: few.average.restore(),
    "state_dict": lambda few: few.average.state_dict(),
}


@pytest.mark.parametrize("following", NEXT)
def test_an_interrupt_anywhere_in_a_block_loses_no_bit(following: str) -> None:
    total = interrupted(evaluated, None)[1].places
    assert total > 200
    late = []
    for at in range(total):
        few, interrupter, before = interrupted(evaluated, at)
        if few.bits() != before:
            late.append(interrupter.where)
        NEXT[following](few)
        assert few.bits() == before, interrupter.where
        assert few.average.update() is None
        with few.average.swapped() as swapped:
            assert swapped and few.bits() != before
        assert few.bits() == before
    # At all other places the block itself has given the bits back.
    assert late == []


def test_an_interrupted_write_back_is_whole_or_not_at_all() -> None:
    def call(few: Few) -> None:
        few.average.write_back()

    done, counter, before = interrupted(call, None)
    after = done.bits()
    assert after != before
    seen = set()
    for at in range(counter.places):
        few, interrupter, _ = interrupted(call, at)
        assert few.bits() in (before, after), interrupter.where
        seen.add(few.bits() == after)
        few.average.update()
    assert seen == {True, False}


@pytest.mark.parametrize("first", [True, False])
def test_an_interrupted_update_leaves_an_average_of_snapshots(first: bool) -> None:
    def call(few: Few) -> None:
        few.average.update()

    updates = 0 if first else 3
    for at in range(interrupted(call, None, updates)[1].places):
        few, interrupter, before = interrupted(call, at, updates)
        assert few.bits() == before, interrupter.where
        few.average.update()
        for i, (_, a) in enumerate(few.average.state_dict()["tensors"].items()):
            # Snapshots were 1 + i, 2 + i and 3 + i; the parameters are 4 + i.
            assert bool(((a >= 1 + i) & (a <= 4 + i)).all()), interrupter.where
            assert not first or bool((a == 4 + i).all()), interrupter.where


# ---- parameters that change -----------------------------------------------------------------


def test_other_parameters_start_the_average_over() -> None:
    p = {"x": torch.ones(3), "y": torch.ones(2)}
    average = ParameterAverage(lambda: list(p.items()))
    for changed, expected in (
        ({"x": torch.ones(4)}, "x was (3,), now it is (4,)"),
        ({"x": torch.ones(4).double()}, "x was averaged in torch.float32, now it is torch.float64"),
        ({"z": torch.ones(1)}, "z has no average"),
    ):
        average.update(5)
        p.update(changed)
        with average.swapped() as swapped:
            assert not swapped
        reason = average.update(7)
        assert reason == f"{expected}; the average starts over"
        assert (average.steps, average.updates) == (7, 1)
    del p["y"]
    assert average.update() == "y is no longer among the parameters; the average starts over"


def test_replaced_memory_and_another_dtype_of_the_same_average_go_on() -> None:
    x = nn.Parameter(torch.ones(4))
    average = ParameterAverage(lambda: [("x", x)])
    average.update(2)
    x.data = torch.full((4,), 3.0).bfloat16()
    assert average.update(2) is None
    # 1 + (1 - 2^-8) (3 - 1), exact in float32.
    assert average.state_dict()["tensors"]["x"].tolist() == [1 + (1 - 2.0**-8) * 2] * 4


def test_wrong_arguments_say_what_was_expected() -> None:
    with pytest.raises(TypeError, match="named: expected a function, got"):
        ParameterAverage([("x", torch.ones(1))])  # type: ignore[arg-type]
    for kappa in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="kappa: expected a finite number above 0"):
            ParameterAverage(list, kappa)
    average = ParameterAverage(lambda: [("x", torch.ones(1))])
    with pytest.raises(ValueError, match="steps: expected"):
        average.update(0)
    for share in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="share: expected a number above 0 and at most 1"):
            average.add(share)
    with pytest.raises(ValueError, match=r"named: expected different names, got \['x', 'x'\]"):
        ParameterAverage(lambda: [("x", torch.ones(1)), ("x", torch.ones(1))]).update()


# ---- state ----------------------------------------------------------------------------------


def test_a_loaded_average_goes_on_with_the_same_bits() -> None:
    model = Model()
    average = averaged(model)
    state = average.state_dict()
    assert set(state) == {"steps", "updates", "tensors"}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other_model = copy.deepcopy(model)
    other = ParameterAverage(other_model.named)
    assert other.load_state_dict(torch.load(buffer, weights_only=True)) is None
    for step in range(3):
        for m, a in ((model, average), (other_model, other)):
            m.train(step)
            assert a.update(2) is None
    again = other.state_dict()
    assert (again["steps"], again["updates"]) == (average.steps, average.updates)
    for name, a in average.state_dict()["tensors"].items():
        assert bits(a) == bits(again["tensors"][name])
        assert a.stride() == again["tensors"][name].stride()


def test_the_state_is_live_and_loads_in_place() -> None:
    """As torch.distributed.checkpoint does it: into the tensors of a fresh object's state."""
    model = Model()
    saved = averaged(model).state_dict()
    other = ParameterAverage(model.named)
    state = other.state_dict()
    assert (state["steps"], state["updates"]) == (0, 0)
    for name, t in saved["tensors"].items():
        state["tensors"][name].copy_(t)
    assert other.load_state_dict({**saved, "tensors": state["tensors"]}) is None
    again = other.state_dict()["tensors"]
    assert all(again[name] is t for name, t in state["tensors"].items())
    assert all(torch.equal(again[name], t) for name, t in saved["tensors"].items())
    assert held_bytes(other) == sum(t.nbytes for t in again.values())


def test_a_state_before_the_first_update_starts_over() -> None:
    model = Model()
    average = averaged(model)
    assert average.load_state_dict(ParameterAverage(model.named).state_dict()) is None
    assert (average.steps, average.updates) == (0, 0)


def test_a_saved_average_of_other_parameters_is_not_continued() -> None:
    state = {"steps": 3, "updates": 2, "tensors": {"x": torch.ones(3)}}
    for tensors, reason in (
        ({"y": torch.ones(3)}, "y has no average"),
        ({"x": torch.ones(4)}, "x was (3,), now it is (4,)"),
        ({"x": torch.ones(3).double()}, "x was averaged in torch.float32, now it is torch.float64"),
        ({}, "x is no longer among the parameters"),
    ):
        average = ParameterAverage(lambda tensors=tensors: list(tensors.items()))
        average.update()
        assert average.load_state_dict(state) == f"{reason}; the average starts over"
        assert (average.steps, average.updates) == (0, 0)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (3, "state_dict: expected a dict, got int"),
        ({}, "state_dict: no entry 'steps'"),
        ({"steps": -1}, r"state_dict\['steps'\]: expected"),
        ({"steps": 1, "updates": 1.5}, r"state_dict\['updates'\]: expected"),
        ({"steps": 1, "updates": 1}, "state_dict: no entry 'tensors'"),
        ({"steps": 1, "updates": 1, "tensors": []}, r"state_dict\['tensors'\]: expected a dict"),
        *(
            (
                {"steps": 1, "updates": 1, "tensors": {"x": value}},
                r"state_dict\['tensors'\]\['x'\]: expected " + expected,
            )
            for value, expected in (
                ([1.0], "a dense tensor of float32, float64 or a complex type, got"),
                (torch.ones(3).half(), "a dense tensor of float32"),
                (torch.ones(3, dtype=torch.int64), "a dense tensor of float32"),
                (torch.ones(3, device="meta"), "a dense tensor of float32"),
                (torch.ones(3).to_sparse(), "a dense tensor of float32"),
                (torch.tensor([1.0, math.nan, 1.0]), "finite values"),
            )
        ),
    ],
)
def test_a_wrong_state_changes_nothing(broken: Any, message: str) -> None:
    x = torch.arange(3.0)
    average = ParameterAverage(lambda: [("x", x)])
    average.update(4)
    before = average.state_dict()
    values = before["tensors"]["x"].clone()
    with pytest.raises(ValueError, match=message):
        average.load_state_dict(broken)
    after = average.state_dict()
    assert (after["steps"], after["updates"]) == (4, 1)
    assert after["tensors"]["x"] is before["tensors"]["x"]
    assert torch.equal(after["tensors"]["x"], values)


def test_nothing_outlives_an_average() -> None:
    """No cycle keeps the average's memory until the garbage collector comes."""
    model = Model()
    average = averaged(model)
    with average.swapped():
        pass
    alive = weakref.ref(average.state_dict()["tensors"]["float32"])
    gc.disable()
    try:
        del average
        assert alive() is None
    finally:
        gc.enable()
