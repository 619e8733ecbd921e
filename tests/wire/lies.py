"""The lies that `hostile.py` tells, one table; each is one function that changes one honest reply.

Phases say what a test must do for the lie to be heard: `attach` (connect and realize the device), `run` (the
guest touches BARs, resets, maps memory), `save` (migrate away), `resume` (migrate to here).
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hostile import COMMANDS, ERROR, FEATURES, HEADER, REPLY

if TYPE_CHECKING:
    from hostile import Device, Reply, Request

PHASES = ("attach", "run", "save", "resume")
DELAY_SECONDS = 6.0
U32, U64 = (1 << 32) - 1, (1 << 64) - 1
GIB = 1 << 30

Change = Callable[["Device", "Request", "Reply"], None]


@dataclass(frozen=True)
class Lie:
    """One named lie: applies to `command` (None: any) and, of DEVICE_FEATURE, to `feature` (0: any)."""

    name: str
    phase: str
    meaning: str
    command: int | None
    feature: int
    change: Change
    on_errors: bool = False  # told even where the honest answer is an error
    state: int | None = None  # only of a SET to this migration state

    def matches(self, request: Request, reply: Reply) -> bool:
        """Whether this is a reply the lie is about."""
        if self.command is not None and request.command != self.command:
            return False
        if self.feature and request.feature != self.feature:
            return False
        if self.state is not None and request.payload[8:12] != struct.pack("<I", self.state):
            return False
        return self.on_errors or not reply.flags & ERROR


class Liar:
    """Applies one lie from the `after`-th match on, `times` times, while `arm_file` exists."""

    def __init__(
        self,
        device: Device,
        lie: Lie | None,
        after: int = 0,
        times: int | None = None,
        arm_file: str | None = None,
    ) -> None:
        self.device = device
        self.lie = lie
        self.after = after
        self.times = times
        self.arm_file = Path(arm_file) if arm_file else None

    def __call__(self, request: Request, reply: Reply) -> None:
        """Change `reply` if it is time to."""
        if self.lie is None or not self.lie.matches(request, reply):
            return
        if self.arm_file is not None and not self.arm_file.exists():
            return
        if self.after > 0:
            self.after -= 1
            return
        if self.times is not None:
            if self.times <= 0:
                return
            self.times -= 1
        self.lie.change(self.device, request, reply)


LIES: dict[str, Lie] = {}


def _add(
    name: str,
    phase: str,
    meaning: str,
    command: str | None,
    change: Change,
    feature: str = "",
    **more: object,
) -> None:
    number = COMMANDS[command] if command else None
    lie = Lie(name, phase, meaning, number, FEATURES.get(feature, 0), change, **more)  # type: ignore[arg-type]
    if LIES.setdefault(name, lie) is not lie:
        raise ValueError(f"two lies are called {name}")


def _put(layout: str, offset: int, *values: int) -> Change:
    """Overwrite bytes of the payload."""

    def change(device: Device, request: Request, reply: Reply) -> None:
        needed = offset + struct.calcsize(layout) - len(reply.payload)
        reply.payload += bytes(max(0, needed))
        struct.pack_into(layout, reply.payload, offset, *values)

    return change


def _payload(data: bytes) -> Change:
    """Replace the payload."""

    def change(device: Device, request: Request, reply: Reply) -> None:
        reply.payload = bytearray(data)

    return change


def _set(**fields: object) -> Change:
    """Set fields of the reply."""

    def change(device: Device, request: Request, reply: Reply) -> None:
        for name, value in fields.items():
            setattr(reply, name, value)

    return change


def _both(*changes: Change) -> Change:
    def change(device: Device, request: Request, reply: Reply) -> None:
        for one in changes:
            one(device, request, reply)

    return change


# --- every command: the frame itself ------------------------------------------------------------------------


def _cut_payload(device: Device, request: Request, reply: Reply) -> None:
    del reply.payload[len(reply.payload) // 2 :]


def _half_then_close(device: Device, request: Request, reply: Reply) -> None:
    reply.send_bytes = HEADER.size + (len(reply.payload) + 1) // 2 if reply.payload else HEADER.size // 2
    reply.close = True


def _half_then_silence(device: Device, request: Request, reply: Reply) -> None:
    _half_then_close(device, request, reply)
    reply.close = False


def _longer(device: Device, request: Request, reply: Reply) -> None:
    reply.payload += b"\x5a" * 65536


def _other_id(device: Device, request: Request, reply: Reply) -> None:
    reply.id += 0x1234


def _other_command(device: Device, request: Request, reply: Reply) -> None:
    reply.command += 1


def _twice(device: Device, request: Request, reply: Reply) -> None:
    reply.after = reply.encode()


def _many_fds(device: Device, request: Request, reply: Reply) -> None:
    reply.fds += [os.open("/dev/null", os.O_RDWR) for _ in range(14)]


def _delay(device: Device, request: Request, reply: Reply) -> None:
    reply.delay_seconds = DELAY_SECONDS


_FRAME: dict[str, tuple[str, Change]] = {
    "empty": ("a success without payload", _payload(b"")),
    "short": ("half of the payload, header to match", _cut_payload),
    "long": ("64 KiB more than there should be", _longer),
    "size-huge": ("the header says 4 GiB", _set(size=U32)),
    "size-tiny": ("the header says 8 bytes, less than itself", _set(size=8)),
    "size-more": ("the header promises 1 MiB that never comes", _set(size=1 << 20)),
    "error": ("an error reply, EIO", _both(_payload(b""), _set(flags=REPLY | ERROR, error=errno.EIO))),
    "error-zero": ("an error reply with errno 0", _both(_payload(b""), _set(flags=REPLY | ERROR, error=0))),
    "error-huge": (
        "an error reply with errno 2^32-1",
        _both(_payload(b""), _set(flags=REPLY | ERROR, error=U32)),
    ),
    "error-min": (
        "an error reply with errno 2^31",
        _both(_payload(b""), _set(flags=REPLY | ERROR, error=1 << 31)),
    ),
    "error-long": (
        "an error reply that carries a payload",
        _both(_longer, _set(flags=REPLY | ERROR, error=22)),
    ),
    "wrong-id": ("a reply to a message nobody sent", _other_id),
    "wrong-command": ("the right id, another command", _other_command),
    "wrong-type": ("neither command nor reply", _set(flags=0x7)),
    "twice": ("the same reply two times", _twice),
    "junk": ("64 bytes of 0xff ahead of the reply", _set(before=b"\xff" * 64)),
    "fds": ("14 file descriptors nobody asked for", _many_fds),
    "half-close": ("half a reply, then the connection closes", _half_then_close),
    "half-silence": ("half a reply, then nothing more of it", _half_then_silence),
    "close": ("the connection closes instead of a reply", _set(silent=True, close=True)),
    "silent": ("no reply at all", _set(silent=True)),
    "delay": ("the reply comes after --delay-seconds", _delay),
    "trickle": ("one byte at a time; slow but true", _set(trickle=True)),
}

_PHASE_OF = {
    "version": "attach",
    "dma-map": "attach",
    "dma-unmap": "run",
    "get-info": "attach",
    "region-info": "attach",
    "irq-info": "attach",
    "set-irqs": "run",
    "region-read": "attach",
    "region-write": "attach",
    "reset": "run",
    "mig-read": "save",
    "mig-write": "resume",
    "precopy-info": "save",
}
_FEATURE_PHASE = {
    "migration": "attach",
    "state": "save",
    "log-start": "save",
    "log-stop": "save",
    "log-report": "save",
    "data-size": "save",
}

_NO_PAYLOAD = ("dma-map", "set-irqs", "reset", "mig-write")  # where an empty reply is no lie

for _kind, (_meaning, _change) in _FRAME.items():
    for _command, _phase in _PHASE_OF.items():
        if _kind in ("empty", "short") and _command in _NO_PAYLOAD:
            continue
        _add(f"{_command}-{_kind}", _phase, f"{_command}: {_meaning}", _command, _change, on_errors=True)
    for _feature, _phase in _FEATURE_PHASE.items():
        _add(
            f"feature-{_feature}-{_kind}",
            _phase,
            f"feature {_feature}: {_meaning}",
            "feature",
            _change,
            _feature,
            on_errors=True,
        )

# With --after N: close, fall silent or spout junk at any message index.
for _kind in ("close", "silent", "half-close", "junk", "wrong-id", "delay"):
    _add(
        f"any-{_kind}",
        "attach",
        f"whichever message: {_FRAME[_kind][0]}",
        None,
        _FRAME[_kind][1],
        on_errors=True,
    )


# --- VERSION ------------------------------------------------------------------------------------------------


def _version_text(text: bytes) -> Change:
    return _payload(struct.pack("<HH", 0, 0) + text)


def _capability(**capabilities: object) -> Change:
    return _version_text(json.dumps({"capabilities": capabilities}).encode() + b"\0")


_VERSION: dict[str, tuple[str, Change]] = {
    "no-nul": ("version data without its NUL", _version_text(b'{"capabilities":{}}')),
    "no-data": ("major and minor only (legal: the data is optional)", _version_text(b"")),
    "two-bytes": ("a reply of two bytes", _payload(b"\0\0")),
    "major": ("major 1", _put("<H", 0, 1)),
    "minor": ("a minor above the one proposed", _put("<H", 2, 99)),
    "not-json": ("bytes that are no JSON", _version_text(b"{{{{{{\0")),
    "not-object": ("a JSON array", _version_text(b"[1,2,3]\0")),
    "not-utf8": ("JSON with invalid UTF-8", _version_text(b'{"capabilities":{"\xff\xfe":1}}\0')),
    "inner-nul": ("a NUL in the middle", _version_text(b'{"capabilities"\0:{}}\0')),
    "deep": ("100 levels of nesting", _version_text(b"[" * 100 + b"\0")),
    "giant": ("1 MiB of JSON", _version_text(b'{"x":"' + b"y" * (1 << 20) + b'"}\0')),
    "capabilities-number": ("capabilities is a number", _version_text(b'{"capabilities":7}\0')),
    "format-string": ("printf directives in the text", _version_text(b"%s%s%n%n\0")),
}
for _value in (0, -1, 64, (64 << 20) + 1, 1 << 63, U64 + 1):
    _VERSION[f"xfer-{_value}"] = (f"max_data_xfer_size {_value}", _capability(max_data_xfer_size=_value))
for _value in (0, -1, 17, 1 << 40):
    _VERSION[f"fds-{_value}"] = (f"max_msg_fds {_value}", _capability(max_msg_fds=_value))
for _value in (0, 1, 4096 + 1, 1 << 63):
    _VERSION[f"pgsizes-{_value}"] = (f"pgsizes {_value}", _capability(pgsizes=_value))
for _value in (0, -1, 1 << 40):
    _VERSION[f"maps-{_value}"] = (f"max_dma_maps {_value}", _capability(max_dma_maps=_value))
for _value in (0, 1, 12288, 1 << 63):
    _VERSION[f"migration-pgsize-{_value}"] = (
        f"migration pgsize {_value}",
        _capability(migration={"pgsize": _value}),
    )
for _value in (0, 1, 1 << 40):
    _VERSION[f"bitmap-{_value}"] = (
        f"max_bitmap_size {_value}",
        _capability(migration={"max_bitmap_size": _value}),
    )
_VERSION |= {
    "xfer-float": ("max_data_xfer_size 1.5", _capability(max_data_xfer_size=1.5)),
    "xfer-string": ("max_data_xfer_size is a string", _capability(max_data_xfer_size="1048576")),
    "xfer-null": ("max_data_xfer_size is null", _capability(max_data_xfer_size=None)),
    "migration-number": ("migration is a number", _capability(migration=1)),
    "migration-null": ("migration is null", _capability(migration=None)),
    "precopy-string": ("migration_precopy_info is a string", _capability(migration_precopy_info="true")),
    "precopy-number": ("migration_precopy_info is a number", _capability(migration_precopy_info=1)),
    "precopy-false": ("no GET_PRECOPY_INFO (legal)", _capability(migration_precopy_info=False)),
    "multi-number": ("write_multiple is a number", _capability(write_multiple=1)),
    "twin": ("twin socket on, without its fd", _capability(twin_socket={"supported": True, "fd_index": 3})),
}
for _name, (_meaning, _change) in _VERSION.items():
    _add(f"version-{_name}", "attach", f"VERSION: {_meaning}", "version", _change)


# --- DEVICE_GET_INFO, REGION_INFO, IRQ_INFO -----------------------------------------------------------------

_add("info-regions-huge", "attach", "num_regions 2^32-1", "get-info", _put("<I", 8, U32))
_add("info-regions-100", "attach", "100 regions, the most QEMU takes", "get-info", _put("<I", 8, 100))
_add("info-regions-0", "attach", "no regions", "get-info", _put("<I", 8, 0))
_add("info-regions-7", "attach", "no config region", "get-info", _put("<I", 8, 7))
_add("info-irqs-huge", "attach", "num_irqs 2^32-1", "get-info", _put("<I", 12, U32))
_add("info-irqs-0", "attach", "no interrupt types", "get-info", _put("<I", 12, 0))
_add("info-argsz-0", "attach", "argsz 0", "get-info", _put("<I", 0, 0))
_add("info-argsz-huge", "attach", "argsz 2^32-1", "get-info", _put("<I", 0, U32))
_add("info-not-pci", "attach", "flags without PCI and RESET", "get-info", _put("<I", 4, 0))


def _for_region(index: int, change: Change) -> Change:
    def only(device: Device, request: Request, reply: Reply) -> None:
        if struct.unpack_from("<I", request.payload, 8)[0] == index:
            change(device, request, reply)

    return only


def _region(
    *,
    flags: int = 0x3,
    cap_offset: int = 0,
    size: int = 65536,
    offset: int = 0,
    argsz: int | None = None,
    caps: bytes = b"",
) -> Change:
    """A whole REGION_INFO reply for BAR2, its capabilities cut to what the client made room for."""

    def change(device: Device, request: Request, reply: Reply) -> None:
        room = struct.unpack_from("<I", request.payload)[0]
        total = 32 + len(caps)
        body = (
            struct.pack("<4IQQ", total if argsz is None else argsz, flags, 2, cap_offset, size, offset) + caps
        )
        reply.payload = bytearray(body[:room] if room >= 32 else body[:32])

    return _for_region(2, change)


def _sparse(*areas: tuple[int, int], following: int = 0, count: int | None = None) -> bytes:
    head = struct.pack("<HHIII", 1, 1, following, len(areas) if count is None else count, 0)
    return head + b"".join(struct.pack("<QQ", *area) for area in areas)


def _with_memfd(change: Change, size: int, count: int = 1) -> Change:
    """Attach memfds of `size` bytes."""

    def wrapped(device: Device, request: Request, reply: Reply) -> None:
        before = bytes(reply.payload)
        change(device, request, reply)
        if bytes(reply.payload) == before:
            return
        for _ in range(count):
            fd = os.memfd_create("hostile")
            os.ftruncate(fd, size)
            reply.fds.append(fd)

    return wrapped


def _growing_argsz(device: Device, request: Request, reply: Reply) -> None:
    room = struct.unpack_from("<I", request.payload)[0]
    struct.pack_into("<I", reply.payload, 0, min(room + 64, U32))


_MMAP, _CAPS = 0x4, 0x8
_REGION: dict[str, tuple[str, Change]] = {
    "argsz-0": ("argsz 0", _put("<I", 0, 0)),
    "argsz-31": ("argsz one less than the structure", _put("<I", 0, 31)),
    "argsz-huge": ("argsz 2^32-1", _put("<I", 0, U32)),
    "argsz-1g": ("argsz 1 GiB", _put("<I", 0, GIB)),
    "argsz-wrap": ("argsz 2^32-16, wraps with a header added", _put("<I", 0, U32 - 15)),
    "argsz-grows": ("argsz always 64 more than was offered", _growing_argsz),
    "size-max": ("BAR2 of 2^64-1 bytes", _region(size=U64)),
    "size-2-63": ("BAR2 of 2^63 bytes", _region(size=1 << 63)),
    "size-1p": ("BAR2 of 2^50 bytes", _region(size=1 << 50)),
    "size-odd": ("BAR2 of 12345 bytes", _region(size=12345)),
    "size-1": ("BAR2 of 1 byte", _region(size=1)),
    "bar0-size-0": ("BAR0, which config space announces, of 0 bytes", _for_region(0, _put("<Q", 16, 0))),
    "msix-size-16": ("BAR4 too small for its MSI-X table", _for_region(4, _put("<Q", 16, 16))),
    "config-size-0": ("config space of 0 bytes", _for_region(7, _put("<Q", 16, 0))),
    "config-size-8": ("config space of 8 bytes", _for_region(7, _put("<Q", 16, 8))),
    "config-size-max": ("config space of 2^64-1 bytes", _for_region(7, _put("<Q", 16, U64))),
    "index": ("an answer about another region", _put("<I", 8, 99)),
    "flags-all": ("all flag bits set", _put("<I", 4, U32)),
    "offset-max": ("a file offset of 2^64-1", _put("<Q", 24, U64)),
    "caps-none": ("CAPS set, nothing behind", _region(flags=0x3 | _CAPS)),
    "caps-offset-0": ("CAPS set, cap_offset 0", _region(flags=0x3 | _CAPS, caps=bytes(64))),
    "caps-offset-inside": (
        "cap_offset inside the structure",
        _region(flags=0xB, cap_offset=8, caps=bytes(64)),
    ),
    "caps-offset-end": ("cap_offset on the last bytes", _region(flags=0xB, cap_offset=95, caps=bytes(64))),
    "caps-offset-argsz": ("cap_offset equal to argsz", _region(flags=0xB, cap_offset=96, caps=bytes(64))),
    "caps-offset-huge": ("cap_offset 2^32-1", _region(flags=0xB, cap_offset=U32, caps=bytes(64))),
    "caps-argsz-lies": (
        "argsz 4096 but only 64 bytes of capabilities, cap_offset beyond them",
        _region(flags=0xB, cap_offset=2048, argsz=4096, caps=bytes(64)),
    ),
    "caps-self": (
        "a capability that points to itself",
        _region(flags=0xB, cap_offset=32, caps=struct.pack("<HHI", 9, 1, 32)),
    ),
    "caps-loop": (
        "two capabilities that point to each other",
        _region(flags=0xB, cap_offset=32, caps=struct.pack("<HHIHHI", 9, 1, 40, 9, 1, 32)),
    ),
    "caps-next-huge": ("next 2^32-1", _region(flags=0xB, cap_offset=32, caps=struct.pack("<HHI", 9, 1, U32))),
    "caps-next-back": (
        "next points into the structure",
        _region(flags=0xB, cap_offset=32, caps=struct.pack("<HHI", 9, 1, 4)),
    ),
    "caps-next-odd": (
        "next is not aligned",
        _region(flags=0xB, cap_offset=32, caps=struct.pack("<HHI", 9, 1, 37) + bytes(8)),
    ),
    "mmap-no-fd": ("MMAP without a file descriptor", _region(flags=0x7)),
    "mmap-small-fd": ("MMAP of 64 KiB with a file of 1 page", _with_memfd(_region(flags=0x7), 4096)),
    "mmap-empty-fd": ("MMAP with an empty file", _with_memfd(_region(flags=0x7), 0)),
    "mmap-two-fds": ("MMAP with two files", _with_memfd(_region(flags=0x7), 65536, 2)),
    "mmap-odd-offset": (
        "MMAP with an unaligned offset",
        _with_memfd(_region(flags=0x7, offset=123), 1 << 20),
    ),
}


def _null_fd(device: Device, request: Request, reply: Reply) -> None:
    struct.pack_into("<I", reply.payload, 4, 0x7)
    reply.fds.append(os.open("/dev/null", os.O_RDWR))


_REGION["mmap-null-fd"] = ("MMAP with /dev/null", _for_region(2, _null_fd))
for _kind, _areas in {
    "sparse-ok": [(0, 4096), (8192, 4096)],
    "sparse-beyond": [(0, 1 << 40)],
    "sparse-overflow": [(U64 - 4095, 8192)],
    "sparse-overlap": [(0, 65536), (4096, 65536)],
    "sparse-zero": [(0, 0)],
    "sparse-odd": [(1, 3)],
}.items():
    _REGION[_kind] = (
        f"sparse areas {_areas}",
        _with_memfd(_region(flags=0xF, cap_offset=32, caps=_sparse(*_areas)), 65536),
    )
for _count in (2, U32, 1 << 28):
    _REGION[f"sparse-count-{_count}"] = (
        f"nr_areas {_count} with one area behind it",
        _with_memfd(_region(flags=0xF, cap_offset=32, caps=_sparse((0, 4096), count=_count)), 65536),
    )
_REGION["sparse-cut"] = (
    "a sparse capability cut in its header",
    _with_memfd(_region(flags=0xF, cap_offset=32, caps=_sparse((0, 4096))[:12]), 65536),
)
for _name, (_meaning, _change) in _REGION.items():
    _add(f"region-{_name}", "attach", f"REGION_INFO: {_meaning}", "region-info", _change)

for _value in (0, 1, 2049, 1 << 16, 1 << 31, U32):
    _add(f"irq-count-{_value}", "attach", f"IRQ_INFO: count {_value}", "irq-info", _put("<I", 12, _value))
_add("irq-index", "attach", "IRQ_INFO: an answer about another index", "irq-info", _put("<I", 8, 77))
_add("irq-flags-all", "attach", "IRQ_INFO: all flag bits set", "irq-info", _put("<I", 4, U32))
_add("irq-argsz-huge", "attach", "IRQ_INFO: argsz 2^32-1", "irq-info", _put("<I", 0, U32))


# --- REGION_READ, REGION_WRITE ------------------------------------------------------------------------------


def _read_more(device: Device, request: Request, reply: Reply) -> None:
    reply.payload += bytes(4096)
    struct.pack_into("<I", reply.payload, 12, len(reply.payload) - 16)


def _read_less(device: Device, request: Request, reply: Reply) -> None:
    del reply.payload[16 + (len(reply.payload) - 16) // 2 :]
    struct.pack_into("<I", reply.payload, 12, len(reply.payload) - 16)


def _count_off(delta: int) -> Change:
    def change(device: Device, request: Request, reply: Reply) -> None:
        count = struct.unpack_from("<I", reply.payload, 12)[0]
        struct.pack_into("<I", reply.payload, 12, (count + delta) & U32)

    return change


for _command, _name in (("region-read", "read"), ("region-write", "write")):
    _add(f"{_name}-count-more", "attach", "count one more than asked, same data", _command, _count_off(1))
    _add(f"{_name}-count-less", "attach", "count one less than asked, same data", _command, _count_off(-1))
    _add(f"{_name}-count-0", "attach", "count 0", _command, _put("<I", 12, 0))
    _add(f"{_name}-count-huge", "attach", "count 2^32-1", _command, _put("<I", 12, U32))
    _add(f"{_name}-count-negative", "attach", "count 2^31", _command, _put("<I", 12, 1 << 31))
    _add(f"{_name}-region", "attach", "an answer about another region", _command, _put("<I", 8, 99))
    _add(f"{_name}-offset", "attach", "an answer about another offset", _command, _put("<Q", 0, U64))
_add("read-data-more", "attach", "4 KiB more data than asked, count to match", "region-read", _read_more)
_add("read-data-less", "attach", "half of the data, count to match", "region-read", _read_less)
_add(
    "read-all-ones",
    "attach",
    "every byte read is 0xff",
    "region-read",
    lambda d, q, r: r.payload.__setitem__(slice(16, None), b"\xff" * (len(r.payload) - 16)),
)


# --- DEVICE_FEATURE -----------------------------------------------------------------------------------------

for _feature, _phase in _FEATURE_PHASE.items():
    _add(f"feature-{_feature}-argsz-0", _phase, "argsz 0", "feature", _put("<I", 0, 0), _feature)
    _add(f"feature-{_feature}-argsz-huge", _phase, "argsz 2^32-1", "feature", _put("<I", 0, U32), _feature)
    _add(
        f"feature-{_feature}-flags",
        _phase,
        "flags of another request",
        "feature",
        _put("<I", 4, 0x1FFFF),
        _feature,
    )
    _add(
        f"feature-{_feature}-argsz-7",
        _phase,
        "argsz below the structure",
        "feature",
        _put("<I", 0, 7),
        _feature,
    )

for _name, _value in {"none": 0, "all": U64, "no-stop-copy": 4, "p2p": 7, "stop-copy": 1}.items():
    _add(
        f"migration-flags-{_name}",
        "attach",
        f"migration flags {_value:#x}",
        "feature",
        _put("<Q", 8, _value),
        "migration",
    )
for _value in (0, 99, U32):
    _add(f"state-get-{_value}", "attach", f"the state is {_value}", "feature", _put("<I", 8, _value), "state")
for _name, _value in {"stop": 1, "running": 2, "stop-copy": 3, "resuming": 4, "pre-copy": 6}.items():
    _phase = "resume" if _name in ("resuming", "running") else "save"
    _add(
        f"state-refuse-{_name}", _phase, f"EIO for the arc to {_name}", "feature",
        _FRAME["error"][1], "state", on_errors=True, state=_value,
    )  # fmt: skip
    _add(
        f"state-close-{_name}", _phase, f"the connection closes at the arc to {_name}", "feature",
        _FRAME["close"][1], "state", on_errors=True, state=_value,
    )  # fmt: skip
    _add(
        f"state-delay-{_name}", _phase, f"the arc to {_name} takes --delay-seconds", "feature",
        _delay, "state", on_errors=True, state=_value,
    )  # fmt: skip


def _grow(layout: str, offset: int, step: int) -> Change:
    def change(device: Device, request: Request, reply: Reply) -> None:
        struct.pack_into(layout, reply.payload, offset, min(device.queries * step, U64))

    return change


for _name, _value in {"0": 0, "1": 1, "1t": 1 << 40, "2-63": 1 << 63, "max": U64}.items():
    _add(
        f"data-size-{_name}",
        "save",
        f"stop_copy_length {_value}",
        "feature",
        _put("<Q", 8, _value),
        "data-size",
    )
_add(
    "data-size-grows",
    "save",
    "stop_copy_length grows by 64 MiB a query",
    "feature",
    _grow("<Q", 8, 64 << 20),
    "data-size",
)


def _bitmap(delta: int | None, fill: int = 0) -> Change:
    """Make the report's bitmap `delta` bytes longer (None: drop it), filled with `fill`."""

    def change(device: Device, request: Request, reply: Reply) -> None:
        length = max(0, len(reply.payload) - 32)
        length = 0 if delta is None else max(0, length + delta)
        reply.payload[32:] = bytes([fill]) * length
        struct.pack_into("<I", reply.payload, 0, len(reply.payload))

    return change


