"""Starts the exporter beside a server, in a process of its own.

In a thread of the server it would hold Python's global lock while it writes out a scrape, and the device's
thread, which gives that lock up twice in every MMIO, would wait for it each time.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from vfu_dev.errors import VfuDevError

_STOP_SECONDS = 5.0


class Exporter:
    """An exporter process, listening from the start.

    Args:
        address: where to listen, a name or number; IPv6 too.
        port: 0 for any that is free.

    Attributes:
        feed: the server's end of the feed; its receiver owns it.
        url: where the live page is.

    Raises: VfuDevError: the address cannot be listened on.
    """

    def __init__(self, address: str, port: int) -> None:
        listener = _listen(address, port)
        self.feed, theirs = socket.socketpair()
        with listener, theirs:
            host, self.port = listener.getsockname()[:2]
            self.url = f"http://[{host}]:{self.port}/" if ":" in host else f"http://{host}:{self.port}/"
            fds = theirs.fileno(), listener.fileno()
            arguments = [*map(str, fds), str(os.getpid())]
            # -P: what lies in the current folder is not ours to import.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "vfu_dev.metrics.exporter", *arguments],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def close(self) -> None:
        """End the process; closing twice is fine."""
        self.feed.close()
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _listen(address: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as err:
        raise VfuDevError(f"metrics address {address}: {err}") from err
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(16)
    except OSError as err:
        listener.close()
        raise VfuDevError(f"metrics port {port} of {address}: {err.strerror}") from err
    return listener
