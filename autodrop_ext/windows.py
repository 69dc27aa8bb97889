"""A counter of steps, snapshots and windows."""

from __future__ import annotations

from typing import Any


class Windows:
    """Counts the steps of windows that follow each other.

    ``steps`` is the one count that grows with each step, in a single assignment; the position in
    the window follows from it. So an interrupt at any place leaves the counts of one step or of the
    next.

    Args:
        window: optimizer steps per window.
        snapshots: how many of them are read; None for all.

    Attributes:
        window: optimizer steps per window.
        snapshots: the argument.
        steps: optimizer steps so far.
        windows: windows closed.
        windows_since_restart: windows closed since the last start over.
        taken: snapshots of the open window.
        spoiled: whether the open window cannot be used, so that its end starts over. Its end is
            waited for, because other ranks end it too.
        incomplete: whether snapshots of the open window are missing. Its end is waited for, too,
            and the windows before it stay.
    """

    def __init__(self, window: int, snapshots: int | None) -> None:
        self.window = window
        self.snapshots = snapshots
        self.steps = 0
        self.windows = 0
        self.windows_since_restart = 0
        self.taken = 0
        self.spoiled = False
        self.incomplete = False
        self._begin = 0  # steps before the open window
        self._closing = 0  # windows there will be once the window at hand is closed

    @property
    def position(self) -> int:
        """Steps of the open window so far."""
        return self.steps - self._begin

    @property
    def snapshots_per_window(self) -> int:
        """Snapshots of a whole window."""
        return self.window if self.snapshots is None else min(self.snapshots, self.window)

    def is_snapshot(self) -> bool:
        """Return whether the parameters are to be read after this step; reads are evenly spaced."""
        return self.position * self.snapshots_per_window // self.window > self.taken

    def begin_close(self) -> None:
        """The window's end is reached; :meth:`discard` needs to know until it is closed."""
        self._closing = self.windows + 1

    def next_window(self) -> None:
        """The next step opens a window."""
        self._begin, self.taken, self.incomplete = self.steps, 0, False

    def start_over(self, position: int = 0) -> None:
        """Forget the windows since the last start over.

        Args:
            position: steps of the open window so far.
        """
        self._begin = self.steps - position
        self.taken = 0
        self.spoiled = self.incomplete = False
        self.windows_since_restart = 0
        self._closing = self.windows

    def discard(self) -> bool:
        """Discard the open window, and return whether that has started over at once.

        Within a window its end is waited for, because other ranks end it too.
        """
        if 0 < self.position < self.window:
            self.spoiled = True
            return False
        if self.position:  # at the window's end, which the other ranks have passed
            self.windows = max(self.windows, self._closing)
        self.start_over()
        return True

    def double(self) -> None:
        """Let the last two windows be one of twice the length."""
        self.window *= 2
        self.windows_since_restart = 1

    def state(self) -> dict[str, Any]:
        """Return the counts as plain values."""
        return {
            "window": self.window,
            "snapshots": self.snapshots,
            "steps": self.steps,
            "windows": self.windows,
            "position": self.position,
            "usable": self.windows_since_restart,
            "spoiled": self.spoiled,
        }

    def restore(
        self, steps: int, windows: int, position: int, windows_since_restart: int, *, spoiled: bool
    ) -> None:
        """Continue from a :meth:`state`; window and snapshots are set before."""
        self.steps, self.windows = steps, windows
        self.start_over(position)
        self.taken = position * self.snapshots_per_window // self.window
        self.windows_since_restart, self.spoiled = windows_since_restart, spoiled
