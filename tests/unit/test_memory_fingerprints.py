"""Memory that a client writes directly: what changed is found, whoever wrote and whenever."""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from typing import Any

import numpy as np
import pytest
from migrationkit import PAGE, Box

from vfu_dev.errors import ConfigError
from vfu_dev.memory import DeviceMemory, Fingerprints, fingerprints, kernels
from vfu_dev.memory.sending import CHECKSUM_BYTES, INDEX_BYTES, Record, Reply, send
from vfu_dev.migration import MigratableState, Migration, SaveSession, plan
from vfu_dev.uapi import DeviceState as S

pytestmark = pytest.mark.usefixtures("small_records")

MIB = 1 << 20
ENOUGH_SECONDS = 3600.0  # a budget that cuts nothing, however long the machine takes


def client_view(memory: DeviceMemory) -> mmap.mmap:
    """Map the memory's file as a client does, without the owner's knowledge."""
    return mmap.mmap(memory.fd, memory.backing_bytes)


@pytest.fixture
def memory() -> DeviceMemory:
    return DeviceMemory("m", 8 * MIB, mapped=True)


def send_all(memory: DeviceMemory, sent: Fingerprints) -> tuple[kernels.Pages, kernels.Hashes]:
    """Do what a session does with dirty pages; return them as they were sent, and the hashes of all."""
    hashes, dirty = np.zeros(memory.page_count, dtype=np.uint64), memory.pages.collect()
    record = Record(memory.rows, memory.pages.codes, hashes, sent)
    record.begin(b"", dirty, 0)
    out = np.empty(len(dirty) * (INDEX_BYTES + memory.page_size_bytes) + CHECKSUM_BYTES, dtype=np.uint8)
    assert send(record, Reply(), len(out), kernels.address(out)) == len(out)
    rows = out[len(dirty) * INDEX_BYTES : -CHECKSUM_BYTES].reshape(-1, memory.page_size_bytes)
    return rows, hashes


def test_a_scan_finds_exactly_the_pages_that_changed(memory: DeviceMemory) -> None:
    """One bit anywhere in a page, pages never touched before, and zeros over what was sent."""
    view = client_view(memory)
    view[0 : 4 * MIB] = os.urandom(4 * MIB)
    memory.relearn()
    sent = Fingerprints(memory)
    send_all(memory, sent)
    assert sent.scan(ENOUGH_SECONDS) == 1024
    assert memory.pages.dirty_pages == 0
    for page in (0, 77, 1023):
        view[page * 4096 + 4095] ^= 1
    view[5 * 4096 : 6 * 4096] = bytes(4096)
    view[1500 * 4096] = 1  # never touched before
    sent.scan(ENOUGH_SECONDS)
    assert memory.pages.collect().tolist() == [0, 5, 77, 1023, 1500]
    assert sent.expected_pages == 0


def test_a_page_written_between_its_copy_and_the_scan_is_found(memory: DeviceMemory) -> None:
    """The fingerprint is that of the copy, as is the hash."""
    memory.raw[: 8 * 4096] = os.urandom(8 * 4096)
    memory.relearn()
    sent = Fingerprints(memory)
    out, hashes = send_all(memory, sent)
    memory.raw[3 * 4096] ^= 1
    sent.scan(ENOUGH_SECONDS)
    assert memory.pages.collect().tolist() == [3]
    assert (hashes[:8] == kernels.hash_pages(out, np.arange(8))).all()


def test_what_somebody_writes_into_a_shared_copy_is_not_taken_for_content(memory: DeviceMemory) -> None:
    """A client overwrites the window all the time: hashes and fingerprints stay those of the memory."""
    memory.raw[:] = os.urandom(8 * MIB)
    memory.relearn()
    sent, dirty = Fingerprints(memory), memory.pages.collect()
    out = np.zeros(len(dirty) * 5000, dtype=np.uint8)
    hashes = np.zeros(memory.page_count, dtype=np.uint64)
    record = Record(memory.rows, memory.pages.codes, hashes, sent)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            out[:] = 7

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            hashes[:] = 0
            record.begin(b"first", dirty, 0)
            send(record, Reply(), len(out), kernels.address(out))
            assert (hashes[dirty] == kernels.hash_pages(memory.rows, dirty)).all()
    finally:
        stop.set()
        writer.join()
    assert sent.scan(ENOUGH_SECONDS) == len(dirty)
    assert memory.pages.dirty_pages == 0


