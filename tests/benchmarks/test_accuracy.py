"""The error of a sketched angle follows its law; what small runs of these benchmarks find."""

from __future__ import annotations

import math

import decisions
import law
import pytest
import torch

HASHES, BUCKETS, ELEMENTS = 80, 4096, 2**16
Printed = pytest.CaptureFixture[str]


def cases() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return dict(law.motions(random, ELEMENTS))


@pytest.mark.parametrize("name", ["all elements", "one column of 512", "150 elements"])
def test_errors_follow_the_law(name: str) -> None:
    a, b = law.orthogonal(cases()[name], torch.Generator().manual_seed(4))
    ratios = law.scaled_errors(a, b, BUCKETS, HASHES).square().mean(0).sqrt()
    # The rms of 80 errors has a standard error of 8 %: 0.7 to 1.3 is nearly four of them.
    for angle, ratio in zip(law.ANGLES, ratios.tolist(), strict=True):
        assert 0.7 < ratio / law.predicted(a, b, angle) < 1.3
        assert law.predicted(a, b, angle) == pytest.approx(1, abs=0.1)  # 16 chunks of 65,536


def test_errors_of_one_column_of_a_chunk_each() -> None:
    """All elements that move stand in the same place of their chunks: rotations part them."""
    sizes = torch.zeros(1024, 4096)
    sizes[:, 7] = 1
    a, b = law.orthogonal(sizes.flatten(), torch.Generator().manual_seed(4))
    errors = law.scaled_errors(a, b, BUCKETS, 60)
    # Standard error 9 %. Rotations by packets alone would give a ratio above 2.
    assert errors.square().mean(0).sqrt().tolist() == pytest.approx([1, 1, 1], abs=0.3)


@pytest.mark.parametrize("angle", law.ANGLES)
def test_prediction_counts_the_pairs_that_can_meet(angle: float) -> None:
    """Two chunks in which one element each moves, and a third one that stands still."""
    a = torch.zeros(3 * law.LANES, dtype=torch.float64)
    b = a.clone()
    a[5], b[law.LANES + 9] = 1, 1
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    # u = (1, 0) and v = (c, s): M has s (1 - c^2) / 2 off its diagonal, twice.
    off_diagonal = (s - c * c * s) / 2
    expected = math.sqrt(2 * 2 * off_diagonal**2 / s**4)
    assert law.predicted(a, b, angle) == pytest.approx(expected, rel=1e-9)
    a, b = torch.zeros(2, law.LANES, dtype=torch.float64)
    a[0], b[1] = 1, 1
    # One chunk meets no other; 1e-6 is the root of what rounding leaves of 1 - 1.
    assert law.predicted(a, b, angle) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("step", "window"), [(1e-3, 64), (1e-7, 1), (1e-7, 64)])
def test_one_bucket_an_element_is_exact(step: float, window: int) -> None:
    # Sums in float64 round to 2^-53 of the parameters: 1e-9 of a step of 1e-7, and 1e-8 degrees.
    assert law.exact_error(step, window) < 1e-8


def test_motion_prints_a_row_for_each(capsys: Printed) -> None:
    law.motion(2, BUCKETS, ELEMENTS)
    rows = capsys.readouterr().out.splitlines()[4:]
    assert [row.split("|")[1].strip() for row in rows] == list(cases())


def test_angles_of_training(capsys: Printed) -> None:
    law.runs(None, 60, 48, only="digits", sizes=(4096,))
    (row,) = capsys.readouterr().out.splitlines()[4:]
    cells = row.strip("| ").split(" | ")
    assert cells[:4] == ["digits network, 64 wide", "79,626", "4,096", "10"]  # of 12 windows
    # The errors of the ten angles may be nearly the same, so that 60 hashes decide: 9 %.
    assert 0.7 < float(cells[5]) < 1.3


def test_differences_are_paired() -> None:
    exact = [decisions.Trained(10, 0.1, 2.0), decisions.Trained(12, 0.4, 4.0)]
    runs = [decisions.Trained(11, 0.1, 2.5), decisions.Trained(15, 0.4, 4.5)]
    assert decisions.row("4,096", runs, exact) == (
        "| 4,096 | 13.0 | +2 +- 1 | 0.2 | 3.5 | +0.5 +- 0 |"
    )
    assert decisions.row("exact", exact, exact) == "| exact | 11.0 | - | 0.2 | 3 | - |"


@pytest.mark.parametrize("schedule", decisions.SCHEDULES)
def test_a_run_repeats_itself(schedule: str) -> None:
    threads = torch.get_num_threads()
    try:
        first, again = (
            decisions.train("digits network, 64 wide", schedule, 4096, 0, 60) for _ in range(2)
        )
    finally:
        torch.set_num_threads(threads)
    assert first == again
    assert first.quality < 90  # percent: better than chance
