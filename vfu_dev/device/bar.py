"""Declarations of what a device has behind its BARs: `Registers`, `Region` and `Msix`.

    class Counter(Device):
        registers = Registers(0, [Field("add", 0x0, "<u8", "wo", "added to the sum"),
                                  Field("sum", 0x8, "<u8", "ro", "of all added", migrates=True)])

        @registers.written("add")
        def add(self, value: int) -> None:
            self.registers["sum"] += value

What depends on an argument is declared in `__init__`, before `super().__init__()` makes the device:

        def __init__(self, name: str | None = None, *, memory_bytes: int = 1 << 20) -> None:
            self.memory = Region(2, size_bytes=memory_bytes)
            super().__init__(name)

A declaration is a value that never changes. Each device makes its own object from it, under the declaration's
name.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Protocol, Self

from vfu_dev.errors import ConfigError
from vfu_dev.uapi import MAX_MSIX_VECTORS, PCI_BASE_ADDRESS_MEM_TYPE_64, PCI_STD_NUM_BARS

NO_BAR = -1
_MIN_BAR_BYTES = 16  # of memory space: PCI Local Bus Specification 3.0, section 6.2.5.1

Handler = Callable[[int, memoryview], None]


class Owner(Protocol):
    """What a declaration uses of the device that is made from it; `Device` is one."""

    def overrides(self, method: str) -> bool:
        """Return whether the device's class has a `method` of its own."""

    def region_read(self, region: Any, offset: int, out: memoryview) -> None:
        """Fill `out`."""

    def region_write(self, region: Any, offset: int, data: memoryview) -> None:
        """Take `data`."""


class Unmade:
    """Placeholder in a declaration for what only the device's own object has; using it is an error."""

    def __get__(self, bar: Bar | None, owner: type[Any]) -> Any:
        if bar is None:
            return self
        what = bar.name or type(bar).__name__
        raise AttributeError(f"{what}: a declaration, of which super().__init__() makes the device's own")


class Bar(ABC):
    """One BAR: a declaration in the class, the BAR itself in a device.

    Attributes:
        index: of the region, VFIO_PCI_BAR0_REGION_INDEX and so on.
        name: that of the attribute it is declared as; for logs, and for what migrates.
        bar_bytes: size of the BAR, a power of two.
        bar_flags: the low bits of the BAR register (PCI_BASE_ADDRESS_MEM_*).
        made: whether this is a device's own.
    """

    bar_flags = 0
    name = ""
    made = False

    def __init__(self, index: int, bar_bytes: int) -> None:
        if bar_bytes < _MIN_BAR_BYTES or bar_bytes & (bar_bytes - 1):
            raise ConfigError(f"BAR{index}: a BAR has a power of two of bytes, not {bar_bytes}")
        self.index = index
        self.bar_bytes = bar_bytes

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self.name = name

    def __get__(self, device: object, owner: type[Any]) -> Self:
        """Return the declaration, as the class has it; a device has its own in its `__dict__`."""
        if device is None:
            return self
        raise AttributeError(f"{self.name} is there once super().__init__() was called")

    def make(self, name: str, device: Owner) -> Self:
        """Return a `device`'s own, under `name`, with storage."""
        # Not copy(): what it makes has a dict of its own, which CPython reads attributes from more slowly.
        mine = object.__new__(type(self))
        for attribute, value in vars(self).items():
            setattr(mine, attribute, value)
        mine.name, mine.made = name, True
        mine._make(device)
        return mine

    @abstractmethod
    def _make(self, device: Owner) -> None:
        """Allocate storage; called on the copy that becomes the device's own."""

    @abstractmethod
    def accesses(self) -> tuple[Handler, Handler]:
        """Return the functions that serve a guest's reads (fill the argument) and writes (data is valid
        during the call).

        Both get an offset and a size that lie in the BAR, of any alignment.
        """

    def reset(self) -> None:  # noqa: B027 - memory has nothing to do
        """Follow a device reset."""

    def with_bar(self, bar_bytes: int) -> Self:
        """Return the same declaration with a larger BAR than what lies behind it needs.

        Raises: ConfigError: not a power of two, or less than it needs.
        """
        if bar_bytes < self.bar_bytes or bar_bytes & (bar_bytes - 1):
            raise ConfigError(f"expected a power of two of at least {self.bar_bytes} bytes, not {bar_bytes}")
        larger = copy.copy(self)
        larger.bar_bytes = bar_bytes
        return larger

    @property
    def bar_registers(self) -> range:
        """Numbers of the BAR registers in configuration space that it takes: a 64-bit BAR takes two."""
        wide = bool(self.bar_flags & PCI_BASE_ADDRESS_MEM_TYPE_64)
        return range(self.index, self.index + 1 + wide)


def declared(cls: type[Any]) -> dict[str, Bar]:
    """Return what a class and its bases declare; a subclass overrides the same name."""
    found: dict[str, Bar] = {}
    for base in reversed(cls.__mro__):
        for name, value in vars(base).items():
            if isinstance(value, Bar):
                found[name] = value
            else:
                found.pop(name, None)
    return found


def judge_place(device: str, bar: Bar, others: Iterable[Bar]) -> None:
    """Check that `device` can have `bar` beside `others`.

    Raises: ConfigError: there is no such BAR, or another one takes it; 64-bit BARs take the next as well.
    """
    needs = bar.bar_registers
    for number in needs:
        if not 0 <= number < PCI_STD_NUM_BARS:
            raise ConfigError(f"{device}: {bar.name} needs BAR{number}, which does not exist")
    for other in others:
        for number in other.bar_registers:
            if number not in needs:
                continue
            both = f"{device}: {other.name} and {bar.name} both need BAR{number}"
            if other.index == bar.index:
                raise ConfigError(both)
            wide = other if number != other.index else bar
            raise ConfigError(
                f"{both}: {wide.name} is 64-bit, it takes BAR{wide.index} and BAR{wide.index + 1}"
            )


class Msix(Bar):
    """A BAR with the MSI-X table; `Device.raise_irq(n)` raises vector n.

    QEMU emulates table and pending bits; a write that reaches the server is stored and has no effect.

    Args:
        vectors: 1 to 2048.

    Attributes:
        pba_offset: where the pending bits are; the table, 16 bytes a vector, begins at 0.

    Raises: ConfigError: MSI-X does not have that number of vectors.
    """

    def __init__(self, index: int, *, vectors: int) -> None:
        if not 1 <= vectors <= MAX_MSIX_VECTORS:
            raise ConfigError(f"BAR{index}: MSI-X has 1 to {MAX_MSIX_VECTORS} vectors, not {vectors}")
        self.vectors = vectors
        self.pba_offset = max(0x800, 1 << (16 * vectors - 1).bit_length())
        super().__init__(index, 2 * self.pba_offset)

    def _make(self, device: Owner) -> None:
        self._bytes = memoryview(bytearray(self.bar_bytes))

    def accesses(self) -> tuple[Handler, Handler]:
        """Return what reads and stores what was stored."""
        return self._read, self._write

    def _read(self, offset: int, out: memoryview) -> None:
        out[:] = self._bytes[offset : offset + len(out)]

    def _write(self, offset: int, data: memoryview) -> None:
        self._bytes[offset : offset + len(data)] = data

    def reset(self) -> None:
        """Forget what was stored."""
        self._bytes[:] = bytes(self.bar_bytes)
