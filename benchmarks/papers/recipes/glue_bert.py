"""BERT on the five GLUE tasks of UAI 2024, Table 5."""

from __future__ import annotations

from training.recipe import Recipe

from ..recipe import PaperRecipe

TASKS = {"cola": "CoLA", "mnli": "MNLI", "qnli": "QNLI", "qqp": "QQP", "sst2": "SST-2"}


def _recipe(task: str, title: str) -> PaperRecipe:
    return PaperRecipe(
        name=f"glue-{task}",
        title=f"BERT, GLUE {title}",
        kind="glue",
        data="glue",
        classes=3 if task == "mnli" else 2,
        recipe=Recipe(
            "adam",
            lr=1e-5,
            rates=(1e-7, 1e-6, 1e-5),
            epochs=3,
            batch=32,
            warmup_share=0.1,  # of the run; see sources
            warmed=("autodrop", "constant", "linear"),
        ),
        seeds=(0,),
        paper="UAI 2024: Table 5",
        sources="UAI 2024, section 6.2: Adam; constant and linear rates search the peak from "
        "1e-7, 1e-6, 1e-5; warm-up for AutoDrop and for the constant and linear rate, none for HD "
        "and TLR. The paper prints neither epochs nor batch nor the length of the warm-up nor the "
        "initial rate of AutoDrop, HD and TLR: 3 and 32 as Devlin et al. 2018, whose program also "
        "warms up over a tenth of each task's run, and 1e-5, the highest of the grid. Its table is "
        "headed BLEU; its numbers can only be accuracies, which is what is measured here (MNLI: "
        "matched), on the development sets, because the labels of the test sets are not "
        "published. AutoDrop's window follows the package's rule for the length of the run after "
        "its warm-up, without its floor of 16 steps.",
    )


RECIPES = tuple(_recipe(task, title) for task, title in TASKS.items())
