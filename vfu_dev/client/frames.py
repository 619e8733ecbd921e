"""One vfio-user message: its header, requests, pending replies, and the errors of waiting.

Source: QEMU's docs/interop/vfio-user.rst, "Header".
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from vfu_dev import uapi
from vfu_dev.errors import ProtocolError, VfuDevError

HEADER = uapi.VFIO_USER_HEADER

Buffer = bytes | bytearray | memoryview

_COMMAND_NAMES = {
    value: name.removeprefix("VFIO_USER_")
    for name, value in vars(uapi).items()
    if name.startswith("VFIO_USER_") and isinstance(value, int) and 0 < value <= 27 and name not in (
        "VFIO_USER_REPLY", "VFIO_USER_TYPE", "VFIO_USER_NO_REPLY"
    )
}  # fmt: skip


def command_name(command: int) -> str:
    """Return the protocol's name for `command`, or its number."""
    return _COMMAND_NAMES.get(command, f"command {command}")


class ClientCommandError(VfuDevError):
    """The server answered `command` with an error; `errno` is the one it gave (EIO where it gave none)."""

    def __init__(self, command: int, number: int) -> None:
        self.command = command
        self.given = number
        self.errno = number if 0 < number < 4096 else errno.EIO
        reason = os.strerror(number) if 0 < number < 4096 else f"error {number}"
        if command == uapi.VFIO_USER_VERSION and number == errno.EBUSY:
            reason = "it is busy with another client"
        super().__init__(f"the server refused {command_name(command)}: {reason}")


class DisconnectedError(ProtocolError):
    """The server is gone, or it closed the connection."""

    errno = errno.ENOTCONN


class ReplyTimeoutError(ProtocolError):
    """The server did not answer in time."""

    errno = errno.ETIMEDOUT


@dataclass(frozen=True)
class Message:
    """One message to send; `parts` go out one after the other, not joined."""

    id: int
    command: int
    flags: int
    error: int
    parts: Sequence[Buffer]

    def buffers(self) -> list[memoryview]:
        """Return header and parts."""
        size = HEADER.size + sum(len(part) for part in self.parts)
        header = HEADER.pack(self.id, self.command, size, self.flags, self.error)
        return [memoryview(header), *(memoryview(part) for part in self.parts)]


@dataclass
class Call:
    """One request under way. `head` takes the fixed part of the reply, `into` what follows it."""

    id: int
    command: int
    head: bytearray
    into: memoryview
    max_fds: int
    deadline: float
    done: bool = False
    abandoned: bool = False
    arriving: bool = False
    error: VfuDevError | None = None
    head_bytes: int = 0
    into_bytes: int = 0
    fds: list[int] = field(default_factory=list)

    @property
    def payload(self) -> memoryview:
        """The reply's fixed part, as long as the server made it."""
        return memoryview(self.head)[: self.head_bytes]
