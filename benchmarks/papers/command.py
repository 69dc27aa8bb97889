"""The papers' tables and figures, and the commands of ``benchmarks/training`` with their models.

python benchmarks/papers/command.py --help
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

# Run as a file, this folder's parent is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.command import EXPECTED, message_of, train_runs
from training.command import cli as training
from training.ranks import Ranks, start_ranks
from training.schedules import SCHEDULES

from papers.exhibits import EXHIBITS
from papers.making import Options, list_exhibits, make_exhibit
from papers.recipes import RECIPES
from papers.sources import SOURCES


class Place(click.ParamType):
    """``DATASET=FOLDER``."""

    name = "dataset=folder"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, str]:
        """The data set's name and a folder that is there."""
        if isinstance(value, tuple):
            return value
        name, sign, folder = value.partition("=")
        if not sign or name not in SOURCES:
            self.fail(
                f"expected one of {', '.join(SOURCES)} and =FOLDER, got {value!r}", param, ctx
            )
        if name != "bert" and not Path(folder).is_dir():
            self.fail(f"{name}: expected a folder, got {folder!r}", param, ctx)
        return name, folder


@click.command()
@click.argument("names", nargs=-1, metavar="[TABLE or FIGURE]...")
@click.option(
    "--data",
    "places",
    type=Place(),
    multiple=True,
    help="Where a data set is; may be given several times.",
)
@click.option(
    "--model",
    "models",
    type=click.Choice(list(RECIPES)),
    multiple=True,
    metavar="NAME",
    help=f"Only this one: {', '.join(RECIPES)}.",
)
@click.option(
    "--schedule",
    "schedules",
    type=click.Choice(list(SCHEDULES)),
    multiple=True,
    metavar="NAME",
    help="Only this one.",
)
@click.option("--seeds", type=click.IntRange(1), help="At most so many.  [default: the paper's]")
@click.option("--epochs", type=click.IntRange(1), help="[default: the paper's]")
@click.option("--subset", type=click.IntRange(1), help="Examples.  [default: all]")
@click.option("--batch", type=click.IntRange(1), help="Examples a step.  [default: the paper's]")
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of what is decoded once.  [default: the data's]",
)
@click.option("--workers", type=click.IntRange(0), default=8, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--precision", type=click.Choice(["auto", "bf16", "fp32"]), default="auto", show_default=True
)
@click.option(
    "--finished", is_flag=True, help="Train nothing: make tables and figures of what there is."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True, help="Of uai-table-3."
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=60,
    show_default=True,
    help="Of each of its rounds, in which AutoDrop closes a window and TLR changes the rate.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default="build/paper",
    show_default=True,
)
def paper(
    names: Sequence[str],
    places: Sequence[tuple[str, str]],
    models: Sequence[str],
    schedules: Sequence[str],
    seeds: int | None,
    cache: Path | None,
    device: str,
    precision: str,
    finished: bool,
    rounds: int,
    steps: int,
    output: Path,
    **base: Any,
) -> None:
    """Tables and figures of the papers: what there is, or run and make some of it.

    Without a name: all of them, the data that they need, and how many runs are finished. With
    names such as uai-table-2 or 2021-figure-7, or with all: trains what is missing, prints the
    paper's numbers next to ours, and draws. Finished runs are not run again, interrupted ones go
    on. On several GPUs: torchrun --nproc-per-node 8 benchmarks/papers/command.py paper ...
    """
    unknown = [name for name in names if name not in EXHIBITS and name != "all"]
    if unknown:
        raise click.UsageError(
            f"expected names that the command without one lists, got {', '.join(unknown)}"
        )
    own = start_ranks()
    on_gpu = torch.cuda.is_available()
    device = own or (("cuda" if on_gpu else "cpu") if device == "auto" else device)
    bf16 = device.startswith("cuda") if precision == "auto" else precision == "bf16"
    options = Options(
        output,
        dict(places),
        models,
        schedules,
        seeds,
        cache,
        {**base, "device": device, "bf16": bf16},
        {"device": device, "bf16": bf16, "rounds": rounds, "steps": steps},
    )
    if not names:
        if Ranks().first:
            click.echo("\n".join(list_exhibits(options)))
        return
    for name in EXHIBITS if "all" in names else names:
        try:
            written = make_exhibit(
                name,
                options,
                None
                if finished
                else lambda specs, title: train_runs(specs, title, output, processes=1),
            )
        except EXPECTED as error:
            raise click.ClickException(message_of(error)) from error
        for path in written:
            click.echo(path.read_text() if path.suffix == ".md" else path)


cli = click.Group(
    commands={**training.commands, "paper": paper},
    context_settings=training.context_settings,
    help="Make the papers' tables and figures; train their models and compare schedules.",
)


if __name__ == "__main__":
    cli()
