"""transformers: the real Trainer next to the same loop written by hand, bit for bit."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from material import SETTINGS, assert_same_decisions, assert_same_parameters, needs, passages
from torch import Tensor, nn

from autodrop_ext import AutoDrop

pytestmark = needs("transformers", "accelerate", "tensorboard")

STEPS, SAVED_AT = 210, 103  # 103 is not at the end of a window of 5
LENGTH, BATCH = 24, 4


def language_model() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Passages(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.rows = passages(count, LENGTH)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


class Recorder:
    """Stacks the rows of a batch, and remembers the batches in their order."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
        self.batches.append({k: v.clone() for k, v in batch.items()})
        return batch


def arguments(folder: pathlib.Path, **options: Any) -> Any:
    from transformers import TrainingArguments

    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": 0.01,
        "logging_steps": 7,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(**(settings | options))


def trainer_of(folder: pathlib.Path, accumulation: int = 1, **options: Any) -> Any:
    from transformers import Trainer

    optimizers, eval_dataset = options.pop("optimizers", None), options.pop("eval_dataset", None)
    return Trainer(
        model=options.pop("model", None) or language_model(),
        args=arguments(folder, gradient_accumulation_steps=accumulation, **options),
        train_dataset=Passages(STEPS * BATCH * accumulation),
        eval_dataset=eval_dataset,
        data_collator=Recorder(),
        # Which targets Trainer counts, and so its mean, differs between versions.
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: (
            loss_of(outputs.logits, labels) / accumulation
        ),
        **({} if optimizers is None else {"optimizers": optimizers}),
    )


def by_hand(
    batches: list[dict[str, Tensor]],
    accumulation: int,
    groups_of: Callable[[nn.Module], Any] = nn.Module.parameters,
    **settings: Any,
) -> Any:
    model = language_model()
    optimizer = torch.optim.AdamW(groups_of(model), lr=0.01, weight_decay=0.0)
    scheduler = AutoDrop(optimizer, **SETTINGS, **settings)
    for step in range(STEPS):
        together = batches[step * accumulation : (step + 1) * accumulation]
        for batch in together:
            logits = model(batch["input_ids"]).logits
            (loss_of(logits, batch["labels"]) / accumulation).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model, scheduler


def test_a_scheduler_given_to_trainer_and_resumed(tmp_path: pathlib.Path) -> None:
    """``optimizers=(optimizer, AutoDrop(optimizer))``, and resume in the middle of a window."""

    def make(folder: pathlib.Path) -> tuple[Any, AutoDrop]:
        model = language_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
        scheduler = AutoDrop(optimizer, **SETTINGS)
        trainer = trainer_of(
            folder,
            model=model,
            optimizers=(optimizer, scheduler),
            save_strategy="steps",
            save_steps=SAVED_AT,
        )
        return trainer, scheduler

    trainer, scheduler = make(tmp_path / "whole")
    trainer.train()
    model, expected = by_hand(trainer.data_collator.batches, 1)
    assert_same_decisions(scheduler, expected)
    assert_same_parameters(trainer.model, model)

    again, resumed = make(tmp_path / "resumed")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{SAVED_AT}"))
    assert len(resumed.history) == len(expected.history)
    assert_same_decisions(resumed, expected)
    assert_same_parameters(again.model, model)


def scalars_of(folder: pathlib.Path) -> dict[str, dict[int, float]]:
    """Every scalar in TensorBoard's files below a folder: value by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_a_callback_where_trainer_makes_the_optimizer(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accumulation, warm-up from Trainer's arguments, TensorBoard, and resume."""
    from autodrop_ext.integrations.transformers import AutoDropCallback

    def make(folder: pathlib.Path) -> Any:
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "board"))
        options = {"optim": "adamw_torch", "weight_decay": 0.0, "warmup_steps": 20}
        options |= {"save_strategy": "steps", "save_steps": SAVED_AT, "report_to": "tensorboard"}
        trainer = trainer_of(folder, accumulation=2, **options)
        callback = AutoDropCallback(**SETTINGS)
        assert callback.attach(trainer) is callback
        return trainer

    trainer = make(tmp_path / "whole")
    trainer.train()

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        """Trainer's two; the order of the parameters is that of the sums, to the last bit."""
        decayed = trainer.get_decay_parameter_names(model)
        named = list(model.named_parameters())
        parts = ([p for n, p in named if n in decayed], [p for n, p in named if n not in decayed])
        return [{"params": part} for part in parts]

    model, expected = by_hand(trainer.data_collator.batches, 2, groups, warmup_steps=20)
    assert_same_decisions(trainer.lr_scheduler, expected)
    assert_same_parameters(trainer.model, model)

    logged = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    board = scalars_of(tmp_path / "whole")
    assert sorted(logged) == list(range(7, STEPS + 1, 7))
    by_step = {decision.step: decision for decision in expected.history}
    for step, entry in logged.items():
        newest = max((s for s in by_step if s <= step), default=None)
        if newest is None:
            assert "autodrop/angular_velocity" not in entry
            continue
        assert entry["autodrop/angular_velocity"] == by_step[newest].angle
        assert entry["autodrop/lr"] == by_step[newest].lr[0]
        assert entry["autodrop/num_drops"] == sum(
            d.dropped for s, d in by_step.items() if s <= newest
        )
        for name in ("angular_velocity", "lr", "num_drops"):
            # TensorBoard keeps float32.
            shown = board[f"train/autodrop/{name}"][step]
            assert shown == pytest.approx(entry[f"autodrop/{name}"], rel=1e-7)
    # A summary of the run is no step of it.
    assert "autodrop/lr" not in trainer.state.log_history[-1]

    again = make(tmp_path / "resumed")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{SAVED_AT}"))
    assert_same_decisions(again.lr_scheduler, expected)
    assert_same_parameters(again.model, model)


