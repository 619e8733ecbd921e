"""The load engine in the device: what it writes and marks, where it stops, what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfu_dev.device import Device
from vfu_dev.device.reference import ReferenceDevice
from vfu_dev.device.reference import workload as load_engine
from vfu_dev.device.reference.layout import CTRL_PAGES, CTRL_RUN, LoadPattern, LoadStatus
from vfu_dev.device.reference.workload import TURN_SECONDS, WorkloadRun
from vfu_dev.errors import ConfigError
from vfu_dev.memory import DeviceMemory
from vfu_dev.migration import engine as migration_engine
from vfu_dev.server import operator_workload
from vfu_dev.server.operator_workload import OperatorWorkload
from vfu_dev.uapi import DeviceState
from vfu_dev.workload import ArrayWriter, Phase, Workload, contents, writes_of
from vfu_dev.workload.pacer import CATCH_UP_NS

MEMORY = 1 << 20
S = DeviceState
TICK_NS = 10_000
LONG_NS = 20_000_000_000

WorkUntil = Callable[[Device, Callable[[], bool]], None]


def journal(spec: Workload, count: int, memory_bytes: int = MEMORY, page_bytes: int = 4096) -> bytearray:
    """What a zeroed memory holds after the first `count` writes, made one by one."""
    writes = writes_of(spec, memory_bytes, page_bytes)
    assert writes is not None
    held = bytearray(memory_bytes)
    offsets, lengths = writes.offsets(0, count).tolist(), writes.lengths(0, count).tolist()
    for number, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        held[offset : offset + length] = contents(spec.seed, number, 1, length).tobytes()
    return held


class Clock:
    """Time as these tests have it: it passes when somebody waits, and by `TICK_NS` with each look at it."""

    def __init__(self) -> None:
        self.ns = 1_000_000_000

    def monotonic_ns(self) -> int:
        """Return the time, and let some pass: a turn ends when the clock says so."""
        self.ns += TICK_NS
        return self.ns

    def monotonic(self) -> float:
        """Return the same in seconds."""
        return self.monotonic_ns() / 1e9

    def time(self) -> float:
        """Return the same as Unix time."""
        return self.ns / 1e9

    def perf_counter_ns(self) -> int:
        """Return the time of measurements."""
        return self.ns

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.ns += max(1, round(seconds * 1e9))


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Have the engine, and the record of the device's states, go by a clock of the test's."""
    made = Clock()
    for user in (load_engine, operator_workload, migration_engine):
        monkeypatch.setattr(user, "time", made)
    return made


@pytest.fixture
def work_until(clock: Clock) -> WorkUntil:
    """Do the device's work as the server's loop does until something is so."""

    def work(device: Device, reached: Callable[[], bool]) -> None:
        ends = clock.ns + LONG_NS
        while not reached():
            assert clock.ns < ends
            due = device.work_due()
            if due == 0:
                device.work(0.001)
            else:
                clock.sleep(LONG_NS / 1e9 if due is None else due)

    return work


@pytest.fixture
def device() -> ReferenceDevice:
    return ReferenceDevice(memory_bytes=MEMORY)


@pytest.fixture
def load(device: ReferenceDevice) -> OperatorWorkload:
    load = OperatorWorkload(lambda: device.memories, device.migration)
    device.workers.append(load)
    return load


