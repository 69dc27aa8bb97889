"""Command line: ``autodrop doctor`` and ``plot``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import autodrop_ext

from ..plotting.titles import printable
from .doctor import examine
from .plot import draw

__all__ = ["main"]

# What a log that JsonLinesLog did not write may lead to.
_BROKEN = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError)
_LONGEST = 300  # characters of an error message: a broken log may quote a line of any length


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``autodrop`` or ``python -m autodrop_ext``, with the process's arguments by default."""
    parser = argparse.ArgumentParser("autodrop", description="Automatic learning-rate drop.")
    version = f"autodrop_ext, version {autodrop_ext.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = "show versions and backends, and test that angles are measured correctly"
    commands.add_parser("doctor", help=about, description=f"{about}; exit status 1 if not")
    about = "draw the log of a run, or several into one picture"
    plot = commands.add_parser("plot", help=about, description=about)
    plot.add_argument("logs", metavar="LOG", nargs="+", type=Path, help="what JsonLinesLog wrote")
    text = "the picture; its ending gives the format; by default LOG.png or comparison.png"
    plot.add_argument("-o", "--output", type=Path, help=text)
    given = parser.parse_args(arguments)
    if given.command == "doctor":
        sys.exit(examine())
    try:
        for line in draw(given.logs, given.output):
            print(printable(line))
    except (ImportError, *_BROKEN) as error:
        text = " ".join(str(error).split())
        if not isinstance(error, (ImportError, OSError, ValueError)):
            text = f"a record is not as JsonLinesLog writes it: {text}"
        sys.exit(f"autodrop: {printable(text)[:_LONGEST]}")
