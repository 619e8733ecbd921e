"""Lies about the frame of any message: its size, its id, its flags, whether and when it comes."""

from __future__ import annotations

import errno
import os

from vfu_dev.hostile.device import Device
from vfu_dev.hostile.lie import U32, Change, add, both, payload, set_fields
from vfu_dev.hostile.message import Reply, Request
from vfu_dev.uapi import VFIO_USER_ERROR as ERROR
from vfu_dev.uapi import VFIO_USER_HEADER as HEADER
from vfu_dev.uapi import VFIO_USER_REPLY as REPLY


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


def delay(device: Device, request: Request, reply: Reply) -> None:
    """Send the reply late."""
    reply.delay_seconds = device.delay_seconds


FRAME: dict[str, tuple[str, Change]] = {
    "empty": ("a success without payload", payload(b"")),
    "short": ("half of the payload, header to match", _cut_payload),
    "long": ("64 KiB more than there should be", _longer),
    "size-huge": ("the header says 4 GiB", set_fields(size=U32)),
    "size-tiny": ("the header says 8 bytes, less than itself", set_fields(size=8)),
    "size-more": ("the header promises 1 MiB that never comes", set_fields(size=1 << 20)),
    "error": ("an error reply, EIO", both(payload(b""), set_fields(flags=REPLY | ERROR, error=errno.EIO))),
    "error-zero": (
        "an error reply with errno 0",
        both(payload(b""), set_fields(flags=REPLY | ERROR, error=0)),
    ),
    "error-huge": (
        "an error reply with errno 2^32-1",
        both(payload(b""), set_fields(flags=REPLY | ERROR, error=U32)),
    ),
    "error-min": (
        "an error reply with errno 2^31",
        both(payload(b""), set_fields(flags=REPLY | ERROR, error=1 << 31)),
    ),
    "error-long": (
        "an error reply that carries a payload",
        both(_longer, set_fields(flags=REPLY | ERROR, error=22)),
    ),
    "wrong-id": ("a reply to a message nobody sent", _other_id),
    "wrong-command": ("the right id, another command", _other_command),
    "wrong-type": ("neither command nor reply", set_fields(flags=0x7)),
    "twice": ("the same reply two times", _twice),
    "junk": ("64 bytes of 0xff ahead of the reply", set_fields(before=b"\xff" * 64)),
    "fds": ("14 file descriptors nobody asked for", _many_fds),
    "half-close": ("half a reply, then the connection closes", _half_then_close),
    "half-silence": ("half a reply, then nothing more of it", _half_then_silence),
    "close": ("the connection closes instead of a reply", set_fields(silent=True, close=True)),
    "silent": ("no reply at all", set_fields(silent=True)),
    "delay": ("the reply comes after --delay-seconds", delay),
    "trickle": ("one byte at a time; slow but true", set_fields(trickle=True)),
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
FEATURE_PHASE = {
    "migration": "attach",
    "state": "save",
    "log-start": "save",
    "log-stop": "save",
    "log-report": "save",
    "data-size": "save",
}

_NO_PAYLOAD = ("dma-map", "set-irqs", "reset", "mig-write")  # where an empty reply is no lie

for _kind, (_meaning, _change) in FRAME.items():
    for _command, _phase in _PHASE_OF.items():
        if _kind in ("empty", "short") and _command in _NO_PAYLOAD:
            continue
        add(f"{_command}-{_kind}", _phase, f"{_command}: {_meaning}", _command, _change, on_errors=True)
    for _feature, _phase in FEATURE_PHASE.items():
        add(
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
    add(
        f"any-{_kind}",
        "attach",
        f"whichever message: {FRAME[_kind][0]}",
        None,
        FRAME[_kind][1],
        on_errors=True,
    )
