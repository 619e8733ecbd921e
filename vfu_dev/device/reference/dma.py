"""The DMA engine of the reference device: descriptors in guest memory or registers, done a slice at a time.

No content of a descriptor raises an exception: an error becomes the descriptor's status. Between two slices
the whole state of a transfer is in `STATE`, so that a migration may start at any moment. docs/device.md
describes the engine for a driver.
"""

from __future__ import annotations

import errno
import time
import zlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vfu_dev.device.base import Device
from vfu_dev.device.reference.layout import (
    CTRL_ABORT,
    CTRL_START,
    DESCRIPTOR,
    FLAG_INTERRUPT,
    MAX_DESCRIPTORS,
    RESULT_OFFSET,
    STATUS_OFFSET,
    Op,
    Status,
)
from vfu_dev.device.region import Region
from vfu_dev.device.registers import Registers
from vfu_dev.errors import AccessError, StreamError, VfuDevError, errno_of
from vfu_dev.migration import RegisterBlock

# The copy of one is what MMIO may have to wait for: 25 us at 20 GiB/s, and some 3 us of Python are around it.
# Larger pieces are copied more slowly: numpy, too, copies 10 % less per second in pieces of 1 MiB and more.
SLICE_BYTES = 512 << 10

READS_GUEST = frozenset({Op.TO_DEVICE, Op.CHECKSUM_GUEST})
WRITES_GUEST = frozenset({Op.TO_GUEST, Op.FILL_GUEST})
USES_DEVICE = frozenset({Op.TO_DEVICE, Op.TO_GUEST, Op.FILL_DEVICE, Op.CHECKSUM_DEVICE})
CHECKSUMS = frozenset({Op.CHECKSUM_GUEST, Op.CHECKSUM_DEVICE})

STATE = np.dtype(
    [
        ("active", "<u4"),  # 1 while a run is under way
        ("fetched", "<u4"),  # 1 while `descriptor` is being worked on
        ("table", "<u8"),
        ("count", "<u4"),
        ("index", "<u4"),  # of the present or next descriptor
        ("position", "<u8"),  # bytes of it that are done
        ("checksum", "<u4"),
        ("aborting", "<u4"),  # 1 when the guest asked for an end
        ("registers", "<u4"),  # 1 when the one descriptor is the one in registers
        ("descriptor", DESCRIPTOR),
    ]
)


class _Descriptor(NamedTuple):
    """A descriptor, as plain integers, in the order of `DESCRIPTOR`."""

    op: int
    flags: int
    address: int
    offset: int
    length: int
    value: int
    vector: int
    status: int
    result: int


