"""A vfio-user client that does nothing but time requests: one socket, one buffer, blocking calls.

`vfu_dev.client` checks whatever it gets and serves requests of the server; here that would be half of what is
measured. Errors are noticed, no more.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vfu_dev import uapi
from vfu_dev.client.frames import HEADER
from vfu_dev.client.messages import MIG_DATA, REGION_ACCESS
from vfu_dev.closing import Closing
from vfu_dev.errors import ProtocolError
from vfu_dev.uapi import DeviceState

Nanoseconds = npt.NDArray[np.int64]

_FEATURE = struct.Struct("<II")
_VERSION = b'{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576}}\0'
TIMEOUT_SECONDS = 120.0
READ_BYTES = 1 << 20  # as QEMU reads


class RawClient(Closing):
    """One connection to the server at `path`. Raises: OSError, ProtocolError: it is not as it should be."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(TIMEOUT_SECONDS)
        self._buffer = memoryview(bytearray(HEADER.size + MIG_DATA.size + READ_BYTES))
        try:
            self._sock.connect(str(path))
            self.call(uapi.VFIO_USER_VERSION, struct.pack("<HH", 0, 0), _VERSION)
        except BaseException:
            self._sock.close()
            raise

    def close(self) -> None:
        """Disconnect."""
        with contextlib.suppress(OSError):
            self._sock.close()

    # --- messages -----------------------------------------------------------------------------------------

    def call(self, command: int, *parts: bytes | memoryview) -> memoryview:
        """Send a request and return the payload of its reply, which holds until the next call."""
        self._sock.sendall(request(command, *parts))
        return self._reply()

    def _reply(self) -> memoryview:
        self._receive(0, HEADER.size)
        _, _, size, flags, error = HEADER.unpack_from(self._buffer)
        if flags & 0xF != uapi.VFIO_USER_REPLY or error:
            raise ProtocolError(f"a reply with flags {flags:#x}, error {error}")
        self._receive(HEADER.size, size)
        return self._buffer[HEADER.size : size]

    def _receive(self, start: int, end: int) -> None:
        while start < end:
            count = self._sock.recv_into(self._buffer[start:end])
            if not count:
                raise ProtocolError("the server closed the connection")
            start += count

    # --- what is timed ------------------------------------------------------------------------------------

    def time_calls(self, messages: list[bytes], count: int) -> Nanoseconds:
        """Send `count` requests, `messages` in turn, each after the reply to the one before.

        Returns: nanoseconds from request to reply, shape (count,).
        """
        times = np.empty(count, np.int64)
        sendall, reply, clock = self._sock.sendall, self._reply, time.perf_counter_ns
        for number in range(count):
            message = messages[number % len(messages)]
            began = clock()
            sendall(message)
            reply()
            times[number] = clock() - began
        return times

    def time_call_behind(self, first: bytes, message: bytes) -> int:
        """Send two requests at once; return the nanoseconds from there to the second reply."""
        began = time.perf_counter_ns()
        self._sock.sendall(first + message)
        self._reply()
        self._reply()
        return time.perf_counter_ns() - began

    # --- migration ----------------------------------------------------------------------------------------

    def set_state(self, state: DeviceState) -> None:
        """Take the device to `state`."""
        feature = uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE | uapi.VFIO_DEVICE_FEATURE_SET
        data = struct.pack("<Ii", int(state), -1)
        self.call(uapi.VFIO_USER_DEVICE_FEATURE, _FEATURE.pack(_FEATURE.size + len(data), feature), data)

    def read_state(self) -> memoryview:
        """Return up to 1 MiB of migration data; it holds until the next call."""
        return self.call(uapi.VFIO_USER_MIG_DATA_READ, MIG_DATA.pack(MIG_DATA.size + READ_BYTES, READ_BYTES))[
            MIG_DATA.size :
        ]

    def write_state(self, data: bytes) -> None:
        """Hand over migration data, at most 1 MiB."""
        argsz = MIG_DATA.size + len(data)
        self.call(uapi.VFIO_USER_MIG_DATA_WRITE, MIG_DATA.pack(argsz, len(data)), data)


def request(command: int, *parts: bytes | memoryview) -> bytes:
    """Return a request as it goes over the wire; the library does not mind that all have the number 0."""
    size = HEADER.size + sum(len(part) for part in parts)
    return b"".join([HEADER.pack(0, command, size, 0, 0), *parts])


def region_read(index: int, offset: int, count: int) -> bytes:
    """Return a request to read a BAR."""
    return request(uapi.VFIO_USER_REGION_READ, REGION_ACCESS.pack(offset, index, count))


def region_write(index: int, offset: int, data: bytes) -> bytes:
    """Return a request to write to a BAR."""
    return request(uapi.VFIO_USER_REGION_WRITE, REGION_ACCESS.pack(offset, index, len(data)), data)


def state_read() -> bytes:
    """Return a request for 1 MiB of migration data."""
    return request(uapi.VFIO_USER_MIG_DATA_READ, MIG_DATA.pack(MIG_DATA.size + READ_BYTES, READ_BYTES))
