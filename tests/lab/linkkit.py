"""A link between two QEMUs with a fixed limit in bytes a second, whatever the processors could do."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from serverkit import PATIENCE_SECONDS

CHUNK_BYTES = 64 << 10
# A link that had nothing to carry, or got no processor, owes no more than this.
CATCH_UP_SECONDS = 0.005


class Link:
    """Takes one connection on `path` and carries it to `target`; both ways, only one is limited.

    Args: bytes_a_second: from whoever connects to `target`.
    """

    def __init__(self, path: Path, target: Path, bytes_a_second: float) -> None:
        self._rate = bytes_a_second
        self._target = target
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._run)]
        self._threads[0].start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            near, _ = self._listener.accept()
            far = socket.socket(socket.AF_UNIX)
            self._ends += [near, far]
            far.connect(str(self._target))
            back = threading.Thread(target=self._carry, args=(far, near, None))
            self._threads.append(back)
            back.start()
            self._carry(near, far, self._rate)

    def _carry(self, origin: socket.socket, target: socket.socket, rate: float | None) -> None:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        due = time.monotonic()
        with contextlib.suppress(OSError):
            while count := origin.recv_into(buffer):
                target.sendall(buffer[:count])
                if rate:
                    now = time.monotonic()
                    due = max(due, now - CATCH_UP_SECONDS) + count / rate
                    if due > now:
                        time.sleep(due - now)
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Cut the link."""
        for one in (self._listener, *self._ends):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
        for one in (self._listener, *self._ends):
            one.close()


@contextlib.contextmanager
def link(path: Path, target: Path, bytes_a_second: float) -> Iterator[str]:
    """Yield the address to migrate to, in QEMU's words."""
    path.unlink(missing_ok=True)
    one = Link(path, target, bytes_a_second)
    try:
        yield f"unix:{path}"
    finally:
        one.close()
