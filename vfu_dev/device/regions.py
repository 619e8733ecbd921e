"""What lies behind a BAR: memory, registers described by a table, or the MSI-X table.

Every access has been checked against the BAR's size when it arrives here; any size and alignment is served.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vfu_dev.device.fields import Access, Field, layout
from vfu_dev.errors import ConfigError
from vfu_dev.memory import DeviceMemory
from vfu_dev.migration import RegisterBlock
from vfu_dev.uapi import MAX_MSIX_VECTORS

# <linux/pci_regs.h>
PCI_BASE_ADDRESS_MEM_TYPE_64 = 0x04
_PCI_BASE_ADDRESS_MEM_PREFETCH = 0x08
PCI_STD_NUM_BARS = 6


class BarSpace(ABC):
    """The content of one BAR.

    Attributes:
        index: the region index, VFIO_PCI_BAR0_REGION_INDEX and so on.
        name: for logs, and for what migrates.
        size_bytes: of the BAR, a power of two.
        bar_flags: the low bits of the BAR register (PCI_BASE_ADDRESS_MEM_*).
    """

    bar_flags = 0

    def __init__(self, index: int, name: str, size_bytes: int) -> None:
        if size_bytes < 16 or size_bytes & (size_bytes - 1):
            raise ConfigError(f"{name}: a BAR has a power of two of bytes, not {size_bytes}")
        self.index = index
        self.name = name
        self.size_bytes = size_bytes

    @property
    def bar_registers(self) -> range:
        """Numbers of the BAR registers in configuration space that it takes: a 64-bit BAR takes two."""
        wide = bool(self.bar_flags & PCI_BASE_ADDRESS_MEM_TYPE_64)
        return range(self.index, self.index + 1 + wide)

    def enlarge(self, size_bytes: int) -> None:
        """Have a larger BAR than what lies behind it needs; before the device is served.

        Raises:  ConfigError: not a power of two, or less than there is.
        """
        if size_bytes < self.size_bytes or size_bytes & (size_bytes - 1):
            raise ConfigError(
                f"{self.name}: expected a power of two of at least {self.size_bytes} bytes, not {size_bytes}"
            )
        self.size_bytes = size_bytes

    @abstractmethod
    def read(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`."""

    @abstractmethod
    def write(self, offset: int, data: memoryview) -> None:
        """Take `data` at `offset`; `data` is dead after the call."""

    def reset(self) -> None:  # noqa: B027 - most spaces have nothing to do
        """Follow a device reset."""


def judge_place(device: str, bar: BarSpace, others: Iterable[BarSpace]) -> None:
    """Find out whether `device` can have `bar` beside `others`.

    Raises:  ConfigError: there is no such BAR, or another one takes it; 64-bit BARs take the next as well.
    """
    needs = bar.bar_registers
    for number in needs:
        if not 0 <= number < PCI_STD_NUM_BARS:
            raise ConfigError(f"{device}: {bar.name} needs BAR{number}, which does not exist")
    for other in others:
        for number in other.bar_registers:
            if number in needs:
                wide = other if number != other.index else bar
                raise ConfigError(
                    f"{device}: {other.name} and {bar.name} both need BAR{number}: {wide.name} is 64-bit, "
                    f"it takes BAR{wide.index} and BAR{wide.index + 1}"
                )


class MemoryBar(BarSpace):
    """A BAR over a device memory, 64-bit and prefetchable, so it takes two BAR registers.

    The BAR is the memory's size rounded up to a power of two; beyond the memory reads give 0xff, as from a
    bus that nobody answers on, and writes are dropped. A device reset leaves the memory alone, like the
    memory of a graphics card.

    A memory can be larger than its BAR, which then shows a window of it.

    Args:
        window_bytes: size of the BAR, a power of two; None for all of the memory.

    Attributes:
        base_bytes: where in the memory the window begins.
    """

    bar_flags = PCI_BASE_ADDRESS_MEM_TYPE_64 | _PCI_BASE_ADDRESS_MEM_PREFETCH

    def __init__(self, index: int, memory: DeviceMemory, window_bytes: int | None = None) -> None:
        whole = max(4096, 1 << (memory.size_bytes - 1).bit_length())
        super().__init__(index, memory.name, window_bytes or whole)
        if memory.mapped and self.size_bytes != whole:
            # What a client has mapped stays where it is.
            raise ConfigError(f"{memory.name}: a window that moves cannot be mapped")
        self.memory = memory
        self.base_bytes = 0
        self._raw = memory.raw
        self._mark = memory.pages.mark
        self._end = memory.size_bytes

    def enlarge(self, size_bytes: int) -> None:
        """Have a larger BAR; beyond the memory it reads 0xff."""
        if self.memory.mapped and size_bytes != self.size_bytes:
            raise ConfigError(f"{self.name}: the BAR of memory that can be mapped has the size of its file")
        super().enlarge(size_bytes)

    def read(self, offset: int, out: memoryview) -> None:
        """Fill `out` from the memory."""
        count = len(out)
        offset += self.base_bytes
        if offset + count <= self._end:
            out[:] = self._raw[offset : offset + count]
            return
        inside = max(0, self._end - offset)
        out[:inside] = self._raw[offset : offset + inside]
        out[inside:] = b"\xff" * (count - inside)

    def write(self, offset: int, data: memoryview) -> None:
        """Store `data` and mark its pages dirty."""
        count = len(data)
        offset += self.base_bytes
        if offset + count > self._end:
            count = max(0, self._end - offset)
            data = data[:count]
        if count:
            self._raw[offset : offset + count] = data
            self._mark(offset, count)


