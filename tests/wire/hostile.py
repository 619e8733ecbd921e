#!/usr/bin/env python3
"""A vfio-user server that lies: a test program, standalone, standard library only.

Without `--lie` it is honest: a small PCI device (64 KiB memory BAR, MSI-X, migration with PRE_COPY) that
QEMU and our own client attach to and migrate. With `--lie NAME` it breaks the protocol in one named way, and
nowhere else, so that what the client does can be told apart. `lies.py`, beside this file, holds them.

    hostile.py SOCKET [--lie NAME] [--after N] [--times N] [--arm-file PATH] [--once] [--verbose]
    hostile.py --list [--phase attach|run|save|load]

`ready` is printed once the socket listens; clients are served one after another until SIGTERM.
Layouts follow docs/interop/vfio-user.rst of QEMU 10.2.2; 19 (GET_PRECOPY_INFO) is native/spec/'s addition.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import errno
import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

HEADER = struct.Struct("<HHIII")  # id, command, size, flags, error
REPLY, NO_REPLY, ERROR, TYPE = 0x1, 0x10, 0x20, 0xF

COMMANDS = {
    "version": 1,
    "dma-map": 2,
    "dma-unmap": 3,
    "get-info": 4,
    "region-info": 5,
    "irq-info": 7,
    "set-irqs": 8,
    "region-read": 9,
    "region-write": 10,
    "reset": 13,
    "write-multi": 15,
    "feature": 16,
    "mig-read": 17,
    "mig-write": 18,
    "precopy-info": 19,
}
FEATURE_GET, FEATURE_SET, FEATURE_PROBE = 1 << 16, 1 << 17, 1 << 18
FEATURES = {
    "migration": 1,
    "state": 2,
    "log-start": 6,
    "log-stop": 7,
    "log-report": 8,
    "data-size": 9,
    "precopy-info-v2": 12,
}
STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY = 1, 2, 3, 4, 6

MEMORY_BYTES = 64 << 10
TRAILER_BYTES = 4 << 10
MSIX_VECTORS = 4
MAX_XFER = 1 << 20
REGION_BYTES = {0: 4096, 2: MEMORY_BYTES, 4: 4096, 7: 256}
IRQ_COUNTS = {0: 0, 1: 0, 2: MSIX_VECTORS, 3: 0, 4: 0}


@dataclass
class Request:
    """One message from the client, its body received whole."""

    id: int
    command: int
    flags: int
    payload: bytes
    fds: list[int]

    @property
    def feature(self) -> int:
        """The feature index of a DEVICE_FEATURE request, else 0."""
        if self.command != COMMANDS["feature"] or len(self.payload) < 8:
            return 0
        return int(struct.unpack_from("<I", self.payload, 4)[0]) & 0xFFFF


@dataclass
class Reply:
    """What goes back; a lie changes any of it. `size` None means the true one."""

    id: int
    command: int
    payload: bytearray = field(default_factory=bytearray)
    fds: list[int] = field(default_factory=list)
    flags: int = REPLY
    error: int = 0
    size: int | None = None
    before: bytes = b""  # raw bytes sent ahead of this reply
    after: bytes = b""  # and behind it
    send_bytes: int | None = None  # only so many bytes of header and payload
    trickle: bool = False  # one byte a send: slow, but no lie
    delay_seconds: float = 0.0
    silent: bool = False
    close: bool = False

    def encode(self) -> bytes:
        """Return header and payload, cut to `send_bytes`."""
        size = HEADER.size + len(self.payload) if self.size is None else self.size
        header = HEADER.pack(
            self.id & 0xFFFF, self.command, size & 0xFFFFFFFF, self.flags, self.error & 0xFFFFFFFF
        )
        return (header + bytes(self.payload))[: self.send_bytes]


class RefusedError(Exception):
    """The honest device answers this request with an errno."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


def _config_space() -> bytearray:
    """PCI type 0 header: BAR0 32-bit, BAR2 64-bit prefetchable, BAR4 with the MSI-X table and PBA."""
    config = bytearray(256)
    struct.pack_into("<HHHHBBBB", config, 0, 0x4656, 0x4455, 0, 0x0010, 1, 0x00, 0x80, 0x08)
    struct.pack_into("<6I", config, 0x10, 0x0, 0, 0xC, 0, 0x0, 0)
    struct.pack_into("<HH", config, 0x2C, 0x4656, 0x4455)
    config[0x34] = 0x40
    struct.pack_into("<BBHII", config, 0x40, 0x11, 0, MSIX_VECTORS - 1, 0x000 | 4, 0x800 | 4)
    return config


