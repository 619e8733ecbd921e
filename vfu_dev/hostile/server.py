"""The lying server: one client at a time, one request at a time, and what the client did about the lie."""

from __future__ import annotations

import array
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vfu_dev import uapi
from vfu_dev.hostile.device import MAX_XFER, Device
from vfu_dev.hostile.lie import Liar
from vfu_dev.hostile.message import RefusedError, Reply, Request
from vfu_dev.uapi import VFIO_USER_HEADER as HEADER

# A request longer than any honest one: nothing is received for it.
_MAX_REQUEST_BYTES = MAX_XFER + (64 << 10)


@dataclass
class Encounter:
    """One connection, and the client's reaction to the lie.

    Attributes:
        lie: its name; None for an honest server.
        told: number of replies with the lie. told_at: the request that first got it.
        told_after: requests answered honestly until then.
        requests_after: what the client asked for afterwards, and how often.
        ended_by: client, server (which some lies have it do), or nobody yet.
        seconds_after: from the lie to the end of the connection.
    """

    lie: str | None
    told: int = 0
    told_at: str | None = None
    told_after: int = 0
    requests: int = 0
    requests_after: Counter[str] = field(default_factory=Counter)
    ended_by: str = "nobody"
    seconds_after: float | None = None

    def text(self) -> str:
        """Return what happened, in a sentence."""
        if self.lie is None:
            return f"no lie; {self.requests} requests, {self._end()}"
        if not self.told:
            return f"not told in {self.requests} requests, {self._end()}"
        after = ", ".join(f"{name} {count}" for name, count in self.requests_after.most_common())
        went_on = f"the client went on: {after}" if after else "the client sent no further request"
        seconds = "" if self.seconds_after is None else f" after {self.seconds_after:.1f} s"
        times = "" if self.told == 1 else f", {self.told} times"
        told = f"told at {self.told_at} (request {self.told_after + 1}){times}"
        return f"{told}; {went_on}; {self._end()}{seconds}"

    def as_json(self) -> dict[str, Any]:
        """Return it for `--json`."""
        return vars(self) | {"requests_after": dict(self.requests_after)}

    def _end(self) -> str:
        if self.ended_by == "client":
            return "the client closed the connection"
        if self.ended_by == "server":
            return "the server closed the connection"
        return "the client is still connected"


class Server:
    """Serves `device`; `lie` sees every reply before it leaves.

    Args: lie: changes a reply, if it is time to. Its `told` is looked at where it has one.
          log: gets a line for each message.
    """

    def __init__(
        self,
        device: Device,
        lie: Callable[[Request, Reply], None],
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.device = device
        self.lie = lie
        self.log = log or (lambda text: None)
        liar = lie if isinstance(lie, Liar) else None
        self.encounter = Encounter(liar.lie.name if liar is not None and liar.lie is not None else None)
        self._liar = liar

    def serve(self, client: socket.socket) -> Encounter:
        """Answer until the client goes away or a lie closes the connection."""
        encounter = self.encounter
        first_told = None
        told_before = self._liar.told if self._liar else 0
        while (request := self._receive(client)) is not None:
            if request.flags & uapi.VFIO_USER_TYPE:
                self.log(f"client replied to {request.name}: {len(request.payload)} bytes")
                continue
            if encounter.told:
                encounter.requests_after[request.name] += 1
            reply = self._honest(request)
            self.lie(request, reply)
            if self._liar and self._liar.told > told_before + encounter.told:
                if first_told is None:
                    first_told = time.monotonic()
                    encounter.told_at, encounter.told_after = request.name, encounter.requests
                encounter.told = self._liar.told - told_before
            encounter.requests += 1
            self.log(f"request {request.name} ({len(request.payload)} bytes) -> error {reply.error}")
            if not self._send(client, reply):
                break
        else:
            encounter.ended_by = "client"
        if first_told is not None:
            encounter.seconds_after = time.monotonic() - first_told
        self.device.disconnect()
        return encounter

    def _honest(self, request: Request) -> Reply:
        reply = Reply(request.id, request.command)
        try:
            payload, reply.fds = self.device.answer(request)
            reply.payload = bytearray(payload)
        except RefusedError as refused:
            reply.flags |= uapi.VFIO_USER_ERROR
            reply.error = refused.errno
        for fd in request.fds:
            os.close(fd)
        reply.silent = bool(request.flags & uapi.VFIO_USER_NO_REPLY)
        return reply

    def _send(self, client: socket.socket, reply: Reply) -> bool:
        """Send `reply`; False where the connection ends with it."""
        if reply.delay_seconds:
            time.sleep(reply.delay_seconds)
        data = reply.before + (b"" if reply.silent else reply.encode()) + reply.after
        rights = []
        if reply.fds:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", reply.fds))]
        try:
            if rights and data:
                data = data[client.sendmsg([data[:16]], rights) :]
            if reply.trickle:
                for value in data:
                    client.sendall(bytes([value]))
            else:
                client.sendall(data)
        except OSError as error:
            self.log(f"client gone: {error}")
            self.encounter.ended_by = "client"
            return False
        finally:
            for fd in reply.fds:
                os.close(fd)
        if reply.close:
            self.encounter.ended_by = "server"
        return not reply.close

    def _receive(self, client: socket.socket) -> Request | None:
        """Return the client's next message; None where there is none, or none that could be one."""
        header, fds = self._exactly(client, HEADER.size)
        if header is None:
            return None
        number, command, size, flags, _ = HEADER.unpack(header)
        if not HEADER.size <= size <= _MAX_REQUEST_BYTES:
            self.log(f"the client sent a message of {size} bytes")
            return None
        payload, more = self._exactly(client, size - HEADER.size)
        return None if payload is None else Request(number, command, flags, payload, fds + more)

    def _exactly(self, client: socket.socket, count: int) -> tuple[bytes | None, list[int]]:
        data, fds = bytearray(), []
        while len(data) < count:
            try:
                part, received, _, _ = socket.recv_fds(client, min(count - len(data), 1 << 20), 32)
            except OSError as error:
                self.log(f"client gone: {error}")
                part, received = b"", []
            fds += received
            if not part:
                for fd in fds:
                    os.close(fd)
                return None, []
            data += part
        return bytes(data), fds
