"""Ctrl-C and SIGTERM while training: noted at once, acted on at the next step boundary, so that a checkpoint can be written first."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Context manager: while it is open, the first SIGINT or SIGTERM sets `name`; a second one ends the process at once.

    Outside the main thread (a notebook's, a server's) signals stay as they are.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            os._exit(128 + number)
        self.name = signal.Signals(number).name

    @property
    def exit_status(self) -> int:
        return 130 if self.name == "SIGINT" else 143

    def __call__(self) -> bool:
        return self.name is not None
