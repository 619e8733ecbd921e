"""Sessions: any interleaving of writes, reads, arcs, cancels and resets ends in two equal devices."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from migrationkit import PAGE, Box, filled, use_small_records
from numpykit import use_numpy
from oldstream import version_1
from serverkit import PATIENCE_SECONDS

from vfu_dev.errors import StateError, StreamError
from vfu_dev.memory import DeviceMemory, device_memory
from vfu_dev.memory.pages import PageIndices
from vfu_dev.migration import MigratableState, SaveSession, decoder, save, stream
from vfu_dev.migration.sampler import SAMPLE_SECONDS, Sampler
from vfu_dev.migration.save import Others
from vfu_dev.uapi import DeviceState as S

pytestmark = pytest.mark.usefixtures("small_records")

PRE_COPY = (S.PRE_COPY, S.PRE_COPY_P2P)
SAVING = (*PRE_COPY, S.STOP_COPY)


class MigrationMachine(RuleBasedStateMachine):
    """A device, whoever writes to it, and a client that migrates it."""

    shape: ClassVar[dict[str, Any]] = {}
    in_numpy: ClassVar[bool] = False
    old_stream: ClassVar[bool] = False  # what arrives is as an earlier version of this program sends it

    @initialize(limit=st.none() | st.integers(0, 50 * PAGE))
    def create(self, limit: int | None) -> None:
        """Start with two new devices."""
        self.patch = pytest.MonkeyPatch()
        use_small_records(self.patch)
        if self.in_numpy:
            use_numpy(self.patch)
        self.source = Box(initial_limit_bytes=limit, **self.shape)
        self.target = Box(**self.shape)
        self.stream = b""
        self.last_initial: int | None = None
        self.reinits = 0

    def teardown(self) -> None:
        """Give the sizes of records back."""
        if hasattr(self, "patch"):
            self.patch.undo()

    @property
    def state(self) -> S:
        """Return the source's migration state."""
        return self.source.migration.state

    @precondition(lambda self: self.state in (S.RUNNING, *PRE_COPY))
    @rule(memory=st.integers(0, 1), at=st.floats(0, 1), length=st.integers(1, 300), value=st.integers(0, 3))
    def write(self, memory: int, at: float, length: int, value: int) -> None:
        """Write anywhere, often zeros, often across pages."""
        target = self.source.memories[memory]
        length = min(length, target.size_bytes)
        offset = int(at * (target.size_bytes - length))
        self.source.put(memory, offset, bytes([value]) * length)

    @precondition(lambda self: self.state in (S.RUNNING, *PRE_COPY))
    @rule(pages=st.lists(st.integers(0, 39), max_size=20), value=st.integers(0, 255))
    def write_pages(self, pages: list[int], value: int) -> None:
        """Write whole pages at once, as a device's own engine does."""
        memory = self.source.memories[0]
        memory.rows[pages] = value
        if not memory.mapped:
            memory.pages.mark_pages(np.array(pages, dtype=np.intp))
        self.source.registers["head"] += 1

    @precondition(lambda self: self.state is S.RUNNING)
    @rule()
    def start(self) -> None:
        """A migration begins with something initial."""
        self.source.migration.set_state(S.PRE_COPY)
        self.stream = b""
        info = self.source.migration.precopy_info()
        assert info.initial_bytes > 0
        self.last_initial = info.initial_bytes
        self.reinits = 0

    @precondition(lambda self: self.state in PRE_COPY)
    @rule(count=st.integers(1, 3000) | st.sampled_from([1, 65536, 1 << 20, 64 << 20]))
    def read(self, count: int) -> None:
        """A read is filled unless nothing is left."""
        promised = self.source.migration.precopy_info()
        left = promised.initial_bytes + promised.dirty_bytes
        data = self.source.read(count)
        assert len(data) == min(count, left)
        self.stream += data
        now = self.source.migration.precopy_info()
        assert now.initial_bytes + now.dirty_bytes == left - len(data)
        # What is initial is read first, but a record under way is finished before.
        assert now.initial_bytes <= promised.initial_bytes
        if not self.reinits:
            assert now.initial_bytes == max(0, promised.initial_bytes - len(data))

    @precondition(lambda self: self.state in PRE_COPY)
    @rule(step=st.integers(1, 4000))
    def drain(self, step: int) -> None:
        """What is promised is what is read, to the byte, and then nothing is left."""
        info = self.source.migration.precopy_info()
        data = self.source.read_all(step)
        assert len(data) == info.initial_bytes + info.dirty_bytes
        self.stream += data
        info = self.source.migration.precopy_info()
        assert (info.initial_bytes, info.dirty_bytes) == (0, 0)

    @precondition(lambda self: self.state in PRE_COPY)
    @rule(count=st.integers(0, 40), opted_in=st.booleans())
    def reconfigure(self, count: int, opted_in: bool) -> None:
        """New initial data appears; a client that did not opt in finds it among the dirty."""
        migration = self.source.migration
        before = migration.precopy_info()
        migration.client_knows_reinit = opted_in
        migration.reinit(self.source.memories[0], np.arange(count, dtype=np.intp))
        now = migration.precopy_info()
        assert migration.take_reinit() == opted_in
        assert not migration.take_reinit()
        self.reinits += 1
        if opted_in:
            assert (now.initial_bytes > 0) == (count > 0 or before.initial_bytes > 0)
            # What was planned together may now be framed in other records.
            assert now.initial_bytes >= before.initial_bytes - 8 * stream.FRAME_BYTES

    @precondition(lambda self: self.state in PRE_COPY)
    @rule()
    def toggle_p2p(self) -> None:
        """Whether P2P is quiet changes nothing that is sent."""
        self.source.migration.set_state(S.PRE_COPY if self.state is S.PRE_COPY_P2P else S.PRE_COPY_P2P)

    @precondition(lambda self: self.state in PRE_COPY)
    @rule()
    def reset_by_the_guest(self) -> None:
        """A reset in PRE_COPY changes registers; the migration goes on."""
        self.source.registers[:] = 0
        self.source.migration.reset(self.state, "reset")

    @precondition(lambda self: self.state in SAVING)
    @rule(lost=st.booleans())
    def cancel(self, lost: bool) -> None:
        """The client gives up: what it has is no state, the device goes on."""
        if lost:
            self.source.migration.reset(S.RUNNING, "connection lost")
        else:
            self.source.migration.set_state(S.RUNNING)
        record = self.source.migration.save_status()
        assert record is not None
        assert (record["status"], record["audited"]) == ("aborted", None)
        with pytest.raises(StreamError):
            self.target.resume(self.stream)
        self.target.migration.reset(S.RUNNING, "test")

    @precondition(lambda self: self.state in (S.RUNNING, *PRE_COPY))
    @rule(read_step=st.integers(1, 5000), write_step=st.integers(1, 5000))
    def complete(self, read_step: int, write_step: int) -> None:
        """Whatever happened before, the other device is this one at the moment of stop."""
        if self.state is S.RUNNING:
            self.stream = b""
        promised = self.source.migration.stop_copy_length()
        self.source.migration.set_state(S.STOP_COPY)
        at_stop = self.source.snapshot()
        assert self.source.migration.stop_copy_length() == promised
        rest = self.source.read_all(read_step)
        assert len(rest) == promised
        assert self.source.migration.stop_copy_length() == 0
        self.stream += rest
        arriving = version_1(self.stream) if self.old_stream else self.stream
        assert len(arriving) == len(self.stream)
        self.target.resume(arriving, write_step)
        assert self.target.snapshot() == at_stop
        saved, resumed = self.source.audit(), self.target.migration.resume_status()
        assert resumed is not None
        assert (saved["status"], resumed["status"]) == ("completed", "completed")
        assert saved["digest"] == resumed["digest"]
        assert saved["audited"] is True
        assert (
            saved["precopy_bytes"] + saved["stop_copy_bytes"] == len(self.stream) == resumed["received_bytes"]
        )
        self.source.migration.set_state(S.RUNNING)

    @invariant()
    def sizes_agree(self) -> None:
        """stop_copy_length exceeds initial + dirty by a constant that only STOP_COPY carries."""
        if not hasattr(self, "source") or self.state not in PRE_COPY:
            return
        info = self.source.migration.precopy_info()
        assert info.initial_bytes >= 0
        assert info.dirty_bytes >= 0
        if not self.reinits:
            assert info.initial_bytes <= (self.last_initial or 0) + 40 * (PAGE + 40)
        tail = stream.tail_bytes(self.source.contents)
        assert self.source.migration.stop_copy_length() == info.initial_bytes + info.dirty_bytes + tail


