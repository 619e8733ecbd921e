"""QEMU's traces as events, one after the other: of its log backend (text) and its simple one (binary).

A trace may be somebody else's: nothing in it is trusted, and it is never in memory as a whole.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import BinaryIO

from vfu_dev.errors import ConfigError, shown
from vfu_dev.qemu_events import BY_NAME, Event, Kind, kind_now, read

# A line of a trace has no more; what is longer is none.
MAX_LINE_BYTES = 64 << 10
MAX_U64 = (1 << 64) - 1
# Of the names in the table.
_BEGINNINGS = ("vfio_", "savevm_section_start")

# trace/simple.c: header, and what a record begins with.
_HEADER = struct.Struct("<QQQ")
_HEADER_ID, _MAGIC, _VERSION = MAX_U64, 0xF2B177CB0AA429B4, 4
_TYPE = struct.Struct("<Q")
_MAPPING, _RECORD = 0, 1
_NAME = struct.Struct("<QI")  # event, length of its name
_EVENT = struct.Struct("<QQII")  # event, monotonic time in ns, length of all this and the arguments, process
_DROPPED = MAX_U64 - 1
_STRING = struct.Struct("<I")
# QEMU's buffer is 256 KiB, and no event's name or arguments are near that.
_MAX_RECORD_BYTES = 64 << 10
_MAX_EVENTS = 100_000
SIMPLE_MAGIC = _HEADER.pack(_HEADER_ID, _MAGIC, _VERSION)[:16]
# QEMU writes in the byte order of its machine.
BIG_ENDIAN_MAGIC = struct.pack(">QQ", _HEADER_ID, _MAGIC)


class TraceError(ConfigError):
    """A trace that cannot be read, or not wholly. `place` is its line, or its byte."""

    def __init__(self, place: str, text: str) -> None:
        super().__init__(f"{place}: {text}")
        self.place = place


@dataclass(frozen=True)
class TraceLine:
    """A line of the log backend.

    Attributes:
        time: Unix seconds, None without a timestamp.
        text: behind the device.
    """

    time: float | None
    event: str
    device: str
    text: str


@dataclass(frozen=True)
class Traced:
    """An event of the table (`qemu_events`).

    Attributes:
        place: FILE:LINE, or FILE and the number of the byte.
        time: seconds of a clock of the trace's own, None without a timestamp.
        process: its number, in a simple trace; 0 elsewhere.
        device: its name, as QEMU has it.
        numbers, words: its fields.
    """

    place: str
    time: float | None
    process: int
    device: str
    kind: Kind
    numbers: dict[str, int] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)


def split_line(line: str) -> TraceLine | None:
    """Return the parts of a line with an event that the table may have; None for any other line.

    With `-msg timestamp=on` QEMU 10.1 and later write `2026-01-02T03:04:05.678901Z event (device) text`, 10.0
    and before `THREAD@1767323045.678901:event  (device) text`. Without it there is no time. What a log daemon
    put before that is passed over.
    """
    at = min((at for name in _BEGINNINGS if (at := line.find(name)) >= 0), default=-1)
    if at < 0:
        return None
    stamp = line[:at].rpartition(" ")[2] if line[at - 1 : at] != " " else line[: at - 1].rpartition(" ")[2]
    time: float | None = None
    if stamp.endswith(":") and "@" in stamp:
        thread, _, seconds = stamp[:-1].partition("@")
        time = _seconds(seconds)
        if time is None or not thread.isdecimal():
            return None
    elif stamp.endswith("Z"):
        time = _unix(stamp)
        if time is None:
            return None
    elif stamp:
        return None
    event, _, text = line[at:].partition(" ")
    text = text.strip()
    device = ""
    if text.startswith("("):
        device, closed, rest = text[1:].partition(")")
        if closed:
            text = rest.strip()
        else:
            device = ""
    return TraceLine(time, event, device, text)


def _seconds(text: str) -> float | None:
    whole, dot, part = text.partition(".")
    if not (dot and whole.isdecimal() and part.isdecimal() and len(whole) < 16 and len(part) < 16):
        return None
    return float(text)


def _unix(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return None


# --- the log ------------------------------------------------------------------------------------------------


def read_log(file: BinaryIO, name: str) -> Iterator[Traced | TraceError]:
    """Yield the events of a log, and an error for each event of the table whose text is another one.

    A last line without an end is left out: its number may lack digits.
    """
    number = 0
    inside = False  # of a line that is too long
    while line := file.readline(MAX_LINE_BYTES):
        whole = line.endswith(b"\n")
        if inside or (not whole and len(line) == MAX_LINE_BYTES):
            inside = not whole
            number += whole
            continue
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)  # of an editor
        if not whole or not (b"vfio_" in line or b"savevm_section_start" in line):  # _BEGINNINGS
            continue
        found = split_line(line.decode("utf-8", "replace"))
        if found is None or (event := BY_NAME.get(found.event)) is None:
            continue
        place = f"{name}:{number}"
        kind, values = read(found.event, found.text)
        if kind is not None and (not event.named or found.device):
            yield _traced(place, found.time, found.device, event, kind, values)
        else:
            expected = "(device) " * event.named + event.text
            yield TraceError(place, f"{event.name} {shown(found.text)}: expected {expected.strip()}")


def _traced(
    place: str, time: float | None, device: str, event: Event, kind: Kind, values: dict[str, str]
) -> Traced | TraceError:
    words = {name: value for name, value in values.items() if name == "state"}
    numbers = {}
    for name, text in values.items():
        if name in words:
            continue
        value = int(text) if len(text) <= 20 else MAX_U64 + 1
        if not -(1 << 31) <= value <= MAX_U64:
            return TraceError(place, f"{event.name}: {name} {text[:24]}: has more than 64 bits")
        numbers[name] = value
    return Traced(place, time, 0, device, kind, numbers, words)


# --- the simple trace ---------------------------------------------------------------------------------------


def read_simple(file: BinaryIO, name: str) -> Iterator[Traced | TraceError]:
    """Yield the events of a simple trace of version 4 (QEMU 2.10 and later), and what is wrong with it.

    A record that the end of the file cuts off is left out.
    """
    at = 0
    names: dict[int, str] = {}

    def take(count: int) -> bytes:
        nonlocal at
        data = file.read(count)
        at += len(data)
        return data

    header = take(_HEADER.size)
    if header.startswith(BIG_ENDIAN_MAGIC):
        yield TraceError(
            name, "is a big-endian machine's simple trace and cannot be read; record a log there"
        )
        return
    if len(header) < _HEADER.size or _HEADER.unpack(header)[:2] != (_HEADER_ID, _MAGIC):
        yield TraceError(name, "is no simple trace of QEMU")
        return
    if (version := _HEADER.unpack(header)[2]) != _VERSION:
        yield TraceError(name, f"is a simple trace of version {version}; version {_VERSION} can be read")
        return
    while len(begin := take(_TYPE.size)) == _TYPE.size:
        place = f"{name}: byte {at - _TYPE.size}"
        (what,) = _TYPE.unpack(begin)
        if what == _MAPPING:
            if len(head := take(_NAME.size)) < _NAME.size:
                return
            number, length = _NAME.unpack(head)
            if length > _MAX_RECORD_BYTES or len(names) >= _MAX_EVENTS:
                yield TraceError(place, "a name of an event that is none")
                return
            names[number] = take(length).decode("utf-8", "replace")
            continue
        if what != _RECORD:
            yield TraceError(place, f"a record of type {what}: expected {_MAPPING} or {_RECORD}")
            return
        if len(head := take(_EVENT.size)) < _EVENT.size:
            return
        number, nanoseconds, length, process = _EVENT.unpack(head)
        if not _EVENT.size <= length <= _MAX_RECORD_BYTES:
            yield TraceError(place, f"a record of {length} bytes")
            return
        body = take(length - _EVENT.size)
        if len(body) < length - _EVENT.size:
            return
        if number == _DROPPED:
            count = int.from_bytes(body[:8], "little")
            yield TraceError(place, f"QEMU dropped {count} events here: sums behind it are too small")
            continue
        if (event := BY_NAME.get(names.get(number, ""))) is None:
            continue
        try:
            yield _unpacked(place, nanoseconds / 1e9, process, event, body)
        except (struct.error, IndexError):
            yield TraceError(place, f"{event.name}: its arguments are not those of QEMU 10.0 to 11.1")


def _unpacked(place: str, time: float, process: int, event: Event, body: bytes) -> Traced | TraceError:
    """Return a record's event. Raises: struct.error: the arguments are others."""
    at = 0

    def word() -> str:
        nonlocal at
        (length,) = _STRING.unpack_from(body, at)
        found = body[at + _STRING.size : at + _STRING.size + length]
        if len(found) < length:
            raise struct.error
        at += _STRING.size + length
        return found.decode("utf-8", "replace")

    device = word() if event.named else ""
    numbers: dict[str, int] = {}
    words: dict[str, str] = {}
    for name, is_word in event.arguments:
        if is_word:
            value = word()
            if name:
                words[name] = value
        else:
            (number,) = _TYPE.unpack_from(body, at)
            at += _TYPE.size
            if name:
                # An int is written as 64 bits, its sign extended.
                numbers[name] = number - (1 << 64) if name == "ret" and number >> 63 else number
    if at != len(body):
        raise struct.error
    return Traced(place, time, process, device, kind_now(event.kind, numbers.get("exact")), numbers, words)
