"""transformers: the Trainer evaluates and saves the average, and resumes from the parameters."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from material import assert_same_parameters, needs
from test_transformers import Passages, language_model, loss_of, trainer_of
from torch import Tensor, nn

from autodrop_ext import AnytimeAutoDrop, AutoDrop

pytestmark = needs("transformers", "accelerate")

STEPS, EVERY = 60, 15  # 15 is in the middle of a window
ANYTIME: dict[str, Any] = {"min_window": 4, "windows": 2, "critical": 1.0, "cosines": 2}
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "eval_strategy": "steps",
    "eval_steps": EVERY,
    "save_strategy": "steps",
    "save_steps": EVERY,
    "optim": "adamw_torch",
    "weight_decay": 0.0,
}


def averaging(folder: pathlib.Path, **options: Any) -> Any:
    from autodrop_ext.integrations.transformers import AutoDropCallback

    trainer = trainer_of(folder, eval_dataset=Passages(8), **(OPTIONS | options))
    AutoDropCallback(scheduler="anytime", evaluate_average=True, **ANYTIME).attach(trainer)
    return trainer


@torch.no_grad()
def eval_loss(model: nn.Module) -> float:
    rows = Passages(8).rows
    return float(loss_of(model(rows).logits, rows))


Weights = dict[str, Tensor]
Run = tuple[Any, pathlib.Path, AnytimeAutoDrop, dict[int, tuple[Weights, Weights, float]]]


def weights(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def by_hand(trainer: Any) -> tuple[AnytimeAutoDrop, dict[int, tuple[Weights, Weights, float]]]:
    """The scheduler; by step the parameters, their average, and the loss with the average."""
    model = language_model()
    decayed = trainer.get_decay_parameter_names(model)
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named if n in decayed]},
            {"params": [p for n, p in named if n not in decayed]},
        ],
        lr=0.01,
        weight_decay=0.0,
    )
    scheduler = AnytimeAutoDrop(optimizer, **ANYTIME)
    at = {}
    batches = [b for b in trainer.data_collator.batches if len(b["input_ids"]) == 4]
    for step, batch in enumerate(batches[:STEPS], start=1):
        loss_of(model(batch["input_ids"]).logits, batch["labels"]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            raw = weights(model)
            with scheduler.averaged_parameters() as held:
                assert held
                at[step] = raw, weights(model), eval_loss(model)
    return scheduler, at


def losses(trainer: Any) -> dict[int, float]:
    return {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}


def saved_in(folder: pathlib.Path) -> Weights:
    from transformers import GPT2LMHeadModel

    return weights(GPT2LMHeadModel.from_pretrained(folder))


def assert_same(a: Weights, b: Weights) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests, whose fixture comes later
    folder = tmp_path_factory.mktemp("whole")
    trainer = averaging(folder)
    trainer.train()
    yield trainer, folder, *by_hand(trainer)
    torch.set_num_threads(threads)


def test_evaluations_are_of_the_average_and_training_is_as_without(
    run: Run,
) -> None:
    trainer, folder, expected, at = run
    assert expected.num_drops > 0 and str(trainer.lr_scheduler.history) == str(expected.history)
    # Trainer adds the losses of the two batches up in another order.
    assert losses(trainer) == pytest.approx({step: loss for step, (_, _, loss) in at.items()})
    raw, average, loss = at[STEPS]
    model = language_model()
    model.load_state_dict(raw, strict=False)
    assert abs(eval_loss(model) - loss) > 1e-4 * loss  # a hundred times the tolerance of approx

    # Checkpoints have the parameters of the run, the model that is saved in the end the average.
    for step, (then, _, _) in at.items():
        assert_same(saved_in(folder / f"checkpoint-{step}"), then)
    assert_same(weights(trainer.model), average)
    trainer.save_model(str(folder / "model"))
    assert_same(saved_in(folder / "model"), average)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss)


def test_a_resumed_run_is_the_same(run: Run, tmp_path: pathlib.Path) -> None:
    trainer, folder, expected, _ = run
    again = averaging(tmp_path)
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{2 * EVERY}"))
    assert str(again.lr_scheduler.history) == str(expected.history)
    assert losses(again) == losses(trainer)
    assert_same_parameters(again.model, trainer.model)


@pytest.mark.parametrize("save_only_model", [False, True])
def test_the_best_model_is_the_one_that_was_evaluated(
    run: Run, tmp_path: pathlib.Path, save_only_model: bool
) -> None:
    _, _, _, at = run
    trainer = averaging(
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the best is not the last
        save_only_model=save_only_model,
    )
    trainer.train()
    best = max(at, key=lambda step: at[step][2])
    assert best != STEPS
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    raw, average, _ = at[best]
    assert_same(saved_in(tmp_path / f"checkpoint-{best}"), average if save_only_model else raw)
    assert_same(weights(trainer.model), average)
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def test_predictions_and_saved_models_in_mid_run(run: Run, tmp_path: pathlib.Path) -> None:
    from transformers import TrainerCallback

    _, _, _, at = run
    seen = {}

    class Midway(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == EVERY:
                trainer.save_model(str(tmp_path / "midway"))
                seen["loss"] = trainer.predict(Passages(8)).metrics["test_loss"]
                seen["model"] = weights(trainer.model)
                control.should_training_stop = True

    trainer = averaging(tmp_path, save_strategy="no", eval_strategy="no")
    trainer.add_callback(Midway())
    trainer.train()
    raw, average, loss = at[EVERY]
    assert_same(saved_in(tmp_path / "midway"), average)
    assert seen["loss"] == pytest.approx(loss)  # another order of the sum
    assert_same(seen["model"], raw)
    assert_same(weights(trainer.model), average)


def test_what_cannot_be_evaluated_is_refused(tmp_path: pathlib.Path) -> None:
    from autodrop_ext.integrations.transformers import AutoDropCallback

    with pytest.raises(ValueError, match=r"^average: expected True with evaluate_average=True"):
        AutoDropCallback(evaluate_average=True, average=False)
    with pytest.raises(ValueError, match=r"^scheduler: expected 'autodrop' or 'anytime', got 'e"):
        AutoDropCallback(scheduler="epoch")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^evaluate_average: expected a bool, got 1"):
        AutoDropCallback(evaluate_average=1)  # type: ignore[arg-type]

    model = language_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    without = trainer_of(tmp_path, model=model, optimizers=(optimizer, AutoDrop(optimizer)))
    with pytest.raises(ValueError, match=r"expected .* an average .*, got AutoDrop without one"):
        AutoDropCallback(evaluate_average=True).attach(without)
    assert "evaluate" not in vars(without)

    # By default AutoDrop keeps no average; here it is made with one.
    trainer = trainer_of(tmp_path, max_steps=4)
    AutoDropCallback(evaluate_average=True, window=2).attach(trainer)
    trainer.train()
    assert trainer.lr_scheduler.average


@pytest.mark.filterwarnings("ignore:AutoDrop. the checkpoint's settings replace")
def test_a_checkpoint_without_an_average(tmp_path: pathlib.Path) -> None:
    """What was to be evaluated is not there; the settings of the checkpoint hold."""
    from autodrop_ext.integrations.transformers import AutoDropCallback

    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(tmp_path, **options)
    AutoDropCallback().attach(trainer)
    trainer.train()
    again = trainer_of(tmp_path, **options)
    AutoDropCallback(evaluate_average=True).attach(again)
    # Trainer itself drops a warning that comes alone while it loads.
    with pytest.raises(ValueError, match=r"also in a checkpoint .*, got AutoDrop without one"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
