"""Lightning: validation and tests of the average, and resuming from the parameters."""

from __future__ import annotations

import inspect
import pathlib
from typing import Any

import pytest
import torch
from material import assert_same_parameters, digit_batches, digit_model, needs
from test_lightning import loader, trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from autodrop_ext import AnytimeAutoDrop, AutoDrop, EpochAutoDrop

pytestmark = [
    needs("lightning", "sklearn"),
    # Its advice, such as more workers for the loader; its use of what torch deprecates.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]

EPOCHS, PER_EPOCH = 5, 31  # a window of 4 never ends with an epoch
ANYTIME: dict[str, Any] = {"min_window": 4, "windows": 2, "critical": 1.0, "cosines": 2}
Weights = dict[str, Tensor]


def module(make: Any = None, fails_at: int | None = None) -> Any:
    import lightning.pytorch as lightning

    class Digits(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = digit_model()
            self.losses: list[float] = []  # of every validation and test

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if len(self.losses) == fails_at:
                raise ZeroDivisionError("in the middle of a validation")
            loss = cross_entropy(self.model(batch[0]), batch[1])
            self.total += float(loss) / 4
            self.log("val_loss", loss, on_epoch=True, batch_size=1)

        test_step = validation_step

        def on_validation_epoch_start(self) -> None:
            self.total = 0.0

        def on_validation_epoch_end(self) -> None:
            self.losses.append(self.total)

        on_test_epoch_start, on_test_epoch_end = on_validation_epoch_start, on_validation_epoch_end

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            self.scheduler = make(optimizer) if make else AnytimeAutoDrop(optimizer, **ANYTIME)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": self.scheduler, "interval": "step"},
            }

    return Digits()


def weights(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a: Weights, b: Weights) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    return sum(float(cross_entropy(model(x), y)) / 4 for x, y in digit_batches(62)[:4])


def by_hand() -> tuple[AnytimeAutoDrop, list[tuple[Weights, Weights, float]]]:
    """The scheduler; after each epoch the parameters, their average, and its loss."""
    model = nn.Module()
    model.model = digit_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = AnytimeAutoDrop(optimizer, **ANYTIME)
    after = []
    for _ in range(EPOCHS):
        for images, labels in digit_batches(62)[:PER_EPOCH]:
            cross_entropy(model.model(images), labels).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        raw = weights(model)
        with scheduler.averaged_parameters() as held:
            assert held
            after.append((raw, weights(model), loss_of(model.model)))
    return scheduler, after


def averaging(folder: pathlib.Path, *callbacks: Any, **options: Any) -> Any:
    from autodrop_ext.integrations.lightning import AutoDropMonitor

    return trainer(
        folder,
        max_epochs=EPOCHS,
        accumulate_grad_batches=1,
        limit_train_batches=PER_EPOCH,
        limit_val_batches=4,
        limit_test_batches=4,
        callbacks=[*callbacks, AutoDropMonitor(evaluate_average=True)],
        enable_checkpointing=bool(callbacks),
        **options,
    )


def saving(folder: pathlib.Path, name: str, **options: Any) -> Any:
    from lightning.pytorch.callbacks import ModelCheckpoint

    name += "-{epoch}"
    return ModelCheckpoint(folder, filename=name, monitor="val_loss", save_top_k=-1, **options)


def saved_in(path: str | pathlib.Path) -> Weights:
    return dict(torch.load(path, weights_only=True)["state_dict"])


def test_validation_checkpoints_tests_and_resuming(tmp_path: pathlib.Path) -> None:
    expected, after = by_hand()
    assert expected.num_drops > 0
    losses = [loss for _, _, loss in after]
    worst = max(range(EPOCHS), key=lambda epoch: losses[epoch])
    best = min(range(EPOCHS), key=lambda epoch: losses[epoch])
    assert worst != EPOCHS - 1
    whole = module()
    full = saving(tmp_path, "full", mode="max")
    alone = saving(tmp_path, "alone", save_weights_only=True)
    fitted = averaging(tmp_path, full, alone)
    fitted.fit(whole, loader(), loader())
    assert str(whole.scheduler.history) == str(expected.history)
    assert whole.losses[1:] == losses  # the first is the sanity check
    for epoch, (raw, average, _) in enumerate(after):
        assert_same(saved_in(tmp_path / f"full-epoch={epoch}.ckpt"), raw)
        assert_same(saved_in(tmp_path / f"alone-epoch={epoch}.ckpt"), average)

    # After fit the module has the last average; checkpoints lead to theirs.
    raw, average, _ = after[-1]
    assert_same(weights(whole), average)
    fitted.save_checkpoint(tmp_path / "final.ckpt")
    assert_same(saved_in(tmp_path / "final.ckpt"), average)
    assert_same(saved_in(tmp_path / "full-epoch=4.ckpt"), raw)
    for path, epoch in (
        (None, EPOCHS - 1),
        ("best", worst),  # of the first ModelCheckpoint, whose mode is "max"
        (alone.best_model_path, best),
        (str(tmp_path / "full-epoch=2.ckpt"), 2),
    ):
        for evaluate in (fitted.test, fitted.validate):
            evaluate(whole, loader(), ckpt_path=path, verbose=False)
            assert whole.losses[-1] == losses[epoch]
            assert_same(weights(whole), after[epoch][1])

    resumed = module()
    again = averaging(tmp_path)
    # Before Lightning 2.6 there was no such argument.
    safe = {"weights_only"} & inspect.signature(again.fit).parameters.keys()
    path = str(tmp_path / "full-epoch=1.ckpt")
    again.fit(resumed, loader(), loader(), ckpt_path=path, **dict.fromkeys(safe, True))
    assert str(resumed.scheduler.history) == str(expected.history)
    assert resumed.losses[-3:] == losses[2:]
    assert_same(weights(resumed), average)

    other = module()
    with pytest.warns(RuntimeWarning, match="parameters are evaluated and not their average"):
        averaging(tmp_path).test(other, loader(), ckpt_path=path, verbose=False)
    assert_same(weights(other), after[1][0])


def test_an_error_in_a_validation_leaves_the_parameters(tmp_path: pathlib.Path) -> None:
    _, after = by_hand()
    failing = module(fails_at=2)  # after the sanity check and one epoch
    saved = saving(tmp_path, "full")
    fitted = averaging(tmp_path, saved)
    with pytest.raises(ZeroDivisionError):
        fitted.fit(failing, loader(), loader())
    assert_same(weights(failing), after[1][0])


@pytest.mark.filterwarnings("ignore:EpochAutoDrop. expected 'interval'")
@pytest.mark.parametrize("make", [AutoDrop, EpochAutoDrop])
def test_what_cannot_be_evaluated_is_refused(tmp_path: pathlib.Path, make: Any) -> None:
    with pytest.raises(ValueError, match=f"an average .*, got {make.__name__} without one"):
        averaging(tmp_path).fit(module(make), loader(), loader())


def test_a_fit_without_a_step_changes_nothing(tmp_path: pathlib.Path) -> None:
    ours = module()
    averaging(tmp_path, max_steps=0).fit(ours, loader(), loader())
    assert_same_parameters(ours.model, digit_model())
