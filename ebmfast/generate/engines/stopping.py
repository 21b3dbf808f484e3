"""Ctrl-C and SIGTERM as a flag: the first asks for a clean stop, a second one interrupts at once."""

from __future__ import annotations

import signal
import threading


class Signals:
    """While in the `with` block, `number` is the signal that came, or None; `flag` is set with it where given."""

    def __init__(self, flag=None):
        self.number: int | None = None
        self._flag, self._before = flag, {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, _frame) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        if self._flag is not None:
            self._flag.requested = True
