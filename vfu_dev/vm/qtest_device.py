"""One device as the driver of `--guest none` sees it: its BARs, and what its memory must hold.

Where the lab plays the firmware too, it gives BARs their addresses, whatever device it is.
"""

from __future__ import annotations

from collections import deque
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vfu_dev.device.reference.layout import REGISTERS
from vfu_dev.vm.guest import GuestError
from vfu_dev.vm.qtest import QtestClient
from vfu_dev.workload import Program
from vfu_dev.workload.spec import DEFAULT_PAGE_BYTES
from vfu_dev.workload.splitmix import outputs

# <linux/pci_regs.h>
PCI_VENDOR_ID = 0x00
PCI_COMMAND = 0x04
PCI_COMMAND_IO = 0x1
PCI_COMMAND_MEMORY = 0x2
PCI_COMMAND_MASTER = 0x4
PCI_COMMAND_ENABLED = PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER
PCI_BASE_ADDRESS_0 = 0x10
PCI_BASE_ADDRESS_SPACE_IO = 0x1
PCI_BASE_ADDRESS_MEM_TYPE_MASK = 0x6
PCI_BASE_ADDRESS_MEM_TYPE_64 = 0x4
PCI_STD_NUM_BARS = 6

# q35: above the ECAM window, below the I/O APIC; libqos uses the same start.
BAR_WINDOW = 0xE000_0000
BAR_WINDOW_END = 0xFEB0_0000
# What does not fit there and has 64 bits of address: far above any RAM, within 40 bits of physical address.
HIGH_WINDOW = 0x40_0000_0000
# I/O ports, where libqos begins too.
IO_WINDOW, IO_WINDOW_END = 0xC000, 0x1_0000

# A device's memory is a multiple of this, whatever its own pages are.
JOURNAL_PAGE = 4096
# Of each device the places that were written last, to be read by MMIO too.
RECENT_WRITES = 64


class Bar(NamedTuple):
    """A BAR as its size probe tells it; `wide`: 64 bits of address."""

    number: int
    size_bytes: int
    io: bool
    wide: bool


async def bars_of(client: QtestClient, slot: int) -> list[Bar]:
    """Return the BARs of the device in `slot` of bus 0; they have no address afterwards."""
    found, index = [], 0
    while index < PCI_STD_NUM_BARS:
        low = await _probe(client, slot, index)
        io = bool(low & PCI_BASE_ADDRESS_SPACE_IO)
        wide = not io and low & PCI_BASE_ADDRESS_MEM_TYPE_MASK == PCI_BASE_ADDRESS_MEM_TYPE_64
        mask = low & (~0x3 if io else ~0xF)
        if wide:
            size = (1 << 64) - (await _probe(client, slot, index + 1) << 32 | mask)
        elif io:
            size = (1 << 16) - (mask & 0xFFFF)  # the upper half may be hardwired to zero
        else:
            size = (1 << 32) - mask
        if low:
            found.append(Bar(index, size, io, wide))
        index += 2 if wide else 1
    return found


async def _probe(client: QtestClient, slot: int, index: int) -> int:
    offset = PCI_BASE_ADDRESS_0 + 4 * index
    await client.config_write(slot, offset, 0xFFFF_FFFF)
    return await client.config_read(slot, offset)


