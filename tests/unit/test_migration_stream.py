"""The stream: what is damaged, cut, moved, repeated, foreign or newer is refused, with a reason, always."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from migrationkit import PAGE, Box, filled
from numpykit import use_numpy
from oldstream import pieces, version_1

from vfu_dev.errors import StreamError
from vfu_dev.migration import stream
from vfu_dev.uapi import DeviceState

pytestmark = pytest.mark.usefixtures("small_records")

MUTATIONS = 10_000
OLD_STREAM = Path(__file__).parents[1] / "data" / "streams" / "version-1.bin"


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


@pytest.mark.parametrize(("version", "in_numpy"), [(2, False), (2, True), (1, False), (1, True)])
def test_no_mutation_is_ever_accepted(monkeypatch: pytest.MonkeyPatch, version: int, in_numpy: bool) -> None:
    """Whatever happens to a stream on its way, the device refuses it and says why."""
    if in_numpy:
        use_numpy(monkeypatch)
    source, other = filled(1), filled(2)
    data, foreign = source.save(), other.save()
    if version == 1:
        data, foreign = version_1(data), version_1(foreign)
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
        head = stream.RECORD.pack(kind, index, 0, count, 0, len(body))
        checksum = xxhash.xxh3_64_intdigest(head + body, seed=chain)
        target = Box()
        with pytest.raises(StreamError) as caught:
            target.resume(parts[0] + head + body + checksum.to_bytes(8, "little"))
        reasons.add(str(caught.value))
    assert len(reasons) == 12, reasons  # the two that do not ascend share theirs


def test_lengths_are_judged_before_anything_is_buffered() -> None:
    """A record that claims 2^60 bytes costs nothing."""
    data = filled().save()
    prelude = pieces(data)[0]
    huge = stream.RECORD.pack(1, 0, 0, 4, 0, 1 << 60)
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
    with pytest.raises(StreamError, match="version 3 is newer"):
        Box().resume(bytes(data))


def test_a_stream_of_the_first_version_is_taken() -> None:
    """As that program wrote it, byte for byte: the state is the one that it was made of, digest and all."""
    data = OLD_STREAM.read_bytes()
    source, target = filled(1), Box()
    assert data == version_1(source.save())
    target.resume(data, step=100)
    assert target.snapshot() == source.snapshot()
    assert target.migration.resume_status()["digest"] == "d953455635ae741e4571e2911ca334a5"  # type: ignore[index]


def test_pages_are_taken_as_they_arrive_and_given_up_when_their_record_is_wrong() -> None:
    """What is stored before its checksum came is not believed: the session ends there, for good."""
    data = bytearray(filled().save())
    parts = pieces(bytes(data))
    first = next(i for i, part in enumerate(parts[1:], 1) if stream.RECORD.unpack_from(part)[0] == 1)
    begin = sum(map(len, parts[:first]))
    data[begin + stream.RECORD.size + 4 * stream.INDEX_BYTES] ^= 1
    target = Box()
    target.migration.set_state(DeviceState.RESUMING)
    end = begin + len(parts[first])
    target.migration.write(memoryview(data)[: end - 1])
    assert any(memory.data.any() for memory in target.memories)
    with pytest.raises(StreamError, match="wrong checksum"):
        target.migration.write(memoryview(data)[end - 1 : end])
    target.migration.reset(DeviceState.RUNNING, "test")
    assert target.events == ["unverified"]


def test_what_was_there_before_and_is_not_sent_is_gone() -> None:
    """Memory is not cleared first, so that its store can be used again; nothing of it is left in the end."""
    source, target = filled(), filled(3)
    target.memories[0].raw[39 * PAGE] = 1  # by somebody who marks nothing
    target.resume(source.save())
    assert target.snapshot() == source.snapshot()
    assert [m.pages.written_pages for m in target.memories] == [
        m.pages.written_pages for m in source.memories
    ]


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


def test_reset_leads_out_of_a_failed_resume_with_new_memory() -> None:
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
