"""The commands, put together."""

from __future__ import annotations

import click

import autodrop_ext

from .demo.command import demo
from .doctor import doctor
from .plot import plot
from .watch import watch


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(autodrop_ext.__version__, prog_name="autodrop_ext")
def autodrop() -> None:
    """Automatic learning-rate drop for PyTorch: try it, check it, look at a run."""


autodrop.add_command(demo)
autodrop.add_command(doctor)
autodrop.add_command(plot)
autodrop.add_command(watch)