class MappedMachine(MigrationMachine):
    """The same with a memory that is written behind everybody's back."""

    shape: ClassVar[dict[str, Any]] = {"pages": (192, 7), "mapped": True}


class NumpyMachine(MigrationMachine):
    """The same without the kernels."""

    in_numpy = True


class MappedNumpyMachine(MappedMachine):
    """The same without the kernels, with such a memory."""

    in_numpy = True


class OldStreamMachine(MigrationMachine):
    """The same with a stream of version 1."""

    old_stream = True


class OldNumpyMachine(OldStreamMachine):
    """The same with that stream, without the kernels."""

    in_numpy = True


MigrationMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestMigrationMachine = MigrationMachine.TestCase
MappedMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestMappedMachine = MappedMachine.TestCase
FEWER = settings(max_examples=40, stateful_step_count=40, deadline=None)
NumpyMachine.TestCase.settings = FEWER
TestNumpyMachine = NumpyMachine.TestCase
MappedNumpyMachine.TestCase.settings = FEWER
TestMappedNumpyMachine = MappedNumpyMachine.TestCase
OldStreamMachine.TestCase.settings = FEWER
TestOldStreamMachine = OldStreamMachine.TestCase
OldNumpyMachine.TestCase.settings = FEWER
TestOldNumpyMachine = OldNumpyMachine.TestCase


