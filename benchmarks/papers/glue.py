"""BERT on GLUE's tab-separated files, by the Trainer of transformers and our callback."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from training.baselines import HypergradientAdamW, TrainableLearningRate
from training.ranks import Ranks
from training.run import LOG, RESULT, RunSpec, check_same, machine, replace_file
from training.schedules import Setup

from autodrop_ext import JsonLinesLog

from .recipes import RECIPES

SCHEDULES_HERE = ("autodrop", "linear", "constant", "hd", "tlr")
_MOST_TOKENS = 128  # of an example, Devlin et al. 2018 for GLUE
_LOG_SIZE = "log-size"  # of the log when Trainer saved; in each of its checkpoints, written last
_NLI = ("contradiction", "entailment", "neutral")


class Columns(NamedTuple):
    """Where a task's file has its sentences and its label.

    Attributes:
        folder: of the task below GLUE's.
        dev: name of the development file.
        header: whether the first line names the columns; otherwise they are numbers.
        texts: columns of one or two sentences.
        label: column of the label.
        labels: what it says, in the order of the classes.
    """

    folder: str
    dev: str
    header: bool
    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...]


COLUMNS = {
    "glue-cola": Columns("CoLA", "dev.tsv", False, ("3",), "1", ("0", "1")),
    "glue-mnli": Columns(
        "MNLI", "dev_matched.tsv", True, ("sentence1", "sentence2"), "gold_label", _NLI
    ),
    "glue-qnli": Columns(
        "QNLI", "dev.tsv", True, ("question", "sentence"), "label", ("entailment", "not_entailment")
    ),
    "glue-qqp": Columns(
        "QQP", "dev.tsv", True, ("question1", "question2"), "is_duplicate", ("0", "1")
    ),
    "glue-sst2": Columns("SST-2", "dev.tsv", True, ("sentence",), "label", ("0", "1")),
}


class Examples(NamedTuple):
    """Sentences, one or two an example, and classes ``[n]``."""

    texts: list[tuple[str, ...]]
    labels: list[int]


def read_examples(root: Path, model: str, *, train: bool) -> Examples:
    """One of GLUE's files.

    Lines of a length that their header does not have (QQP's published file has some) and labels
    that annotators did not agree on (``-``, in SNLI's and some copies of MNLI) are left out.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: a column is missing, or no line is whole.
    """
    columns = COLUMNS[model]
    folder = root / columns.folder if (root / columns.folder).is_dir() else root
    path = folder / ("train.tsv" if train else columns.dev)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected GLUE's {columns.folder}, found no such file")
    with path.open(encoding="utf-8", newline="") as file:
        # GLUE's quotation marks are part of the sentences.
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    head = rows.pop(0) if columns.header and rows else [str(i) for i in range(4)]
    places = {name: i for i, name in enumerate(head)}
    missing = [name for name in (*columns.texts, columns.label) if name not in places]
    if missing:
        raise ValueError(
            f"{path}: expected columns {', '.join((*columns.texts, columns.label))}, got "
            f"{', '.join(head)}"
        )
    classes = {label: i for i, label in enumerate(columns.labels)}
    whole = [r for r in rows if len(r) == len(head) and r[places[columns.label]] in classes]
    if not whole:
        raise ValueError(
            f"{path}: expected lines of {len(head)} columns with a label out of "
            f"{', '.join(columns.labels)}, got none"
        )
    return Examples(
        [tuple(r[places[name]] for name in columns.texts) for r in whole],
        [classes[r[places[columns.label]]] for r in whole],
    )


class _Encoded(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, examples: Examples, tokenizer: Any) -> None:
        sides = list(zip(*examples.texts, strict=True))
        self._fields = tokenizer(
            *(list(side) for side in sides), truncation=True, max_length=_MOST_TOKENS
        )
        self._labels = examples.labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        fields = {name: values[i] for name, values in self._fields.items()}
        return {**fields, "labels": self._labels[i]}


def train_glue(
    spec: RunSpec,
    root: Path,
    *,
    keep_checkpoint: bool = True,
    on_epoch: Callable[[int, int, dict[str, Any]], object] = lambda epoch, epochs, record: None,
) -> dict[str, Any]:
    """As :func:`training.loop.train`, for GLUE's tasks.

    Trainer saves its state after every epoch, and a killed run continues from the last one that was
    saved whole. A run whose loss is no number ends with its epoch. With several processes
    (torchrun) Trainer shares the batches among them; one process must see one GPU at most, because
    Trainer would give each of several a whole batch.

    Raises:
        ValueError: the schedule is none of Table 5's, an option is missing or has no meaning here,
            several GPUs are visible to one process, or the folder holds a run of another spec.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "GLUE needs transformers: pip install 'autodrop_ext[bench]'", name="transformers"
        ) from error
    from autodrop_ext.integrations.transformers import AutoDropCallback

    if spec.schedule not in SCHEDULES_HERE:
        raise ValueError(
            f"schedule: GLUE's tasks have {', '.join(SCHEDULES_HERE)}, got {spec.schedule!r}"
        )
    if spec.data is None or spec.checkpoint is None:
        raise ValueError(
            f"data, checkpoint: {spec.model} needs GLUE's folder and a pretrained model, got "
            f"{spec.data}, {spec.checkpoint}"
        )
    if spec.angles is not None:
        raise ValueError(
            f"angles: {spec.model} is trained by Trainer, which has no meter that only watches; "
            f"expected none, got {spec.angles!r}"
        )
    folder = spec.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    result_path = folder / RESULT
    if result_path.exists():
        done: dict[str, Any] = json.loads(result_path.read_text())
        check_same(spec, RECIPES[spec.model].recipe, done, result_path)
        return done

    paper = RECIPES[spec.model]
    recipe = paper.recipe
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec.checkpoint)
    train, test = _data(spec, tokenizer)
    torch.manual_seed(spec.seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        spec.checkpoint, num_labels=paper.classes
    )
    lr = recipe.lr if spec.lr is None else spec.lr
    epochs = spec.epochs or recipe.epochs
    steps_per_epoch = -(-len(train) // (spec.batch or recipe.batch or 32))
    warmup = spec.warmup(recipe, epochs * steps_per_epoch)
    args = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=max(1, (spec.batch or recipe.batch or 32) // _processes()),
        per_device_eval_batch_size=128,
        learning_rate=lr,
        num_train_epochs=epochs,
        lr_scheduler_type="linear" if spec.schedule == "linear" else "constant_with_warmup",
        warmup_steps=warmup,
        weight_decay=0.0,  # with it Trainer's AdamW would be another optimizer than Adam
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        adam_epsilon=recipe.eps,
        bf16=spec.bf16,
        use_cpu=spec.device == "cpu",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,  # the last whole one stays while the next is written
        logging_strategy="epoch",
        logging_nan_inf_filter=False,  # it would replace what shows that a run has diverged
        seed=spec.seed,
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=spec.workers,
    )
    if args.n_gpu > 1:
        raise ValueError(
            f"device: expected one GPU for each process, because Trainer multiplies the batch by "
            f"their number, got {args.n_gpu}; start with torchrun, or set CUDA_VISIBLE_DEVICES=0"
        )
    setup = Setup(
        model,
        recipe,
        lr,
        epochs,
        steps_per_epoch,
        spec.schedule_settings(recipe),
        warmup_steps=warmup,
    )
    trainer = transformers.Trainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        compute_metrics=lambda p: {
            "accuracy": float((np.argmax(p.predictions, axis=-1) == p.label_ids).mean())
        },
        optimizers=_optimizers(spec, setup),
    )
    log = JsonLinesLog(folder / LOG)
    saved = _last_whole(folder / "trainer")
    if trainer.is_world_process_zero():
        for place in (folder / "trainer").glob("checkpoint-*"):
            if not (place / _LOG_SIZE).is_file():
                shutil.rmtree(place)  # Trainer would count it among those that it keeps
        if saved is None:
            log.path.unlink(missing_ok=True)
        elif log.path.exists():
            os.truncate(log.path, int((saved / _LOG_SIZE).read_text()))
    if spec.schedule == "autodrop":
        settings = {**setup.settings, "window": setup.window}
        AutoDropCallback(**settings, buckets=None, on_reading=log).attach(trainer)

    class Progress(transformers.TrainerCallback):  # type: ignore[misc]
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            curve = _curve(state.log_history)
            control.should_training_stop |= curve[-1]["loss"] is None
            on_epoch(len(curve), epochs, curve[-1])

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                written = log.path.stat().st_size if log.path.exists() else 0
                place = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _LOG_SIZE
                replace_file(place, str(written).encode())  # last of all: now it is whole

    trainer.add_callback(Progress())
    trainer.train(resume_from_checkpoint=None if saved is None else str(saved))
    curve = _curve(trainer.state.log_history)
    last = curve[-1]
    diverged = last["loss"] is None
    done = {
        "spec": asdict(spec),
        "recipe": spec.recipe_in_use(recipe),
        "measure": "error, %",
        "initial_lr": lr,
        "settings": setup.plain_settings(),
        "steps_per_epoch": steps_per_epoch,
        "diverged": diverged,
        "error": None if diverged else last["error"],
        "best_error": None if diverged else min(r["error"] for r in curve),
        "loss": last["loss"],
        "test_loss": last["test_loss"],
        "lr": last["lr"],
        "drops": getattr(trainer.lr_scheduler, "num_drops", None),
        "curve": curve,
        "machine": machine(spec.device),
    }
    if trainer.is_world_process_zero():
        replace_file(result_path, json.dumps(done, indent=1, allow_nan=False).encode())
        if not keep_checkpoint:
            shutil.rmtree(folder / "trainer")
    return done