class DmaEngine:
    """Works off descriptors between guest memory and `region` of a `device`, behind its `registers`."""

    def __init__(self, device: Device, registers: Registers, region: Region) -> None:
        self._device = device
        self._registers = registers
        self._memory = region.memory
        self._block = np.zeros(1, dtype=STATE)
        # A view of each field: finding one in the structure takes as long as a register's access.
        self._state = {name: self._block[name] for name in STATE.names or ()}
        self._decoded: _Descriptor | None = None  # the one in the state; see `_descriptor`
        self._epoch = 0  # changes with everything that makes a transfer under way void
        self._pattern: tuple[int, memoryview] | None = None

    # --- what the registers do ------------------------------------------------------------------------------

    def write_ctrl(self, value: int) -> None:
        """Start or abort; a start during a run is dropped and counted."""
        if not self._may_start(value):
            return
        table, count = self._registers["dma_table"], self._registers["dma_count"]
        table_bytes = count * DESCRIPTOR.itemsize
        if not 1 <= count <= MAX_DESCRIPTORS or table % 64 or table + table_bytes > 1 << 64:
            self._end(Status.BAD_TABLE)
            return
        self._replace_state(np.zeros(1, dtype=STATE))
        for name, value in (("active", 1), ("table", table), ("count", count)):
            self._state[name][0] = value
        self._registers["dma_status"] = Status.BUSY

    def write_descriptor_ctrl(self, value: int) -> None:
        """The same for the descriptor in registers; a copy of it is taken, so the next may be written."""
        if not self._may_start(value):
            return
        self._replace_state(np.zeros(1, dtype=STATE))
        for name in ("active", "registers", "count"):
            self._state[name][0] = 1
        for name in DESCRIPTOR.names or ():
            self._state["descriptor"][name] = self._registers[f"desc_{name}"]
        self._registers["desc_status"], self._registers["desc_result"] = Status.IDLE, 0
        self._registers["dma_status"] = Status.BUSY

    def _may_start(self, value: int) -> bool:
        if value & CTRL_ABORT and self.busy:
            # Done by `advance`: the guest may wait for this write, and cannot serve DMA by message meanwhile.
            self._state["aborting"][0] = 1
        if not value & CTRL_START:
            return False
        if self.busy:
            self._device.counters.dma_errors += 1
        return not self.busy

    @property
    def busy(self) -> bool:
        """Whether a run is under way."""
        return bool(self._state["active"][0])

    def reset(self) -> None:
        """Drop everything, even in the middle of a transfer. Registers are reset elsewhere."""
        self._epoch += 1
        self._replace_state(np.zeros(1, dtype=STATE))

    # --- work -----------------------------------------------------------------------------------------------

    def due(self) -> float | None:
        """Return the seconds until there is work; None: not before a register is written."""
        return 0.0 if self.busy else None

    def advance(self, budget_seconds: float) -> None:
        """Work for about that long, or until a guest waits for its access; at least one slice."""
        deadline = time.monotonic() + budget_seconds
        # It does not change in here: DMA by message lets accesses in, but none to configuration space.
        if self.busy and not self._device.bus_master():
            self._end(Status.NO_BUS_MASTER)
        while self.busy:
            self._step()
            if time.monotonic() >= deadline or self._device.bus.request_waits():
                return

    def _step(self) -> None:
        """Fetch one descriptor, or do one slice of it."""
        state, epoch = self._state, self._epoch
        if state["aborting"][0]:
            if state["fetched"][0]:
                self._complete(Status.ABORTED)
            if epoch == self._epoch:
                self._end(Status.ABORTED)
            return
        if not state["fetched"][0]:
            if not self._fetch():
                return
            refused = self._judge(self._descriptor())
            if refused is not None:
                self._complete(refused)
                return
        descriptor = self._descriptor()
        position = int(state["position"][0])
        count = min(SLICE_BYTES, descriptor.length - position)
        try:
            self._move(descriptor, position, count)
        except VfuDevError as err:
            if epoch == self._epoch:  # else the connection was lost meanwhile, and the result has no reader
                self._complete(_status_of(err))
            return
        if epoch != self._epoch:
            return
        state["position"][0] = position + count
        if position + count == descriptor.length:
            self._complete(Status.DONE)

    def _fetch(self) -> bool:
        """Read the next descriptor; False when the run ended by that."""
        epoch = self._epoch
        if self._state["registers"][0]:
            self._state["fetched"][0] = 1
            return True
        raw = bytearray(DESCRIPTOR.itemsize)
        address = int(self._state["table"][0]) + int(self._state["index"][0]) * DESCRIPTOR.itemsize
        try:
            self._device.guest_memory.read(address, memoryview(raw))
        except VfuDevError:
            if epoch == self._epoch:
                self._end(Status.TABLE_UNREACHABLE)
            return False
        if epoch != self._epoch:
            return False
        self._state["descriptor"][:] = np.frombuffer(raw, dtype=DESCRIPTOR)
        self._decoded = None
        for name, value in (("fetched", 1), ("position", 0), ("checksum", 0)):
            self._state[name][0] = value
        return True

    def _replace_state(self, state: npt.NDArray[np.void]) -> None:
        self._block[:] = state
        self._decoded = None

    def _descriptor(self) -> _Descriptor:
        """Return the descriptor in the state, decoded once: that takes as long as 20 KiB take to copy."""
        if self._decoded is None:
            self._decoded = _Descriptor(*self._state["descriptor"][0].item())
        return self._decoded

    def _judge(self, descriptor: _Descriptor) -> Status | None:
        """Return the error of a descriptor, None if it is valid; no byte has moved yet."""
        refused = self._judge_shape(descriptor)
        if refused is not None or descriptor.op not in READS_GUEST | WRITES_GUEST:
            return refused
        address, length = descriptor.address, descriptor.length
        if address + length > 1 << 64:
            return Status.UNMAPPED
        write = descriptor.op in WRITES_GUEST
        in_memory = not self._state["registers"][0]
        table = int(self._state["table"][0])
        table_end = table + int(self._state["count"][0]) * DESCRIPTOR.itemsize
        if in_memory and write and address < table_end and table < address + length:
            return Status.OVERLAP
        try:
            self._device.guest_memory.check(address, length, write=write)
        except VfuDevError as err:
            return _status_of(err)
        return None

    def _judge_shape(self, descriptor: _Descriptor) -> Status | None:
        """Return the error of a descriptor that does not depend on guest memory."""
        if descriptor.op not in set(Op) or descriptor.flags & ~FLAG_INTERRUPT:
            return Status.BAD_OP
        if descriptor.flags & FLAG_INTERRUPT and descriptor.vector >= self._device.irq_vectors:
            return Status.BAD_VECTOR
        if not 0 < descriptor.length < 1 << 63:
            return Status.BAD_LENGTH
        size = self._memory.size_bytes
        if descriptor.op in USES_DEVICE and (
            descriptor.offset > size or descriptor.length > size - descriptor.offset
        ):
            return Status.BAD_DEVICE_RANGE
        return None

    def _move(self, descriptor: _Descriptor, position: int, count: int) -> None:
        """Do `count` bytes from `position`, all within what `_judge` looked at."""
        guest, memory, counters = self._device.guest_memory, self._memory, self._device.counters
        address, offset = descriptor.address + position, descriptor.offset + position
        match descriptor.op:
            case Op.TO_DEVICE:
                try:
                    guest.read(address, memory.raw[offset : offset + count])
                finally:  # a read that fails half way has written half
                    memory.pages.mark(offset, count)
                counters.dma_read_bytes += count
            case Op.TO_GUEST:
                guest.write(address, memory.raw[offset : offset + count])
                counters.dma_written_bytes += count
            case Op.FILL_GUEST:
                guest.write(address, self._fill(descriptor.value)[:count])
                counters.dma_written_bytes += count
            case Op.FILL_DEVICE:
                memory.store(offset, self._fill(descriptor.value)[:count])
            case Op.CHECKSUM_GUEST:
                buffer = memoryview(bytearray(count))
                guest.read(address, buffer)
                self._state["checksum"][0] = zlib.crc32(buffer, int(self._state["checksum"][0]))
                counters.dma_read_bytes += count
            case Op.CHECKSUM_DEVICE:
                piece = memory.raw[offset : offset + count]
                self._state["checksum"][0] = zlib.crc32(piece, int(self._state["checksum"][0]))

    def _fill(self, value: int) -> memoryview:
        """Return one slice of `value`, which starts anew in each because a slice is whole words long."""
        if self._pattern is None or self._pattern[0] != value:
            words = np.full(SLICE_BYTES // 8, value, dtype="<u8")
            self._pattern = value, words.data.cast("B")
        return self._pattern[1]

    def _complete(self, status: Status) -> None:
        """Write result and then status back, interrupt, and go on to the next descriptor."""
        state, epoch = self._state, self._epoch
        descriptor = self._descriptor()
        result = int(state["position"][0])
        if status is Status.DONE and descriptor.op in CHECKSUMS:
            result = int(state["checksum"][0])
        elif status is not Status.DONE:
            self._device.counters.dma_errors += 1
        try:
            self._write_back(result, status)
        except VfuDevError:
            if epoch == self._epoch:
                self._end(Status.TABLE_UNREACHABLE)
            return
        if epoch != self._epoch:
            return
        state["fetched"][0] = 0
        state["index"] += 1
        self._registers["dma_done"] = (self._registers["dma_done"] + 1) & 0xFFFF_FFFF
        if int(state["index"][0]) == int(state["count"][0]):
            self._end(Status.IDLE)
        if descriptor.flags & FLAG_INTERRUPT and descriptor.vector < self._device.irq_vectors:
            self._device.raise_irq(descriptor.vector)

    def _write_back(self, result: int, status: Status) -> None:
        """Update the descriptor, the result first: a driver that polls the status then finds the result."""
        if self._state["registers"][0]:
            self._registers["desc_result"], self._registers["desc_status"] = result, status
            return
        address = int(self._state["table"][0]) + int(self._state["index"][0]) * DESCRIPTOR.itemsize
        self._device.guest_memory.write(address + RESULT_OFFSET, result.to_bytes(8, "little"))
        self._device.guest_memory.write(address + STATUS_OFFSET, status.to_bytes(4, "little"))

    def _end(self, status: Status) -> None:
        """End the run."""
        if status is not Status.IDLE:
            self._device.counters.dma_errors += 1
            if self._state["registers"][0]:  # else it is in memory, which may be out of reach
                self._registers["desc_status"] = status
        self._replace_state(np.zeros(1, dtype=STATE))
        self._registers["dma_status"] = status

    # --- migration ------------------------------------------------------------------------------------------

    def block(self) -> RegisterBlock | None:
        """Return what migrates beside the registers: the transfer under way."""
        defaults = {"registers": 0}  # a state from before there were such descriptors
        return RegisterBlock("dma", STATE, self._block.tobytes, self._unpack, self._validate, defaults)

    def _unpack(self, content: bytes) -> None:
        self._epoch += 1
        self._replace_state(np.frombuffer(content, dtype=STATE))

    def _validate(self, content: bytes) -> None:
        """Refuse the state of a transfer that is impossible on this device."""
        state = np.frombuffer(content, dtype=STATE)[0]
        active, fetched = int(state["active"]), int(state["fetched"])
        in_registers = int(state["registers"])
        if active > 1 or fetched > active or in_registers > active:
            raise StreamError("a DMA transfer that is neither under way nor not")
        if not active:
            return
        count, index = int(state["count"]), int(state["index"])
        table_end = int(state["table"]) + count * DESCRIPTOR.itemsize
        if not 1 <= count <= MAX_DESCRIPTORS or index >= count or table_end > 1 << 64:
            raise StreamError(f"a DMA transfer at descriptor {index} of {count}")
        if in_registers and (count != 1 or table_end != DESCRIPTOR.itemsize):
            raise StreamError("a DMA transfer of a descriptor in registers that has a table")
        descriptor = _Descriptor(*state["descriptor"].item())
        if not fetched:
            return
        refused = self._judge_shape(descriptor)
        if refused is not None or int(state["position"]) >= descriptor.length:
            raise StreamError("a DMA transfer under way that this device would have refused")
        if descriptor.op in READS_GUEST | WRITES_GUEST and descriptor.address + descriptor.length > 1 << 64:
            raise StreamError("a DMA transfer under way beyond the last address")


def _status_of(error: VfuDevError) -> Status:
    """Return the status that a descriptor gets for a failed access."""
    if isinstance(error, AccessError):
        number = errno_of(error)
        if number in (errno.EFAULT, errno.ENOENT):
            return Status.UNMAPPED
        if number in (errno.EACCES, errno.EPERM):
            return Status.FORBIDDEN
    return Status.FAILED