class MsixBar(BarSpace):
    """The BAR of MSI-X table and pending bits. QEMU emulates both; what reaches us is kept, no more."""

    TABLE_OFFSET = 0x000
    PBA_OFFSET = 0x800

    def __init__(self, index: int, vectors: int, size_bytes: int = 4096) -> None:
        super().__init__(index, "msix", size_bytes)
        self._bytes = memoryview(bytearray(size_bytes))
        self.set_vectors(vectors)

    def set_vectors(self, vectors: int) -> None:
        """Have `vectors` interrupts and a BAR that their table fits in; before the device is served.

        Raises:  ConfigError: MSI-X has 1 to 2048 (PCI Local Bus Specification 3.0, section 6.8.2).
        """
        if not 1 <= vectors <= MAX_MSIX_VECTORS:
            raise ConfigError(f"{self.name}: MSI-X has 1 to {MAX_MSIX_VECTORS} vectors, not {vectors}")
        self.vectors = vectors
        # The table takes the first half, 16 bytes a vector; the pending bits begin at the second.
        half = max(self.PBA_OFFSET, 1 << (16 * vectors - 1).bit_length())
        self.PBA_OFFSET = half
        self.enlarge(max(self.size_bytes, 2 * half))

    def enlarge(self, size_bytes: int) -> None:
        """Have a larger BAR, zero beyond what there was."""
        super().enlarge(size_bytes)
        self._bytes = memoryview(bytearray(self._bytes).ljust(size_bytes, b"\0"))

    def read(self, offset: int, out: memoryview) -> None:
        """Fill `out` with what was written."""
        out[:] = self._bytes[offset : offset + len(out)]

    def write(self, offset: int, data: memoryview) -> None:
        """Store `data`."""
        self._bytes[offset : offset + len(data)] = data

    def reset(self) -> None:
        """Forget what was written."""
        self._bytes[:] = bytes(len(self._bytes))


@dataclass(slots=True)
class _Slot:
    """One register, with all that an access to it needs."""

    start: int
    stop: int
    stores: bool
    hook: Callable[[Any], None] | None
    codec: struct.Struct


