"""Which events of the client's connection wake the loop, and when none may."""

from __future__ import annotations

import contextlib
import select
import selectors
from collections.abc import Callable, Iterator


class Watch:
    """The registration of one descriptor, which changes with every connection.

    Args:
        selector: the loop's; its data for our sockets is a callable without arguments.
        fd: returns what to wait on now, negative for nothing.
        serve: called when it is ready.
    """

    def __init__(
        self, selector: selectors.BaseSelector, fd: Callable[[], int], serve: Callable[[], None]
    ) -> None:
        self._selector = selector
        self._fd = fd
        self._serve = serve
        self._registered = -1
        self._events = 0
        self._set_aside = 0  # how many wait for the client in the middle of its requests

    def renew(self) -> None:
        """Follow a new connection, or the end of one.

        It registers anew even when the number is the same: the kernel forgot the old registration when the
        library closed the old connection.
        """
        self._forget()
        if not self._set_aside and (fd := self._fd()) >= 0:
            self._registered, self._events = fd, selectors.EVENT_READ
            self._selector.register(fd, selectors.EVENT_READ, self._serve)

    def want(self, events: int) -> None:
        """Wait for POLLIN, or for POLLOUT while the client does not read its replies."""
        wanted = selectors.EVENT_WRITE if events == select.POLLOUT else selectors.EVENT_READ
        if self._registered >= 0 and self._events != wanted:
            self._events = wanted
            self._selector.modify(self._registered, wanted, self._serve)

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Have nothing of the client's served meanwhile: this is in the middle of a request of its."""
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
