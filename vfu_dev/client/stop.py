"""When to end: after a time, or at an interrupt."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """What a load waits on.

    Attributes:
        signal: the number of the signal that asked to end, None while there was none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._asked = threading.Event()

    def ask(self, number: int, _frame: Any = None) -> None:
        """Ask to end; a handler of signals. Asking twice is for somebody who does not want to wait."""
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        self._asked.set()

    @property
    def asked(self) -> bool:
        """Whether to end now."""
        return self._asked.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait for at most the given time; returns whether to end now."""
        return self._asked.wait(seconds)

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Have SIGINT and SIGTERM ask."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self.ask) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


def deadline_of(seconds: float | None) -> float:
    """Return when `seconds` from now are over, of the clock `time.monotonic`; None is never."""
    return float("inf") if seconds is None else time.monotonic() + seconds