class Windows:
    """Hands out addresses for BARs, as firmware does after power-on or reset."""

    def __init__(self) -> None:
        self._low, self._high, self._io = BAR_WINDOW, HIGH_WINDOW, IO_WINDOW

    async def place(self, client: QtestClient, slot: int) -> dict[int, int]:
        """Give the BARs of one device addresses and enable it; return them by BAR.

        Raises: GuestError: there is no room for one.
        """
        places = {}
        for bar in sorted(await bars_of(client, slot), key=lambda bar: -bar.size_bytes):
            place = places[bar.number] = self._take(bar)
            await client.config_write(slot, PCI_BASE_ADDRESS_0 + 4 * bar.number, place & 0xFFFF_FFFF)
            if bar.wide:
                await client.config_write(slot, PCI_BASE_ADDRESS_0 + 4 * bar.number + 4, place >> 32)
        await client.config_write(slot, PCI_COMMAND, PCI_COMMAND_ENABLED)
        return places

    def _take(self, bar: Bar) -> int:
        def aligned(start: int) -> int:
            return -(-start // bar.size_bytes) * bar.size_bytes

        if bar.io:
            place = aligned(self._io)
            if place + bar.size_bytes > IO_WINDOW_END:
                raise GuestError(f"no I/O ports for BAR {bar.number}; use --guest linux")
            self._io = place + bar.size_bytes
            return place
        place = aligned(self._low)
        if place + bar.size_bytes <= BAR_WINDOW_END:
            self._low = place + bar.size_bytes
            return place
        if not bar.wide:
            raise GuestError(f"no room for a BAR of {bar.size_bytes} bytes below 4 GiB; use --guest linux")
        place = aligned(self._high)
        self._high = place + bar.size_bytes
        return place


class Journal:
    """What a memory must hold: its first content, which `fill` says, and what was written since.

    Only pages that were written are kept, so that a memory of 1 GiB costs nothing before it is read back.
    """

    def __init__(self, size_bytes: int, fill: int) -> None:
        self._fill = fill
        self._pages = np.zeros((size_bytes // JOURNAL_PAGE, JOURNAL_PAGE), np.uint8)
        self._written = np.zeros(len(self._pages), bool)

    def write(self, offset: int, data: npt.NDArray[np.uint8]) -> None:
        """Note that the bytes `data` were written at `offset`."""
        for page in range(offset // JOURNAL_PAGE, (offset + len(data) - 1) // JOURNAL_PAGE + 1):
            if not self._written[page]:
                self._pages[page] = self._first(page * JOURNAL_PAGE, JOURNAL_PAGE)
                self._written[page] = True
        self._pages.reshape(-1)[offset : offset + len(data)] = data

    def read(self, offset: int, count: int) -> npt.NDArray[np.uint8]:
        """Return `count` bytes from `offset` on, both multiples of 8."""
        first, last = offset // JOURNAL_PAGE, -(-(offset + count) // JOURNAL_PAGE)
        written = self._written[first:last]
        if written.all():
            return self._pages.reshape(-1)[offset : offset + count]
        content = self._first(first * JOURNAL_PAGE, (last - first) * JOURNAL_PAGE)
        content.reshape(-1, JOURNAL_PAGE)[written] = self._pages[first:last][written]
        return content[offset - first * JOURNAL_PAGE :][:count]

    def _first(self, offset: int, count: int) -> npt.NDArray[np.uint8]:
        words = (
            outputs(self._fill, offset // 8, count // 8) if self._fill else np.zeros(count // 8, np.uint64)
        )
        return words.view(np.uint8)


class QtestDevice:
    """A device, and what its memory must hold.

    Attributes:
        recent: (offset, bytes) of the last writes to memory.
    """

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.bar0 = 0
        self.bar2 = 0
        self.size_bytes = 0
        self.page_bytes = DEFAULT_PAGE_BYTES
        self.fill = 0
        self.scratch: int | None = None
        self.program: Program | None = None
        self.recent: deque[tuple[int, int]] = deque(maxlen=RECENT_WRITES)

    @cached_property
    def journal(self) -> Journal:
        """What the memory must hold."""
        return Journal(self.size_bytes, self.fill)

    def register(self, name: str) -> int:
        """Return the address of a register of the reference device."""
        return self.bar0 + REGISTERS[name].offset

    def place(self, places: dict[int, int]) -> None:
        """Take over the addresses of the BARs."""
        self.bar0, self.bar2 = places.get(0, 0), places.get(2, 0)
