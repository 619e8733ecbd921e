"""A lie for every check of `vfu-dev check`: what a server would have to do for that check to fail.

Each lie is added to the honest device of `vfu_dev.hostile`, which passes every check.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from serverkit import PATIENCE_SECONDS

from vfu_dev import uapi
from vfu_dev.conformance import CHECKS, arcs
from vfu_dev.hostile import Device, Reply, Request, Server
from vfu_dev.hostile.device import SPARSE_REGION
from vfu_dev.hostile.message import COMMANDS, FEATURES
from vfu_dev.uapi import DeviceState, MigrationFlags

S = DeviceState
GET, SET, PROBE = (
    uapi.VFIO_DEVICE_FEATURE_GET,
    uapi.VFIO_DEVICE_FEATURE_SET,
    uapi.VFIO_DEVICE_FEATURE_PROBE,
)
TRIGGER_EVENTFD = uapi.VFIO_IRQ_SET_DATA_EVENTFD | uapi.VFIO_IRQ_SET_ACTION_TRIGGER


@dataclass
class Liar:
    """What a lie sees: the device, its state before the request, and room for what it remembers."""

    device: Device
    state: DeviceState = S.RUNNING
    connections: int = 0
    kept: list[int] = field(default_factory=list)
    held: bytes = b""
    count: int = 0

    def close(self) -> None:
        """Close what was kept."""
        for fd in self.kept:
            os.close(fd)


Lie = Callable[[Liar, Request, Reply], None]
When = Callable[[Liar, Request, Reply], bool]


@dataclass(frozen=True)
class Case:
    """A lie, and what else makes its check fail.

    Attributes: clients: connections after which the server is gone. waiting: a second client is left so.
                impatient: it shows in what does not come, so the check is given little time.
    """

    lie: Lie
    clients: int | None = None
    waiting: bool = False
    impatient: bool = False


# --- when ---------------------------------------------------------------------------------------------------


def of(command: str, *more: When) -> When:
    """Requests of one command, for which all of `more` hold."""
    return lambda liar, q, r: q.command == COMMANDS[command] and all(one(liar, q, r) for one in more)


def feature(name: str, method: int, *more: When) -> When:
    """DEVICE_FEATURE requests about one feature, of one `method`; PROBE is one whatever it probes for."""

    def matches(liar: Liar, q: Request, r: Reply) -> bool:
        flags = struct.unpack_from("<I", q.payload, 4)[0]
        found = PROBE if flags & PROBE else flags & (GET | SET)
        return q.feature == FEATURES[name] and found == method

    return of("feature", matches, *more)


def failing(liar: Liar, q: Request, r: Reply) -> bool:
    """The honest answer is an error."""
    return bool(r.flags & uapi.VFIO_USER_ERROR)


def fine(liar: Liar, q: Request, r: Reply) -> bool:
    """The honest answer is none."""
    return not failing(liar, q, r)


def word(offset: int, value: int) -> When:
    """The request has the 32-bit `value` at `offset`."""
    return lambda liar, q, r: q.payload[offset : offset + 4] == struct.pack("<I", value)


def bit(offset: int, mask: int) -> When:
    """The request has a bit of `mask` in the 32 bits at `offset`."""
    return lambda liar, q, r: bool(struct.unpack_from("<I", q.payload, offset)[0] & mask)


# --- what ---------------------------------------------------------------------------------------------------


def lie(when: When, *changes: Lie) -> Case:
    """Change the answers to some requests."""

    def tell(liar: Liar, q: Request, r: Reply) -> None:
        if when(liar, q, r):
            for change in changes:
                change(liar, q, r)

    return Case(tell)


def refuse(number: int = errno.EIO) -> Lie:
    def change(liar: Liar, q: Request, r: Reply) -> None:
        r.flags, r.error, r.payload = uapi.VFIO_USER_REPLY | uapi.VFIO_USER_ERROR, number, bytearray()

    return change


def accept(payload: bytes | None = b"") -> Lie:
    """Succeed with `payload`; None: that of the request."""

    def change(liar: Liar, q: Request, r: Reply) -> None:
        r.flags, r.error = uapi.VFIO_USER_REPLY, 0
        r.payload = bytearray(q.payload if payload is None else payload)

    return change


def put(layout: str, offset: int, *values: int) -> Lie:
    def change(liar: Liar, q: Request, r: Reply) -> None:
        struct.pack_into(layout, r.payload, offset, *values)

    return change


def append(data: bytes) -> Lie:
    def change(liar: Liar, q: Request, r: Reply) -> None:
        r.payload += data

    return change


def cut(count: int) -> Lie:
    def change(liar: Liar, q: Request, r: Reply) -> None:
        del r.payload[-count:]

    return change


def in_state(state: DeviceState) -> Lie:
    """Leave the device in `state`."""

    def change(liar: Liar, q: Request, r: Reply) -> None:
        liar.device.state = state

    return change


def version(**capabilities: object) -> Case:
    text = json.dumps({"capabilities": capabilities}).encode() + b"\0"
    return lie(of("version"), accept(struct.pack("<HH", 0, 0) + text))


# --- lies with a memory -------------------------------------------------------------------------------------


def second_of_an_id(liar: Liar, q: Request, r: Reply) -> None:
    if q.id == 7:
        r.silent = liar.count == 1
        liar.count += 1


def second_read_unanswered(liar: Liar, q: Request, r: Reply) -> None:
    if q.command == COMMANDS["mig-read"]:
        r.silent = liar.count == 1
        liar.count += 1


def swapped(liar: Liar, q: Request, r: Reply) -> None:
    """Hold one answer back until the next is out."""
    if q.command == COMMANDS["get-info"]:
        if liar.held:
            r.after, liar.held = liar.held, b""
        elif q.id % 2:
            liar.held, r.silent = r.encode(), True


def other_file(liar: Liar, q: Request, r: Reply) -> None:
    for fd in r.fds:
        os.ftruncate(fd, 4096)


def no_file(liar: Liar, q: Request, r: Reply) -> None:
    while r.fds:
        os.close(r.fds.pop())


def whole_region(liar: Liar, q: Request, r: Reply) -> None:
    request = struct.pack("<4IQQ", 4096, 0, SPARSE_REGION, 0, 0, 0)
    r.payload = bytearray(liar.device.region_info(request))


def command_register_stays(liar: Liar, q: Request, r: Reply) -> None:
    liar.device.regions[7][4:6] = bytes(2)


def no_eventfds(liar: Liar, q: Request, r: Reply) -> None:
    for fd in liar.device.eventfds.values():
        os.close(fd)
    liar.device.eventfds.clear()


def all_eventfds(liar: Liar, q: Request, r: Reply) -> None:
    for fd in liar.device.eventfds.values():
        os.write(fd, struct.pack("<Q", 1))


def eternal_eventfds(liar: Liar, q: Request, r: Reply) -> None:
    """Keep a copy of every eventfd, and signal them all on every trigger."""
    if q.command != COMMANDS["set-irqs"]:
        return
    flags, count = struct.unpack_from("<I", q.payload, 4)[0], struct.unpack_from("<I", q.payload, 16)[0]
    if flags == TRIGGER_EVENTFD:
        liar.kept += [os.dup(fd) for fd in liar.device.eventfds.values()]
    elif count:
        for fd in liar.kept:
            os.write(fd, struct.pack("<Q", 1))


def halved(liar: Liar, q: Request, r: Reply) -> None:
    if q.command == COMMANDS["mig-read"] and not liar.count and len(r.payload) > 9:
        liar.count = 1
        keep = 8 + (len(r.payload) - 8) // 2
        liar.device.pending[:0] = r.payload[keep:]
        del r.payload[keep:]
        struct.pack_into("<II", r.payload, 0, keep, keep - 8)


def padded(liar: Liar, q: Request, r: Reply) -> None:
    if q.command == COMMANDS["mig-read"] and not failing(liar, q, r):
        (size,) = struct.unpack_from("<I", q.payload, 4)
        r.payload = r.payload.ljust(8 + size, b"\0")


def more_after_the_end(liar: Liar, q: Request, r: Reply) -> None:
    if q.command == COMMANDS["mig-read"] and r.payload[4:8] == bytes(4):
        liar.count += 1
        if liar.count == 2:
            r.payload = bytearray(struct.pack("<II", 12, 4) + b"more")


def too_many_maps(liar: Liar, q: Request, r: Reply) -> None:
    if q.command == COMMANDS["dma-map"] and len(liar.device.mappings) > 16:
        refuse(errno.EINVAL)(liar, q, r)


def no_mapping_twice(liar: Liar, q: Request, r: Reply) -> None:
    if q.command == COMMANDS["dma-map"]:
        liar.count += 1
        if liar.count > 1:
            refuse(errno.EEXIST)(liar, q, r)


def set_to(state: DeviceState | int, *more: When) -> When:
    return feature("state", SET, word(8, int(state)), *more)


def was(state: DeviceState) -> When:
    return lambda liar, q, r: liar.state is state


def without_files(liar: Liar, q: Request, r: Reply) -> bool:
    return not q.fds


def _info(**values: int) -> bytes:
    return struct.pack("<4I", 16, values.get("flags", 3), values.get("regions", 9), 5)


_NO_INFO = struct.pack("<4IQQ", 32, 0, 9, 0, 0, 0)
_STATE_LOST = lie(set_to(S.STOP, was(S.RUNNING)), in_state(S.RUNNING))
_BAD_STATE_TAKEN = lie(set_to(S.STOP, failing), accept(None), in_state(S.STOP))

CASES: dict[str, Case] = {
    "device-info-has-its-size": lie(of("get-info"), put("<I", 0, 0)),
    "device-is-a-pci-device": lie(of("get-info"), put("<I", 4, 1)),
    "device-has-the-pci-regions": lie(of("get-info"), put("<I", 8, 7)),
    "device-can-be-reset": lie(of("get-info"), put("<I", 4, 2)),
    "message-id-is-echoed": Case(lambda liar, q, r: setattr(r, "id", r.id ^ 1) if q.command == 4 else None),
    "message-id-may-be-used-twice": Case(second_of_an_id, impatient=True),
    "command-is-echoed": Case(lambda liar, q, r: setattr(r, "command", 5) if q.command == 4 else None),
    "no-reply-is-kept-to": Case(lambda liar, q, r: setattr(r, "silent", False)),
    "error-is-a-header-alone": lie(of("region-read", failing), append(bytes(16))),
    "error-has-an-errno": lie(of("region-read", failing), refuse(0)),
    "command-that-is-unknown": Case(lambda liar, q, r: accept()(liar, q, r) if q.command == 999 else None),
    "commands-are-taken-in-order": Case(swapped, impatient=True),
    "request-that-is-too-short": lie(of("get-info", failing), accept(_info())),
    "region-info-is-about-its-index": lie(of("region-info"), put("<I", 8, 99)),
    "region-info-has-its-size": lie(of("region-info", word(8, 0)), put("<I", 0, 40)),
    "region-info-fits-its-room": lie(of("region-info", word(8, SPARSE_REGION)), whole_region),
    "region-capabilities-form-a-list": lie(
        of("region-info", word(8, SPARSE_REGION), word(0, 65536)), put("<I", 36, 32)
    ),
    "region-sparse-areas-are-inside": lie(
        of("region-info", word(8, SPARSE_REGION), word(0, 65536)), put("<Q", 56, 1 << 40)
    ),
    "region-that-maps-brings-a-file": lie(of("region-info"), no_file),
    "region-file-is-long-enough": lie(of("region-info"), other_file),
    "region-that-is-not-there": lie(of("region-info", failing), accept(_NO_INFO)),
    "config-space-can-be-read": lie(of("region-read"), lambda liar, q, r: r.payload.__setitem__(
        slice(16, None), bytes(len(r.payload) - 16)
    )),
    "config-capabilities-form-a-list": lie(of("region-read", word(12, 256)), put("<B", 16 + 0x41, 0x40)),
    "region-read-repeats-its-request": lie(of("region-read", fine), put("<I", 12, 3)),
    "region-write-repeats-its-request": lie(of("region-write"), put("<I", 8, 99)),
    "region-write-arrives": lie(of("region-write"), command_register_stays),
    "region-access-outside-is-refused": lie(of("region-read", failing), accept(bytes(20))),
    "region-that-maps-can-be-read": lie(of("region-read", word(8, SPARSE_REGION)), refuse()),
    "write-multi-counts-its-writes": lie(of("write-multi"), put("<Q", 0, 1)),
    "irq-info-is-about-its-index": lie(of("irq-info"), put("<I", 8, 77)),
    "irq-type-that-is-not-there": lie(of("irq-info", failing), accept(struct.pack("<4I", 16, 0, 5, 0))),
    "irq-is-signalled": Case(lie(of("set-irqs"), no_eventfds).lie, impatient=True),
    "irq-is-signalled-where-true": lie(of("set-irqs", bit(4, uapi.VFIO_IRQ_SET_DATA_BOOL)), all_eventfds),
    "irq-can-be-disabled": Case(eternal_eventfds),
    "irq-can-be-taken-back": Case(eternal_eventfds),
    "irq-reply-is-a-header-alone": lie(of("set-irqs"), append(bytes(4))),
    "irq-out-of-range-is-refused": lie(of("set-irqs", failing), accept()),
    "dma-map-is-accepted": lie(of("dma-map"), append(bytes(32))),
    "dma-map-without-a-file-is-accepted": lie(of("dma-map", without_files), refuse(errno.EINVAL)),
    "dma-map-twice-is-refused": lie(of("dma-map", failing), accept()),
    "dma-map-over-another-is-refused": lie(of("dma-map", failing), refuse(errno.EINVAL)),
    "dma-unmap-repeats-its-request": lie(of("dma-unmap"), put("<Q", 8, 0)),
    "dma-unmap-of-a-part-is-refused": lie(of("dma-unmap", failing), accept(None)),
    "dma-unmap-of-nothing-is-refused": lie(of("dma-unmap", failing), accept(None)),
    "dma-maps-are-as-many-as-said": Case(too_many_maps),
    "dma-mode-without-a-file-is-refused": lie(of("dma-map", failing), accept()),
    "dma-mode-mmap-is-accepted": lie(of("dma-map", bit(4, 4)), refuse(errno.EINVAL)),
    "dma-mode-file-is-accepted": lie(of("dma-map", bit(4, 8)), refuse(errno.EINVAL)),
    "dma-map-beyond-its-file-is-refused": lie(of("dma-map", failing), accept()),
    "dma-map-that-wraps-is-refused": lie(of("dma-map", failing), accept()),
    "feature-that-is-unknown": lie(of("feature", failing), accept(None)),
    "feature-probe-minds-its-methods": lie(feature("migration", PROBE, failing), accept(None)),
    "feature-probe-repeats-its-request": lie(feature("state", PROBE), append(bytes(8))),
    "feature-set-repeats-its-request": lie(feature("state", SET), cut(8)),
    "feature-get-has-its-size": lie(feature("migration", GET), put("<I", 0, 8)),
    "feature-get-and-set-exclude-each-other": lie(feature("state", GET | SET, failing), accept(None)),
    "feature-set-minds-its-argsz": lie(feature("state", SET, failing), accept(None)),
    "feature-get-minds-its-argsz": lie(feature("migration", GET, failing), accept(bytes(16))),
    "migration-has-stop-copy": lie(feature("migration", GET), put("<Q", 8, 4)),
    "migration-has-precopy": lie(feature("migration", GET), put("<Q", 8, 3)),
    "migration-has-p2p": lie(feature("migration", GET), put("<Q", 8, 5)),
    "migration-begins-in-running": lie(feature("state", GET), put("<I", 8, S.STOP)),
    "state-error-cannot-be-asked-for": lie(set_to(S.ERROR), accept(None)),
    "state-that-is-not-there-is-refused": lie(set_to(8), accept(None)),
    "state-is-reached-before-the-reply": _STATE_LOST,
    "stream-can-be-read": lie(of("mig-read"), refuse()),
    "stream-ends-with-a-short-reply": Case(halved),
    "stream-reply-has-its-size": Case(padded),
    "stream-end-stays": Case(more_after_the_end),
    "stream-reply-is-no-longer-than-asked": lie(
        of("mig-read", word(4, 17)), accept(struct.pack("<II", 26, 18) + bytes(18))
    ),
    "stream-pause-is-no-error": lie(of("mig-read", word(4, 65536), lambda liar, q, r: len(r.payload) == 8),
                                    refuse(errno.ENOMSG)),
    "stream-read-needs-a-saving-state": lie(of("mig-read", failing), accept(struct.pack("<II", 8, 0))),
    "stream-write-needs-resuming": lie(of("mig-write", failing), accept()),
    "stream-write-is-answered": lie(of("mig-write"), append(bytes(8))),
    "stream-round-trip": lie(set_to(S.STOP, was(S.RESUMING)), refuse()),
    "stream-round-trip-with-precopy": lie(set_to(S.STOP, was(S.RESUMING)), refuse()),
    "stream-in-other-slices": lie(of("mig-write", lambda liar, q, r: len(q.payload) < 4096), refuse()),
    "stream-in-slices-of-the-limit": lie(
        of("mig-write", lambda liar, q, r: len(q.payload) > 65536 + 8), refuse()
    ),
    "stream-read-beyond-the-limit": lie(
        of("mig-read", failing), accept(struct.pack("<II", 8, 0) + bytes((1 << 20) + 4096))
    ),
    "stream-that-is-cut-is-refused": _BAD_STATE_TAKEN,
    "stream-that-is-empty-is-refused": _BAD_STATE_TAKEN,
    "stream-that-is-damaged-is-refused": _BAD_STATE_TAKEN,
    "precopy-info-is-offered": version(migration={"pgsize": 4096}),
    "precopy-info-has-its-size": lie(of("precopy-info"), cut(8)),
    "precopy-info-needs-precopy": lie(of("precopy-info", failing), accept(struct.pack("<IIQQ", 24, 0, 0, 0))),
    "precopy-initial-begins-above-zero": lie(of("precopy-info"), put("<Q", 8, 0)),
    "precopy-initial-falls": lie(of("precopy-info"), put("<Q", 8, 1 << 20)),
    "precopy-dirty-begins-at-zero": lie(of("precopy-info"), put("<Q", 16, 4096)),
    "precopy-info-takes-argsz-zero": lie(of("precopy-info", word(0, 0)), refuse(errno.EINVAL)),
    "data-size-is-offered": lie(feature("data-size", PROBE), refuse(errno.ENOTTY)),
    "data-size-in-each-state": lie(feature("data-size", GET, was(S.STOP)), refuse()),
    "data-size-is-what-is-read": lie(feature("data-size", GET), put("<Q", 8, 1 << 40)),
    "sizes-agree": lie(feature("data-size", GET), put("<Q", 8, 1)),
    "window-size-is-a-number": version(migration_data_window="1M"),
    "window-is-taken": lie(of("mig-window"), append(bytes(8))),
    "window-has-to-be-sealed": lie(of("mig-window", failing), accept()),
    "window-has-to-be-of-its-size": lie(of("mig-window", failing), accept()),
    "window-needs-one-descriptor": lie(of("mig-window", failing), accept()),
    "window-is-made-once": lie(of("mig-window", failing), refuse(errno.EINVAL)),
    "window-has-the-data": lie(of("mig-read", fine), put("<Q", 8, 1)),
    "window-range-is-checked": lie(of("mig-read", failing), accept(struct.pack("<IIQ", 16, 0, 0))),
    "window-messages-have-no-data": lie(of("mig-read", failing), accept(struct.pack("<II", 8, 0))),
    "window-requests-may-overlap": Case(second_read_unanswered, impatient=True),
    "window-ends-with-its-connection": lie(
        of("mig-read", lambda liar, q, r: liar.connections > 1), refuse(errno.EINVAL)
    ),
    "logging-is-offered": lie(feature("log-start", PROBE), refuse(errno.ENOTTY)),
    "logging-start-repeats-its-request": lie(feature("log-start", SET), put("<Q", 24, 0)),
    "logging-of-everything": lie(feature("log-start", SET, word(16, 0)), refuse(errno.EINVAL)),
    "logging-report-has-its-bitmap": lie(feature("log-report", GET), cut(8)),
    "logging-report-ends-with-its-range": lie(feature("log-report", GET), put("<Q", 32, 0xFF)),
    "logging-report-needs-a-start": lie(feature("log-report", GET, failing), accept(bytes(64))),
    "logging-starts-once": lie(feature("log-start", SET, failing), accept(None)),
    "logging-page-size-is-a-power-of-two": lie(feature("log-report", GET, failing), accept(bytes(64))),
    "logging-start-takes-the-kernels-form": lie(
        feature("log-start", SET, lambda liar, q, r: len(q.payload) == 32), refuse(errno.EINVAL)
    ),
    "reset-is-answered": lie(of("reset"), refuse()),
    "reset-recovers-from-error": lie(of("reset"), in_state(S.ERROR)),
    "next-client-is-served": Case(lambda liar, q, r: None, clients=1),
    "version-keeps-the-major": lie(of("version"), put("<H", 0, 1)),
    "version-does-not-raise-the-minor": lie(of("version"), put("<H", 2, 9)),
    "version-takes-a-newer-minor": lie(of("version", word(0, 9 << 16)), refuse(errno.EINVAL)),
    "version-refuses-another-major": lie(of("version", failing), accept(bytes(4))),
    "version-data-is-optional": lie(of("version", lambda liar, q, r: len(q.payload) == 4), refuse()),
    "version-data-is-json": lie(of("version", lambda liar, q, r: liar.connections > 1), cut(1)),
    "version-limits-are-numbers": version(max_data_xfer_size="1M"),
    "version-offers-what-was-proposed": version(max_dma_maps=65535),
    "version-keeps-to-one-socket": version(twin_socket={"supported": True, "fd_index": 0}),
    "version-refuses-what-is-no-json": lie(of("version", failing), accept(bytes(4))),
    "version-comes-first": lie(of("get-info", failing), accept(_info())),
    "second-client-is-told": Case(lambda liar, q, r: None, waiting=True),
    "next-client-finds-no-mappings": Case(no_mapping_twice),
    "next-client-finds-no-eventfds": Case(eternal_eventfds, impatient=True),
    "message-shorter-than-its-header": Case(lambda liar, q, r: None, clients=2),
    "message-of-four-gigabytes": Case(lambda liar, q, r: None, clients=2),
    "client-that-leaves-in-a-message": Case(lambda liar, q, r: None, clients=2),
}  # fmt: skip

for _start in S:
    if _start not in (S.ERROR, S.RUNNING):
        CASES[f"reset-in-{_start.name.lower().replace('_', '-')}"] = lie(of("reset", was(_start)), refuse())
    for _end in S:
        _name = f"arc-{_start.name}-to-{_end.name}".lower().replace("_", "-")
        if _name in CHECKS:
            _allowed = bool(arcs.paths(MigrationFlags(0x7), _start, _end))
            _here = set_to(_end, was(_start))
            CASES[_name] = lie(_here, refuse()) if _allowed else lie(_here, accept(None))
            # Said to be done, and not done; where it is not to be done, done nevertheless.
            if _start is not _end:
                _after = in_state(_start if _allowed else _end)
                CASES[f"{_name} (untrue)"] = lie(_here, accept(None) if _allowed else refuse(), _after)


# --- a server that lies -------------------------------------------------------------------------------------


class LyingServer:
    """Listens on `path`; a second client gets EBUSY, unless the lie is to leave it waiting."""

    def __init__(self, path: Path, case: Case | None) -> None:
        self.case = case
        self.errors: list[Exception] = []
        self.liar = Liar(Device(p2p=True, sparse=True, window=True))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._serving = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._waiting: list[socket.socket] = []
        self._acceptor = threading.Thread(target=self._accept)
        self._acceptor.start()

    def close(self) -> None:
        """End every thread."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in self._waiting:
            client.close()
        for thread in (self._acceptor, *self._threads):
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()
        self.liar.close()
        assert self.errors == []

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.liar.connections += 1
            last = self.case is not None and self.liar.connections == self.case.clients
            if last:
                self._listener.close()
            thread = threading.Thread(target=self._serve, args=(client,))
            self._threads.append(thread)
            thread.start()
            if last:
                return

    def _serve(self, client: socket.socket) -> None:
        # A client that has just gone is given a moment to be noticed.
        if not self._serving.acquire(timeout=0.2):
            if self.case is not None and self.case.waiting:
                self._waiting.append(client)
                return
            with client, contextlib.suppress(OSError):
                number, command, size, _, _ = uapi.VFIO_USER_HEADER.unpack(client.recv(16))
                client.recv(size)
                flags = uapi.VFIO_USER_REPLY | uapi.VFIO_USER_ERROR
                client.sendall(uapi.VFIO_USER_HEADER.pack(number, command, 16, flags, errno.EBUSY))
            return
        try:
            with client:
                Server(self.liar.device, self._tell).serve(client)
                self.liar.state = self.liar.device.state
        finally:
            self._serving.release()

    def _tell(self, request: Request, reply: Reply) -> None:
        if self.case is not None:
            try:
                self.case.lie(self.liar, request, reply)
            except Exception as error:  # else the check would fail for it
                self.errors.append(error)
        self.liar.state = self.liar.device.state


@contextmanager
def lying_server(path: Path, case: Case | None) -> Iterator[None]:
    """A server that tells the lie of `case`; None: none."""
    server = LyingServer(path, case)
    try:
        yield
    finally:
        server.close()
