"""The stream: what is damaged, cut, moved, repeated, foreign or newer is refused, with a reason, always."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Iterator

import pytest
import xxhash
from migrationkit import PAGE, Box, filled

from vfu_dev.errors import StreamError
from vfu_dev.migration import stream
from vfu_dev.uapi import DeviceState

pytestmark = pytest.mark.usefixtures("small_records")

MUTATIONS = 10_000


def pieces(data: bytes) -> list[bytes]:
    """Cut a valid stream into its prelude (with schema) and its records."""
    length = stream.PRELUDE.size + stream.PRELUDE.unpack_from(data)[2]
    found, position = [data[:length]], length
    while position < len(data):
        size = stream.RECORD.size + stream.RECORD.unpack_from(data, position)[5]
        found.append(data[position : position + size])
        position += size
    return found


def mutations(data: bytes, other: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Yield damaged versions of `data` without end."""
    parts, foreign = pieces(data), pieces(other)
    while True:
        kind = rng.choice(
            ["flip", "bytes", "cut", "drop", "repeat", "swap", "splice", "insert", "append", "gap"]
        )
        if kind == "flip":
            damaged = bytearray(data)
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == "bytes":
            start = rng.randrange(len(data))
            count = rng.randrange(1, 40)
            damaged = bytearray(data[:start] + rng.randbytes(count) + data[start + count :])
        elif kind == "cut":
            damaged = bytearray(data[: rng.randrange(len(data))])
        elif kind == "gap":
            start = rng.randrange(len(data))
            damaged = bytearray(data[:start] + data[start + rng.randrange(1, 100) :])
        elif kind == "append":
            damaged = bytearray(data + rng.randbytes(rng.randrange(1, 100)))
        else:
            new = list(parts)
            at = rng.randrange(len(new))
            if kind == "drop":
                del new[at]
            elif kind == "repeat":
                new.insert(at, new[at])
            elif kind == "swap":
                to = rng.randrange(len(new))
                new[at], new[to] = new[to], new[at]
            elif kind == "splice":
                new = new[:at] + foreign[rng.randrange(len(foreign)) :]
            else:
                new.insert(at, rng.choice(foreign))
            damaged = bytearray(b"".join(new))
        if bytes(damaged) != data:
            yield kind, bytes(damaged)


def test_no_mutation_is_ever_accepted() -> None:
    """Whatever happens to a stream on its way, the device refuses it and says why."""
    source, other = filled(1), filled(2)
    data, foreign = source.save(), other.save()
    target = Box()
    rng = random.Random(20260922)
    found = mutations(data, foreign, rng)
    accepted, reasons = [], set()
    for number in range(MUTATIONS):
        kind, damaged = next(found)
        if damaged == foreign:  # a splice at the start is the other stream, whole
            continue
        try:
            target.resume(damaged, step=rng.choice([1 << 20, 997, 64, 13]))
            accepted.append((number, kind))
        except StreamError as err:
            reasons.add(str(err))
        if target.migration.state is not DeviceState.RESUMING:
            accepted.append((number, kind))
        target.migration.reset(DeviceState.RUNNING, "test")
    assert accepted == []
    assert "" not in reasons
    assert len(reasons) > 100
    # and the undamaged one is taken, in slices of a byte
    target.resume(data, step=1)
    assert target.snapshot() == source.snapshot()


