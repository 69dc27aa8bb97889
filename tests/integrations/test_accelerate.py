"""accelerate in one process: accumulation, bf16, fp16 with a scaler."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from material import (
    SETTINGS,
    assert_same_decisions,
    assert_same_parameters,
    digit_batches,
    digit_model,
    needs,
)
from torch import nn
from torch.nn.functional import cross_entropy

from autodrop_ext import AutoDrop

pytestmark = needs("accelerate", "sklearn")

STEPS, SAVED_AT = 210, 103  # 103 is not at the end of a window of 5
MICRO = 2  # batches per optimizer step
# 2^24 times the loss is past float16's largest number, so that the first steps overflow.
SCALER = {"init_scale": 2.0**24, "growth_interval": 50}


def build(mixed_precision: str) -> tuple[nn.Module, torch.optim.Optimizer, AutoDrop]:
    model = digit_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, AutoDrop(optimizer, **SETTINGS)


class Prepared:
    """What an accelerate script has."""

    def __init__(self, mixed_precision: str) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_steps=MICRO,
            mixed_precision="bf16" if mixed_precision == "bf16" else "no",
        )
        if mixed_precision == "fp16":
            # accelerate takes "fp16" on a CPU for float32; torch's scaler works there all the same.
            self.accelerator.scaler = torch.amp.GradScaler("cpu", **SCALER)
        self.float16 = mixed_precision == "fp16"
        model, optimizer, self.scheduler = build(mixed_precision)
        self.model, self.optimizer, self.prepared = self.accelerator.prepare(
            model, optimizer, self.scheduler
        )

    def train(self, batches: list[Any]) -> None:
        for images, labels in batches:
            with self.accelerator.accumulate(self.model):
                with torch.autocast("cpu", torch.float16, enabled=self.float16):
                    logits = self.model(images)
                loss = cross_entropy(logits.float(), labels)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.prepared.step()
                self.optimizer.zero_grad()


def by_hand(mixed_precision: str, batches: list[Any]) -> tuple[nn.Module, AutoDrop, int]:
    model, optimizer, scheduler = build(mixed_precision)
    scaler = torch.amp.GradScaler("cpu", **SCALER, enabled=mixed_precision == "fp16")
    dtype = torch.float16 if mixed_precision == "fp16" else torch.bfloat16
    for i, (images, labels) in enumerate(batches, start=1):
        with torch.autocast("cpu", dtype, enabled=mixed_precision != "no"):
            logits = model(images)
        scaler.scale(cross_entropy(logits.float(), labels) / MICRO).backward()
        if i % MICRO == 0:
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()
    return model, scheduler, scheduler.meter.steps


@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_windows_are_counted_in_optimizer_steps(
    mixed_precision: str, tmp_path: pathlib.Path
) -> None:
    batches = digit_batches(STEPS * MICRO)
    run = Prepared(mixed_precision)
    run.train(batches[: SAVED_AT * MICRO])
    run.accelerator.save_state(str(tmp_path))
    run.train(batches[SAVED_AT * MICRO :])
    model, expected, steps = by_hand(mixed_precision, batches)
    skipped = STEPS - steps
    assert (skipped > 0) == (mixed_precision == "fp16")
    assert run.scheduler.meter.steps == steps
    assert_same_decisions(run.scheduler, expected)
    assert_same_parameters(run.model, model)

    again = Prepared(mixed_precision)
    again.accelerator.load_state(str(tmp_path))
    again.train(batches[SAVED_AT * MICRO :])
    assert_same_decisions(again.scheduler, expected)
    assert_same_parameters(again.model, model)


def test_the_number_of_calls_is_not_capped() -> None:
    """accelerate stops stepping a scheduler at its attribute ``total_steps``, where it has one."""
    _, _, scheduler = build("no")
    assert not hasattr(scheduler, "total_steps")


def test_a_warning_points_to_the_users_line() -> None:
    prepared = Prepared("no")
    with pytest.warns(RuntimeWarning, match="without an optimizer step") as caught:
        for _ in range(2001):
            prepared.prepared.step()
    assert {w.filename for w in caught if "AutoDrop" in str(w.message)} == {__file__}
