"""What lies behind a BAR: memory, registers described by a table, or the MSI-X table.

Every access has been checked against the BAR's size when it arrives here; any size and alignment is served.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vfu_dev.errors import ConfigError
from vfu_dev.memory import DeviceMemory
from vfu_dev.migration import RegisterBlock


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


# PCI_BASE_ADDRESS_MEM_TYPE_64 | PCI_BASE_ADDRESS_MEM_PREFETCH, <linux/pci_regs.h>
_BAR_64_BIT_PREFETCHABLE = 0x04 | 0x08


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

    bar_flags = _BAR_64_BIT_PREFETCHABLE

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
        if not 1 <= vectors <= 2048:
            raise ConfigError(f"{self.name}: MSI-X has 1 to 2048 vectors, not {vectors}")
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


@dataclass(frozen=True)
class Field:
    """One register.

    Attributes:
        offset: in the BAR.
        format: a numpy dtype, little endian: "<u4", "<u8", "V256" for plain bytes.
        access: "ro" reads the stored value, writes are dropped; "rw"; "wo" reads zero; "intx" reads the
            causes of INTx, of which ones written are acknowledged: a device with such a register has INTx.
        migrates: whether its value is part of the device's state.
        survives_reset: whether a device reset leaves it alone.
        doc: what it is for.
        default: the value of a register that migrates when the state comes from a version of the device that
            did not have it; None if such a state is to be refused.
    """

    name: str
    offset: int
    format: str
    access: str
    doc: str
    migrates: bool = False
    survives_reset: bool = False
    default: int | bytes | None = None


class RegisterBar(BarSpace):
    """Registers described by a table of fields, stored in a numpy structured scalar.

    A write to a field calls its hook with the new value; a write that covers a part of a field calls it with
    the rest unchanged, as a device with byte enables sees it.

    Args:
        fields: the table; offsets not in it read zero and drop writes.
        hooks: field name -> what happens when it is written; the value is stored before, except for "wo".
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
        self.fields = {field.name: field for field in fields}
        self.dtype = np.dtype(
            {
                "names": [f.name for f in fields],
                "formats": [f.format for f in fields],
                "offsets": [f.offset for f in fields],
                "itemsize": size_bytes,
            }
        )
        self.values = np.zeros(1, dtype=self.dtype)
        self._bytes = self.values.view(np.uint8).data
        self._sizes = {f.name: self.dtype[f.name].itemsize for f in fields}
        self._exact = {(f.offset, self._sizes[f.name]): f for f in fields}
        self._hooks = hooks
        unknown = set(hooks) - set(self.fields)
        if unknown:
            raise ConfigError(f"{name}: hooks for registers that do not exist: {sorted(unknown)}")
        self.acknowledge: Callable[[int], None] = lambda _: None  # of INTx, set by the device
        self._initial = bytes(size_bytes)
        migrating = [f for f in fields if f.migrates and f.access != "intx"]  # that is in `Interrupts`
        # Explicit and packed: what travels does not depend on where a register sits in the BAR.
        self._migrating = np.dtype([(f.name, f.format) for f in migrating])

    def enlarge(self, size_bytes: int) -> None:
        """Have a larger BAR; beyond the registers it reads zero."""
        super().enlarge(size_bytes)
        names = list(self.fields)
        parts = self.dtype.fields
        assert parts is not None
        self.dtype = np.dtype(
            {
                "names": names,
                "formats": [parts[name][0] for name in names],
                "offsets": [parts[name][1] for name in names],
                "itemsize": size_bytes,
            }
        )
        self.values = np.frombuffer(bytearray(self._bytes).ljust(size_bytes, b"\0"), dtype=self.dtype)
        self._bytes = self.values.view(np.uint8).data
        self._initial = self._initial.ljust(size_bytes, b"\0")

    def __getitem__(self, name: str) -> int:
        """Return the integer value of a register."""
        return int(self.values[name][0])

    def __setitem__(self, name: str, value: int) -> None:
        """Store the integer value of a register, without its hook."""
        self.values[name] = value

    def set_initial(self) -> None:
        """Make the present values those that a reset returns to."""
        self._initial = bytes(self._bytes)

    def read(self, offset: int, out: memoryview) -> None:
        """Fill `out` with register contents."""
        out[:] = self._bytes[offset : offset + len(out)]

    def write(self, offset: int, data: memoryview) -> None:
        """Write every field that `data` touches, in the order of the table."""
        field = self._exact.get((offset, len(data)))
        if field is not None:
            self._write_field(field, 0, data)
            return
        end = offset + len(data)
        for field in self.fields.values():
            start = max(offset, field.offset)
            stop = min(end, field.offset + self._sizes[field.name])
            if start < stop:
                self._write_field(field, start - field.offset, data[start - offset : stop - offset])

    def _write_field(self, field: Field, offset: int, data: memoryview) -> None:
        if field.access == "ro":
            return
        at = field.offset + offset
        hook = self._hooks.get(field.name)
        if field.access == "rw":
            self._bytes[at : at + len(data)] = data
            if hook is not None:
                hook(self.values[field.name][0])
        elif field.access == "intx":
            self.acknowledge(int.from_bytes(bytes(offset) + data, "little"))
        elif hook is not None:
            hook(int.from_bytes(bytes(offset) + data, "little"))

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
