"""A KeyboardInterrupt before the n-th instruction of some code."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any


class Interrupter:
    """Raises KeyboardInterrupt at one of the places, or counts them.

    Every instruction is a place, more than those at which Python looks for signals.

    Args:
        at: number of the place, from 0; None counts only.
        watches: says whether the instructions of some code are places.

    Attributes:
        places: how many have been passed.
        where: the place at which it was raised.
    """

    def __init__(self, at: int | None, watches: Callable[[CodeType], bool]) -> None:
        self.at = at
        self.watches = watches
        self.places = 0
        self.where = ""

    def __enter__(self) -> Interrupter:
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def is_place(self, frame: FrameType) -> bool:
        """Return True if the next instruction of watched code counts."""
        return True

    def interrupt(self) -> None:
        """Do what happens at the place."""
        raise KeyboardInterrupt

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not self.watches(frame.f_code):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._inside

    def _inside(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode" and self.is_place(frame):
            self.places += 1
            if self.places - 1 == self.at:
                name = pathlib.Path(frame.f_code.co_filename).name
                self.where = f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
                self.interrupt()
        return self._inside
