"""The package's warnings."""

from __future__ import annotations

import os
import pathlib
import sys
import sysconfig
import warnings

import torch

# Whose frames are not the user's: this package, Python's own library, and installed packages, among
# them those that call a scheduler's step() for the user. Some are in the user's folder, or in that
# of the Python that a virtual environment was made from.
_INSTALLED = tuple(
    os.path.join(folder, "")
    for folder in {
        str(pathlib.Path(__file__).parent),
        str(pathlib.Path(torch.__file__).parents[1]),
        *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
        *(folder for folder in sys.path if folder.endswith(("site-packages", "dist-packages"))),
    }
)


class Warnings:
    """Warnings that carry the name of what the user made and point to the user's line.

    Between :meth:`hold` and :meth:`release` they wait, because a warning that is an error would
    leave what is between them half done.

    Args:
        owner: class that the user made, such as "AutoDrop".
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self._kinds: set[str | None] = set()
        self._held = False
        self._waiting: list[str] = []

    def once(self, kind: str | None, message: str) -> None:
        """Warn, unless there was a warning of this kind; None is none."""
        if kind is None or kind not in self._kinds:
            self._kinds.add(kind)
            self.warn(message)

    def mute(self, *kinds: str) -> None:
        """Give no warning of these kinds from now on."""
        self._kinds.update(kinds)

    def has_warned(self, kind: str) -> bool:
        """Return whether there was a warning of this kind."""
        return kind in self._kinds

    def warn(self, message: str) -> None:
        """Warn, now or at the next :meth:`release`."""
        self._waiting.append(message)
        if not self._held:
            self.release()

    def hold(self) -> None:
        """Let warnings wait for :meth:`release`."""
        self._held = True

    def release(self) -> None:
        """Warn of what has waited; after an error, the rest waits for the next call."""
        self._held = False
        while self._waiting:
            _warn(f"{self.owner}: {self._waiting.pop(0)}")


def _warn(message: str) -> None:
    """Warn at the innermost line that is the user's."""
    if sys.version_info >= (3, 12):
        warnings.warn(message, RuntimeWarning, skip_file_prefixes=_INSTALLED)
        return
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSTALLED):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)