def _last_whole(folder: Path) -> Path | None:
    """The newest of Trainer's checkpoints that was saved to its end; a kill may leave a part."""
    whole = [p for p in folder.glob("checkpoint-*") if (p / _LOG_SIZE).is_file()]
    return max(whole, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def _data(spec: RunSpec, tokenizer: Any) -> tuple[_Encoded, _Encoded]:
    root = Path(spec.data or "")
    train = read_examples(root, spec.model, train=True)
    test = read_examples(root, spec.model, train=False)
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = order[: spec.subset]
    if spec.validation:
        from training.task import VALIDATION

        cut = max(1, len(chosen) // VALIDATION)
        test, chosen = _part(train, chosen[:cut]), chosen[cut:]
    elif spec.subset is not None:
        test = _part(test, range(min(spec.subset, len(test.labels))))
    return _Encoded(_part(train, chosen), tokenizer), _Encoded(test, tokenizer)


def _part(examples: Examples, indices: Sequence[int]) -> Examples:
    return Examples([examples.texts[i] for i in indices], [examples.labels[i] for i in indices])


def _optimizers(spec: RunSpec, setup: Setup) -> tuple[Any, Any]:
    """For the two methods that move the rate by themselves; for the others Trainer makes them."""
    if spec.schedule not in ("hd", "tlr"):
        return None, None
    setup.model.to(spec.device)
    recipe, settings = setup.recipe, setup.settings
    if spec.schedule == "hd":
        optimizer: Any = HypergradientAdamW(
            setup.model.parameters(),
            setup.lr,
            settings["beta"],
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=0.0,
        )
        return optimizer, _Moving(optimizer, setup.warmup_steps)
    optimizer = setup.optimizer()
    gap = max(settings["least_gap"], round(settings["gap_epochs"] * setup.steps_per_epoch))
    rate = TrainableLearningRate(optimizer, gap, bound=settings["bound"])
    return optimizer, _Moving(optimizer, setup.warmup_steps, rate)


class _Moving:
    """A scheduler for Trainer around a rate that moves by itself, with a linear warm-up.

    Args:
        optimizer: whose rate it is; HD moves it in ``step()``.
        warmup_steps: over which the rate is multiplied by a factor that rises to 1.
        rate: changes the rate after every step that is no warm-up; None: the optimizer does.
    """

    def __init__(
        self, optimizer: Any, warmup_steps: int, rate: TrainableLearningRate | None = None
    ) -> None:
        self._groups, self._rate = optimizer.param_groups, rate
        self.warmup_steps, self.steps = warmup_steps, 0
        self._scheduled = [group["lr"] for group in self._groups]
        self._used: list[float] = []
        self._use()

    def step(self) -> None:
        """Trainer calls this after every optimizer step."""
        for i, group in enumerate(self._groups):
            self._scheduled[i] += group["lr"] - self._used[i]  # what the step itself has changed
            group["lr"] = self._scheduled[i]
        self.steps += 1
        if self._rate is not None and self.steps == self.warmup_steps:
            self._rate.begin()
        elif self._rate is not None and self.steps > self.warmup_steps:
            self._rate.step()
            self._scheduled = [group["lr"] for group in self._groups]
        self._use()

    def _use(self) -> None:
        share = min(1.0, (self.steps + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        self._used = [lr * share for lr in self._scheduled]
        for group, lr in zip(self._groups, self._used, strict=True):
            group["lr"] = lr

    def get_last_lr(self) -> list[float]:
        """Rates of the next step."""
        return [float(group["lr"]) for group in self._groups]

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors; the rates in use belong to the optimizer's state."""
        return {
            "steps": self.steps,
            "scheduled": list(self._scheduled),
            "used": list(self._used),
            "rate": None if self._rate is None else self._rate.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.steps, self._scheduled = state["steps"], list(state["scheduled"])
        self._used = list(state["used"])
        if self._rate is not None:
            self._rate.load_state_dict(state["rate"])


def _curve(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record an epoch, as the other tasks have them, from Trainer's log."""
    curve = []
    training: dict[str, Any] = {}
    for entry in history:
        if "loss" in entry:
            training = entry
        elif "eval_accuracy" in entry:
            loss = _finite(training.get("loss"))
            test_loss = _finite(entry["eval_loss"])
            diverged = loss is None or test_loss is None
            curve.append(
                {
                    "epoch": len(curve) + 1,
                    "step": entry["step"],
                    "loss": None if diverged else loss,
                    "lr": _finite(training.get("learning_rate")),
                    "error": None if diverged else 100 * (1 - entry["eval_accuracy"]),
                    "test_loss": None if diverged else test_loss,
                }
            )
    return curve


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _processes() -> int:
    """Of this run; Trainer's batch is that of one of them."""
    return Ranks().size
