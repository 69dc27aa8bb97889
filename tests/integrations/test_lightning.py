"""Lightning: the real Trainer next to the same loop written by hand, bit for bit."""

from __future__ import annotations

import inspect
import pathlib
import warnings
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
from torch.optim.lr_scheduler import LinearLR, SequentialLR

from autodrop_ext import AutoDrop, EpochAutoDrop

pytestmark = [
    needs("lightning", "sklearn"),
    # Its advice, such as more workers for the loader; its use of what torch deprecates.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]

# Two batches to an optimizer step: 31 steps an epoch, so that no epoch ends with a window of 5
# before the fifth. Lightning resumes inside of an epoch only with a loader that has a state.
EPOCHS, PER_EPOCH, SAVED_AFTER = 7, 62, 3
BATCHES = EPOCHS * PER_EPOCH


class InOrder(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.batches = digit_batches(PER_EPOCH)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> Any:
        return self.batches[i]


def loader() -> Any:
    return torch.utils.data.DataLoader(InOrder(), batch_size=None, shuffle=False)


def optimizer_of(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def module(interval: str = "step", scheduler_of: Any = None, skipped: tuple[int, ...] = ()) -> Any:
    import lightning.pytorch as lightning

    class Digits(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = digit_model()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            images, labels = batch
            if batch_idx in skipped:
                return None
            return cross_entropy(self.model(images), labels)

        def configure_optimizers(self) -> Any:
            optimizer = optimizer_of(self.model)
            make = scheduler_of or (lambda optimizer: AutoDrop(optimizer, **SETTINGS))
            self.scheduler = make(optimizer)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": self.scheduler, "interval": interval},
            }

    return Digits()


def trainer(folder: pathlib.Path, **options: Any) -> Any:
    import lightning.pytorch as lightning

    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": EPOCHS,
        "accumulate_grad_batches": 2,
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(**(settings | options))


def by_hand(accumulation: int = 2, skipped: tuple[int, ...] = ()) -> tuple[nn.Module, AutoDrop]:
    model = digit_model()
    optimizer = optimizer_of(model)
    scheduler = AutoDrop(optimizer, **SETTINGS)
    for i, (images, labels) in enumerate(digit_batches(PER_EPOCH) * EPOCHS):
        if i % PER_EPOCH not in skipped:
            (cross_entropy(model(images), labels) / accumulation).backward()
        if (i + 1) % accumulation == 0:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model, scheduler


def keeping_logger() -> Any:
    """One that keeps the values of AutoDropMonitor: ``(step, values)``."""
    from lightning.pytorch.loggers import Logger

    class Keeping(Logger):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[tuple[int, dict[str, float]]] = []

        @property
        def name(self) -> str:
            return "kept"

        @property
        def version(self) -> int:
            return 0

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            assert step is not None
            if any(name.startswith("autodrop/") for name in metrics):
                self.kept.append((step, dict(metrics)))

    return Keeping()


def test_the_documented_dict_is_the_loop_by_hand_and_resumes(tmp_path: pathlib.Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    from autodrop_ext.integrations.lightning import AutoDropMonitor

    model, expected = by_hand()
    logger = keeping_logger()
    saving = ModelCheckpoint(
        tmp_path, filename="{epoch}", every_n_epochs=SAVED_AFTER, save_top_k=-1
    )
    whole = module()
    trainer(
        tmp_path,
        callbacks=[AutoDropMonitor(), saving],
        logger=logger,
        enable_checkpointing=True,
    ).fit(whole, loader())
    assert_same_decisions(whole.scheduler, expected)
    assert_same_parameters(whole.model, model)

    assert [step for step, _ in logger.kept] == [d.step for d in expected.history]
    drops = 0
    for (_, values), decision in zip(logger.kept, expected.history, strict=True):
        drops += decision.dropped
        assert values["autodrop/angular_velocity"] == decision.angle
        assert values["autodrop/lr"] == decision.lr[0]
        assert values["autodrop/num_drops"] == drops

    resumed = module()
    checkpoint = tmp_path / f"epoch={SAVED_AFTER - 1}.ckpt"
    again = trainer(tmp_path)
    # Before Lightning 2.6 there was no such argument.
    safe = {"weights_only"} & inspect.signature(again.fit).parameters.keys()
    again.fit(resumed, loader(), ckpt_path=str(checkpoint), **dict.fromkeys(safe, True))
    assert_same_decisions(resumed.scheduler, expected)
    assert_same_parameters(resumed.model, model)


def test_stepping_once_an_epoch_is_pointed_out(tmp_path: pathlib.Path) -> None:
    """Lightning's default is "epoch", and it says nothing."""
    from autodrop_ext.integrations.lightning import AutoDropMonitor

    wrong = module(interval="epoch")
    with pytest.warns(RuntimeWarning, match=r"not once an epoch \(Lightning: 'interval': 'step'\)"):
        trainer(tmp_path, max_epochs=4).fit(wrong, loader())
    assert not wrong.scheduler.history

    with pytest.warns(RuntimeWarning, match="AutoDrop: expected 'interval': 'step'") as caught:
        trainer(tmp_path, max_epochs=1, callbacks=[AutoDropMonitor()]).fit(
            module(interval="epoch"), loader()
        )
    assert {w.filename for w in caught if "'interval'" in str(w.message)} == {__file__}
    with pytest.warns(RuntimeWarning, match="EpochAutoDrop: expected 'interval': 'epoch'"):
        trainer(tmp_path, max_epochs=1, callbacks=[AutoDropMonitor()]).fit(
            module(scheduler_of=EpochAutoDrop), loader()
        )
    with pytest.warns(RuntimeWarning, match="returned no scheduler of this package"):
        trainer(tmp_path, max_epochs=1, callbacks=[AutoDropMonitor()]).fit(
            module(scheduler_of=LinearLR), loader()
        )


def test_epochs_and_schedulers_inside_others_are_logged(tmp_path: pathlib.Path) -> None:
    from autodrop_ext.integrations.lightning import AutoDropMonitor

    def after_warmup(optimizer: torch.optim.Optimizer) -> SequentialLR:
        parts = [LinearLR(optimizer, total_iters=10), AutoDrop(optimizer, **SETTINGS)]
        return SequentialLR(optimizer, parts, milestones=[10])

    for interval, make, count in (
        ("epoch", EpochAutoDrop, 4),  # one for each epoch
        ("step", after_warmup, (4 * PER_EPOCH // 2 - 10) // 5 - 2),
    ):
        logger = keeping_logger()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            trainer(tmp_path, max_epochs=4, callbacks=[AutoDropMonitor()], logger=logger).fit(
                module(interval, make), loader()
            )
        assert len(logger.kept) == count
        assert "autodrop/lr" in logger.kept[-1][1]
    steps = [step for step, _ in logger.kept]
    assert steps == sorted(set(steps))


def test_a_training_step_that_returns_none_is_still_a_step(tmp_path: pathlib.Path) -> None:
    """Lightning then steps the optimizer without gradients; torch's loop by hand would as well."""
    skipped = (10, 11, 12)  # one step without any gradient, one with half of them
    ours = module(skipped=skipped)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*training_step.*returned.*None")
        trainer(tmp_path).fit(ours, loader())
    model, expected = by_hand(skipped=skipped)
    assert ours.scheduler.meter.steps == BATCHES // 2
    assert_same_decisions(ours.scheduler, expected)
    assert_same_parameters(ours.model, model)
