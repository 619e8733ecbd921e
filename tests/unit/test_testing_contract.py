"""The device contract: our own devices keep it, and a device that breaks one part of it is told which."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vfu_dev.device import Bar, Device, Field, Msix, PciIdentity, Region, Registers
from vfu_dev.device.base import Worker
from vfu_dev.device.reference import ReferenceDevice
from vfu_dev.errors import AccessError
from vfu_dev.migration import PrecopyInfo
from vfu_dev.testing import ContractError, InMemoryClient, check_device, move
from vfu_dev.testing.contract import CHECKS
from vfu_dev.uapi import DeviceState


class Scratchpad(Device):
    """The smallest device: memory behind a BAR, and what a write does."""

    bar0 = Region(0, size_bytes=4096, migrate=True)

    def region_write(self, region: Region, offset: int, data: memoryview) -> None:
        """Store it."""
        region.store(offset, data)


class MappedPad(Device):
    """Memory that the guest reaches without anybody being told."""

    pad = Region(2, size_bytes=8192, mapped=True)


class Sum(Device):
    """A good device that the broken ones below are made from."""

    registers = Registers(
        0,
        [
            Field("mode", 0, "<u4", "rw", "how", migrates=True),
            Field("add", 8, "<u8", "wo", "added"),
            Field("sum", 16, "<u8", "ro", "of what was added", migrates=True),
        ],
        initial={"mode": 3},
    )
    notes = Region(2, size_bytes=5 * 4096)

    @registers.written("add")
    def add(self, value: int) -> None:
        """Add."""
        self.registers["sum"] = (self.registers["sum"] + value) % (1 << 64)


def reference(**options: Any) -> Callable[[], Device]:
    return lambda: ReferenceDevice(memory_bytes=9 * 4096, **options)


class TooWide(Sum):
    """Has a class code of 25 bits."""

    identity = PciIdentity(0x4656, 1, class_code=0x1000000, revision=0)


class Overlapping(Device):
    """Has a 64-bit BAR where the next one begins."""

    memory = Region(0, size_bytes=4096)
    registers = Registers(1, [Field("a", 0, "<u4", "rw", "", migrates=True)])


class Silent(Device):
    """Has a register that nothing happens for."""

    registers = Registers(0, [Field("add", 0, "<u8", "wo", "added")])


class Defaulted(Device):
    """Says what a register is worth in older states, and does not migrate it."""

    registers = Registers(0, [Field("mode", 0, "<u4", "ro", "", default=1)])


class Moved(Sum):
    """Puts its registers under a 64-bit BAR when all of it was declared."""

    def initialise(self) -> None:
        """Move them."""
        self.bars.sort(key=lambda bar: -bar.index)
        self.bars[1].index = 3


class Unbounded(Sum):
    """Serves any address."""

    def region_handler(self, bar: Bar) -> Callable[[memoryview, int, bool], None]:
        """Check nothing."""

        def access(data: memoryview, offset: int, is_write: bool) -> None:
            if not is_write:
                data[:] = bytes(len(data))

        return access


class Picky(Device):
    """Raises what nobody catches."""

    registers = Registers(0, [Field("mode", 0, "<u4", "rw", "", migrates=True)])

    @registers.written("mode")
    def choose(self, mode: int) -> None:
        """Know two modes and be surprised by a third."""
        {0: "off", 1: "on"}[mode]


class Unreset(Sum):
    """Has two initial states."""

    def reset_registers(self) -> None:
        """Come out of a reset in another mode than out of the factory."""
        self.registers["mode"] = 7


class Forgetful(Device):
    """Its register is not part of its state."""

    registers = Registers(0, [Field("mode", 0, "<u4", "rw", "")])


class Outside(Device):
    """Keeps what the guest wrote in an attribute, which nobody migrates."""

    page = Region(0, size_bytes=4096)

    def initialise(self) -> None:
        """Start with nothing."""
        self.kept = bytearray(4096)

    def region_write(self, region: Region, offset: int, data: memoryview) -> None:
        """Keep it in Python."""
        self.kept[offset : offset + len(data)] = data

    def region_read(self, region: Region, offset: int, out: memoryview) -> None:
        """Return it from there."""
        out[:] = self.kept[offset : offset + len(out)]


class Unmarked(Device):
    """Writes memory behind the back of dirty tracking."""

    page = Region(0, size_bytes=4096)

    def region_write(self, region: Region, offset: int, data: memoryview) -> None:
        """Store without a mark."""
        region.memory.raw[offset : offset + len(data)] = data


class Stuck(Sum):
    """Forgets the migration in a reset: a load that failed stays for ever."""

    def reset(self, state: DeviceState, reason: str) -> None:
        """Reset registers alone."""
        for bar in self.bars:
            bar.reset()


class Restless(Sum):
    """Takes writes when it must stand still."""

    def _state_changed(self, state: DeviceState) -> None:
        pass


class Counting(Device):
    """A read changes what migrates, also while the device is stopped."""

    page = Region(0, size_bytes=4096)

    def region_read(self, region: Region, offset: int, out: memoryview) -> None:
        """Count reads in the memory that is read."""
        region.store(0, bytes([(region.read(0, 1)[0] + 1) % 256]))
        out[:] = region.read(offset, len(out))


class Boastful(Sum):
    """Promises a byte more than there is."""

    def initialise(self) -> None:
        """Have a migration that lies."""
        honest = self.migration.precopy_info

        def info() -> PrecopyInfo:
            found = honest()
            return PrecopyInfo(found.initial_bytes, found.dirty_bytes + 1)

        self.migration.precopy_info = info  # type: ignore[method-assign]


class Sloppy(Sum):
    """Accepts any stream."""

    def initialise(self) -> None:
        """Have a migration that trusts."""

        resuming = self.migration._resuming

        def trust() -> None:
            resuming.session = None

        resuming.finish = trust  # type: ignore[method-assign]


class Copier(Device):
    """Copies guest memory into a region, when it may."""

    registers = Registers(
        0,
        [
            Field("source", 0, "<u8", "rw", "guest address", migrates=True),
            Field("go", 8, "<u4", "wo", "bytes to copy"),
            Field("status", 12, "<u4", "ro", "0 ok, 1 refused, 2 not now", migrates=True),
        ],
    )
    page = Region(2, size_bytes=4096)
    msix = Msix(1, vectors=1)

    @registers.written("go")
    def copy(self, count: int) -> None:
        """Copy."""
        self.registers["status"] = self.attempt(count)
        self.raise_irq(0)

    def attempt(self, count: int) -> int:
        """Return the status."""
        if not self.may_start:
            return 2
        data = bytearray(min(count, 4096))
        try:
            self.guest_memory.read(self.registers["source"], memoryview(data))
        except AccessError:
            return 1
        self.page.store(0, data)
        return 0


@pytest.mark.parametrize(
    ("factory", "changed"),
    [
        (Scratchpad, ()),
        (Sum, ()),
        (Copier, ()),
        (reference(), ("generation",)),
        (reference(fill_seed=5), ("generation",)),
        (reference(mapped=True), ("generation",)),
        (reference(more={"aux": Region(4, size_bytes=8192)}), ("generation",)),
        (MappedPad, ()),
    ],
)
def test_our_devices_keep_the_contract(factory: Callable[[], Device], changed: tuple[str, ...]) -> None:
    assert check_device(factory, changed_by_resume=changed) == [check.__name__ for check in CHECKS]


class Loud(Copier):
    """Reads guest memory in states where it must be quiet."""

    @property
    def may_start(self) -> bool:
        """Ask nobody."""
        return True


class Direct(Sum):
    """Raises interrupts past `raise_irq`, which would have kept them back."""

    msix = Msix(1, vectors=1)

    def add(self, value: int) -> None:
        """Raise at once."""
        self.bus.raise_message(0)


def test_a_device_reads_the_guest_memory_that_the_client_gives_it() -> None:
    with InMemoryClient(Copier()) as client:
        region = client.dma_map(0x10000, 4096)
        region.memory[16:20] = b"data"
        client.region_write(0, 0, (0x10010).to_bytes(8, "little"))
        client.region_write(0, 8, (4).to_bytes(4, "little"))
        assert client.region_read(2, 0, 4) == b"data"
        client.dma_unmap(region)
        client.region_write(0, 8, (4).to_bytes(4, "little"))
        assert client.region_read(0, 12, 4) == b"\x01\0\0\0"
        assert client.irqs == [0, 0]
        assert client.bus.accesses == [(0x10010, 4, False)] * 2


def test_a_declared_device_works_by_itself_where_it_may() -> None:
    class Ticker(Device):
        """Counts its own steps, five of them."""

        registers = Registers(0, [Field("steps", 0, "<u4", "ro", "taken", migrates=True)])

        def make_workers(self) -> list[Worker]:
            return [Steps(self)]

    class Steps:
        def __init__(self, device: Ticker) -> None:
            self.device = device

        def due(self) -> float | None:
            return 0 if self.device.registers["steps"] < 5 else None

        def advance(self, budget_seconds: float) -> None:
            self.device.registers["steps"] += 1

        def reset(self) -> None:
            pass

        def block(self) -> None:
            return None

    with InMemoryClient(Ticker()) as client:
        client.migration.set_state(DeviceState.RUNNING_P2P)
        client.work()
        assert client.region_read(0, 0, 4) == bytes(4)
        client.migration.set_state(DeviceState.RUNNING)
        client.work()
        assert client.region_read(0, 0, 4) == b"\x05\0\0\0"
    check_device(Ticker)


@pytest.mark.parametrize(
    ("broken", "check", "text"),
    [
        (TooWide, "identity", "class_code 0x1000000 does not fit in 24 bits"),
        (Overlapping, "declarations", "both need BAR1"),
        (Silent, "declarations", "add is write-only and has no hook"),
        (Defaulted, "declarations", "mode has a default for older states, but does not migrate"),
        (Moved, "declarations", "notes and registers both need BAR3"),
        (Unbounded, "bounds", "not refused"),
        (Picky, "access_sizes", "raised KeyError"),
        (Unreset, "reset", "mode is 7, at first it was 3"),
        (Forgetful, "round_trip", "differs in: mode"),
        (Outside, "round_trip", "differs in: page"),
        (Unmarked, "round_trip", "page"),
        (Stuck, "damaged_stream", "in RESUMING"),
        (Sloppy, "damaged_stream", "was accepted"),
        (Restless, "state_policy", "takes writes in STOP"),
        (Counting, "state_policy", "its state changes in STOP"),
        (Loud, "quiet", "guest memory was accessed in RUNNING_P2P"),
        (Direct, "quiet", "interrupts [0] were raised in RUNNING_P2P"),
        (Boastful, "promised_bytes", "promised"),
    ],
)
def test_each_check_finds_the_device_that_breaks_it(broken: type[Device], check: str, text: str) -> None:
    with pytest.raises(ContractError) as caught:
        check_device(broken)
    assert check in caught.value.broken
    assert text in caught.value.broken[check]
    assert broken.__name__ in str(caught.value)


def test_a_device_that_cannot_be_made_fails_one_check_in_words() -> None:
    with pytest.raises(ContractError) as caught:
        check_device(Overlapping)
    assert list(caught.value.broken) == ["declarations"]
    assert "Overlapping breaks 1 of 10 checks" in str(caught.value)


def test_every_check_has_a_device_that_fails_it() -> None:
    parameters = test_each_check_finds_the_device_that_breaks_it.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert {check for _, check, _ in parameters} == {check.__name__ for check in CHECKS}


@pytest.fixture
def pair() -> Iterator[tuple[InMemoryClient, InMemoryClient]]:
    with InMemoryClient(Sum("one")) as one, InMemoryClient(Sum("two")) as two:
        yield one, two


def test_a_client_in_memory_moves_a_device_in_any_slices(pair: tuple[InMemoryClient, InMemoryClient]) -> None:
    source, target = pair
    for value in (40, 2):
        source.region_write(0, 8, value.to_bytes(8, "little"))
    source.region_write(2, 5000, b"note")
    moved = move(source, target, slice_bytes=11)
    assert moved > 4096
    assert target.region_read(0, 16, 8) == (42).to_bytes(8, "little")
    assert target.region_read(2, 5000, 4) == b"note"
    assert source.migration.get_state() is DeviceState.STOP


def test_a_device_must_not_keep_the_bytes_it_was_handed() -> None:
    """In a server they are gone after the call; in memory they are too."""
    kept: list[memoryview] = []

    class Keeper(Scratchpad):
        def region_write(self, region: Region, offset: int, data: memoryview) -> None:
            kept.append(data)

    with InMemoryClient(Keeper()) as client:
        client.region_write(0, 0, b"x")
        assert bytes(kept[0]) == b"\xdd"