_add("log-report-no-bitmap", "save", "no bitmap in the report", "feature", _bitmap(None), "log-report")
_add("log-report-bitmap-short", "save", "bitmap 8 bytes short", "feature", _bitmap(-8), "log-report")
_add("log-report-bitmap-odd", "save", "bitmap 3 bytes short", "feature", _bitmap(-3), "log-report")
_add("log-report-bitmap-long", "save", "bitmap 64 KiB long", "feature", _bitmap(65536), "log-report")
_add(
    "log-report-all-ones",
    "save",
    "every bit set, outside the range too",
    "feature",
    _bitmap(0, 0xFF),
    "log-report",
)
_add("log-report-iova", "save", "a report about another range", "feature", _put("<Q", 8, U64), "log-report")
_add("log-report-length", "save", "a report of 2^64-1 bytes", "feature", _put("<Q", 16, U64), "log-report")
_add("log-report-page-size-0", "save", "page size 0", "feature", _put("<Q", 24, 0), "log-report")
_add("log-start-page-size-0", "save", "page size 0", "feature", _put("<Q", 8, 0), "log-start")
_add("log-start-ranges-huge", "save", "num_ranges 2^32-1", "feature", _put("<I", 16, U32), "log-start")


# --- MIG_DATA_READ, MIG_DATA_WRITE, GET_PRECOPY_INFO --------------------------------------------------------


