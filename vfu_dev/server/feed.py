"""Hands figures to a process that shows them, over a private socket pair."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable

from vfu_dev.figures import Figures

# Bytes that a peer may leave unread before it is dropped: a few answers.
_MAX_UNSENT_BYTES = 4 << 20


class Feed:
    """Answers each line, the number of a sample, with one line of JSON.

    Args:
        peer: a connected stream socket; owned by this object.
        selector: the loop's; its data for our socket is a callable without arguments.
        figures: what to answer with.
    """

    def __init__(
        self, peer: socket.socket, selector: selectors.BaseSelector, figures: Callable[[int], Figures]
    ) -> None:
        peer.setblocking(False)
        self._peer = peer
        self._selector = selector
        self._figures = figures
        self._received = bytearray()
        self._unsent = bytearray()
        self._open = True
        selector.register(peer, selectors.EVENT_READ, self._ready)

    def close(self) -> None:
        """Hang up; closing twice is fine."""
        if self._open:
            self._open = False
            self._selector.unregister(self._peer)
            self._peer.close()

    def _ready(self) -> None:
        try:
            data = self._peer.recv(4096)
        except BlockingIOError:
            data = None
        except OSError:
            data = b""
        if data == b"":
            self.close()
            return
        self._received += data or b""
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            self._unsent += self._figures(int(line)).to_json() + b"\n"
        self._send()

    def _send(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._peer.send(self._unsent)]
        except BlockingIOError:
            if len(self._unsent) > _MAX_UNSENT_BYTES:
                self.close()
                return
        except OSError:
            self.close()
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
        self._selector.modify(self._peer, events, self._ready)
