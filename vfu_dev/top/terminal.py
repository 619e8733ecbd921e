"""Single keys from a terminal, without waiting for Enter."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from types import TracebackType
from typing import Any, Self


class Keys:
    """Keys while the context lasts, then the terminal is as it was. Where there is none, no key comes."""

    def __init__(self) -> None:
        self._fd = -1
        self._before: list[Any] = []

    def __enter__(self) -> Self:
        try:
            fd = sys.stdin.fileno()
            self._before = termios.tcgetattr(fd)
            tty.setcbreak(fd)  # Ctrl-C stays a signal
            self._fd = fd
        except (termios.error, OSError, ValueError):
            self._fd = -1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
            self._fd = -1

    def wait(self, seconds: float) -> str:
        """Return the keys pressed within `seconds`, as soon as there are any; empty when there were none."""
        if self._fd < 0:
            time.sleep(seconds)
            return ""
        ready, _, _ = select.select([self._fd], [], [], seconds)
        if not ready:
            return ""
        data = os.read(self._fd, 64)
        if not data:  # the terminal went away
            return "q"
        return data.decode(errors="replace")