def test_damage_with_a_matching_checksum_is_refused_too() -> None:
    """A forged record has a right checksum: its fields are judged all the same."""
    data = filled().save()
    parts = pieces(data)
    chain = int.from_bytes(data[16:24], "little")
    reasons = set()
    for kind, index, count, body in [
        (9, 0, 1, b""),
        (1, 5, 1, bytes(4 + PAGE)),
        (1, 0, 0, b""),
        (1, 0, 5, bytes(5 * (4 + PAGE))),
        (1, 0, 2, struct.pack("<II", 3, 3) + bytes(2 * PAGE)),
        (1, 0, 2, struct.pack("<II", 4, 3) + bytes(2 * PAGE)),
        (1, 0, 1, struct.pack("<I", 40) + bytes(PAGE)),
        (1, 0, 1, bytes(3 + PAGE)),
        (2, 0, 7, bytes(28)),
        (2, 0, 1, struct.pack("<I", 0xFFFFFFFF)),
        (3, 1, 0, bytes(16)),
        (3, 0, 0, bytes(17)),
        (4, 0, 0, bytes(48)),
    ]:
        head = stream.RECORD.pack(kind, index, 0, count, 0, len(body), 0)[:-8]
        checksum = xxhash.xxh3_64_intdigest(head + body, seed=chain)
        target = Box()
        with pytest.raises(StreamError) as caught:
            target.resume(parts[0] + head + checksum.to_bytes(8, "little") + body)
        reasons.add(str(caught.value))
    assert len(reasons) == 12, reasons  # the two that do not ascend share theirs


def test_lengths_are_judged_before_anything_is_buffered() -> None:
    """A record that claims 2^60 bytes costs nothing."""
    data = filled().save()
    prelude = pieces(data)[0]
    huge = stream.RECORD.pack(1, 0, 0, 4, 0, 1 << 60, 0)
    target = Box()
    target.migration.set_state(DeviceState.RESUMING)
    tracemalloc.start()
    with pytest.raises(StreamError, match="claims"):
        target.migration.write(memoryview(prelude + huge + bytes(100)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 16


def test_a_newer_version_is_named() -> None:
    data = bytearray(filled().save())
    data[8] = stream.STREAM_VERSION + 1
    with pytest.raises(StreamError, match="version 2 is newer"):
        Box().resume(bytes(data))


def test_another_shape_is_refused_in_the_first_message_and_both_are_named() -> None:
    data = filled().save()
    target = Box(pages=(41, 7))
    target.migration.set_state(DeviceState.RESUMING)
    with pytest.raises(StreamError, match=r"m0.*size_bytes: here 2624, in the stream 2560"):
        target.migration.write(memoryview(data)[: len(pieces(data)[0])])
    assert target.migration.resume_status()["status"] == "failed"  # type: ignore[index]


def test_a_stream_that_failed_stays_failed() -> None:
    """After one error the rest of a good stream does not help, nor does leaving RESUMING."""
    data = filled().save()
    target = Box()
    target.migration.set_state(DeviceState.RESUMING)
    with pytest.raises(StreamError, match="not a vfu-dev state stream"):
        target.migration.write(memoryview(bytes(100)))
    with pytest.raises(StreamError, match="not a vfu-dev state stream"):
        target.migration.write(memoryview(data))
    for _ in range(2):
        with pytest.raises(StreamError, match="not a vfu-dev state stream"):
            target.migration.set_state(DeviceState.RUNNING)
        assert target.migration.state is DeviceState.RESUMING
    assert target.events == []


def test_reset_leads_out_of_a_failed_load_with_new_memory() -> None:
    """Half a state is never run on: memory is cleared, registers were never touched."""
    data = filled().save()
    target = Box()
    target.registers["head"] = 99
    target.migration.set_state(DeviceState.RESUMING)
    target.migration.write(memoryview(data)[: len(data) // 2])
    with pytest.raises(StreamError, match="cut off"):
        target.migration.set_state(DeviceState.STOP)
    target.migration.reset(DeviceState.RUNNING, "test")
    assert target.events == ["unverified"]
    assert target.registers["head"] == 99
    assert target.migration.resume_status()["status"] == "failed"  # type: ignore[index]


def test_nothing_at_all_is_not_a_state() -> None:
    target = Box()
    target.migration.set_state(DeviceState.RESUMING)
    with pytest.raises(StreamError, match="cut off before its first record"):
        target.migration.set_state(DeviceState.STOP)
