"""Decides which events of the client's connection wake the loop, and when none may."""

from __future__ import annotations

import contextlib
import select
import selectors
import time
from collections.abc import Callable, Iterator

# How long to sleep between two questions whether a wait is over.
_ASK_SECONDS = 0.05


class Watch:
    """The registration of one descriptor, which changes with every connection.

    Args:
        selector: the loop's; its data for our sockets is a callable without arguments.
        fd: returns what to wait on now, negative for nothing.
        serve: called when it is ready; None where somebody else waits for it: nothing is registered then.
    """

    def __init__(
        self, selector: selectors.BaseSelector, fd: Callable[[], int], serve: Callable[[], None] | None
    ) -> None:
        self._selector = selector
        self._fd = fd
        self._serve = serve
        self._registered = -1
        self._set_aside = 0  # how many wait for the client in the middle of its requests

    def renew(self) -> None:
        """Follow a new connection, or the end of one.

        It registers anew even when the number is the same: the kernel forgot the old registration when the
        library closed the old connection.
        """
        self._forget()
        if self._serve is not None and not self._set_aside and (fd := self._fd()) >= 0:
            self._registered = fd
            self._selector.register(fd, selectors.EVENT_READ, self._serve)

    def wait(
        self,
        seconds: float | None,
        over: Callable[[], bool],
        turn: Callable[[], bool],
        events: int = 0,
    ) -> bool:
        """In the middle of a client's request: serve all others until the time is up, or `over()`.

        Args:
            seconds: None for no limit.
            turn: other work between two waits; returns whether there is more.
            events: of the client's, poll(2)'s, that end the wait as well; its hanging up always does.

        Returns: whether it was the client that ended the wait.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        with self._client_waiting():
            waiting = select.poll()
            client = self._fd()
            if client >= 0:  # a device may work, and be held up, without one
                waiting.register(client, events)
            waiting.register(self._selector.fileno(), select.POLLIN)  # type: ignore[attr-defined]  # epoll's
            more = False
            while not over():
                left = _ASK_SECONDS
                if deadline is not None:
                    left = min(left, deadline - time.monotonic())
                    if left <= 0:
                        return False
                ready = dict(waiting.poll(0 if more else max(1, left * 1000)))
                if client in ready:
                    return True
                for key, _ in self._selector.select(0):
                    key.data()
                more = turn()
            return False

    @contextlib.contextmanager
    def _client_waiting(self) -> Iterator[None]:
        """Have nothing of the client's served meanwhile."""
        self._forget()
        self._set_aside += 1
        try:
            yield
        finally:
            self._set_aside -= 1
            self.renew()

    def _forget(self) -> None:
        if self._registered >= 0:
            with contextlib.suppress(KeyError, OSError):
                self._selector.unregister(self._registered)
        self._registered = -1
