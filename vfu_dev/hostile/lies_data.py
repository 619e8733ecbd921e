"""Lies about data: region accesses, device features, migration; and requests that no honest server sends."""

from __future__ import annotations

import errno
import struct

from vfu_dev.hostile.device import Device
from vfu_dev.hostile.lie import U32, U64, Change, add, both, payload, put, set_fields
from vfu_dev.hostile.lies_frame import FEATURE_PHASE, FRAME, delay
from vfu_dev.hostile.message import COMMANDS, Reply, Request
from vfu_dev.uapi import VFIO_USER_ERROR as ERROR
from vfu_dev.uapi import VFIO_USER_HEADER as HEADER
from vfu_dev.uapi import VFIO_USER_REPLY as REPLY

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
    add(f"{_name}-count-more", "attach", "count one more than asked, same data", _command, _count_off(1))
    add(f"{_name}-count-less", "attach", "count one less than asked, same data", _command, _count_off(-1))
    add(f"{_name}-count-0", "attach", "count 0", _command, put("<I", 12, 0))
    add(f"{_name}-count-huge", "attach", "count 2^32-1", _command, put("<I", 12, U32))
    add(f"{_name}-count-negative", "attach", "count 2^31", _command, put("<I", 12, 1 << 31))
    add(f"{_name}-region", "attach", "an answer about another region", _command, put("<I", 8, 99))
    add(f"{_name}-offset", "attach", "an answer about another offset", _command, put("<Q", 0, U64))
add("read-data-more", "attach", "4 KiB more data than asked, count to match", "region-read", _read_more)
add("read-data-less", "attach", "half of the data, count to match", "region-read", _read_less)
add(
    "read-all-ones",
    "attach",
    "every byte read is 0xff",
    "region-read",
    lambda d, q, r: r.payload.__setitem__(slice(16, None), b"\xff" * (len(r.payload) - 16)),
)


# --- DEVICE_FEATURE -----------------------------------------------------------------------------------------

for _feature, _phase in FEATURE_PHASE.items():
    add(f"feature-{_feature}-argsz-0", _phase, "argsz 0", "feature", put("<I", 0, 0), _feature)
    add(f"feature-{_feature}-argsz-huge", _phase, "argsz 2^32-1", "feature", put("<I", 0, U32), _feature)
    add(
        f"feature-{_feature}-flags",
        _phase,
        "flags of another request",
        "feature",
        put("<I", 4, 0x1FFFF),
        _feature,
    )
    add(
        f"feature-{_feature}-argsz-7",
        _phase,
        "argsz below the structure",
        "feature",
        put("<I", 0, 7),
        _feature,
    )

for _name, _value in {"none": 0, "all": U64, "no-stop-copy": 4, "p2p": 7, "stop-copy": 1}.items():
    add(
        f"migration-flags-{_name}",
        "attach",
        f"migration flags {_value:#x}",
        "feature",
        put("<Q", 8, _value),
        "migration",
    )
for _value in (0, 99, U32):
    add(f"state-get-{_value}", "attach", f"the state is {_value}", "feature", put("<I", 8, _value), "state")
for _name, _value in {"stop": 1, "running": 2, "stop-copy": 3, "resuming": 4, "pre-copy": 6}.items():
    _phase = "resume" if _name in ("resuming", "running") else "save"
    add(
        f"state-refuse-{_name}", _phase, f"EIO for the arc to {_name}", "feature",
        FRAME["error"][1], "state", on_errors=True, state=_value,
    )  # fmt: skip
    add(
        f"state-close-{_name}", _phase, f"the connection closes at the arc to {_name}", "feature",
        FRAME["close"][1], "state", on_errors=True, state=_value,
    )  # fmt: skip
    add(
        f"state-delay-{_name}", _phase, f"the arc to {_name} takes --delay-seconds", "feature",
        delay, "state", on_errors=True, state=_value,
    )  # fmt: skip


def _grow(layout: str, offset: int, step: int) -> Change:
    def change(device: Device, request: Request, reply: Reply) -> None:
        struct.pack_into(layout, reply.payload, offset, min(device.queries * step, U64))

    return change


for _name, _value in {"0": 0, "1": 1, "1t": 1 << 40, "2-63": 1 << 63, "max": U64}.items():
    add(
        f"data-size-{_name}",
        "save",
        f"stop_copy_length {_value}",
        "feature",
        put("<Q", 8, _value),
        "data-size",
    )
