"""What both halves of a test know: the process that the library is preloaded into, and pytest's."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass
class Served:
    """Device servers, as a test's process sees them: sockets are those of devices 0, 1, ...

    `registers`: name -> (offset in BAR0, bytes) of the reference device.
    """

    sockets: list[str]
    pids: list[int] = field(default_factory=list)
    memory_bytes: int = 0
    registers: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def kill(self, number: int = 0) -> None:
        """End a server at once (SIGKILL); return when it has let go of its sockets."""
        os.kill(self.pids[number], signal.SIGKILL)
        self._wait_for(number, "ZX")

    def pause(self, number: int = 0) -> None:
        """Have a server answer nothing until `resume`."""
        os.kill(self.pids[number], signal.SIGSTOP)
        self._wait_for(number, "T")

    def resume(self, number: int = 0) -> None:
        """Let it go on."""
        os.kill(self.pids[number], signal.SIGCONT)

    def _wait_for(self, number: int, states: str) -> None:
        """Wait until all threads of a server are in one of these states (letters of proc(5)).

        A signal takes effect when they run; until the last one is dead, their sockets are open.
        """

        def found() -> set[str]:
            stats = Path(f"/proc/{self.pids[number]}/task").glob("*/stat")
            return {stat.read_text().rpartition(")")[2].split()[0] for stat in stats}

        while True:
            with contextlib.suppress(OSError):  # a thread that is gone
                if found() <= set(states):
                    return
            time.sleep(0.001)

    def to_json(self) -> dict[str, Any]:
        """What run_inside.py makes this of again."""
        return asdict(self)


def inside(
    environment: dict[str, str] | None = None, *, variant: str = "asan", fds: bool = True
) -> Callable[[Function], Function]:
    """Have a test run in a process of its own that the library is preloaded into.

    Args: environment: more for it. variant: which build of the library: asan, tsan or plain.
          fds: whether descriptors stand for devices there (the way by descriptor).
    """

    def mark(function: Function) -> Function:
        function.inside = (environment or {}, variant, fds)  # type: ignore[attr-defined]
        return function

    return mark
