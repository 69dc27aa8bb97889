"""Measure the accuracy contract: the meter's angle against float64 sums of the same iterates.

    python benchmarks/accuracy/rounding.py [--elements N] [--windows W ...] [--json FILE]

Parameters follow a random walk with drift in float32; what reaches the meter is what float64 sums.
For every window and relative update per step the table shows the largest error over all readings
of the sum form, the delta form and the automatic choice (degrees), the form that the automatic
choice ended in, and the smallest ratio of its reported ``rounding_error`` to the true error.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib

import torch

from autodrop_ext import AngularVelocity

FORMS = ("sum", "delta", "auto")
READINGS = 5


def angle64(a: torch.Tensor, b: torch.Tensor) -> float:
    cosine = (a @ b / (a.norm() * b.norm())).clamp(-1, 1)
    return math.degrees(math.acos(cosine.item()))


def measure(
    window: int, update: float, elements: int, drift: float, seed: int
) -> dict[str, object]:
    """One cell of the table.

    Args:
        update: root mean square of a step relative to the parameters.
        drift: share of a step that repeats from step to step; the rest is fresh noise.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(elements, generator=generator)
    size = x.abs() * update
    direction = torch.randn(elements, generator=generator) * size
    # A bank of noise, read at random offsets: drawing it fresh would take most of the time.
    bank = torch.randn(4 * elements, generator=generator)
    meters = {form: AngularVelocity([x], window, form=form) for form in FORMS}
    means: list[torch.Tensor] = []
    worst = dict.fromkeys(FORMS, 0.0)
    covered, angle = math.inf, 0.0
    for _ in range(READINGS + 2):
        total = torch.zeros(elements, dtype=torch.float64)
        for _ in range(window):
            offset = int(torch.randint(0, 3 * elements, (1,), generator=generator))
            noise = bank[offset : offset + elements] * size
            x += drift * direction + math.sqrt(1 - drift**2) * noise
            total += x
            readings = {form: meter.observe() for form, meter in meters.items()}
        means = [*means[-2:], total / window]
        if len(means) < 3:
            continue
        angle = angle64(means[2] - means[1], means[1] - means[0])
        for form, reading in readings.items():
            assert reading is not None and reading.angle is not None
            error = abs(reading.angle - angle)
            worst[form] = max(worst[form], error)
            if form == "auto":
                covered = min(covered, reading.rounding_error / max(error, 1e-12))
    return {
        "window": window,
        "update": update,
        "angle": angle,
        **worst,
        "form": meters["auto"].form,
        "reported_over_true": covered,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=100_000)
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 64, 640, 1000])
    parser.add_argument("--drift", type=float, nargs="+", default=[0.5, 0.05])
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    rows = []
    columns = ["k", "update", "drift", "angle", "sum form", "delta form", "automatic", "form"]
    columns.append("reported / true")
    print(f"| {' | '.join(columns)} |")
    print(f"|{'--:|' * len(columns)}")
    for drift in arguments.drift:
        for window in arguments.windows:
            for update in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
                row = measure(window, update, arguments.elements, drift, seed=window) | {
                    "drift": drift
                }
                rows.append(row)
                print(
                    f"| {window} | {update:.0e} | {drift} | {row['angle']:.2f} "
                    f"| {row['sum']:.1e} | {row['delta']:.1e} | {row['auto']:.1e} "
                    f"| {row['form']} | {row['reported_over_true']:.1f} |",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
