"""The compiled core, if it loads, and the reason if it does not."""

from __future__ import annotations

import importlib
import pathlib
from types import ModuleType

# torch first: the extension then shares its OpenMP runtime and thread pool instead of a second one
# whose idle threads would compete for the same cores.

core: ModuleType | None = None
import_error = ""
try:
    core = importlib.import_module("autodrop_ext._C")
except ImportError as error:
    import_error = str(error)


def repair() -> str:
    """Return what to do if :data:`core` is None."""
    checkout = pathlib.Path(__file__).parents[2]
    if (checkout / "csrc").is_dir():
        return (
            f"Python imports the package from its checkout {checkout}, which holds nothing "
            "compiled; run Python in another directory, or install with: pip install -e ."
        )
    return (
        "with a C++17 compiler at hand, install the package again in its checkout: "
        "pip install --force-reinstall --no-deps ."
    )


def why_missing() -> str:
    """Return why :data:`core` is None and what to do about it."""
    return f"the compiled core does not load ({import_error}); {repair()}"


def loaded() -> ModuleType:
    """Return the compiled core.

    Raises:
        RuntimeError: it does not load; the message says why and what to do.
    """
    if core is None:
        raise RuntimeError(why_missing())
    return core