@pytest.mark.parametrize("page_bytes", [64, 4096, 65536, MIB])
def test_two_sessions_have_different_fingerprints_of_the_same_content(page_bytes: int) -> None:
    memory = DeviceMemory("m", 2 * MIB, page_bytes, mapped=True)
    memory.raw[:] = os.urandom(2 * MIB)
    memory.relearn()
    one, other = Fingerprints(memory), Fingerprints(memory)
    for sent in (one, other):
        memory.pages.rearm()
        send_all(memory, sent)
    assert not (one.sent == other.sent).any()


def test_a_page_changed_back_is_not_sent_again(memory: DeviceMemory) -> None:
    memory.raw[:8] = b"original"
    memory.relearn()
    sent = Fingerprints(memory)
    send_all(memory, sent)
    memory.raw[:8] = b"anything"
    memory.raw[:8] = b"original"
    sent.scan(ENOUGH_SECONDS)
    assert memory.pages.dirty_pages == 0


def test_pages_sent_as_zeros_are_found_when_written(memory: DeviceMemory) -> None:
    memory.raw[0:8192] = b"x" * 8192
    memory.relearn()
    sent = Fingerprints(memory)
    send_all(memory, sent)
    sent.sent_zeros(np.array([0, 9]))
    memory.pages.claim(np.array([0, 9]))
    sent.scan(ENOUGH_SECONDS)
    assert memory.pages.collect().tolist() == [0]


def test_a_budget_cuts_a_scan_and_the_next_one_goes_on(memory: DeviceMemory) -> None:
    """Each part has its turn, what was not seen is estimated, and after enough scans all is found."""
    memory.raw[:] = os.urandom(8 * MIB)
    memory.relearn()
    sent = Fingerprints(memory)
    send_all(memory, sent)
    memory.rows[::4, 7] ^= 1
    assert sent.scan(0.0) == 256  # one chunk of 1 MiB at least
    assert memory.pages.dirty_pages == 64
    assert sent.expected_pages == 7 * 64
    for _ in range(7):
        sent.scan(0.0)
    assert memory.pages.dirty_pages == 512
    assert sent.scan(ENOUGH_SECONDS) == 2048 - 512
    assert sent.expected_pages == 0


def test_two_threads_find_what_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_PARALLEL_BYTES", 0)
    memory = DeviceMemory("m", 16 * MIB, mapped=True)
    memory.raw[:] = os.urandom(16 * MIB)
    memory.relearn()
    for rates in ([1.0, 2.0], [2.0, 1.0]):
        monkeypatch.setattr(fingerprints._pace, "rates", rates)
        sent = Fingerprints(memory)
        memory.pages.rearm()
        send_all(memory, sent)
        pages = np.random.default_rng(1).choice(4096, 300, replace=False)
        memory.rows[pages, 4000] += 1
        assert sent.scan(ENOUGH_SECONDS) == 4096
        assert memory.pages.collect().tolist() == sorted(pages.tolist())


@pytest.mark.parametrize("page_bytes", [4096, MIB, 4 * MIB])
def test_the_pace_of_scans_counts_bytes_whatever_the_page_size(
    monkeypatch: pytest.MonkeyPatch, page_bytes: int
) -> None:
    monkeypatch.setattr(fingerprints, "_PARALLEL_BYTES", 0)
    learnt: list[float] = []
    monkeypatch.setattr(fingerprints._pace, "learn", lambda _threads, work, _seconds: learnt.append(work))
    asked: list[int] = []
    monkeypatch.setattr(fingerprints._pace, "threads", lambda work: asked.append(work) or 1)
    memory = DeviceMemory("m", 16 * MIB, page_bytes, mapped=True)
    memory.raw[:] = os.urandom(16 * MIB)
    memory.relearn()
    sent = Fingerprints(memory)
    memory.pages.rearm()
    send_all(memory, sent)
    assert sent.scan(10.0) == memory.page_count
    assert (asked[-1], learnt[-1]) == (16 * MIB, 16 * MIB)