add(
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


add("log-report-no-bitmap", "save", "no bitmap in the report", "feature", _bitmap(None), "log-report")
add("log-report-bitmap-short", "save", "bitmap 8 bytes short", "feature", _bitmap(-8), "log-report")
add("log-report-bitmap-odd", "save", "bitmap 3 bytes short", "feature", _bitmap(-3), "log-report")
add("log-report-bitmap-long", "save", "bitmap 64 KiB long", "feature", _bitmap(65536), "log-report")
add(
    "log-report-all-ones",
    "save",
    "every bit set, outside the range too",
    "feature",
    _bitmap(0, 0xFF),
    "log-report",
)
add("log-report-iova", "save", "a report about another range", "feature", put("<Q", 8, U64), "log-report")
add("log-report-length", "save", "a report of 2^64-1 bytes", "feature", put("<Q", 16, U64), "log-report")
add("log-report-page-size-0", "save", "page size 0", "feature", put("<Q", 24, 0), "log-report")
add("log-start-page-size-0", "save", "page size 0", "feature", put("<Q", 8, 0), "log-start")
add("log-start-ranges-huge", "save", "num_ranges 2^32-1", "feature", put("<I", 16, U32), "log-start")


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


add("mig-data-more", "save", "4 KiB more data than asked, all there", "mig-read", _mig_more)
add("mig-data-promised", "save", "size as asked, the data missing", "mig-read",
     both(_mig_size_more, lambda d, q, r: r.payload.__delitem__(slice(8, None))))  # fmt: skip
add("mig-size-huge", "save", "size 2^32-1", "mig-read", put("<I", 4, U32))
add("mig-size-negative", "save", "size 2^31", "mig-read", put("<I", 4, 1 << 31))
add("mig-size-0", "save", "size 0 with data behind it", "mig-read", put("<I", 4, 0))
add("mig-argsz-0", "save", "argsz 0", "mig-read", put("<I", 0, 0))
add("mig-argsz-huge", "save", "argsz 2^32-1", "mig-read", put("<I", 0, U32))
add(
    "mig-always-empty",
    "save",
    "never any data, whatever the sizes say",
    "mig-read",
    payload(struct.pack("<II", 8, 0)),
)
add("mig-endless", "save", "data without end", "mig-read", _mig_endless, on_errors=True)
add("mig-one-byte", "save", "one byte a reply; slow but true", "mig-read", _mig_one_byte)
add(
    "mig-write-payload",
    "resume",
    "the reply to a write carries the data back",
    "mig-write",
    payload(bytes(4096)),
)
add("mig-write-nospace", "resume", "ENOSPC for data", "mig-write",
     both(payload(b""), set_fields(flags=REPLY | ERROR, error=errno.ENOSPC)))  # fmt: skip

add("precopy-argsz-0", "save", "argsz 0", "precopy-info", put("<I", 0, 0))
add("precopy-argsz-huge", "save", "argsz 2^32-1", "precopy-info", put("<I", 0, U32))
add("precopy-flags-all", "save", "all flag bits set", "precopy-info", put("<I", 4, U32))
add("precopy-initial-max", "save", "initial_bytes 2^64-1", "precopy-info", put("<Q", 8, U64))
add("precopy-dirty-max", "save", "dirty_bytes 2^64-1", "precopy-info", put("<Q", 16, U64))
add("precopy-both-max", "save", "both 2^64-1, the sum wraps", "precopy-info", put("<QQ", 8, U64, U64))
add(
    "precopy-constant",
    "save",
    "always 1 MiB initial, 1 MiB dirty",
    "precopy-info",
    put("<QQ", 8, 1 << 20, 1 << 20),
)
add("precopy-initial-0", "save", "initial_bytes 0 from the start", "precopy-info", put("<QQ", 8, 0, 0))
add("precopy-grows", "save", "dirty_bytes grows by 64 MiB a query", "precopy-info", _grow("<Q", 16, 64 << 20))
add(
    "precopy-data-disagree",
    "save",
    "nothing dirty, yet stop_copy_length 1 TiB",
    "feature",
    put("<Q", 8, 1 << 40),
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
    add(f"request-{_name}", "attach", f"from the server: {_meaning}", "region-read", set_fields(before=_data))
