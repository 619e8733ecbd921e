"""Traces as QEMU writes them: lines of each version, records of the simple backend, and recorded ones."""

from __future__ import annotations

import lzma
import struct
from collections.abc import Iterator
from pathlib import Path

from vfu_dev.qemu_events import BY_NAME

TRACES = Path(__file__).parent / "data" / "traces"
DEVICE = "0000:3b:00.1"
# Seconds, name, fields in the order of its text.
Event = tuple[float, str, tuple[int | str, ...]]
HEADER = struct.pack("<QQQ", (1 << 64) - 1, 0xF2B177CB0AA429B4, 4)


def recorded(release: str, side: str) -> str:
    """Return a trace that was recorded here: two devices, a cancelled and a completed migration.

    `11.1-multifd` is one device and one migration, whose STOP_COPY went through multifd.
    """
    return lzma.open(TRACES / f"{release}-{side}.log.xz", "rt", errors="replace").read()


def move(
    *,
    initial: int = 3 << 20,
    blocks: tuple[int, ...] = (1 << 20, 1 << 20, 1 << 20),
    dirty: tuple[int, ...] = (5000, 7000),
    extra: int = 1000,
    carried: int | None = None,
) -> Iterator[Event]:
    """Yield (seconds, event, fields in the order of its text) of a migration at the source, as in 10.0.

    Every block and every answer of the device is 10 ms behind the one before; a change of state takes 2 ms.

    Args: blocks: of the initial data. dirty: dirty_bytes at each exact question, which is then read.
    """
    at = 100.0

    def state(name: str, recover: str = "ERROR") -> Iterator[Event]:
        nonlocal at
        yield at, "vfio_migration_set_state", (name, recover)
        at += 0.002
        yield at, "vfio_migration_set_device_state", (name,)

    yield from state("PRE_COPY", "RUNNING")
    yield at, "vfio_save_setup", (1 << 20,)
    yield at, "vfio_state_pending_estimate", (initial, 0, initial, 0)
    yield at, "vfio_save_iterate_start", ()
    left = initial
    for block in blocks:
        at += 0.010
        left = max(0, left - block)
        yield at, "vfio_save_block", (block,)
        yield at, "vfio_save_iterate", (left, 0)
    for size in dirty:
        at += 0.010
        length = left + size + extra
        yield at, "vfio_state_pending_exact", (length, 0, length, left, size)
        at += 0.010
        yield at, "vfio_save_block", (left + size,)
        yield at, "vfio_save_iterate", (0, 0)
        left = 0
    yield from state("PRE_COPY_P2P")
    yield from state("STOP_COPY")
    yield at, "vfio_save_complete_precopy_start", ()
    at += 0.010
    yield at, "vfio_save_block", (extra if carried is None else carried,)
    yield at, "vfio_save_complete_precopy", (0,)
    yield at, "vfio_save_device_config_state", ()
    yield from state("STOP")
    yield at, "vfio_save_cleanup", ()


def filled(text: str, fields: tuple[int | str, ...]) -> str:
    """Return the text of an event with its fields."""
    for value in fields:
        places = {text.find(one): one for one in ("0x%lx", "%lu", "%u", "%d", "%s") if one in text}
        one = places[min(places)]
        text = text.replace(one, f"{value:#x}" if one == "0x%lx" else str(value), 1)
    return text


def lines(events: Iterator[Event], *, form: str = "10.0", device: str = DEVICE) -> str:
    """Return a log; `form` is 10.0, 11.1, 8.2 or none, for lines without time."""
    found = []
    for at, name, fields in events:
        event = BY_NAME[name]
        text = event.text
        if form == "8.2":
            if name in ("vfio_migration_set_device_state", "vfio_save_iterate_start"):
                continue
            if name == "vfio_migration_set_state":
                at, fields = at + 0.002, fields[:1]  # it came behind the change
            if name == "vfio_save_complete_precopy_start":
                continue
            text = event.earlier[0].text if event.earlier else text
        line = f"{name}  ({device}) {filled(text, fields)}".rstrip()
        stamps = {"10.0": f"4711@{at:.6f}:", "8.2": f"4711@{at:.6f}:", "none": ""}
        iso = f"2026-11-26T10:{int(at) // 60:02}:{at % 60:09.6f}Z "
        found.append(stamps.get(form, iso) + line)
    return "\n".join(found) + "\n"


def simple(events: Iterator[Event], *, device: str = DEVICE, process: int = 4711) -> bytes:
    """Return a simple trace of version 4: the mapping of its events, then records, as trace/simple.c does."""
    numbers: dict[str, int] = {}
    body = b""
    for at, name, fields in events:
        number = numbers.setdefault(name, 1000 + len(numbers))
        arguments = struct.pack("<I", len(device)) + device.encode()
        for value in fields:
            if isinstance(value, str):
                arguments += struct.pack("<I", len(value)) + value.encode()
            else:
                arguments += struct.pack("<q" if value < 0 else "<Q", value)
        head = struct.pack("<QQII", number, round(at * 1e9), 24 + len(arguments), process)
        body += struct.pack("<Q", 1) + head + arguments
    mapping = b"".join(
        struct.pack("<QQI", 0, number, len(name)) + name.encode() for name, number in numbers.items()
    )
    return HEADER + mapping + body