def test_untouched_memory_costs_nothing() -> None:
    """8 GiB that nobody touched are neither scanned nor allocated."""
    memory = DeviceMemory("m", 8 << 30, mapped=True)
    memory.raw[4 << 30] = 1
    state = MigratableState("t", [memory], [])
    session = SaveSession(state)
    buffer = memoryview(bytearray(MIB))
    while session.read_into(buffer):
        pass
    session.stop()
    assert session.read_into(buffer) > 0
    assert session.counters.pages_sent == 1
    assert memory.allocated_blocks() * 512 <= 2 * MIB  # one page, or a huge one


def test_the_file_cannot_be_cut_by_who_has_it(memory: DeviceMemory) -> None:
    """A shorter file under our mapping would end the server with SIGBUS."""
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 4096)
    assert fcntl.fcntl(memory.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL


def test_a_memory_of_odd_size_has_a_file_as_large_as_its_bar() -> None:
    memory = DeviceMemory("m", 5 * 4096, mapped=True)
    assert memory.backing_bytes == os.fstat(memory.fd).st_size == 8 * 4096
    with pytest.raises(ConfigError, match="cannot be mapped"):
        DeviceMemory("m", 65 * PAGE, PAGE, mapped=True)


def test_a_guest_that_never_stops_writing_is_moved_whole() -> None:
    """A thread writes without a mark, during every read; each checksum and the end still hold."""
    source, target = Box(pages=(1024, 64), mapped=True), Box(pages=(1024, 64), mapped=True)
    stop = threading.Event()
    view = np.frombuffer(client_view(source.memories[0]), dtype=np.uint64)

    def write() -> None:
        rng = np.random.default_rng(5)
        while not stop.is_set():
            view[rng.integers(0, len(view), 500)] = rng.integers(0, 1 << 40, 500, dtype=np.uint64)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        source.migration.set_state(S.PRE_COPY)
        data = bytearray()
        while len(data) < 4 * 1024 * PAGE:  # the test's time limit ends it if the writer is never found
            data += source.read(50_000)
    finally:
        stop.set()
        writer.join()
    source.migration.set_state(S.STOP_COPY)
    promised = source.migration.stop_copy_length()
    rest = source.read_all(10_000)
    assert len(rest) == promised
    target.resume(bytes(data) + rest, step=777)
    assert target.snapshot() == source.snapshot()
    saved = source.audit()
    assert (saved["status"], saved["audited"]) == ("completed", True)


def test_a_final_scan_too_long_for_one_read_does_not_end_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no time to scan, reads are filled with what was sent before until everything was scanned."""
    monkeypatch.setattr(plan, "FINAL_SCAN_SECONDS", 0.0)
    monkeypatch.setattr("vfu_dev.migration.save.FINAL_SCAN_SECONDS", 0.0)
    source, target = (DeviceMemory("m", 16 * MIB, mapped=True) for _ in range(2))
    source.raw[:] = os.urandom(16 * MIB)
    migration = Migration("s", MigratableState("t", [source], []))
    migration.set_state(S.PRE_COPY)
    buffer = memoryview(bytearray(MIB))
    data = bytearray()
    while stored := migration.read_into(buffer):
        data += buffer[:stored]
    source.raw[15 * MIB] ^= 1
    migration.set_state(S.STOP_COPY)
    rest = [bytes(buffer[: migration.read_into(buffer)]) for _ in range(40)]
    sizes = [len(part) for part in rest if part]
    assert all(size == MIB for size in sizes[:-1])
    receiver = Migration("t", MigratableState("t", [target], []))
    receiver.set_state(S.RESUMING)
    receiver.write(memoryview(data))
    for part in rest:
        receiver.write(memoryview(part))
    receiver.set_state(S.RUNNING)
    assert bytes(target.raw) == bytes(source.raw)


@pytest.mark.parametrize("again", [b"b", b"\0"])
def test_a_page_sent_twice_in_one_read_is_sent_as_it_was_each_time(
    monkeypatch: pytest.MonkeyPatch, again: bytes
) -> None:
    """The guest writes between two passes, and both are read at once: what the first one said still holds."""
    source, target = (DeviceMemory("m", 16 * 4096, mapped=True) for _ in range(2))
    migration = Migration("s", MigratableState("t", [source], []))
    source.raw[5 * 4096 : 6 * 4096] = b"a" * 4096
    migration.set_state(S.PRE_COPY)
    begin, changes = plan.PassPlan.start_pass, [b"a", again]

    def start_pass(one: plan.PassPlan, *arguments: Any) -> bool:
        if changes:
            source.raw[5 * 4096 : 6 * 4096] = changes.pop(0) * 4096
        return begin(one, *arguments)

    monkeypatch.setattr(plan.PassPlan, "start_pass", start_pass)
    data = bytearray(1 << 20)
    count = migration.read_into(memoryview(data))
    record = migration.save_status()
    assert record is not None
    assert record["pages_resent"] == 1
    migration.set_state(S.STOP_COPY)
    rest = bytearray(1 << 20)
    receiver = Migration("t", MigratableState("t", [target], []))
    receiver.set_state(S.RESUMING)
    receiver.write(memoryview(data)[:count])
    receiver.write(memoryview(rest)[: migration.read_into(memoryview(rest))])
    receiver.set_state(S.RUNNING)
    assert bytes(target.raw) == bytes(source.raw) == bytes(5 * 4096) + again * 4096 + bytes(10 * 4096)


def test_pages_found_zero_and_written_before_they_were_sent_are_sent_as_data() -> None:
    """Classified in PRE_COPY, written without a mark, and only read when the device had stopped."""
    source, target = Box(pages=(64, 7), mapped=True), Box(pages=(64, 7), mapped=True)
    source.memories[0].raw[63 * PAGE] = 1
    source.migration.set_state(S.PRE_COPY)  # all 64 pages have backing store, 63 are zeros
    source.migration.precopy_info()
    source.memories[0].raw[5 * PAGE] = 9
    source.migration.set_state(S.STOP_COPY)
    target.resume(source.read_all())
    assert target.snapshot() == source.snapshot()


def test_what_is_known_of_mapped_memory_ends_with_the_session() -> None:
    """A page sent as zeros in one migration and written after it is data in the next."""
    source, target = Box(pages=(64, 7), mapped=True), Box(pages=(64, 7), mapped=True)
    source.memories[0].raw[0] = 1
    target.resume(source.save())
    source.memories[0].raw[63 * PAGE] = 9
    assert source.migration.stop_copy_length() > 2 * PAGE
    target.resume(source.save())
    assert target.snapshot() == source.snapshot()
    # and from the destination, which resumed, back
    target.memories[0].raw[5 * PAGE] = 3
    source.resume(target.save())
    assert source.snapshot() == target.snapshot()


def test_a_search_for_touched_pages_stops_in_time_and_goes_on(memory: DeviceMemory) -> None:
    """Every second page touched: the kernel is asked a thousand times, a few in each scan."""
    memory.rows[::2, 5] = 1
    assert memory.relearn(0.0) == 4096
    assert memory.pages.written_pages == 1
    sent = Fingerprints(memory)
    for _ in range(1100):
        sent.scan(0.0)
    assert memory.pages.written_pages == 1024
    # and without the time to search, nothing that was written is missed in the end
    memory.rows[1::2, 5] = 1
    sent.stop(0.0)
    assert memory.pages.dirty_pages == 2048
