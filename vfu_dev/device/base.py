"""The base of every device: regions, interrupts, migration, counters.

An author subclasses `Device`, declares what is behind its BARs and defines what registers do. The device is
then attachable, migratable with pre-copy, and observable.
"""

from __future__ import annotations

import errno
import functools
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from typing import ClassVar, Protocol

import numpy as np

from vfu_dev.device.bar import NO_BAR, Bar, Msix, declared, judge_place
from vfu_dev.device.bus import Bus, GuestMemory, NoBus
from vfu_dev.device.config_space import ConfigSpace
from vfu_dev.device.counters import Counters
from vfu_dev.device.fields import Access
from vfu_dev.device.identity import PciIdentity
from vfu_dev.device.interrupts import Interrupts
from vfu_dev.device.region import Region
from vfu_dev.device.registers import Registers
from vfu_dev.errors import AccessError, ConfigError, judge_name
from vfu_dev.memory import DeviceMemory
from vfu_dev.migration import MigratableState, Migration, RegisterBlock, StateMachine, StateObject
from vfu_dev.migration.fsm import ALL_FLAGS, P2P_STATES, RUNNING_GROUP
from vfu_dev.uapi import MAX_MSI_MESSAGES, DeviceState, MigrationFlags

logger = logging.getLogger(__name__)

# States in which a device may start DMA and interrupts; in all others it only answers.
_ACTIVE_STATES = RUNNING_GROUP - P2P_STATES


class RefusedAccessError(AccessError):
    """A region access that is out of bounds, or a write to a device that must not change now.

    Attributes:
        region: name of the region.
        offset, count: what was asked for, in bytes.
    """

    def __init__(self, region: str, offset: int, count: int, reason: str, number: int) -> None:
        super().__init__(f"{region}: access of {count} bytes at {offset:#x}: {reason}")
        self.region = region
        self.offset = offset
        self.count = count
        self.errno = number


class Worker(Protocol):
    """Work that a device does by itself, in small steps; never in a state in which it has to be quiet."""

    def due(self) -> float | None:
        """Return the seconds until there is work: 0 for now, None for not before something asks for it."""

    def advance(self, budget_seconds: float) -> None:
        """Work for about that long, or until `bus.request_waits`. Guest memory may fail, by AccessError."""

    def reset(self) -> None:
        """Drop the work in progress; registers were reset before."""

    def block(self) -> RegisterBlock | None:
        """Return the state of the worker that migrates beside registers."""