def test_initial_falls_to_zero_before_dirty_does() -> None:
    """`initial_limit_bytes` splits what was written: that part is initial, the rest dirty from the start."""
    box = filled(initial_limit_bytes=10 * PAGE)
    box.migration.set_state(S.PRE_COPY)
    info = box.migration.precopy_info()
    expected = stream.prelude_bytes(box.contents) + stream.pages_bytes(8, PAGE) + stream.zeros_bytes(2)
    assert info.initial_bytes == expected + stream.INITIAL_END_BYTES
    assert info.dirty_bytes > 20 * PAGE


def test_an_idle_device_with_untouched_memory_still_has_initial_bytes() -> None:
    box = Box()
    box.migration.set_state(S.PRE_COPY)
    info = box.migration.precopy_info()
    assert info.initial_bytes == stream.prelude_bytes(box.contents) + stream.INITIAL_END_BYTES
    assert info.dirty_bytes == 0


@pytest.mark.parametrize("limit", [None, 10 * PAGE, 0])
@pytest.mark.parametrize("stopped", [False, True])
def test_the_destination_knows_when_initial_data_has_arrived(limit: int | None, stopped: bool) -> None:
    """It is told with the very byte that takes initial_bytes to zero, also in STOP_COPY."""
    source, target = filled(initial_limit_bytes=limit), Box()
    source.migration.set_state(S.STOP_COPY if stopped else S.PRE_COPY)
    record = source.migration.save_status()
    assert record is not None
    initial = record["initial_bytes"]
    assert isinstance(initial, int)
    data = source.read_all()
    target.migration.set_state(S.RESUMING)
    target.migration.write(memoryview(data[: initial - 1]))
    assert not target.migration.initial_received
    target.migration.write(memoryview(data[initial - 1 : initial]))
    assert target.migration.initial_received
    target.migration.write(memoryview(data[initial:]))
    assert target.migration.initial_received == 1


def test_new_initial_data_is_announced_complete_once_more() -> None:
    source, target = filled(), Box()
    source.migration.client_knows_reinit = True
    source.migration.set_state(S.PRE_COPY)
    target.migration.set_state(S.RESUMING)
    target.migration.write(memoryview(source.read_all()))
    source.migration.reinit(source.memories[0], np.arange(5))
    data = source.read_all()
    target.migration.write(memoryview(data[:-1]))
    assert target.migration.initial_received == 1
    target.migration.write(memoryview(data[-1:]))
    assert target.migration.initial_received == 2


@pytest.mark.parametrize("pages", [0.0, 0.5, 1.0, 2.25, 4.0])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_record_sent_in_parts_holds_together(mapped: bool, pages: float) -> None:
    """A page written while its record is on the wire arrives whole, before or after, and then again."""
    source, target = Box(pages=(64, 7), mapped=mapped), Box(pages=(64, 7), mapped=mapped)
    source.put(0, 0, b"a" * (4 * PAGE))
    source.migration.set_state(S.PRE_COPY)
    head = stream.prelude_bytes(source.contents) + stream.RECORD.size + 4 * stream.INDEX_BYTES
    first = source.read(head + int(pages * PAGE))
    source.put(0, 0, b"b" * (4 * PAGE))
    second = source.read_all()
    source.migration.set_state(S.STOP_COPY)
    target.resume(first + second + source.read_all(), step=7)
    assert target.snapshot() == source.snapshot()


def test_a_page_written_while_its_record_is_under_way_counts_in_the_next_migration() -> None:
    """It goes with that record, and is no longer looked at; but it is no less a part of the state."""
    box = Box()
    box.migration.set_state(S.PRE_COPY)
    box.read_all()
    box.put(0, 0, b"a" * PAGE)
    box.read(1)
    box.put(0, 0, b"b" * PAGE)
    assert box.migration.precopy_info().dirty_bytes == stream.pages_bytes(1, PAGE) - 1
    box.migration.set_state(S.RUNNING)
    promised = box.migration.stop_copy_length()
    assert len(box.save()) == promised
    assert promised > stream.pages_bytes(1, PAGE)