def _mig_endless(device: Device, request: Request, reply: Reply) -> None:
    size = min(struct.unpack_from("<I", request.payload, 4)[0], 1 << 20)
    reply.flags, reply.error = REPLY, 0
    reply.payload = bytearray(struct.pack("<II", 8 + size, size) + bytes(size))


def _mig_more(device: Device, request: Request, reply: Reply) -> None:
    size = struct.unpack_from("<I", request.payload, 4)[0] + 4096
    reply.payload = bytearray(struct.pack("<II", 8 + size, size) + b"\x5a" * size)


def _mig_size_more(device: Device, request: Request, reply: Reply) -> None:
    size = struct.unpack_from("<I", request.payload, 4)[0]
    struct.pack_into("<II", reply.payload, 0, 8 + size, size)


def _mig_one_byte(device: Device, request: Request, reply: Reply) -> None:
    kept = bytes(reply.payload[9:])
    device.pending[:0] = kept
    reply.payload = (
        bytearray(struct.pack("<II", 9, 1) + reply.payload[8:9]) if len(reply.payload) > 8 else reply.payload
    )


_add("mig-data-more", "save", "4 KiB more data than asked, all there", "mig-read", _mig_more)
_add("mig-data-promised", "save", "size as asked, the data missing", "mig-read",
     _both(_mig_size_more, lambda d, q, r: r.payload.__delitem__(slice(8, None))))  # fmt: skip
