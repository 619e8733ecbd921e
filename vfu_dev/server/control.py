"""The control socket: one JSON object per line each way.

The answer to `{"command": "status"}` is `{"ok": true, "result": {...}}`, that to a bad request
`{"ok": false, "error": "text"}`. A command may take its time: it returns an iterator that the loop advances
between other work, and the answer follows when it ends.
"""

from __future__ import annotations

import json
import logging
import select
import selectors
import socket
from collections.abc import Callable, Collection, Iterator
from typing import Any

from vfu_dev.errors import VfuDevError
from vfu_dev.server.door import Door

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 64 * 1024
MAX_CLIENTS = 32
# Requests of one client served before the vfio-user socket is polled again.
_REQUESTS_A_TURN = 16
# A client that does not read its answers is dropped beyond this.
MAX_UNSENT_BYTES = 4 << 20

Request = dict[str, Any]
# Returns the command's result, or an iterator that yields while it works and returns the result.
Command = Callable[[Request], Any]


class _Client:
    def __init__(self, connection: socket.socket, refusal: str | None) -> None:
        self.connection = connection
        self.refusal = refusal  # the answer to whatever it asks
        self.received = bytearray()
        self.unsent = bytearray()
        self.job: Any = None
        self.more = False  # there may be whole lines in `received`
        self.closing = False
        self.ended = False  # it sends nothing more, but may wait for answers

    @property
    def busy(self) -> bool:
        """Whether there is work for this client without new input."""
        return self.job is not None or self.more


class ControlSocket:
    """Serves commands to the clients of a door.

    Args:
        door: where clients connect, at most `MAX_CLIENTS` at once; closed with this.
        selector: the loop's; its data for our sockets is a callable without arguments.
        commands: name -> function of the request.
        hidden: of these, earlier names, which work without being listed.
    """

    def __init__(
        self,
        door: Door,
        selector: selectors.BaseSelector,
        commands: dict[str, Command],
        hidden: Collection[str] = (),
    ) -> None:
        self._door = door
        self._selector = selector
        self._commands = commands
        self._hidden = hidden
        self._clients: dict[int, _Client] = {}
        selector.register(door, selectors.EVENT_READ, self._accept)

    @property
    def busy(self) -> bool:
        """Whether a command is at work that `advance` would advance."""
        return any(client.busy for client in self._clients.values())

    def advance(self) -> None:
        """Give every command at work one step."""
        for client in list(self._clients.values()):
            if client.job is not None:
                self._step(client)
            elif client.more:
                self._serve_lines(client)

    def flush(self) -> None:
        """Send what can be sent at once; for the answer to the command that ends the server."""
        for client in list(self._clients.values()):
            self._send(client)

    def close(self) -> None:
        """Drop all clients and close the door."""
        for client in list(self._clients.values()):
            self._drop(client)
        self._selector.unregister(self._door)
        self._door.close()

    def _accept(self) -> None:
        connection = self._door.accept()
        if connection is None:
            return
        strangers = (client for client in self._clients.values() if client.refusal is not None)
        if len(self._clients) >= MAX_CLIENTS and (stranger := next(strangers, None)) is not None:
            self._drop(stranger)  # it has sent nothing, and would get no answer
        if len(self._clients) >= MAX_CLIENTS:
            connection.close()
            logger.warning("control: more than %d clients, one turned away", MAX_CLIENTS)
            return
        client = _Client(connection, self._door.access.refusal(connection))
        self._clients[connection.fileno()] = client
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._ready(client))

    def _ready(self, client: _Client) -> None:
        if client.unsent:
            self._send(client)
        if client.connection.fileno() < 0:
            return  # sending found that it is gone, and dropped it
        if client.ended:
            if _has_hung_up(client.connection):
                self._drop(client)
            return
        if client.busy and len(client.received) > MAX_LINE_BYTES:
            return  # it has asked enough; the rest waits in the socket
        try:
            data = client.connection.recv(MAX_LINE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._drop(client)
            return
        if not data:
            # `echo ... | nc -U PATH` ends its side at once and reads what comes.
            client.ended = True
            if _has_hung_up(client.connection):
                self._drop(client)
            else:
                self._send(client)
            return
        client.received += data
        self._serve_lines(client)

    def _serve_lines(self, client: _Client) -> None:
        for _ in range(_REQUESTS_A_TURN):
            client.more = False
            if client.job is not None or client.closing:
                break
            line, newline, rest = client.received.partition(b"\n")
            if len(line) > MAX_LINE_BYTES:
                self._answer(client, error=f"a request has at most {MAX_LINE_BYTES} bytes")
                client.closing = True
                break
            if not newline:
                break
            client.received = rest
            client.more = bool(rest)
            if line.strip():
                self._serve(client, bytes(line))
        self._send(client)

    def _serve(self, client: _Client, line: bytes) -> None:
        if client.refusal is not None:
            logger.warning("control: a client was turned away: %s", client.refusal)
            self._answer(client, error=client.refusal)
            client.closing = True
            return
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as err:
            self._answer(client, error=f"not JSON: {err}")
            return
        name = request.get("command") if isinstance(request, dict) else None
        command = self._commands.get(name) if isinstance(name, str) else None
        if command is None:
            known = ", ".join(sorted(set(self._commands).difference(self._hidden)))
            self._answer(client, error=f'expected {{"command": NAME}} with NAME one of {known}')
            return
        try:
            result = command(request)
        except Exception as err:
            self._failed(client, err)
            return
        if isinstance(result, Iterator):
            client.job = result
        else:
            self._answer(client, result=result)

    def _step(self, client: _Client) -> None:
        try:
            next(client.job)
            return
        except StopIteration as end:
            self._answer(client, result=end.value)
        except Exception as err:
            self._failed(client, err)
        client.job = None
        self._serve_lines(client)

    def _failed(self, client: _Client, error: Exception) -> None:
        if isinstance(error, VfuDevError):
            self._answer(client, error=str(error))
        else:
            logger.exception("control: a command failed")
            self._answer(client, error=f"{type(error).__name__}: {error}")

    def _answer(self, client: _Client, result: Any = None, error: str | None = None) -> None:
        answer = {"ok": True, "result": result} if error is None else {"ok": False, "error": error}
        client.unsent += json.dumps(answer).encode() + b"\n"

    def _send(self, client: _Client) -> None:
        try:
            while client.unsent:
                sent = client.connection.send(client.unsent)
                del client.unsent[:sent]
        except (BlockingIOError, InterruptedError):
            if len(client.unsent) > MAX_UNSENT_BYTES:
                self._drop(client)
                return
        except OSError:
            self._drop(client)
            return
        if (client.closing or (client.ended and not client.busy)) and not client.unsent:
            self._drop(client)
            return
        events = selectors.EVENT_WRITE if client.unsent else 0
        if not client.ended or not events:
            events |= selectors.EVENT_READ
        if client.connection.fileno() in self._clients:
            self._selector.modify(client.connection, events, lambda: self._ready(client))

    def _drop(self, client: _Client) -> None:
        if self._clients.pop(client.connection.fileno(), None) is None:
            return
        client.job = None
        self._selector.unregister(client.connection)
        client.connection.close()


def _has_hung_up(connection: socket.socket) -> bool:
    """Return whether the peer is gone, rather than only done with sending."""
    poll = select.poll()
    poll.register(connection, 0)  # POLLHUP is always reported
    return any(events & select.POLLHUP for _, events in poll.poll(0))