class RegisterBar(BarSpace):
    """Registers described by a table of fields, stored in a numpy structured scalar.

    A write to a field calls its hook with the new value: an int, whatever the access, or bytes for a field of
    "V" format. A write that covers a part of a field calls it with the rest unchanged (zero, as it reads, for
    "wo"), as a device with byte enables sees it.

    Args:
        fields: the table; offsets not in it read zero and drop writes.
        hooks: field name -> what happens when it is written; the value is stored before, except for "wo".

    Attributes:
        fields, hooks: the same, by name.
        dtype, values: all registers as one numpy structure.

    Raises:  ConfigError: a table that cannot be, or a hook that no write would call; names the register.
    """

    def __init__(
        self,
        index: int,
        name: str,
        size_bytes: int,
        fields: Sequence[Field],
        hooks: dict[str, Callable[[Any], None]],
    ) -> None:
        super().__init__(index, name, size_bytes)
        self.dtype = layout(name, fields, size_bytes)
        self.fields = {field.name: field for field in fields}
        self.values = np.zeros(1, dtype=self.dtype)
        self._bytes = self.values.view(np.uint8).data
        unknown = set(hooks) - set(self.fields)
        if unknown:
            raise ConfigError(f"{name}: hooks for registers that do not exist: {sorted(unknown)}")
        for hooked in hooks:
            access = self.fields[hooked].access
            if access in (Access.READ_ONLY, Access.INTX):
                raise ConfigError(f"{name}: a hook for {hooked}, which is {access}: no write would call it")
        self.hooks = hooks
        self.acknowledge: Callable[[int], None] = lambda _: None  # of INTx, set by the device
        self._slots = {field.name: self._slot(field, hooks.get(field.name)) for field in fields}
        self._exact = {(slot.start, slot.stop - slot.start): slot for slot in self._slots.values()}
        self._initial = bytes(size_bytes)
        migrating = [f for f in fields if f.migrates and f.access != Access.INTX]  # that is in `Interrupts`
        # Explicit and packed: what travels does not depend on where a register sits in the BAR.
        self._migrating = np.dtype([(f.name, f.format) for f in migrating])

    def _slot(self, field: Field, hook: Callable[[Any], None] | None) -> _Slot:
        if field.access == Access.INTX:
            hook = self._acknowledge
        stores = field.access == Access.READ_WRITE
        return _Slot(field.offset, field.end, stores, hook, field.codec)

    def _acknowledge(self, causes: int) -> None:
        self.acknowledge(causes)  # looked up for each call: the device sets it after the table was made

    def enlarge(self, size_bytes: int) -> None:
        """Have a larger BAR; beyond the registers it reads zero."""
        super().enlarge(size_bytes)
        self.dtype = layout(self.name, list(self.fields.values()), size_bytes)
        self.values = np.frombuffer(bytearray(self._bytes).ljust(size_bytes, b"\0"), dtype=self.dtype)
        self._bytes = self.values.view(np.uint8).data
        self._initial = self._initial.ljust(size_bytes, b"\0")

    def __getitem__(self, name: str) -> Any:
        """Return the value of a register: an int, or bytes for one of "V" format."""
        slot = self._slots[name]
        return slot.codec.unpack_from(self._bytes, slot.start)[0]

    def __setitem__(self, name: str, value: int | bytes) -> None:
        """Store the value of a register, without its hook.

        Raises:  OverflowError, TypeError: it does not fit, or is no value of such a register.
        """
        slot = self._slots[name]
        if isinstance(value, int):
            try:
                # Not pack_into, which leaves zeros behind when it fails.
                self._bytes[slot.start : slot.stop] = slot.codec.pack(value)
                return
            except struct.error:
                pass  # `encode` says what is wrong with it
        self._bytes[slot.start : slot.stop] = self.fields[name].encode(value)

    def set_initial(self) -> None:
        """Make the present values those that a reset returns to."""
        self._initial = bytes(self._bytes)

    def read(self, offset: int, out: memoryview) -> None:
        """Fill `out` with register contents."""
        out[:] = self._bytes[offset : offset + len(out)]

    def write(self, offset: int, data: memoryview) -> None:
        """Write every field that `data` touches, in the order of the table."""
        slot = self._exact.get((offset, len(data)))
        if slot is not None:
            self._write_slot(slot, 0, data)
            return
        end = offset + len(data)
        for slot in self._slots.values():
            start = max(offset, slot.start)
            stop = min(end, slot.stop)
            if start < stop:
                self._write_slot(slot, start - slot.start, data[start - offset : stop - offset])

    def _write_slot(self, slot: _Slot, offset: int, data: memoryview) -> None:
        """Write `data` at `offset` of one register."""
        hook = slot.hook
        if slot.stores:
            at = slot.start + offset
            self._bytes[at : at + len(data)] = data
            if hook is not None:
                hook(slot.codec.unpack_from(self._bytes, slot.start)[0])
        elif hook is not None:
            if len(data) < slot.stop - slot.start:
                data = memoryview((bytes(offset) + data).ljust(slot.stop - slot.start, b"\0"))
            hook(slot.codec.unpack(data)[0])

    def reset(self) -> None:
        """Return to the initial values, except for what survives."""
        kept = {name: self.values[name].copy() for name, f in self.fields.items() if f.survives_reset}
        self._bytes[:] = self._initial
        for name, value in kept.items():
            self.values[name] = value

    def block(self) -> RegisterBlock | None:
        """Return the part of the registers that migrates, or None when none does."""
        if not self._migrating.names:
            return None
        names = self._migrating.names
        defaults = {n: f.default for n, f in self.fields.items() if n in names and f.default is not None}
        return RegisterBlock(self.name, self._migrating, self._pack, self._unpack, defaults=defaults)

    def _pack(self) -> bytes:
        block = np.zeros(1, dtype=self._migrating)
        for name in self._migrating.names or ():
            block[name] = self.values[name]
        return block.tobytes()

    def _unpack(self, content: bytes) -> None:
        block = np.frombuffer(content, dtype=self._migrating)
        for name in self._migrating.names or ():
            self.values[name] = block[name]