_add("mig-size-huge", "save", "size 2^32-1", "mig-read", _put("<I", 4, U32))
_add("mig-size-negative", "save", "size 2^31", "mig-read", _put("<I", 4, 1 << 31))
_add("mig-size-0", "save", "size 0 with data behind it", "mig-read", _put("<I", 4, 0))
_add("mig-argsz-0", "save", "argsz 0", "mig-read", _put("<I", 0, 0))
_add("mig-argsz-huge", "save", "argsz 2^32-1", "mig-read", _put("<I", 0, U32))
_add(
    "mig-always-empty",
    "save",
    "never any data, whatever the sizes say",
    "mig-read",
    _payload(struct.pack("<II", 8, 0)),
)
_add("mig-endless", "save", "data without end", "mig-read", _mig_endless, on_errors=True)
_add("mig-one-byte", "save", "one byte a reply; slow but true", "mig-read", _mig_one_byte)
_add(
    "mig-write-payload",
    "resume",
    "the reply to a write carries the data back",
    "mig-write",
    _payload(bytes(4096)),
)
_add("mig-write-nospace", "resume", "ENOSPC for data", "mig-write",
     _both(_payload(b""), _set(flags=REPLY | ERROR, error=errno.ENOSPC)))  # fmt: skip

_add("precopy-argsz-0", "save", "argsz 0", "precopy-info", _put("<I", 0, 0))
_add("precopy-argsz-huge", "save", "argsz 2^32-1", "precopy-info", _put("<I", 0, U32))
_add("precopy-flags-all", "save", "all flag bits set", "precopy-info", _put("<I", 4, U32))
_add("precopy-initial-max", "save", "initial_bytes 2^64-1", "precopy-info", _put("<Q", 8, U64))
_add("precopy-dirty-max", "save", "dirty_bytes 2^64-1", "precopy-info", _put("<Q", 16, U64))
_add("precopy-both-max", "save", "both 2^64-1, the sum wraps", "precopy-info", _put("<QQ", 8, U64, U64))
_add(
    "precopy-constant",
    "save",
    "always 1 MiB initial, 1 MiB dirty",
    "precopy-info",
    _put("<QQ", 8, 1 << 20, 1 << 20),
)
_add("precopy-initial-0", "save", "initial_bytes 0 from the start", "precopy-info", _put("<QQ", 8, 0, 0))
_add(
    "precopy-grows", "save", "dirty_bytes grows by 64 MiB a query", "precopy-info", _grow("<Q", 16, 64 << 20)
)
_add(
    "precopy-data-disagree",
    "save",
    "nothing dirty, yet stop_copy_length 1 TiB",
    "feature",
    _put("<Q", 8, 1 << 40),
    "data-size",
)


