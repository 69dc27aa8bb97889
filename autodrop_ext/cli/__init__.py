"""Command line: ``autodrop doctor`` and ``plot``."""

from __future__ import annotations

import importlib.util
import sys

__all__ = ["main"]


def main() -> None:
    """Run ``autodrop`` or ``python -m autodrop_ext``; ``doctor`` needs no click."""
    missing = importlib.util.find_spec("click") is None
    if missing and sys.argv[1:2] == ["doctor"]:
        from .doctor import examine

        sys.exit(examine())
    if missing:
        sys.exit("autodrop: `autodrop plot` needs click: pip install 'autodrop_ext[cli]'")
    from .app import autodrop

    autodrop(prog_name="autodrop")
