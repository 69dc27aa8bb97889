"""Random parameters that move in random ways: exact angles are true, others within their error."""

from __future__ import annotations

import io
import random
import warnings
from typing import Any

import pytest
import torch
from oracle import Witness, count, is_right
from torch import Tensor, nn

from autodrop_ext import AngularVelocity

DTYPES = (
    torch.float32,
    torch.float32,
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)
MOTIONS = ("straight", "back and forth", "turning", "walk", "drift", "decay")


class Case:
    """One seeded case: tensors, a motion and what happens to them on the way."""

    def __init__(
        self,
        seed: int,
        magnitude: float | None = None,
        dtype: Any = None,
        *,
        hashed: bool = False,
    ) -> None:
        self.choose = choose = random.Random(f"fuzz {seed}")
        if hashed and dtype is None:
            # The law is about many elements that move. Half-precision ones move one at a time.
            dtype, magnitude = choose.choice([torch.float32, torch.float64]), 1.0
        self.noise = torch.Generator().manual_seed(seed)
        self.magnitude = choose.choice([1.0, 1.0, 1e-3, 1e3]) if magnitude is None else magnitude
        self.dtype = dtype
        self.motion = choose.choice(MOTIONS)
        self.scale = 10.0 ** -choose.randint(1, 6)
        self.window = choose.choice([1, 2, 3, 4, 5, 7, 8] if hashed else [1, 2, 3, 5, 8, 13, 20])
        self.settings: dict[str, Any] = {
            "window": self.window,
            "backend": choose.choice(["cpu", "cpu", "cpu", "reference"]),
            "buckets": choose.choice([2**18, 2**18, 4096 * 7, None]),
            "per_tensor": choose.random() < 0.2,
        }
        self.tensors = [self.tensor() for _ in range(choose.randint(1, 5))]
        if hashed:
            self.settings |= {"buckets": 4096, "per_tensor": False}
            large = self.noise_of([choose.randint(5000, 12_000)]) * self.magnitude
            self.tensors.append(nn.Parameter(large.to(self.dtype)))
        if not any(t.numel() for t in self.tensors):
            self.tensors.append(self.tensor(least=2))
        self.exact = [self.to_double(t) for t in self.tensors]
        self.ahead = [self.normal(t) for t in self.tensors]
        self.aside = [self.normal(t) for t in self.tensors]
        self.tied = choose.random() < 0.2
        self.t = 0
        self.errors: list[float] = []  # of hashed angles, in standard errors

    def tensor(self, least: int = 0) -> nn.Parameter:
        choose = self.choose
        if choose.random() < 0.2:
            shape = [choose.randint(1000, 2500)]
        else:
            shape = [choose.randint(max(least, 1), 7) for _ in range(choose.randint(1, 4))]
            if not least and choose.random() < 0.1:
                shape = choose.choice([[], [0], [3, 0]])
        dtype = self.dtype or choose.choice(DTYPES)
        layout = choose.choice(["plain", "plain", "permuted", "strided", "offset", "channels"])
        full = list(shape)
        if layout == "strided" and full:
            full[-1] *= 2
        if layout == "offset" and full:
            full[0] += 1
        values = self.noise_of(full) * self.magnitude
        if self.dtype is None and dtype == torch.float16:
            values /= self.magnitude  # its range is small
        x = values.to(dtype)
        if layout == "strided" and full:
            x = x[..., ::2]
        if layout == "offset" and full:
            x = x[1:]
        if layout == "permuted":
            x = x.permute(choose.sample(range(x.dim()), x.dim()))
        if layout == "channels" and x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        return nn.Parameter(x)

    def noise_of(self, shape: list[int]) -> Tensor:
        return torch.randn(shape, generator=self.noise, dtype=torch.float64)

    def to_double(self, t: Tensor) -> Tensor:
        return t.detach().to(torch.complex128 if t.is_complex() else torch.float64).clone()

    def normal(self, t: Tensor) -> Tensor:
        wide = torch.complex128 if t.is_complex() else torch.float64
        return torch.randn(t.shape, generator=self.noise, dtype=wide)

    @torch.no_grad()
    def move(self) -> None:
        self.t += 1
        for i, tensor in enumerate(self.tensors):
            unit = self.scale * (1.0 if tensor.dtype == torch.float16 else self.magnitude)
            ahead, aside = self.ahead[i], self.aside[i]
            if self.motion == "straight":
                delta = ahead
            elif self.motion == "back and forth":
                delta = ahead if (self.t - 1) // self.window % 4 < 2 else -ahead
            elif self.motion == "turning":
                delta = ahead + aside * (self.t * 0.003)
            elif self.motion == "walk":
                delta = self.normal(tensor)
            elif self.motion == "drift":
                delta = ahead + self.normal(tensor)
            else:
                delta = self.exact[i] * -0.3 / self.magnitude
            self.exact[i] = self.exact[i] + delta * unit
            tensor.copy_(self.exact[i])

    def new_meter(self) -> AngularVelocity:
        """A meter, which measures what requires a gradient now, and later what did once."""
        self.measured = [t for t in self.tensors if t.requires_grad]
        return AngularVelocity(self.given, **self.settings)

    def watched(self) -> list[Tensor]:
        return [t for t in self.tensors if any(t is other for other in self.measured)]

    def given(self) -> list[Tensor]:
        return [*self.tensors, self.tensors[0]] if self.tied else list(self.tensors)


