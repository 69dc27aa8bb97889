"""The ``autodrop`` command."""

from __future__ import annotations

import click

import autodrop_ext

from .doctor import examine
from .plot import plot


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(autodrop_ext.__version__, prog_name="autodrop_ext")
def autodrop() -> None:
    """Automatic learning-rate drop for PyTorch: check the installation, look at a run."""


@autodrop.command()
def doctor() -> None:
    """Show versions and backends, and test that angles are measured correctly.

    The exit status is 1 if the compiled core does not load or a test fails.
    """
    raise SystemExit(examine())


autodrop.add_command(plot)
