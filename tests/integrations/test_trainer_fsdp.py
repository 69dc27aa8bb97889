"""transformers with two processes and FSDP2, the path where Trainer takes no ``optimizers=``."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import pytest
from material import SETTINGS, needs
from test_transformers import Passages, Recorder, arguments, language_model, loss_of

sys.path.append(str(pathlib.Path(__file__).parent.parent / "distributed"))
from launch import run

pytestmark = [needs("transformers", "accelerate"), pytest.mark.slow]

STEPS, SAVED_AT = 120, 63  # 63 is not at the end of a window of 5


def fsdp2_trainer(folder: str, callback: dict[str, Any], **options: Any) -> Any:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from transformers import Trainer

    from autodrop_ext.integrations.transformers import AutoDropCallback

    args = arguments(
        pathlib.Path(folder),
        fsdp=True,
        fsdp_config={"version": 2},
        **options,
    )
    assert args.device.type == "cpu"
    # Among CPUs accelerate turns FSDP into DDP and does not say so; torch shards there as well.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = Trainer(
        model=language_model(),
        args=args,
        train_dataset=Passages(STEPS * 8),
        eval_dataset=Passages(8),
        data_collator=Recorder(),
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: loss_of(
            outputs.logits, labels
        ),
    )
    assert trainer.is_fsdp_enabled
    AutoDropCallback(**callback).attach(trainer)
    return trainer


def train(rank: int, folder: str, resume: str | None) -> tuple[list[dict[str, Any]], int, int]:
    """Decisions, the number of DTensors among the parameters, and the bytes of the meter."""
    from torch.distributed.tensor import DTensor

    trainer = fsdp2_trainer(
        folder, SETTINGS, max_steps=STEPS, save_strategy="steps", save_steps=SAVED_AT
    )
    trainer.train(resume_from_checkpoint=resume)
    scheduler = trainer.lr_scheduler
    sharded = sum(isinstance(p, DTensor) for p in trainer.model.parameters())
    decisions = [decision.as_dict() for decision in scheduler.history]
    return decisions, sharded, scheduler.meter.device_bytes


def test_fsdp2(tmp_path: pathlib.Path) -> None:
    folder = str(tmp_path)
    (whole, sharded, held), (other, _, _) = run(2, train, folder, None, timeout=60)
    model = language_model()
    assert sharded == len(list(model.parameters()))
    # Three tables of the whole model, and 32 bytes for each stretch of this rank's part.
    elements = sum(p.numel() for p in model.parameters())
    assert held <= 24 * elements + 32 * 2 * sharded
    assert whole == other
    assert len(whole) == STEPS // 5 - 2
    assert any(decision["dropped"] for decision in whole)
    assert all(decision["angle"] is not None for decision in whole)

    # The checkpoint of rank 0 holds decisions and tables; the window that was open is left out.
    (resumed, _, _), (other, _, _) = run(
        2, train, folder, f"{folder}/checkpoint-{SAVED_AT}", timeout=60
    )
    assert resumed == other
    kept = SAVED_AT // 5 - 2
    assert resumed[:kept] == whole[:kept]
    angles = [decision["angle"] for decision in resumed[kept:]]
    assert len(angles) == len(whole[kept:]) - 1
    assert None not in angles


def evaluate(rank: int, folder: str, average: bool) -> tuple[str, list[float], float]:
    """Decisions, losses of evaluations during training, and that after it."""
    options = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 4}
    callback = SETTINGS | {"window": 2, "evaluate_average": average}
    trainer = fsdp2_trainer(f"{folder}/{average}", callback, **options)
    trainer.train()
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    return str(trainer.lr_scheduler.history), losses, trainer.evaluate()["eval_loss"]


def test_the_average_of_sharded_parameters_is_evaluated(tmp_path: pathlib.Path) -> None:
    (plain, raw, last), _ = run(2, evaluate, str(tmp_path), False, timeout=60)
    (decisions, losses, after), other = run(2, evaluate, str(tmp_path), True, timeout=60)
    assert (decisions, losses, after) == other
    assert decisions == plain and last == raw[-1] and after == losses[-1]
    # The losses are about 6, and differ by 0.1; two summations of one loss differ by 1e-6.
    assert all(abs(a - b) > 1e-3 for a, b in zip(raw, losses, strict=True))
