"""Lies about the window for migration data, which only a server that tells one of them offers."""

from __future__ import annotations

import errno
import json

from vfu_dev.hostile.device import Device
from vfu_dev.hostile.lie import U32, U64, Change, add, both, payload, put, set_fields
from vfu_dev.hostile.message import Reply, Request
from vfu_dev.uapi import VFIO_USER_ERROR as ERROR
from vfu_dev.uapi import VFIO_USER_REPLY as REPLY


def _offer(value: object) -> Change:
    def change(device: Device, request: Request, reply: Reply) -> None:
        found = json.loads(bytes(reply.payload[4:-1]))
        found["capabilities"]["migration_data_window"] = value
        reply.payload[4:] = json.dumps(found).encode() + b"\0"

    return change


def _forget(device: Device, request: Request, reply: Reply) -> None:
    device.window = None


for _name, _value in {"text": "16M", "negative": -1, "true": True, "object": {}, "2-64": 1 << 64}.items():
    add(f"window-offer-{_name}", "attach", f"migration_data_window {_value}", "version", _offer(_value))
add("window-offer-1", "save", "a window of at most 1 byte", "version", _offer(1))
add("window-offer-max", "save", "a window of up to 2^63 bytes", "version", _offer(1 << 63))
add(
    "window-refused", "save", "EINVAL for the window", "mig-window",
    both(payload(b""), set_fields(flags=REPLY | ERROR, error=errno.EINVAL), _forget),
)  # fmt: skip
add("window-payload", "save", "the reply to the window has 4 KiB", "mig-window", payload(bytes(4096)))
add("window-size-more", "save", "1 MiB more data than there is room for", "mig-read", put("<I", 4, 2 << 20))
add("window-size-huge", "save", "data of 2^32-1 bytes", "mig-read", put("<I", 4, U32))
add("window-offset", "save", "data at another offset than asked", "mig-read", put("<Q", 8, 1 << 20 | 64))
add("window-offset-max", "save", "data at 2^64-1", "mig-read", put("<Q", 8, U64))
add(
    "window-reply-short",
    "save",
    "a reply as it is without a window",
    "mig-read",
    lambda d, q, r: r.payload.__delitem__(slice(8, None)),
)
add(
    "window-reply-data",
    "save",
    "4 KiB of data behind the reply",
    "mig-read",
    lambda d, q, r: r.payload.extend(bytes(4096)),
)
add("window-write-payload", "resume", "the reply to a write has 4 KiB", "mig-write", payload(bytes(4096)))
