"""Client of a server's control socket: one JSON object per line each way."""

from __future__ import annotations

import array
import fcntl
import json
import os
import socket
import termios
import time
from typing import Any

from vfu_dev.closing import Closing
from vfu_dev.errors import ProtocolError, VfuDevError
from vfu_dev.socket_paths import default_control

MAX_LINE_BYTES = 4 << 20  # a status with 1000 transitions is about 100 KiB


class ControlError(VfuDevError):
    """The server answered a control command with an error, or cannot be asked."""


class ControlClient(Closing):
    """A connection to a control socket.

    Raises: ControlError: nobody listens on `path`.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout_seconds: float = 5.0) -> None:
        self.path = os.fspath(path)
        self.timeout_seconds = timeout_seconds
        self._received = bytearray()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.settimeout(timeout_seconds)
            self._sock.connect(self.path)
        except OSError as error:
            self._sock.close()
            raise ControlError(f"no control socket at {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close; closing twice is fine."""
        self._sock.close()

    def command(self, name: str, **arguments: Any) -> Any:
        """Send {"command": name, ...} and return the answer's result.

        Raises: ControlError: the server refused, or did not answer; ProtocolError: its answer is invalid.
        """
        try:
            self._sock.sendall(json.dumps({"command": name, **arguments}).encode() + b"\n")
            line = self._line()
        except OSError as error:
            raise ControlError(f"no answer to {name} on {self.path}: {error}; {self.advice}") from error
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(
                f"{self.path} answers with something that is not JSON; {self.advice}"
            ) from error
        if not isinstance(answer, dict) or not isinstance(answer.get("ok"), bool):
            raise ProtocolError(f"{self.path} answered {name} without saying whether it is ok")
        if not answer["ok"]:
            said = str(answer.get("error", "refused without a reason"))
            raise ControlError(said if said.startswith(f"{name}: ") else f"{name}: {said}")
        return answer.get("result")

    @property
    def advice(self) -> str:
        """Advice for a missing or invalid answer."""
        return (
            "if that is a device's vfio-user socket, name its control socket: "
            f"{default_control(self.path).name} beside it, unless `vfu-dev serve --control` said otherwise"
        )

    def is_unread(self) -> bool:
        """Return whether the server has not taken in yet what was sent; safe in any thread.

        That is the case when the server does not accept the connection: a vfio-user server that has its
        client, or a stuck one.
        """
        count = array.array("i", [0])
        try:
            fcntl.ioctl(self._sock, termios.TIOCOUTQ, count)
        except OSError:  # closed meanwhile
            return False
        return count[0] > 0

    def status(self) -> dict[str, Any]:
        """Return the server's status object."""
        result = self.command("status")
        if not isinstance(result, dict):
            raise ProtocolError(f"{self.path} answered status with {type(result).__name__}")
        return result

    def _line(self) -> bytes:
        deadline = time.monotonic() + self.timeout_seconds
        while b"\n" not in self._received:
            if len(self._received) > MAX_LINE_BYTES:
                raise ProtocolError(f"{self.path} answers with a line of more than {MAX_LINE_BYTES} bytes")
            self._sock.settimeout(max(0.001, deadline - time.monotonic()))
            part = self._sock.recv(1 << 16)
            if not part:
                raise ConnectionResetError("the server closed the connection")
            self._received += part
            if self._received[:1] != b"{":  # vfio-user's header, which has no end of line to wait for
                raise ProtocolError(f"{self.path} answers with something that is not JSON; {self.advice}")
        line, _, rest = bytes(self._received).partition(b"\n")
        self._received = bytearray(rest)
        return line
