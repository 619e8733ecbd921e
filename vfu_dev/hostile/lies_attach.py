"""Lies about what there is: VERSION, DEVICE_GET_INFO, REGION_INFO and IRQ_INFO."""

from __future__ import annotations

import json
import os
import struct

from vfu_dev.hostile.device import Device
from vfu_dev.hostile.lie import GIB, U32, U64, Change, add, payload, put
from vfu_dev.hostile.message import Reply, Request

# --- VERSION ------------------------------------------------------------------------------------------------


def _version_text(text: bytes) -> Change:
    return payload(struct.pack("<HH", 0, 0) + text)


def _capability(**capabilities: object) -> Change:
    return _version_text(json.dumps({"capabilities": capabilities}).encode() + b"\0")


_VERSION: dict[str, tuple[str, Change]] = {
    "no-nul": ("version data without its NUL", _version_text(b'{"capabilities":{}}')),
    "no-data": ("major and minor only (legal: the data is optional)", _version_text(b"")),
    "two-bytes": ("a reply of two bytes", payload(b"\0\0")),
    "major": ("major 1", put("<H", 0, 1)),
    "minor": ("a minor above the one proposed", put("<H", 2, 99)),
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


def _without_precopy_info(device: Device, request: Request, reply: Reply) -> None:
    device.has_precopy_info = False
    _capability(migration={"pgsize": 4096})(device, request, reply)


_VERSION["precopy-absent"] = ("no GET_PRECOPY_INFO, which is EINVAL (legal)", _without_precopy_info)
for _name, (_meaning, _change) in _VERSION.items():
    add(f"version-{_name}", "attach", f"VERSION: {_meaning}", "version", _change)


# --- DEVICE_GET_INFO, REGION_INFO, IRQ_INFO -----------------------------------------------------------------

add("info-regions-huge", "attach", "num_regions 2^32-1", "get-info", put("<I", 8, U32))
add("info-regions-100", "attach", "100 regions, the most QEMU takes", "get-info", put("<I", 8, 100))
add("info-regions-0", "attach", "no regions", "get-info", put("<I", 8, 0))
add("info-regions-7", "attach", "no config region", "get-info", put("<I", 8, 7))
add("info-irqs-huge", "attach", "num_irqs 2^32-1", "get-info", put("<I", 12, U32))
add("info-irqs-0", "attach", "no interrupt types", "get-info", put("<I", 12, 0))
add("info-argsz-0", "attach", "argsz 0", "get-info", put("<I", 0, 0))
add("info-argsz-huge", "attach", "argsz 2^32-1", "get-info", put("<I", 0, U32))
add("info-not-pci", "attach", "flags without PCI and RESET", "get-info", put("<I", 4, 0))


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
    "argsz-0": ("argsz 0", put("<I", 0, 0)),
    "argsz-31": ("argsz one less than the structure", put("<I", 0, 31)),
    "argsz-huge": ("argsz 2^32-1", put("<I", 0, U32)),
    "argsz-1g": ("argsz 1 GiB", put("<I", 0, GIB)),
    "argsz-wrap": ("argsz 2^32-16, wraps with a header added", put("<I", 0, U32 - 15)),
    "argsz-grows": ("argsz always 64 more than was offered", _growing_argsz),
    "size-max": ("BAR2 of 2^64-1 bytes", _region(size=U64)),
    "size-2-63": ("BAR2 of 2^63 bytes", _region(size=1 << 63)),
    "size-1p": ("BAR2 of 2^50 bytes", _region(size=1 << 50)),
    "size-odd": ("BAR2 of 12345 bytes", _region(size=12345)),
    "size-1": ("BAR2 of 1 byte", _region(size=1)),
    "bar0-size-0": ("BAR0, which config space announces, of 0 bytes", _for_region(0, put("<Q", 16, 0))),
    "msix-size-16": ("BAR4 too small for its MSI-X table", _for_region(4, put("<Q", 16, 16))),
    "config-size-0": ("config space of 0 bytes", _for_region(7, put("<Q", 16, 0))),
    "config-size-8": ("config space of 8 bytes", _for_region(7, put("<Q", 16, 8))),
    "config-size-max": ("config space of 2^64-1 bytes", _for_region(7, put("<Q", 16, U64))),
    "index": ("an answer about another region", put("<I", 8, 99)),
    "flags-all": ("all flag bits set", put("<I", 4, U32)),
    "offset-max": ("a file offset of 2^64-1", put("<Q", 24, U64)),
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
    add(f"region-{_name}", "attach", f"REGION_INFO: {_meaning}", "region-info", _change)

for _value in (0, 1, 2049, 1 << 16, 1 << 31, U32):
    add(f"irq-count-{_value}", "attach", f"IRQ_INFO: count {_value}", "irq-info", put("<I", 12, _value))
add("irq-index", "attach", "IRQ_INFO: an answer about another index", "irq-info", put("<I", 8, 77))
add("irq-flags-all", "attach", "IRQ_INFO: all flag bits set", "irq-info", put("<I", 4, U32))
add("irq-argsz-huge", "attach", "IRQ_INFO: argsz 2^32-1", "irq-info", put("<I", 0, U32))