@pytest.mark.parametrize("cold_first", [True, False])
def test_hot_pages_do_not_starve_cold_ones(cold_first: bool) -> None:
    """With the policy, pages that are rewritten all the time are not sent again while others wait."""
    memory = DeviceMemory("m", 400 * PAGE, PAGE)
    session = SaveSession(MigratableState("t", [memory], []), cold_first=cold_first)
    hot = np.arange(0, 400, 4)
    cold = np.setdiff1d(np.arange(400), hot)
    for _ in range(3):  # what is hot shows
        memory.rows[hot] += 1
        memory.pages.mark_pages(hot)
        drain(session)
    memory.store(0, b"x" * memory.size_bytes)
    buffer = memoryview(bytearray(4 * (PAGE + 4) + 32))
    resent_before, reads = session.counters.pages_resent, 0
    while np.isin(cold, memory.pages.collect()).any():
        memory.pages.mark_pages(hot)
        session.read_into(buffer)
        reads += 1
    if cold_first:
        assert reads <= 300 / 4 + 3
        assert session.counters.pages_resent - resent_before < 16
    else:
        assert reads >= 390 / 4


def test_a_writer_in_order_is_not_overtaken_for_ever() -> None:
    """One that goes round as fast as the link: no more waits in the end than with every page in order."""
    waiting = []
    for cold_first in (True, False):
        memory = DeviceMemory("m", 400 * PAGE, PAGE)
        memory.store(0, b"x" * memory.size_bytes)
        session = SaveSession(MigratableState("t", [memory], []), cold_first=cold_first)
        buffer = memoryview(bytearray(4 * (PAGE + 4) + 32))
        for step in range(500):
            memory.pages.mark_pages(np.arange(4 * step + 3, 4 * step + 7) % 400)
            session.read_into(buffer)
        waiting.append(memory.pages.dirty_pages)
    assert waiting[0] <= waiting[1] + 8


def test_pages_sent_twice_wait_for_pages_sent_once() -> None:
    """Within a pass, the order is how often a page was sent before."""
    memory = DeviceMemory("m", 40 * PAGE, PAGE)
    session = SaveSession(MigratableState("t", [memory], []))
    memory.store(0, b"x" * 8 * PAGE)
    drain(session)
    memory.store(0, b"y" * 40 * PAGE)  # 8 sent before, 32 new
    assert session.info().dirty_bytes > 0
    session.read_into(memoryview(bytearray(stream.pages_bytes(32, PAGE))))
    assert memory.pages.collect().tolist() == list(range(8))


def drain(session: SaveSession) -> int:
    total = 0
    buffer = memoryview(bytearray(4096))
    while stored := session.read_into(buffer):
        total += stored
    return total


def test_a_missed_mark_is_found_by_the_audit() -> None:
    """A write behind dirty tracking's back ends in a failed save with the digest of what really is there."""
    box = filled()
    box.migration.set_state(S.PRE_COPY)
    box.read_all()
    box.memories[0].raw[5 * PAGE] ^= 1  # nobody marks it
    box.migration.set_state(S.STOP_COPY)
    box.read_all()
    record = box.audit()
    assert record["status"] == "failed"
    assert "missed a write" in str(record["error"])