# --- commands from the server that no honest server sends ---------------------------------------------------


def _request(command: int, payload: bytes = b"", size: int | None = None, flags: int = 0) -> bytes:
    return (
        HEADER.pack(0x4242, command, HEADER.size + len(payload) if size is None else size, flags, 0) + payload
    )


_DMA_READ, _DMA_WRITE = 11, 12
_REQUESTS: dict[str, tuple[str, bytes]] = {
    "dma-read-2-63": ("DMA_READ of 2^63 bytes", _request(_DMA_READ, struct.pack("<QQ", 0, 1 << 63))),
    "dma-read-max": ("DMA_READ of 2^64-1 bytes", _request(_DMA_READ, struct.pack("<QQ", 0, U64))),
    "dma-read-u32": ("DMA_READ of 2^32-1 bytes", _request(_DMA_READ, struct.pack("<QQ", 0, U32))),
    "dma-read-0": ("DMA_READ of 0 bytes", _request(_DMA_READ, struct.pack("<QQ", 0, 0))),
    "dma-read-wrap": ("DMA_READ past 2^64", _request(_DMA_READ, struct.pack("<QQ", U64 - 15, 4096))),
    "dma-read-unmapped": (
        "DMA_READ where nothing is",
        _request(_DMA_READ, struct.pack("<QQ", 1 << 60, 4096)),
    ),
    "dma-read-short": ("DMA_READ of a 4-byte body", _request(_DMA_READ, bytes(4))),
    "dma-read-empty": ("DMA_READ without a body", _request(_DMA_READ)),
    "dma-write-2-63": (
        "DMA_WRITE of 2^63 bytes",
        _request(_DMA_WRITE, struct.pack("<QQ", 0, 1 << 63) + bytes(64)),
    ),
    "dma-write-more": (
        "DMA_WRITE of more than it carries",
        _request(_DMA_WRITE, struct.pack("<QQ", 0, 4096) + bytes(64)),
    ),
    "dma-write-empty": ("DMA_WRITE without a body", _request(_DMA_WRITE)),
    "dma-write-no-reply": (
        "DMA_WRITE of more than it carries, no reply wanted",
        _request(_DMA_WRITE, struct.pack("<QQ", 0, 4096) + bytes(64), flags=0x10),
    ),
    "unknown": ("command 999", _request(999, bytes(32))),
    "version": ("VERSION, which is the client's", _request(COMMANDS["version"], bytes(64))),
    "size-huge": ("a request of 4 GiB", _request(_DMA_READ, size=U32)),
    "size-tiny": ("a request shorter than its header", _request(_DMA_READ, size=15)),
    "error-flag": (
        "a request with the error bit",
        _request(_DMA_READ, struct.pack("<QQ", 0, 16), flags=0x20),
    ),
    "flood": ("1000 DMA_READs at once", _request(_DMA_READ, struct.pack("<QQ", 0, 4096)) * 1000),
}
for _name, (_meaning, _data) in _REQUESTS.items():
    _add(f"request-{_name}", "attach", f"from the server: {_meaning}", "region-read", _set(before=_data))
