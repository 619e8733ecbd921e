"""Plain memory is served in C as Python serves it: content, marks, counters, and never when it must not be.

A device behind the real library, and its twin that Python serves in memory, get the same accesses.
"""

from __future__ import annotations

import contextlib
import os
import platform
import queue
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from serverkit import PATIENCE_SECONDS, short_folder, wait_until

from vfu_dev.builds import artifact
from vfu_dev.client import ClientCommandError, VfioUserDevice
from vfu_dev.device import Device, Field, Region, Registers
from vfu_dev.errors import AccessError, BuildError, StateError, VfuDevError
from vfu_dev.faults import Fault
from vfu_dev.libvfio_user import Context, open_library
from vfu_dev.memory.pages import CODE_DIRTY
from vfu_dev.migration.fsm import RUNNING_GROUP
from vfu_dev.server.faults import fault_board
from vfu_dev.server.setup import set_up
from vfu_dev.testing import InMemoryClient
from vfu_dev.uapi import DeviceState

S = DeviceState
SANITIZED = "VFU_DEV_TEST_SANITIZED"
EXAMPLES = 8 if os.environ.get(SANITIZED) else 25
# Making a failure shorter takes minutes, with two servers for each try.
PHASES = (Phase.reuse, Phase.generate)
T = TypeVar("T")


class Card(Device):
    """A memory of small pages whose BAR is larger, and a window on another one whose BAR is smaller."""

    registers = Registers(0, [Field("window", 0x0, "<u8", "rw", "where the window begins", migrates=True)])
    memory = Region(2, size_bytes=64 * 100, page_size_bytes=64)
    large = Region(4, size_bytes=3 * 4096, page_size_bytes=256, bar_bytes=4096)

    @registers.written("window")
    def move(self, value: int) -> None:
        """Show what begins there."""
        self.large.base_bytes = value

    def reset_registers(self) -> None:
        """Show the start again."""
        self.move(self.registers["window"])

    def resumed(self) -> None:
        """Show what was shown."""
        self.move(self.registers["window"])


class MappedCard(Card):
    """The client may map the memory, but for its end."""

    memory = Region(2, size_bytes=(64 << 10) + 4096, mapped=True)


class WatchfulCard(Card):
    """Has a say in every access."""

    def region_write(self, region: Region, offset: int, data: memoryview) -> None:
        """Note the last one at the end."""
        region.store(offset, data)
        region.store(region.size_bytes - 8, offset.to_bytes(8, "little"))


class OddRegion(Region):
    """A class of an author's own."""


class OddCard(Card):
    """Its memory is none that anybody else knows."""

    memory = OddRegion(2, size_bytes=64 * 100, page_size_bytes=64)


class Served:
    """`device` behind the real library, in a thread; without Python's loop around it.

    Attributes:
        board: its faults; to be used in `call`.
    """

    def __init__(self, library: Path, path: Path, device: Device) -> None:
        self.device = device
        self.path = path
        opened = open_library(library)
        self.context = Context(opened, os.fspath(path), device.name)
        callbacks, bus = set_up(device, opened, self.context, None, lambda: False)
        self.board = fault_board(device, opened, self.context, callbacks, bus, self._hold)
        self.context.realize()
        self.returns = 0  # of Context.serve
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _hold(self, seconds: float | None, over: Callable[[], bool]) -> None:
        raise AssertionError

    def call(self, function: Callable[[], T]) -> T:
        """Return what `function` returns in the thread that serves."""
        answers: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._jobs.put(lambda: answers.put(function()))
        os.eventfd_write(self._wake, 1)
        return answers.get(timeout=PATIENCE_SECONDS)

    @property
    def thread_id(self) -> int:
        """The kernel's number of the thread that serves."""
        assert self._thread.native_id is not None
        return self._thread.native_id

    def connect(self) -> VfioUserDevice:
        """Connect, once the client before is gone."""
        return VfioUserDevice.connect(self.path, timeout_seconds=PATIENCE_SECONDS)

    def close(self) -> None:
        """Stop serving."""
        self._jobs.put(None)
        os.eventfd_write(self._wake, 1)
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive()
        os.close(self._wake)
        self.device.close()

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            self.context.destroy()  # which ends the client's wait, too

    def _serve(self) -> None:
        while True:
            if self.context.attached:
                with contextlib.suppress(ConnectionResetError):
                    self.context.serve(self._wake, 0.01, None)
                self.returns += 1
            elif self.context.poll_fd in select.select([self.context.poll_fd, self._wake], [], [])[0]:
                self.context.attach()
            while self._has_job():
                job = self._jobs.get()
                if job is None:
                    return
                job()

    def _has_job(self) -> bool:
        try:
            return os.eventfd_read(self._wake) == 1
        except BlockingIOError:
            return False


