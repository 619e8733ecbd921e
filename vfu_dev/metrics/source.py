"""The exporter's end of the feed: asks the server for figures, and keeps them for its own clients."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections import deque
from itertools import islice

from vfu_dev.errors import VfuDevError
from vfu_dev.figures import Figures, Sample, Snapshot

SAMPLES_KEPT = 3000
# Minimum seconds between two requests to the device, whatever the number of readers.
MIN_SECONDS = 0.05
# A scan of a big memory, or a step of a migration, may keep the device's thread busy that long.
TIMEOUT_SECONDS = 5.0
_MAX_LINE_BYTES = 4 << 20


class FigureSourceError(VfuDevError):
    """The server does not answer, or has hung up."""


class FigureSource:
    """Figures from a server's feed, for any number of threads.

    Args: feed: a connected stream socket; owned by this object.
    """

    def __init__(self, feed: socket.socket) -> None:
        feed.settimeout(TIMEOUT_SECONDS)
        self._feed = feed
        self._lock = threading.Lock()
        self._received = bytearray()
        self._owed = 0  # answers that are still to come
        self._snapshot: Snapshot | None = None
        self._asked = 0.0
        self._sequence = 0
        self._samples: deque[Sample] = deque(maxlen=SAMPLES_KEPT)

    def snapshot(self) -> Snapshot:
        """Return the device as it is, or was a moment ago.

        Raises: SourceError: the server does not answer.
        """
        return self.figures(0, limit=0).snapshot

    def figures(self, after: int, limit: int = SAMPLES_KEPT) -> Figures:
        """Return the same with up to `limit` samples after number `after`."""
        with self._lock:
            if self._snapshot is None or time.monotonic() - self._asked >= MIN_SECONDS:
                self._refresh()
            assert self._snapshot is not None
            oldest = self._sequence - len(self._samples)
            first = max(after, oldest) if after <= self._sequence else oldest
            found = list(islice(self._samples, first - oldest, first - oldest + limit))
            sequence = first + len(found)
            return Figures(self._snapshot, sequence, sequence < self._sequence, found)

    def check(self) -> None:
        """Ask the device's thread now.

        Raises: SourceError: it does not answer.
        """
        with self._lock:
            self._refresh()

    def hung_up(self) -> bool:
        """Say whether the server has ended."""
        if not self._lock.acquire(blocking=False):
            return False  # somebody is asking; the answer, or its absence, will tell
        try:
            readable, _, _ = select.select([self._feed], [], [], 0)
            return bool(readable) and self._feed.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True
        finally:
            self._lock.release()

    def _refresh(self) -> None:
        more = True
        while more:
            try:
                self._feed.sendall(b"%d\n" % self._sequence)
                self._owed += 1
                # An answer that came too late for who asked is passed over; the question was the same.
                while self._owed:
                    line = self._line()
                    self._owed -= 1
                figures = Figures.from_dict(json.loads(line))
            except (OSError, ValueError, KeyError, TypeError) as err:
                raise FigureSourceError(f"the server does not answer: {err}") from err
            self._samples.extend(figures.samples)
            self._sequence, more = figures.sequence, figures.more
            self._snapshot, self._asked = figures.snapshot, time.monotonic()

    def _line(self) -> bytes:
        while b"\n" not in self._received:
            part = self._feed.recv(1 << 16)
            if not part or len(self._received) > _MAX_LINE_BYTES:
                raise ConnectionResetError("it hung up")
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return bytes(line)