def check(case: Case, steps: int, events: dict[int, str]) -> tuple[list[str], int]:
    """What is wrong, and the number of angles that were compared.

    Args:
        events: what happens before which step.
    """
    meter = case.new_meter()
    witness = Witness(case.watched)
    wrong, angles, disturbed = [], 0, 0
    for step in range(1, steps + 1):
        event = events.get(step)
        i = case.choose.randrange(len(case.tensors))
        tensor = case.tensors[i]
        if event == "move":  # to other memory, also inside of a window
            elsewhere = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            tensor.data = elsewhere.copy_(tensor.data)
        elif event == "replace" and tensor.numel():
            case.tensors[i] = nn.Parameter(tensor.detach().clone())
            case.measured.append(case.tensors[i])
            disturbed = step
        elif event == "freeze" and not disturbed:  # the meter has seen that it required one
            tensor.requires_grad_(False)  # it was measured, and is until the meter is made again
        elif event == "resume":
            watched = list(map(id, case.watched()))
            buffer = io.BytesIO()
            torch.save(meter.state_dict(), buffer)
            buffer.seek(0)
            meter = case.new_meter()
            meter.load_state_dict(torch.load(buffer, weights_only=True))
            if list(map(id, case.watched())) != watched:
                disturbed = step
        case.move()
        witness.see()
        reading = meter.observe()
        if reading is None:
            continue
        truth = witness.angle(case.window)
        where = f"step {step} of {case.settings}, {case.motion} by {case.scale:g}: "
        if reading.angle is not None:
            angles += 1
            if not is_right(reading, truth):
                wrong.append(
                    f"{where}{reading.angle!r} is not {truth!r} within {reading.standard_error!r}"
                )
            elif reading.standard_error > 0.1:  # below, both displacements have nearly one table
                case.errors.append((reading.angle - truth.angle) / reading.standard_error)
        elif truth is not None and step >= disturbed + 4 * case.window:
            wrong.append(f"{where}no angle where {truth!r} is true")
    return wrong, angles


def run(seeds: range, **options: Any) -> tuple[list[str], int, list[float]]:
    """All seeds: what is wrong, each with its seed, the angles compared, and errors of hashed ones.

    Args:
        options: of :class:`Case`. With a magnitude, nothing happens to the parameters.
    """
    everything, angles, errors = [], 0, []
    for seed in seeds:
        case = Case(seed, **options)
        steps = 8 * case.window
        at = {}
        if "magnitude" not in options:
            for _ in range(case.choose.choice([0, 0, 1, 2])):
                name = case.choose.choice(["move", "replace", "freeze", "resume", "resume"])
                at[case.choose.randint(2, steps // 2 + 1)] = name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # their words have tests of their own
            wrong, compared = check(case, steps, at)
        everything += [f"seed {seed}: {w}" for w in wrong]
        angles += compared
        errors += case.errors
    return everything, angles, errors


def report(wrong: list[str], angles: int) -> str:
    shown = "\n".join(wrong[:8])
    return f"{len(wrong)} of {angles} angles are wrong; the first ones:\n{shown}"


def test_exact_angles_are_true() -> None:
    cases = count(440, 3000)
    wrong, angles, errors = run(range(cases))
    assert angles > 3 * cases
    assert not errors  # at most 2**18 elements: every one has its own bucket
    assert not wrong, report(wrong, angles)


def test_hashed_angles_are_true_within_their_standard_error() -> None:
    cases = count(60, 600)
    wrong, angles, errors = run(range(cases), hashed=True)
    assert angles > 3 * cases
    assert len(errors) > angles / 2
    assert not wrong, report(wrong, angles)
    # Angles of one case share their hash, and so their error: about one value a case. Elements of
    # the same chunk never meet, which makes small models a little better than the law.
    root_mean_square = (sum(error**2 for error in errors) / len(errors)) ** 0.5
    assert 0.6 < root_mean_square < 1.2


def test_angles_near_0_and_180_degrees() -> None:
    """A straight line, where the arc cosine hides what the sums have lost."""
    wrong, angles = [], 0
    for seed in range(count(60, 400)):
        case = Case(seed, dtype=(torch.float32, torch.float64)[seed % 2])
        case.motion = MOTIONS[seed // 2 % 3]
        case.scale = 10.0 ** -case.choose.uniform(1, 7)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            found, compared = check(case, 7 * case.window, {})
        wrong += [f"seed {seed}: {w}" for w in found]
        angles += compared
    assert angles > count(60, 400)
    assert not wrong, report(wrong, angles)


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("magnitude", [1e-36, 1e-40, 1e-44, 1e30, 3e37])
def test_values_at_the_ends_of_float32(magnitude: float, hashed: bool) -> None:
    """Squares of them leave float32's range, and sums of a window may; those of float64 do not."""
    wrong, angles, _ = run(
        range(count(12, 100)), magnitude=magnitude, dtype=torch.float32, hashed=hashed
    )
    assert angles > 0
    assert not wrong, report(wrong, angles)


@pytest.mark.parametrize("magnitude", [1e-140, 1e-60, 1e-46, 1e45, 1e60, 1e140])
def test_float64_values_outside_the_range_of_float32(magnitude: float) -> None:
    wrong, angles, _ = run(range(count(12, 100)), magnitude=magnitude, dtype=torch.float64)
    assert angles > 0
    assert not wrong, report(wrong, angles)


@pytest.mark.parametrize("magnitude", [1e-300, 1e300])
def test_float64_values_whose_squares_are_no_float64(magnitude: float) -> None:
    """No angle is made of them."""
    for seed in range(count(6, 40)):
        case = Case(seed, magnitude, torch.float64)
        case.motion = "drift"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            meter = case.new_meter()
            for _ in range(8 * case.window):
                case.move()
                reading = meter.observe()
                assert reading is None or reading.angle is None