def served_in_c(device: Device) -> tuple[int, int]:
    """Return how many reads and writes no Python was called for."""
    return int(device.counters.reads.shared[0]), int(device.counters.writes.shared[0])


CARDS = (Card, MappedCard, WatchfulCard, OddCard)
PLAIN = (Card, MappedCard)
STATES = st.sampled_from([S.RUNNING, S.PRE_COPY, S.RUNNING_P2P, S.PRE_COPY_P2P, S.STOP, S.STOP_COPY])
COUNTS = st.sampled_from([1, 2, 4, 8, 3, 5, 16, 65, 300])
# Where a BAR, a page, or the memory behind it ends; and anywhere.
OFFSETS = st.one_of(
    st.sampled_from([0, 60, 63, 255, 3 * 4096 - 4, 4092, 4095, 6392, 6399, 8184, 65532, (64 << 10) + 4090]),
    st.integers(0, 8300),
)
WINDOWS = st.sampled_from([0, 1, 256, 8192, 3 * 4096 - 2, 3 * 4096, 1 << 63, (1 << 64) - 1, (1 << 64) - 4096])
WILD = st.sampled_from([1 << 17, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 8])


class Twins(RuleBasedStateMachine):
    """A served device and its twin in memory; the served one migrates now and then, to a third."""

    library: Path
    folder: Path
    made = 0

    @initialize(card=st.sampled_from(CARDS))
    def begin(self, card: type[Card]) -> None:
        """Make both, and connect."""
        Twins.made += 1
        self.card = card
        self.served = Served(self.library, self.folder / f"s{Twins.made}", card("served"))
        self.twin = InMemoryClient(card("twin"))
        self.device = self.served.connect()
        self.target: InMemoryClient | None = None
        self.fault: int | None = None
        self.write(4, 0, 4, 1)  # at least one in C, unless the card has a say

    def teardown(self) -> None:
        """Close everything, after one last migration."""
        if not hasattr(self, "served"):
            return
        try:
            self.go(S.RUNNING)
            self.precopy()
            self.complete()
        finally:
            self.device.close()
            self.served.close()
            self.twin.close()
            if self.target is not None:
                self.target.close()

    @property
    def state(self) -> DeviceState:
        """The state of both."""
        return self.twin.migration.get_state()

    def _both(self, act: Callable[[Any], object]) -> object:
        """Do the same to both; return what both answered."""
        answers: list[object] = []
        for one in (self.device, self.twin):
            try:
                answers.append(act(one))
            except (ClientCommandError, VfuDevError):
                answers.append("refused")
        assert answers[0] == answers[1], answers
        return answers[0]

    @contextlib.contextmanager
    def _in_c(self, bar: int, accesses: tuple[int, int]) -> Iterator[None]:
        """Do these reads and writes, and see that C serves them where no Python has to."""
        before = served_in_c(self.served.device)
        yield
        plain = self.card in PLAIN or (self.card is OddCard and bar == 4)
        if plain and self.fault is None and self.state in RUNNING_GROUP:
            assert np.subtract(served_in_c(self.served.device), before).tolist() == list(accesses)

    # --- what a guest does ----------------------------------------------------------------------------------

    @rule(bar=st.sampled_from([2, 4]), offset=OFFSETS, count=COUNTS, seed=st.integers(0, 255))
    def write(self, bar: int, offset: int, count: int, seed: int) -> None:
        """Write what lies in the BAR."""
        data = bytes((seed + i) & 0xFF for i in range(count))
        if offset + count > self.twin.device.bars[bar // 2].bar_bytes:
            return
        with self._in_c(bar, (0, 1)):
            self._both(lambda one: one.region_write(bar, offset, data))

    @rule(bar=st.sampled_from([2, 4]), offset=OFFSETS, count=COUNTS)
    def read(self, bar: int, offset: int, count: int) -> None:
        """Read the same from both."""
        if offset + count <= self.twin.device.bars[bar // 2].bar_bytes:
            with self._in_c(bar, (1, 0)):
                assert self._both(lambda one: bytes(one.region_read(bar, offset, count))) != "refused"

    @rule(offsets=st.lists(OFFSETS, min_size=1, max_size=9))
    def post(self, offsets: list[int]) -> None:
        """Write without waiting for replies, which only a client of messages can; then read."""
        inside = [offset for offset in offsets if offset + 4 <= self.twin.device.bars[2].bar_bytes]
        with self._in_c(4, (1, len(inside))):
            for offset in inside:
                self.device.region_write(4, offset, offset.to_bytes(4, "little"), posted=True)
                with contextlib.suppress(AccessError):
                    self.twin.region_write(4, offset, offset.to_bytes(4, "little"))
            self._both(lambda one: bytes(one.region_read(4, 0, 300)))

    @rule(offset=WILD, count=COUNTS)
    def go_wild(self, offset: int, count: int) -> None:
        """Go beyond a region: refused, and nothing is counted as served."""
        before = self.served.device.counters.region_writes
        for access in (
            lambda: self.device.region_write(2, offset, bytes(count)),
            lambda: self.device.region_read(2, offset, count),
        ):
            with pytest.raises(ClientCommandError):
                access()
        assert self.served.device.counters.region_writes == before

    @rule(window=WINDOWS)
    def move_window(self, window: int) -> None:
        """Have the second BAR begin elsewhere."""
        self._both(lambda one: one.region_write(0, 0, window.to_bytes(8, "little")))

    @precondition(lambda self: self.card is MappedCard and self.state in RUNNING_GROUP)
    @rule(offset=st.integers(0, (64 << 10) - 300), count=COUNTS)
    def write_mapped(self, offset: int, count: int) -> None:
        """Write without a message."""
        with self.device.map_region(2) as mapping:
            ((start, memory),) = mapping.areas
            assert (start, len(memory)) == (0, 64 << 10)
            memory[offset : offset + count] = b"m" * count
        memory = self.twin.device.memories[0]
        memory.raw[offset : offset + count] = b"m" * count

    # --- what others do -------------------------------------------------------------------------------------

    @rule(state=STATES)
    def go(self, state: DeviceState) -> None:
        """Change the state, where a way leads there; a migration that was under way is given up."""
        try:
            self.twin.migration.set_state(state)
        except StateError:
            return
        self.device.migration.set_state(state)
        self.target = None

    @rule()
    def reset(self) -> None:
        """Reset the device, as a guest may at any time."""
        self._both(lambda one: one.reset())

    @rule()
    def reconnect(self) -> None:
        """Lose the client."""
        self.device.close()
        self.twin.disconnect()
        self.device = self.served.connect()
        self.target = None

    @rule(op=st.sampled_from(["region-read", "region-write"]), bar=st.sampled_from(["", ",bar=2", ",bar=4"]))
    @precondition(lambda self: self.fault is None)
    def arm(self, op: str, bar: str) -> None:
        """Arm a fault that never strikes, but has to see every access."""
        self.fault = self.served.call(
            lambda: self.served.board.arm(Fault.parse(f"op={op},error=EIO,after=1000000{bar}"))
        )
        before = served_in_c(self.served.device)
        for number in (2, 4) if not bar else (int(bar[-1]),):
            self.read(number, 0, 4)
            self.write(number, 0, 4, 1)
        assert served_in_c(self.served.device) == before

    @rule()
    @precondition(lambda self: self.fault is not None)
    def clear(self) -> None:
        """Clear it."""
        assert self.served.call(lambda: self.served.board.clear(self.fault)) == 1
        self.fault = None

    @rule()
    @precondition(lambda self: self.state is S.RUNNING)
    def precopy(self) -> None:
        """Begin a migration to a third device."""
        self._both(lambda one: one.migration.set_state(S.PRE_COPY))
        self.target = InMemoryClient(self.card("target"))
        self.target.migration.set_state(S.RESUMING)

    @rule(count=st.sampled_from([1, 500, 5000, 1 << 20]))
    @precondition(lambda self: self.target is not None)
    def move_some(self, count: int) -> None:
        """Move a piece of the stream."""
        assert self.target is not None
        self.target.migration.write(self.device.migration.read(count))

    @rule()
    @precondition(lambda self: self.target is not None)
    def complete(self) -> None:
        """Stop, move the rest: what was written at any time is there, and no more."""
        assert self.target is not None
        self._both(lambda one: one.migration.set_state(S.STOP_COPY))
        with pytest.raises(ClientCommandError):
            self.device.region_write(2, 0, b"late")
        with pytest.raises(AccessError):
            self.twin.region_write(2, 0, b"late")
        while piece := self.device.migration.read(1 << 20):
            self.target.migration.write(piece)
        self.target.migration.set_state(S.RUNNING)
        for mine, there in zip(self.served.device.memories, self.target.device.memories, strict=True):
            assert np.array_equal(mine.data, there.data)
        self._both(lambda one: one.migration.set_state(S.RUNNING))
        self.target.close()
        self.target = None

    @rule()
    @precondition(lambda self: self.state is S.RUNNING)
    def resume(self) -> None:
        """Take the state of an earlier moment back, with writes in between and while it comes."""
        self.device.migration.set_state(S.STOP_COPY)
        stream = b"".join(iter(lambda: self.device.migration.read(1 << 20), b""))
        self.device.migration.set_state(S.RUNNING)
        self.write(2, 100, 16, 7)
        self._both(lambda one: one.migration.set_state(S.RESUMING))
        self.write(2, 200, 16, 8)
        self._both(lambda one: one.migration.write(stream))
        self._both(lambda one: one.migration.set_state(S.RUNNING))

    # --- what always holds ----------------------------------------------------------------------------------

    @invariant()
    def they_are_the_same(self) -> None:
        """Content, and every figure of accesses; and C served what it should, and nothing else."""
        if not hasattr(self, "served"):
            return
        mine, other = self.served.device, self.twin.device
        for memory, twin in zip(mine.memories, other.memories, strict=True):
            assert np.array_equal(memory.data, twin.data)
            assert np.all((twin.pages.codes == 0) | (memory.pages.codes != 0)), "never written?"
        assert _figures(mine) == _figures(other)
        assert bool(mine.serves_writes[0]) == (self.state in RUNNING_GROUP)
        assert served_in_c(other) == (0, 0)
        if self.card not in PLAIN:
            assert served_in_c(mine) == (0, 0) or self.card is OddCard


def _figures(device: Device) -> dict[str, int]:
    counters = device.counters
    names = ("region_reads", "region_writes", "region_read_bytes", "region_written_bytes", "refused_by_state")
    found = {name: counters.as_dict()[name] for name in names}
    for name, one in (("reads", counters.reads), ("writes", counters.writes)):
        assert sum(one.seconds.totals()[0]) == one.seconds.count
        found[f"{name} timed"] = one.seconds.count
    return found


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Return a folder for sockets."""
    with short_folder() as path:
        yield path


def test_c_serves_what_python_would_have(library: Path, folder: Path) -> None:
    """Any order of accesses, states, faults, resets, connections and migrations."""
    Twins.library, Twins.folder = library, folder
    run_machine(Twins, settings=settings(max_examples=EXAMPLES, stateful_step_count=40, phases=PHASES))


@pytest.fixture
def card(library: Path, folder: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    """Return a served `Card`."""
    made = Served(library, folder / f"c{id(request):x}", Card("card"))
    yield made
    made.close()


def test_no_python_runs_for_plain_memory(card: Served) -> None:
    """Neither the handlers nor the loop; all of it does for a register, and for memory that is not plain."""
    with card.connect() as device:
        device.region_write(2, 0, b"begin")
        returns = card.returns
        while card.returns == returns:  # until a turn is over
            device.region_write(2, 8, b"a")
        for page in range(100):
            device.region_write(2, 64 * page + 60, b"12345678"[: 4 if page == 99 else 8])
            assert device.region_read(2, 64 * page + 60, 4) == b"1234"
        counters = card.device.counters
        assert (counters.reads.count, counters.writes.count) == (0, 0)
        assert served_in_c(card.device)[0] == 100
        assert np.all(card.device.memory.memory.pages.codes == CODE_DIRTY)
        device.region_read(0, 0, 8)
        assert (counters.reads.count, counters.region_reads) == (1, 101)


def test_a_stopped_device_is_asked_before_the_reply(card: Served) -> None:
    """A posted write right behind STOP finds the way through C closed already, and is refused."""
    with card.connect() as device:
        for _ in range(50):
            device.region_write(2, 0, bytes(4))
            device.migration.set_state(S.STOP)
            device.region_write(2, 0, b"late", posted=True)
            assert device.region_read(2, 0, 4) == bytes(4)
            device.migration.set_state(S.RUNNING)
        assert card.device.counters.refused_by_state == 50


# <asm/unistd.h>
RECVFROM = {"x86_64": 45, "aarch64": 207}
POLL = {"x86_64": 7, "aarch64": 73}


def waits_in(card: Served, number: int) -> None:
    """Wait until the thread that serves waits in the system call of that number."""
    where = Path(f"/proc/self/task/{card.thread_id}/syscall")
    wait_until(lambda: where.read_text().split()[0] == str(number), f"system call {number}")


def test_the_wait_for_a_request_ends_for_everything_else(card: Served) -> None:
    """It is in recv(), which a signal interrupts, as often as there is something else."""
    with card.connect() as device:
        for count in range(200):
            assert device.region_read(2, 0, 4) == bytes(4)
            assert card.call(lambda count=count: count) == count
        waits_in(card, RECVFROM[platform.machine()])
        assert card.call(lambda: "woken") == "woken"


def in_proc(where: str, tell: Callable[[Path], str], wanted: str) -> list[Path]:
    """Return the entries of a folder of this process's that `tell` says `wanted` of."""
    found = []
    for entry in Path("/proc/self", where).iterdir():
        with contextlib.suppress(OSError):  # it is gone already
            if tell(entry) == wanted:
                found.append(entry)
    return found


def waiters() -> list[Path]:
    """Return the threads of this process that wait for a server."""
    return in_proc("task", lambda task: (task / "comm").read_text(), "vfu-waiter\n")


def eventfds() -> list[Path]:
    """Return the descriptors of this process that are eventfds."""
    return in_proc("fd", os.readlink, "anon_inode:[eventfd]")


def test_the_thread_that_waits_takes_no_signal_and_ends_with_the_server(library: Path, folder: Path) -> None:
    wait_until(lambda: not waiters(), "the end of those before")
    before = eventfds()
    card = Served(library, folder / "thread", Card("card"))
    try:
        for _ in range(3):
            with card.connect() as device:
                assert device.region_read(2, 0, 4) == bytes(4)
                waits_in(card, RECVFROM[platform.machine()])
                wait_until(waiters, "a thread that waits")
                (waiter,) = waiters()  # one for all clients
                watched = waiter / "fd"  # not the process's: to share these makes each request slower
                wait_until(lambda watched=watched: len(os.listdir(watched)) == 3, "a table of its own")
                fields = dict(line.split(":\t") for line in (waiter / "status").read_text().splitlines())
                blocked = {number for number in range(1, 65) if int(fields["SigBlk"], 16) >> number - 1 & 1}
                assert signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP} <= blocked
    finally:
        card.close()
    wait_until(lambda: not waiters(), "its end")  # joined, and a moment later gone from /proc
    assert eventfds() == before


def test_a_program_keeps_its_own_signal(library: Path, folder: Path) -> None:
    """The library waits in poll() as long as the program has a handler of its own."""
    came: list[int] = []
    before = signal.signal(signal.SIGURG, lambda number, _: came.append(number))
    card = Served(library, folder / "own", Card("card"))
    try:
        with card.connect() as device:
            assert device.region_read(2, 0, 4) == bytes(4)
            waits_in(card, POLL[platform.machine()])
            assert card.call(lambda: "woken") == "woken"
            assert came == []
            signal.raise_signal(signal.SIGURG)
            assert came == [signal.SIGURG]
            signal.signal(signal.SIGURG, signal.SIG_DFL)
            assert card.call(lambda: "woken") == "woken"
            waits_in(card, RECVFROM[platform.machine()])
    finally:
        card.close()
        signal.signal(signal.SIGURG, before or signal.SIG_DFL)


def test_a_thread_that_blocks_the_signal_is_served(card: Served) -> None:
    """It waits in poll() from the next turn on, and in recv() again when it no longer blocks it."""
    with card.connect() as device:
        for how, number in ((signal.SIG_BLOCK, POLL), (signal.SIG_UNBLOCK, RECVFROM)):
            card.call(lambda how=how: signal.pthread_sigmask(how, [signal.SIGURG]))
            waits_in(card, number[platform.machine()])
            assert device.region_read(2, 0, 4) == bytes(4)
            assert card.call(lambda: "woken") == "woken"
            waits_in(card, number[platform.machine()])


def test_with_sanitizers() -> None:
    """The tests above once more, with a library that ends the process for a step beyond, or an overflow."""
    if os.environ.get(SANITIZED):
        return  # this is that process
    try:
        library = artifact("libvfio-user-asan", build=True)
    except BuildError as error:
        pytest.skip(str(error))
    runtimes = [
        subprocess.run(
            ["cc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        SANITIZED: "1",
        "VFU_DEV_LIBVFIO_USER": str(library),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0,abort_on_error=0",
        "PYTHONMALLOC": "malloc",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 passed" in done.stdout