class Device:
    """The honest device. Migration: memory as initial data, a trailer in STOP_COPY; loads anything."""

    def __init__(self) -> None:
        pattern = bytes(range(256)) * (MEMORY_BYTES // 256)
        self.regions = {index: bytearray(size) for index, size in REGION_BYTES.items()}
        self.regions[2][:] = pattern
        self.regions[7] = _config_space()
        self.state = RUNNING
        self.pending = bytearray()
        self.queries = 0  # how often sizes were asked for; growing lies use it

    def answer(self, request: Request) -> tuple[bytes, list[int]]:
        """Return reply payload and fds, or raise RefusedError."""
        for name, number in COMMANDS.items():
            if number == request.command:
                handler: Callable[[bytes], bytes] = getattr(self, name.replace("-", "_"))
                try:
                    return handler(request.payload), []
                except struct.error:
                    raise RefusedError(errno.EINVAL) from None
        raise RefusedError(errno.ENOSYS)

    def version(self, payload: bytes) -> bytes:
        """Our limits, in less text than QEMU proposes: it reuses its request as the reply buffer."""
        capabilities = {
            "max_msg_fds": 8,
            "max_data_xfer_size": MAX_XFER,
            "migration": {"pgsize": 4096},
            "migration_precopy_info": True,
        }
        return struct.pack("<HH", 0, 0) + json.dumps({"capabilities": capabilities}).encode() + b"\0"

    def dma_map(self, payload: bytes) -> bytes:
        """Accept every mapping and use none."""
        return b""

    def dma_unmap(self, payload: bytes) -> bytes:
        """Answer with the request."""
        return payload

    def get_info(self, payload: bytes) -> bytes:
        """PCI, resettable, 9 regions, 5 interrupt types."""
        return struct.pack("<4I", 16, 0x3, 9, len(IRQ_COUNTS))

    def region_info(self, payload: bytes) -> bytes:
        """Readable and writable, trapped, no capabilities."""
        index = struct.unpack_from("<4I", payload)[2]
        size = REGION_BYTES.get(index, 0)
        return struct.pack("<4IQQ", 32, 0x3 if size else 0, index, 0, size, 0)

    def irq_info(self, payload: bytes) -> bytes:
        """MSI-X only."""
        index = struct.unpack_from("<4I", payload)[2]
        return struct.pack("<4I", 16, 0x9 if IRQ_COUNTS.get(index) else 0, index, IRQ_COUNTS.get(index, 0))

    def set_irqs(self, payload: bytes) -> bytes:
        """Accept and forget."""
        return b""

    def region_read(self, payload: bytes) -> bytes:
        """Bounds-checked, as the lies are to be the only fault."""
        offset, index, count = struct.unpack_from("<QII", payload)
        data = self._slice(index, offset, count)
        return struct.pack("<QII", offset, index, count) + bytes(data)

    def region_write(self, payload: bytes) -> bytes:
        """Store as it comes; config BAR bits are the client's to emulate."""
        offset, index, count = struct.unpack_from("<QII", payload)
        data = payload[16 : 16 + count]
        if len(data) != count:
            raise RefusedError(errno.EINVAL)
        self._slice(index, offset, count)[:] = data
        return struct.pack("<QII", offset, index, count)

    def write_multi(self, payload: bytes) -> bytes:
        """Accept and count."""
        return payload[:8]

    def reset(self, payload: bytes) -> bytes:
        """Back to RUNNING, as after a failed arc."""
        self.state = RUNNING
        return b""

    def feature(self, payload: bytes) -> bytes:
        """DEVICE_FEATURE: migration, state, data size and DMA logging."""
        _, flags = struct.unpack_from("<II", payload)
        index, data = flags & 0xFFFF, payload[8:]
        if index not in FEATURES.values():
            raise RefusedError(errno.ENOTTY)
        if flags & FEATURE_PROBE:
            return payload
        if flags & FEATURE_SET:
            if index == FEATURES["state"]:
                self._enter(struct.unpack_from("<I", data)[0])
            return payload
        if index == FEATURES["migration"]:
            data = struct.pack("<Q", 0x5)
        elif index == FEATURES["state"]:
            data = struct.pack("<II", self.state, 0xFFFFFFFF)
        elif index == FEATURES["data-size"]:
            self.queries += 1
            data = struct.pack("<Q", len(self.pending) + TRAILER_BYTES)
        elif index == FEATURES["log-report"]:
            _, length, page_size = struct.unpack_from("<QQQ", data)
            if page_size == 0:
                raise RefusedError(errno.EINVAL)
            words = (length // page_size + 63) // 64
            data = data[:24] + bytes(8 * words)
        else:
            raise RefusedError(errno.EINVAL)
        return struct.pack("<II", 8 + len(data), flags) + data

    def mig_read(self, payload: bytes) -> bytes:
        """Slices of the stream; empty when there is no more."""
        _, size = struct.unpack_from("<II", payload)
        if self.state not in (PRE_COPY, STOP_COPY):
            raise RefusedError(errno.EINVAL)
        data = bytes(self.pending[: min(size, MAX_XFER)])
        del self.pending[: len(data)]
        return struct.pack("<II", 8 + len(data), len(data)) + data

    def mig_write(self, payload: bytes) -> bytes:
        """Swallow."""
        if self.state != RESUMING:
            raise RefusedError(errno.EINVAL)
        return b""

    def precopy_info(self, payload: bytes) -> bytes:
        """All that is left counts as initial data; nothing gets dirty."""
        if self.state != PRE_COPY:
            raise RefusedError(errno.EINVAL)
        self.queries += 1
        return struct.pack("<IIQQ", 24, 0, len(self.pending), 0)

    def _enter(self, state: int) -> None:
        if state not in (STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY):
            raise RefusedError(errno.EINVAL)
        if state == PRE_COPY or (state == STOP_COPY and self.state != PRE_COPY):
            self.pending = bytearray(self.regions[2])
        if state == STOP_COPY:
            self.pending += bytes(TRAILER_BYTES)
        self.state = state

    def _slice(self, index: int, offset: int, count: int) -> memoryview:
        region = self.regions.get(index)
        if region is None or offset > len(region) or count > len(region) - offset:
            raise RefusedError(errno.EINVAL)
        return memoryview(region)[offset : offset + count]


class Server:
    """One client at a time, one request at a time; `lie` sees every reply before it leaves."""

    def __init__(self, device: Device, lie: Callable[[Request, Reply], None], verbose: bool = False) -> None:
        self.device = device
        self.lie = lie
        self.verbose = verbose

    def serve(self, client: socket.socket) -> None:
        """Answer until the client goes away or a lie closes the connection."""
        while (request := self._receive(client)) is not None:
            if request.flags & TYPE:
                self._log(f"client replied to {request.command}: {len(request.payload)} bytes")
                continue
            reply = Reply(request.id, request.command)
            try:
                payload, reply.fds = self.device.answer(request)
                reply.payload = bytearray(payload)
            except RefusedError as refused:
                reply.flags |= ERROR
                reply.error = refused.errno
            for fd in request.fds:
                os.close(fd)
            reply.silent = bool(request.flags & NO_REPLY)
            self.lie(request, reply)
            self._log(f"request {request.command} ({len(request.payload)} bytes) -> error {reply.error}")
            if not self._send(client, reply):
                return

    def _send(self, client: socket.socket, reply: Reply) -> bool:
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
            self._log(f"client gone: {error}")
            return False
        finally:
            for fd in reply.fds:
                os.close(fd)
        return not reply.close

    def _receive(self, client: socket.socket) -> Request | None:
        header, fds = self._exactly(client, HEADER.size)
        if header is None:
            return None
        number, command, size, flags, _ = HEADER.unpack(header)
        payload, more = self._exactly(client, max(0, size - HEADER.size))
        return None if payload is None else Request(number, command, flags, payload, fds + more)

    def _exactly(self, client: socket.socket, count: int) -> tuple[bytes | None, list[int]]:
        data, fds = bytearray(), []
        while len(data) < count:
            try:
                part, received, _, _ = socket.recv_fds(client, min(count - len(data), 1 << 20), 32)
            except OSError as error:
                self._log(f"client gone: {error}")
                part, received = b"", []
            fds += received
            if not part:
                return None, fds
            data += part
        return bytes(data), fds

    def _log(self, text: str) -> None:
        if self.verbose:
            print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Parse the command line and serve."""
    import lies  # beside this file; imported here because it imports this module's layouts

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("socket", nargs="?", help="path of the socket to listen on")
    parser.add_argument("--lie", metavar="NAME", help="the one lie to tell (see --list)")
    parser.add_argument(
        "--after", type=int, default=0, metavar="N", help="tell the truth to N matching requests first"
    )
    parser.add_argument("--times", type=int, metavar="N", help="lie at most N times")
    parser.add_argument("--arm-file", metavar="PATH", help="lie only while this file exists")
    parser.add_argument("--delay-seconds", type=float, default=6.0, help="for delay-* lies (default: 6)")
    parser.add_argument("--once", action="store_true", help="exit after the first client")
    parser.add_argument("--verbose", action="store_true", help="log every message to stderr")
    parser.add_argument("--list", action="store_true", help="print the lies' names")
    parser.add_argument("--phase", choices=lies.PHASES, help="with --list: only lies told in this phase")
    parser.add_argument("--describe", action="store_true", help="with --list: phase and meaning too")
    options = parser.parse_args()
    if options.list:
        for lie in lies.LIES.values():
            if options.phase in (None, lie.phase):
                print(f"{lie.name}\t{lie.phase}\t{lie.meaning}" if options.describe else lie.name)
        return 0
    if options.socket is None:
        parser.error("a socket path is needed")
    if options.lie is not None and options.lie not in lies.LIES:
        parser.error(f"no such lie: {options.lie} (see --list)")
    lies.DELAY_SECONDS = options.delay_seconds
    device = Device()
    liar = lies.Liar(
        device,
        lies.LIES[options.lie] if options.lie else None,
        after=options.after,
        times=options.times,
        arm_file=options.arm_file,
    )
    server = Server(device, liar, options.verbose)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(options.socket)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(options.socket)
        listener.listen(4)
        print("ready", flush=True)
        try:
            while True:
                client, _ = listener.accept()
                with client:
                    server.serve(client)
                device.state = RUNNING
                if options.once:
                    return 0
        except KeyboardInterrupt:
            return 0
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(options.socket)


if __name__ == "__main__":
    # `lies` imports this module by name; make that the same module as the running script.
    sys.modules["hostile"] = sys.modules["__main__"]
    sys.exit(main())
