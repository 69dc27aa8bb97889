"""A counter of steps, snapshots and windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Windows:
    """Counts the steps of windows that follow each other.

    ``steps`` is the one count that grows with each step, in a single assignment; the position in
    the window follows from it. So an interrupt at any place leaves the counts of one step or of the
    next. The end of a window that cannot be used is waited for, because other ranks end it too.
    """

    window: int  # optimizer steps per window
    snapshots: int | None  # how many of them are read; None for all
    steps: int = 0  # optimizer steps so far
    windows: int = 0  # closed
    windows_since_restart: int = 0  # closed since the last start over
    taken: int = 0  # snapshots of the open window
    spoiled: bool = False  # the end of the open window starts over
    incomplete: bool = False  # snapshots of the open window are missing; those before it stay
    begin: int = 0  # steps before the open window
    closing: int = 0  # windows there will be once the window at hand is closed

    @property
    def position(self) -> int:
        """Steps of the open window so far."""
        return self.steps - self.begin

    @property
    def snapshots_per_window(self) -> int:
        """Snapshots of a whole window."""
        return self.window if self.snapshots is None else min(self.snapshots, self.window)

    def is_snapshot(self) -> bool:
        """Return whether the parameters are to be read after this step; reads are evenly spaced."""
        return self.position * self.snapshots_per_window // self.window > self.taken

    def next_window(self) -> None:
        """The next step opens a window."""
        self.begin, self.taken, self.incomplete = self.steps, 0, False

    def start_over(self, position: int = 0) -> None:
        """Forget the windows since the last start over.

        Args:
            position: steps of the open window so far.
        """
        self.begin = self.steps - position
        self.taken = self.windows_since_restart = 0
        self.spoiled = self.incomplete = False
        self.closing = self.windows

    def discard(self) -> bool:
        """Discard the open window, and return whether that has started over at once."""
        if 0 < self.position < self.window:
            self.spoiled = True
            return False
        if self.position:  # at the window's end, which the other ranks have passed
            self.windows = max(self.windows, self.closing)
        self.start_over()
        return True

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

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`."""
        self.window, self.snapshots = state["window"], state["snapshots"]
        self.steps, self.windows = state["steps"], state["windows"]
        self.start_over(state["position"])
        self.taken = self.position * self.snapshots_per_window // self.window
        self.windows_since_restart, self.spoiled = state["usable"], state["spoiled"]