@settings(max_examples=60)
@given(
    st.sampled_from(["sequential", "uniform", "hotset", "zipf"]),
    st.sampled_from([1, 3, 8, 24, 100, 4096, 4104, 12288, 32768, 40000, 65536]),
    st.sampled_from([64, 4096, 65536]),
    st.booleans(),
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
)
def test_batches_leave_what_single_writes_would(
    pattern: str, size: int, page: int, mapped: bool, batches: list[int]
) -> None:
    """Content and pages touched are those of the writes made one after the other, byte by byte."""
    memory = DeviceMemory("memory", MEMORY, page, mapped=mapped)
    spec = Workload(pattern, rate_pages=1, write_bytes=size, seed=5, hot_fraction=0.01)
    writes = writes_of(spec, MEMORY, page)
    assert writes is not None
    writer = ArrayWriter(memory.data, page, writes)
    made, touched = 0, set()
    for count in batches:
        written, pages = writer.write(made, count)
        assert written == count * size
        touched |= set(pages.tolist())
        made += count
    assert memory.raw.tobytes() == journal(spec, made, MEMORY, page)
    offsets = writes.offsets(0, made).tolist()
    assert touched == {p for o in offsets for p in range(o // page, (o + size - 1) // page + 1)}
    memory.close()


def test_a_trace_is_written(
    tmp_path: Path, device: ReferenceDevice, load: OperatorWorkload, work_until: WorkUntil
) -> None:
    """Writes of different lengths, across pages, with the pages they touch."""
    path = tmp_path / "a.csv"
    path.write_text("time,offset,length\n0,4090,12\n0.001,9000,1\n0.002,20480,8192\n")
    spec = Workload("trace", trace=str(path), seed=9)
    load.start(spec)
    work_until(device, lambda: load.written_bytes > 3 * (12 + 1 + 8192))
    load.stop()
    assert device.memory.data.tobytes() == journal(spec, int(str(load.status()["writes"])))
    assert device.memory.memory.pages.collect().tolist() == [0, 1, 2, 5, 6]


def test_pages_are_marked(device: ReferenceDevice, load: OperatorWorkload, work_until: WorkUntil) -> None:
    """Exactly the pages that were written are dirty."""
    spec = Workload("hotset", rate_pages=20_000, write_bytes=100, hot_share=1.0)
    load.start(spec, seconds=0.02)
    work_until(device, lambda: not load.status()["running"])
    writes = writes_of(spec, MEMORY)
    assert writes is not None
    pages = writes.offsets(0, int(str(load.status()["writes"]))) // 4096
    assert device.memory.memory.pages.collect().tolist() == sorted(set(pages.tolist()))


def test_the_rate_is_kept(device: ReferenceDevice, load: OperatorWorkload, work_until: WorkUntil) -> None:
    """Half a second's writes are made, and the memory holds them."""
    spec = Workload("hotset", rate_bytes=4 << 20, write_bytes=4096)
    load.start(spec, seconds=0.5)
    work_until(device, lambda: not load.status()["running"])
    status: dict[str, Any] = load.status()
    # The last two milliseconds' are not made any more.
    assert 510 <= status["writes"] <= 512
    assert (status["missed_writes"], status["keeps_up"], status["carried"]) == (0, True, 1.0)
    assert 0.5 <= status["seconds"] < 0.501
    assert status["load"] == spec.to_dict()
    assert device.memory.data.tobytes() == journal(spec, status["writes"])
    assert load.due() is None


def test_too_much_is_said(device: ReferenceDevice, load: OperatorWorkload, work_until: WorkUntil) -> None:
    """A rate that no machine carries: writes are missed, and the figures say that it does not keep up."""
    load.start(Workload("uniform", rate_bytes=1 << 45, write_bytes=1 << 20))
    work_until(device, lambda: bool(load.status()["missed_writes"]))
    status = load.status()
    assert not status["keeps_up"]
    assert status["carried"] < 0.95  # type: ignore[operator]
    assert status["reached_rate_bytes"] < status["asked_rate_bytes"]  # type: ignore[operator]
    load.stop()
    stopped = load.status()
    assert stopped["missed_writes"] >= status["missed_writes"]  # type: ignore[operator]
    assert (load.status(), stopped["running"]) == (stopped, False)
    assert device.work_due() is None


def test_a_pause_of_the_load_is_not_slept_through(
    device: ReferenceDevice, load: OperatorWorkload, work_until: WorkUntil
) -> None:
    """The pacer takes a quarter of a second without a look for lateness: writes missed, the clock held."""
    load.start(Workload("uniform", rate_pages=0.01))
    device.work(0.001)
    due = device.work_due()
    assert due is not None
    assert due <= CATCH_UP_NS / 1e9
    work_until(device, lambda: load.status()["seconds"] > 0.6)
    assert load.status()["missed_writes"] == 0


def test_a_turn_is_short(
    device: ReferenceDevice, load: OperatorWorkload, work_until: WorkUntil, clock: Clock
) -> None:
    """However much is due, one turn makes a part of it and comes back: 64 KiB for each look at the clock."""
    load.start(Workload("uniform", rate_bytes=1 << 45, write_bytes=4096))
    work_until(device, lambda: bool(load.written_bytes))
    before = load.written_bytes
    device.work(10.0)
    assert 0 < load.written_bytes - before <= (TURN_SECONDS * 1e9 / TICK_NS + 1) * (64 << 10)


def test_phases_take_turns(device: ReferenceDevice, load: OperatorWorkload, work_until: WorkUntil) -> None:
    """Each phase writes its own numbers, and an idle one nothing."""
    busy = Workload("sequential", rate_pages=10_000, write_bytes=8, seed=3)
    spec = Workload("phases", phases=(Phase(0.05, busy), Phase(0.05, Workload("idle"))))
    load.start(spec, seconds=0.2)
    work_until(device, lambda: not load.status()["running"])
    writes = int(str(load.status()["writes"]))
    assert 990 <= writes <= 1001  # half of the time
    assert device.memory.data.tobytes() == journal(busy, writes)


@pytest.mark.parametrize("quiet", [S.RUNNING_P2P, S.PRE_COPY_P2P, S.STOP, S.STOP_COPY, S.RESUMING])
def test_quiet_states_are_quiet(
    device: ReferenceDevice, load: OperatorWorkload, quiet: DeviceState, work_until: WorkUntil, clock: Clock
) -> None:
    """Nothing is written there, it is not held against the load, and afterwards it goes on."""
    load.start(Workload("uniform", rate_pages=20_000))
    work_until(device, lambda: load.written_bytes > 0)
    if quiet is S.PRE_COPY_P2P:
        device.migration.set_state(S.PRE_COPY)
    device.migration.set_state(quiet)
    before, missed = load.written_bytes, load.status()["missed_writes"]
    for _ in range(6):
        assert device.work_due() is None
        device.work(0.001)
        clock.sleep(0.1)
    assert load.written_bytes == before
    if quiet is S.RESUMING:
        device.reset(S.RUNNING, "given up")
    else:
        device.migration.set_state(S.RUNNING)
    work_until(device, lambda: load.written_bytes > before + 8 * 2000)
    status = load.status()
    # 12 000 were due meanwhile, of which a quarter of a second's would have been made up for.
    assert status["missed_writes"] == missed == 0
    assert 0.6 <= float(str(status["quiet_seconds"])) < 0.61


def test_it_goes_on_while_state_is_saved(
    device: ReferenceDevice, load: OperatorWorkload, work_until: WorkUntil
) -> None:
    """In PRE_COPY the device writes, and what was read before is dirty again."""
    load.start(Workload("sequential", rate_pages=20_000))
    device.migration.set_state(S.PRE_COPY)
    work_until(device, lambda: load.written_bytes > 8 * 512)
    buffer = memoryview(bytearray(4 << 20))
    while device.migration.read_into(buffer):
        pass
    before = load.written_bytes
    work_until(device, lambda: load.written_bytes > before)
    assert device.migration.precopy_info().dirty_bytes > 0


def test_it_survives_a_reset(device: ReferenceDevice, load: OperatorWorkload, work_until: WorkUntil) -> None:
    """The operator's load is not the guest's to end."""
    load.start(Workload("uniform", rate_pages=20_000))
    device.reset(S.RUNNING, "test")
    before = load.written_bytes
    work_until(device, lambda: load.written_bytes > before)


def test_what_cannot_be_is_refused(device: ReferenceDevice, load: OperatorWorkload) -> None:
    """Another memory, a write that does not fit: an error, and what was running goes on."""
    load.start(Workload("uniform", rate_pages=20_000))
    with pytest.raises(ConfigError, match="expected one of memory"):
        load.start(Workload("idle"), "vram")
    small = OperatorWorkload(lambda: [DeviceMemory("tiny", 4096)], device.migration)
    with pytest.raises(ConfigError, match="does not fit"):
        small.start(Workload("uniform", rate_pages=1, write_bytes=8192))
    with pytest.raises(ConfigError, match="no memory"):
        OperatorWorkload(list, device.migration).start(Workload("idle"))
    assert load.status()["running"]


# --- registers --------------------------------------------------------------------------------------------


def set_load(device: ReferenceDevice, pattern: int = LoadPattern.UNIFORM, **more: int) -> Workload:
    """Write a load into the registers as a guest does and start it; returns what it should be."""
    values = {"load_rate": 20_000, "load_seed": 77, "load_write_bytes": 16, "load_hot_share": 800_000}
    values |= {"load_hot_fraction": 250_000, "load_zipf_exponent": 1_200_000, "load_pattern": pattern}
    for name, value in (values | more | {"load_ctrl": more.get("load_ctrl", CTRL_RUN | CTRL_PAGES)}).items():
        write(device, name, value)
    return Workload(
        LoadPattern(pattern).name.lower(),
        rate_pages=20_000,
        seed=77,
        write_bytes=16,
        hot_fraction=0.25,
        hot_share=0.8,
        zipf_exponent=1.2,
    )


def write(device: ReferenceDevice, name: str, value: int) -> None:
    field = device.registers.fields[name]
    size = np.dtype(field.format).itemsize
    device.registers.write(field.offset, memoryview(value.to_bytes(size, "little")))


@pytest.mark.parametrize("pattern", list(LoadPattern))
def test_registers_make_a_load(device: ReferenceDevice, pattern: LoadPattern, work_until: WorkUntil) -> None:
    """Stopped, the count says what the memory holds."""
    spec = set_load(device, pattern)
    work_until(device, lambda: device.registers["load_count"] > 500)
    write(device, "load_ctrl", 0)
    assert device.registers["load_status"] == LoadStatus.STOPPED
    assert device.work_due() is None
    assert device.memory.data.tobytes() == journal(spec, device.registers["load_count"])


@pytest.mark.parametrize(
    "wrong", [{"pattern": 0}, {"load_write_bytes": 0}, {"load_hot_share": 1_000_001}, {"load_rate": 1 << 60}]
)
def test_registers_without_sense_stop_it(
    device: ReferenceDevice, wrong: dict[str, int], work_until: WorkUntil
) -> None:
    """At the start, and when they are changed under way."""
    if "pattern" not in wrong:
        set_load(device, **wrong)
        assert device.registers["load_status"] == LoadStatus.BAD_LOAD
    set_load(device)
    work_until(device, lambda: device.registers["load_count"] > 0)
    for name, value in wrong.items():
        write(device, "load_pattern" if name == "pattern" else name, value)
    work_until(device, lambda: device.registers["load_status"] == LoadStatus.BAD_LOAD)
    assert device.registers["load_ctrl"] == 0
    assert device.work_due() is None


def test_a_changed_seed_goes_on_with_the_number(device: ReferenceDevice, work_until: WorkUntil) -> None:
    """The writes after the change are those of the other load, from the same number on."""
    set_load(device)
    work_until(device, lambda: device.registers["load_count"] > 100)
    write(device, "load_seed", 78)
    changed = device.registers["load_count"]
    work_until(device, lambda: device.registers["load_count"] > changed)
    write(device, "load_ctrl", 0)
    count = device.registers["load_count"]
    other = Workload("uniform", rate_pages=1, seed=78, write_bytes=16)
    writes = writes_of(other, MEMORY)
    assert writes is not None
    for number in range(changed, count):
        offset = int(writes.offsets(number, 1)[0])
        later = {int(o) for o in writes.offsets(number + 1, count - number)}
        if offset not in later:
            assert device.memory.read(offset, 16) == contents(78, number, 1, 16).tobytes()


def test_a_reset_ends_it(device: ReferenceDevice, work_until: WorkUntil) -> None:
    """Registers and load are as new."""
    set_load(device)
    work_until(device, lambda: device.registers["load_count"] > 0)
    device.reset(S.RUNNING, "test")
    assert device.registers["load_count"] == 0
    assert device.work_due() is None


def test_it_goes_on_at_the_destination(device: ReferenceDevice, work_until: WorkUntil) -> None:
    """Source and destination together make one load: no write is lost, doubled or other than it would be."""
    target = ReferenceDevice(memory_bytes=MEMORY)
    spec = set_load(device, LoadPattern.ZIPF)
    work_until(device, lambda: device.registers["load_count"] > 200)
    source = device.migration
    source.set_state(S.PRE_COPY)
    target.migration.set_state(S.RESUMING)
    buffer = memoryview(bytearray(1 << 20))

    def move() -> None:
        while count := source.read_into(buffer):
            target.migration.write(buffer[:count])

    move()
    before = device.registers["load_count"]
    work_until(device, lambda: device.registers["load_count"] > before)
    source.set_state(S.STOP_COPY)
    move()
    source.set_state(S.STOP)
    target.migration.set_state(S.STOP)
    moved = target.registers["load_count"]
    assert moved == device.registers["load_count"]
    target.migration.set_state(S.RUNNING)
    work_until(target, lambda: target.registers["load_count"] > moved + 200)
    write(target, "load_ctrl", 0)
    assert target.memory.data.tobytes() == journal(spec, target.registers["load_count"])
    assert target.registers["load_missed"] == device.registers["load_missed"]


def test_a_run_begins_where_it_is_told(device: ReferenceDevice) -> None:
    """Its first write is the one named, not number 0."""
    spec = Workload("sequential", rate_pages=100_000)
    run = WorkloadRun(spec, device.memory.memory, device.migration, first=10)
    while not run.writes:
        run.advance(0.001)
    assert device.memory.memory.pages.collect()[0] == 10
