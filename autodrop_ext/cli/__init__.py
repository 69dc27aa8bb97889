"""Command line: ``autodrop demo``, ``doctor``, ``plot`` and ``watch``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of ``autodrop`` and of ``python -m autodrop_ext``."""
    try:
        import click  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        sys.exit(f"autodrop: {error}; the commands need: pip install 'autodrop_ext[cli]'")
    from .app import autodrop

    autodrop(prog_name="autodrop")