def test_what_trainer_makes_and_where_the_callback_stands(tmp_path: pathlib.Path) -> None:
    """create_scheduler is given accelerate's wrapper, which has no hooks; the callback is first."""
    from accelerate.optimizer import AcceleratedOptimizer

    from autodrop_ext.integrations.transformers import AutoDropCallback

    callback = AutoDropCallback(**SETTINGS)
    trainer = trainer_of(tmp_path, max_steps=12, warmup_steps=3)
    trainer.add_callback(callback)  # where Trainer puts it: behind the reporters
    assert trainer.callback_handler.callbacks[-1] is callback
    callback.attach(trainer)
    assert trainer.callback_handler.callbacks[0] is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()
    first = trainer.lr_scheduler
    assert isinstance(trainer.optimizer, AcceleratedOptimizer)
    assert isinstance(first, AutoDrop)
    assert first.optimizer is trainer.optimizer.optimizer
    assert (first.window, first.warmup_steps, first.state_dict()["optimizer_steps"]) == (
        5,
        3,
        12,
    )
    trainer.train()
    assert trainer.lr_scheduler is not first  # as Trainer does with its own


def test_callbacks_that_would_do_nothing_say_so(tmp_path: pathlib.Path) -> None:
    from autodrop_ext.integrations.transformers import AutoDropCallback

    trainer = trainer_of(tmp_path)
    trainer.add_callback(AutoDropCallback())
    with pytest.raises(RuntimeError, match=r"expected attach\(trainer\) before train\(\)"):
        trainer.train()
    with pytest.raises(TypeError, match=r"trainer: expected a transformers\.Trainer, got Linear"):
        AutoDropCallback().attach(nn.Linear(2, 2))

    model = language_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = trainer_of(tmp_path, model=model, optimizers=(optimizer, AutoDrop(optimizer)))
    with pytest.raises(ValueError, match="window, factor: expected no settings"):
        AutoDropCallback(window=5, factor=0.5).attach(given)
    callback = AutoDropCallback().attach(given)
    with pytest.raises(ValueError, match="expected a callback not yet attached"):
        callback.attach(given)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer)
    other = trainer_of(tmp_path, model=model, optimizers=(optimizer, constant))
    with pytest.raises(ValueError, match="got one with ConstantLR"):
        AutoDropCallback().attach(other)
    wrong = trainer_of(tmp_path)
    AutoDropCallback(windows=5).attach(wrong)
    with pytest.raises(TypeError, match="windows"):
        wrong.train()


def test_trainer_never_takes_it_for_a_plateau_scheduler() -> None:
    """Trainer steps those once per evaluation, and hands them a metric."""
    assert not issubclass(AutoDrop, torch.optim.lr_scheduler.ReduceLROnPlateau)


def test_fsdp_refuses_optimizers_and_takes_the_callback(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer's rule, which docs/integrations.md tells of; a process alone cannot run its FSDP."""
    from transformers import Trainer

    from autodrop_ext.integrations.transformers import AutoDropCallback

    model = language_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    create = Trainer.create_accelerator_and_postprocess

    def under_fsdp(trainer: Any) -> None:
        create(trainer)
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", under_fsdp)
    with pytest.raises(RuntimeError, match="`optimizers` is not allowed if PyTorch FSDP"):
        trainer_of(tmp_path, model=model, optimizers=(optimizer, AutoDrop(optimizer)))
    callback = AutoDropCallback(window=5)
    assert callback.attach(trainer_of(tmp_path, model=model)) is callback