def test_a_kernel_that_hides_what_is_allocated_does_not_end_a_migration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a container whose /proc has no pagemap: audit and resume take all pages."""
    source, target = filled(1), filled(2)
    monkeypatch.setattr(device_memory, "_PAGEMAP", "/proc/self/none")
    source.migration.set_state(S.STOP_COPY)
    target.resume(source.read_all())
    assert target.snapshot() == source.snapshot()
    record = source.audit()
    assert record["status"] == "completed"
    assert record["audited"]


def test_reads_and_figures_outside_their_states_are_refused() -> None:
    box = Box()
    for call in (box.migration.precopy_info, lambda: box.read(10)):
        with pytest.raises(StateError):
            call()
    with pytest.raises(StateError):
        box.migration.write(memoryview(b"x"))


def test_qemu_never_spins_between_close_and_far() -> None:
    """QEMU 10.2's loop, with any threshold above the tail, completes an idle device's migration."""
    for threshold in (stream.tail_bytes(Box().contents) + 1, 1000, 5000, 1 << 20):
        box = filled()
        box.migration.set_state(S.PRE_COPY)
        info = box.migration.precopy_info()
        estimate = info.initial_bytes + info.dirty_bytes
        for _ in range(1000):
            if estimate < threshold:
                exact = box.migration.stop_copy_length()
                info = box.migration.precopy_info()
                estimate = info.initial_bytes + info.dirty_bytes
                if exact <= threshold:
                    break
            estimate = max(0, estimate - len(box.read(512)))
        else:
            pytest.fail(f"no end with threshold {threshold}")


def test_a_read_that_failed_leaves_nothing_that_fails_later() -> None:
    """The device stays in PRE_COPY without a session: there are no figures, and sampling goes on."""
    box = filled()
    sampler = Sampler(box.migration, 0.0)
    box.migration.set_state(S.PRE_COPY)
    sampler.poll()
    box.migration.break_session(StateError("a defect"))
    assert box.migration.state is S.PRE_COPY
    assert not box.migration.has_precopy_info
    sampler.poll()
    with pytest.raises(StateError, match="a defect"):
        box.migration.set_state(S.STOP_COPY)
    box.migration.set_state(S.RUNNING)
    box.migration.set_state(S.PRE_COPY)
    assert box.migration.has_precopy_info


def test_a_sample_that_waits_for_a_processor_does_not_put_the_next_one_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sample may take 2 % of the loop's time. What other processes take of that is no reason to wait."""
    box = filled()
    box.migration.set_state(S.PRE_COPY)
    sampler = Sampler(box.migration)
    monkeypatch.setattr(Sampler, "_sample", lambda *_: time.sleep(0.05))
    sampler.poll()
    timeout = sampler.timeout()
    assert timeout is not None
    assert timeout <= SAMPLE_SECONDS


def test_a_sample_that_takes_long_puts_the_next_one_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds of the loop's thread are 2 % of 500."""
    box = filled()
    box.migration.set_state(S.PRE_COPY)
    sampler = Sampler(box.migration)
    monkeypatch.setattr(time, "thread_time", iter([1.0, 11.0]).__next__)
    sampler.poll()
    timeout = sampler.timeout()
    assert timeout is not None
    assert 500 - PATIENCE_SECONDS < timeout <= 500


@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_written_in_the_middle_of_a_read_is_not_lost(
    mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes between any two parts of one read, to pages before and behind the place: the target is equal."""
    monkeypatch.setattr(save, "BETWEEN_SECONDS", 0.0)
    shape: dict[str, Any] = {"pages": (64, 7), "mapped": mapped}
    box, target, rng = filled(**shape), Box(**shape), np.random.default_rng(1)
    box.migration.set_state(S.PRE_COPY)
    target.migration.set_state(S.RESUMING)
    written = 0

    def write() -> None:
        nonlocal written
        box.put(0, int(rng.integers(0, 63 * PAGE)), bytes(rng.integers(0, 256, PAGE, np.uint8)))
        written += 1

    buffer = memoryview(bytearray(1 << 16))
    for _ in range(3):
        stored = box.migration.read_into(buffer, Others(-1, write))
        target.migration.write(buffer[:stored])
    assert written > 30
    box.migration.set_state(S.STOP_COPY)
    target.migration.write(memoryview(box.read_all()))
    target.migration.set_state(S.STOP)
    assert target.snapshot() == box.snapshot()


def test_a_read_whose_migration_ends_in_its_middle_fails() -> None:
    box = filled()
    box.migration.set_state(S.PRE_COPY)
    lost = Others(-1, lambda: box.migration.reset(S.RUNNING, "connection lost"))
    with pytest.raises(StateError, match="ended while its data was read"):
        box.migration.read_into(memoryview(bytearray(4096)), lost)
    saved = box.migration.save_status()
    assert saved is not None
    assert saved["status"] == "aborted"


def test_a_slice_that_changes_while_it_is_judged_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory that the client shares: what was checked counts, and pages are what lies in memory."""
    data = bytearray(filled().save())
    target = Box()
    judged = 0
    judge = decoder.StreamDecoder._judge_indices

    def judge_and_change(self: decoder.StreamDecoder, piece: memoryview) -> PageIndices:
        nonlocal judged
        indices, judged = judge(self, piece), judged + 1
        at = data.index(bytes(piece))
        data[at : at + len(piece)] = bytes(len(piece))
        return indices

    monkeypatch.setattr(decoder.StreamDecoder, "_judge_indices", judge_and_change)
    target.resume(data)  # type: ignore[arg-type]
    assert judged > 5
    assert target.snapshot() == filled().snapshot()
