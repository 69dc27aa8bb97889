"""The compiled core, if it loads, and the reason if it does not."""

from __future__ import annotations

from types import ModuleType

# torch first: the extension then shares its OpenMP runtime and thread pool instead of a second one
# whose idle threads would compete for the same cores.
from torch import Tensor

REINSTALL = "pip install --force-reinstall --no-deps ."
"""The command, to be given in the checkout."""

core: ModuleType | None = None
import_error = ""
try:
    from .. import _C
except ImportError as error:
    import_error = str(error)
else:
    core = _C


def why_missing() -> str:
    """Why :data:`core` is None and what to do about it."""
    return (
        f"the compiled core does not load ({import_error}); with a C++17 compiler at hand, install "
        f"the package again in its checkout: {REINSTALL}"
    )


def address(arena: Tensor | None) -> int:
    """Address of a tensor's first element; 0, which the core reads as nullptr, for None."""
    return 0 if arena is None else arena.data_ptr()