class Device:
    """A PCI device.

    A subclass declares what it has as attributes: `Registers`, `Region` and `Msix`, in the class, or in
    `__init__` where it depends on an argument. `super().__init__()` makes the device of them, so it comes
    after the last declaration. A subclass may override what is below "for authors".

    Attributes:
        identity: PCI ids and class; the default ids are assigned to nobody.
        type_name: both ends of a migration have to agree on it; the class's name by default.
        msi_vectors: number of MSI messages, 0 for a device without MSI; None: as many as MSI-X has.
        express: whether it is a PCI Express endpoint, with function level reset, or a conventional function.
        flags: migration states to announce.
        initial_limit_bytes: bytes that count as initial in a migration; None for everything ever written.
        bars: the device's own BARs, in the order of the declarations; `memories` and `unmigrated` are their
            memory.
        bus: the bus that it is plugged into, see `attach`.
        serves_writes: whether it does in its migration state, for C to read; shape (1,) uint8.

    Args:
        name: of this device, for logs and status; the type's by default.

    Raises: ConfigError: a declaration is impossible, or conflicts with another one.
    """

    # Class 0xff: "device does not fit in any defined classes" (PCI Code and ID Assignment Specification).
    identity = PciIdentity(vendor=0x4656, device=0xFFFF, class_code=0xFF0000, revision=0)
    express = True
    msi_vectors: int | None = None
    flags: MigrationFlags = ALL_FLAGS
    initial_limit_bytes: int | None = None
    type_name: ClassVar[str]
    # Defaults for what streams of older versions lack, and what of them may be dropped: see
    # `MigratableState`.
    added_state: ClassVar[Collection[str]] = ()
    dropped_state: ClassVar[Collection[str]] = ()
    # What `__init__` declared so far, and the names of all that is declared, once the device is being made.
    _assigned: dict[str, Bar] = {}  # noqa: RUF012 - replaced, never changed
    _declared: Collection[str] | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not hasattr(cls, "type_name"):
            cls.type_name = cls.__name__

    def __init__(self, name: str | None = None) -> None:
        declarations = self.declarations()
        self._declared = declared(type(self)).keys() | self._assigned.keys()
        self.bars: list[Bar] = []
        self.name = name or self.type_name
        self.counters = Counters()
        self.memories: list[DeviceMemory] = []
        self.unmigrated: list[DeviceMemory] = []
        self.msix_vectors = 0
        self.bus: Bus = NoBus()
        self.interrupts = Interrupts(lambda: self.irq_vectors, self.bus, self.counters)
        self.config = ConfigSpace()  # laid out by the server
        self._writes_served = self._may_start = True
        self.serves_writes = np.ones(1, dtype=np.uint8)
        for attribute, bar in declarations.items():
            self._make(attribute, bar)
        self.workers: list[Worker] = list(self.make_workers())
        self.migration = self._make_migration()
        self.initialise()

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute; a declared name cannot be set again, nor can a declaration be added later."""
        if isinstance(value, Bar) and not value.made:
            if self._declared is not None:
                raise ConfigError(f"{type(self).__name__}: declare {name} before super().__init__()")
            self._assigned = {**self._assigned, name: value}
        elif self._declared is not None and name in self._declared:
            raise ConfigError(f"{type(self).__name__}: {name} is declared, and can be nothing else besides")
        super().__setattr__(name, value)

    def _make(self, attribute: str, declaration: Bar) -> None:
        """Make what is declared, and put it where the declaration was."""
        bar = declaration.make(attribute, self)
        if bar.index != NO_BAR or not isinstance(bar, Region):
            judge_place(self.name, bar, self.bars)
            self.bars.append(bar)
        if isinstance(bar, Region):
            (self.memories if bar.migrate else self.unmigrated).append(bar.memory)
        elif isinstance(bar, Msix):
            self.msix_vectors = bar.vectors
        elif isinstance(bar, Registers):
            self._connect_line(bar)
        if self._declared is not None and attribute in self._declared:
            super().__setattr__(attribute, bar)

    def overrides(self, method: str) -> bool:
        """Return whether this device's class has its own `method`."""
        return getattr(type(self), method) is not getattr(Device, method)

    def _connect_line(self, bar: Registers) -> None:
        """Let the register that shows the causes of INTx do so, if `bar` has one."""
        for field in bar.fields.values():
            if field.access != Access.INTX:
                continue
            if self.interrupts.has_line:
                raise ConfigError(f"{bar.name}: {field.name}: a second register that acknowledges INTx")
            self.interrupts.has_line = True
            self.interrupts.mirror = functools.partial(bar.__setitem__, field.name)
            bar.on_acknowledge(field.name, self.interrupts.acknowledge)

    def _make_migration(self) -> Migration:
        blocks = [bar.block() for bar in self.bars if isinstance(bar, Registers)]
        blocks += [worker.block() for worker in self.workers]
        if self.irq_vectors:
            blocks.append(self.interrupts.block())
        blocks.append(self.config.block())
        contents = MigratableState(
            self.type_name,
            self.memories,
            [*(block for block in blocks if block is not None), *self.state_objects()],
            added=self.added_state,
            dropped=self.dropped_state,
        )
        return Migration(
            self.name,
            contents,
            flags=self.flags,
            initial_limit_bytes=self.initial_limit_bytes,
            on_state=self._state_changed,
            on_resumed=self.resumed,
            on_unverified=self._unverified,
        )

    @property
    def name(self) -> str:
        """Name of this device, for logs and status. Setting it raises ConfigError, see `judge_name`."""
        return self._name

    @name.setter
    def name(self, name: str) -> None:
        judge_name("device", name)
        self._name = name
        if hasattr(self, "migration"):
            self.migration.name = name

    @property
    def irq_vectors(self) -> int:
        """Number of interrupts that can be raised, whichever kind the guest uses."""
        return self.msix_vectors or self.msi_vectors or int(self.interrupts.has_line)

    @property
    def msi_messages(self) -> int:
        """Number of MSI messages, a power of two; 0 for no MSI. By default those of MSI-X, at most 32."""
        wanted = min(self.msix_vectors, MAX_MSI_MESSAGES) if self.msi_vectors is None else self.msi_vectors
        return 1 << (wanted - 1).bit_length() if wanted else 0

    def restrict_flags(self, flags: MigrationFlags) -> None:
        """Announce no more than `flags`; before the first client."""
        self.flags &= flags
        self.migration.machine = StateMachine(self.flags)

    # --- for authors --------------------------------------------------------------------------------------

    def declarations(self) -> dict[str, Bar]:
        """Return the declarations by name: class attributes, then those that `__init__` assigned.

        Called once, before anything is made. A subclass may add declarations without an attribute, such as
        one of several memories, and change declarations, as `vfu-dev serve` does for its options.
        """
        return declared(type(self)) | self._assigned

    def make_workers(self) -> Sequence[Worker]:
        """Return what the device does by itself; called once, when registers and memories are there."""
        return ()

    def initialise(self) -> None:
        """Give memory its first content; called once, when memories and registers are there.

        After a resume that was given up, memory is zero instead.
        """

    def state_objects(self) -> Sequence[StateObject]:
        """Return state that is neither memory nor registers, with how to pack and unpack it; called once."""
        return ()

    def reset_registers(self) -> None:
        """Follow a device reset, after all registers returned to their initial values."""

    def resumed(self) -> None:
        """Follow a completed resume, before the device may run."""

    def region_read(self, region: Region, offset: int, out: memoryview) -> None:
        """Fill `out` when the guest reads a declared region; in bounds, of any size and alignment."""
        out[:] = region.read(offset, len(out))

    def region_write(self, region: Region, offset: int, data: memoryview) -> None:
        """Follow the guest's write to a declared region; in bounds; `data` is valid during the call only."""
        region.store(offset, data)

    def raise_irq(self, vector: int) -> None:
        """Raise interrupt `vector`, from 0 to `irq_vectors` - 1, in the way that the guest chose.

        One that does not exist, a negative one too, is ignored and counted (`irq_errors`): the number may be
        a guest's. With MSI-X it is message `vector`. With MSI it is message `vector` modulo the number of
        messages that the guest allowed. With INTx it is a cause that stands until the guest acknowledges it.

        While the device has to be quiet, the interrupt stays pending, migrates, and is raised when the device
        runs again.
        """
        if 0 <= vector < self.irq_vectors:
            self.counters.irqs += 1
            self.interrupts.raise_vector(vector)
        else:
            self.counters.irq_errors += 1

    @property
    def guest_memory(self) -> GuestMemory:
        """The guest's memory, while the device is attached; without, each access is an AccessError."""
        return self.bus

    def bus_master(self) -> bool:
        """Return whether the guest lets the device do DMA; until then no address is reachable."""
        return self.bus.is_master()

    @property
    def may_start(self) -> bool:
        """Whether the device may start DMA and interrupts: not in P2P states, nor when it is stopped."""
        return self._may_start

    # --- for the server -----------------------------------------------------------------------------------

    def attach(self, bus: Bus) -> None:
        """Plug the device into `bus`, before its first client, or into a layer around the bus."""
        self.bus = self.interrupts.bus = bus

    def detach(self) -> None:
        """Unplug the device: it is not served any more."""
        self.attach(NoBus())

    def work_due(self) -> float | None:
        """Return the seconds until a worker has something to do; None for not before something changes."""
        if not self.workers or not self.may_start:
            return None
        soonest = None
        for worker in self.workers:
            due = worker.due()
            if due is not None and (soonest is None or due < soonest):
                soonest = due
        return soonest

    def work(self, budget_seconds: float) -> None:
        """Let every worker with something to do go on, for about `budget_seconds` each."""
        for worker in self.workers:
            # Checked each time: one worker's transfer may have ended in a lost connection, which is a reset.
            if self.may_start and worker.due() == 0:
                worker.advance(budget_seconds)

    def region_handler(self, bar: Bar) -> Callable[[memoryview, int, bool], None]:
        """Return the function through which every access to `bar` goes: bounds, policy, counters, BAR."""
        size, name, counters = bar.bar_bytes, bar.name, self.counters
        read, write = bar.accesses()
        clock, bucket = time.perf_counter_ns, bisect_left
        # Histogram.observe_ns, taken apart: a call less.
        reads, writes = counters.reads, counters.writes
        read_seconds, write_seconds = reads.seconds, writes.seconds
        edges, read_counts, write_counts = read_seconds.edges_ns, read_seconds.counts, write_seconds.counts

        def access(data: memoryview, offset: int, is_write: bool) -> None:
            count = len(data)
            if offset < 0 or offset > size or count > size - offset:
                counters.refused_accesses += 1
                raise RefusedAccessError(name, offset, count, f"beyond {size} bytes", errno.EINVAL)
            if not is_write:
                reads.count += 1
                reads.bytes += count
                began = clock()
                read(offset, data)
                took = clock() - began
                read_counts[bucket(edges, took)] += 1
                read_seconds.sum_ns += took
            elif self._writes_served:
                writes.count += 1
                writes.bytes += count
                began = clock()
                write(offset, data)
                took = clock() - began
                write_counts[bucket(edges, took)] += 1
                write_seconds.sum_ns += took
            else:
                counters.refused_accesses += 1
                counters.refused_by_state += 1
                reason = f"the device is in {self.migration.state.name} and does not change"
                raise RefusedAccessError(name, offset, count, reason, errno.EBUSY)

        return access

    def reset(self, state: DeviceState, reason: str) -> None:
        """Follow a device reset, a function level reset or a lost connection.

        Args: state: the migration state afterwards, see `Migration.reset`.
              reason: `Interruption.DISCONNECTED`, or any other text, which is a reset's.
        """
        self.counters.resets += 1
        # What is pending is not raised by running again.
        self.interrupts.reset()
        # Memory first: when an unverified resume is given up, registers must be reset after it.
        self.migration.reset(state, reason)
        for bar in self.bars:
            bar.reset()
        self.config.reset()
        for worker in self.workers:
            worker.reset()
        self.reset_registers()

    def _state_changed(self, state: DeviceState) -> None:
        self._writes_served = state in RUNNING_GROUP
        self.serves_writes[0] = self._writes_served
        self._may_start = state in _ACTIVE_STATES
        if self._may_start:
            self.interrupts.release()
        else:
            self.interrupts.hold()

    def _unverified(self) -> None:
        # Zeros, not the initial content: a large memory takes longer to fill than the 5 s that QEMU waits for
        # a reply (x-msg-timeout).
        for memory in self.memories:
            memory.clear()

    def close(self) -> None:
        """Give all memory back."""
        for memory in (*self.memories, *self.unmigrated):
            memory.close()
