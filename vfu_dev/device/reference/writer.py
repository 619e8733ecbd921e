"""The autonomous DMA writer: stamps a guest buffer page by page, at a rate, until it is stopped.

What it is for: a device's writes into guest memory are invisible to the migration of that memory, unless they
are logged. A stamp is an addition, so one that got lost stays visible for ever, however often its page is
stamped again: stamp n (from 0) adds word n of `stamp_words` to each 64-bit word of page n % pages.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from vfu_dev.device.base import Device
from vfu_dev.device.reference.layout import MAX_RATE_BYTES, STAMP_PAGE_BYTES, STAMP_SEED, WriterStatus
from vfu_dev.device.registers import Registers
from vfu_dev.errors import VfuDevError
from vfu_dev.workload.splitmix import fill_words

# Maximum written at once, and maximum backlog when the device was kept from writing.
_SLICE_PAGES = 64
_OWED_SECONDS = 0.25
_WAKE_SECONDS = 0.002


def stamp_words(first: int, count: int) -> npt.NDArray[np.uint64]:
    """Return what stamps `first` and following add, shape (count,): splitmix64 outputs of `STAMP_SEED`."""
    words = np.empty(count, dtype=np.uint64)
    fill_words(words, STAMP_SEED, first)
    return words


def expected_pages(pages: int, stamps: int) -> npt.NDArray[np.uint64]:
    """Return what each word of each page holds after `stamps` stamps on zeroed memory, shape (pages,)."""
    words = np.zeros(-(-stamps // pages) * pages, dtype=np.uint64)
    words[:stamps] = stamp_words(0, stamps)
    total: npt.NDArray[np.uint64] = words.reshape(-1, pages).sum(axis=0, dtype=np.uint64)
    return total


class DmaWriter:
    """The writer behind the registers `writer_*` of a `device`; all of its state is in them."""

    def __init__(self, device: Device, registers: Registers) -> None:
        self._device = device
        self._registers = registers
        self._last = 0.0
        self._owed_bytes = 0.0
        self._epoch = 0
        self._stamping = False
        self._stop_asked = False
        self._buffer = np.empty((_SLICE_PAGES, STAMP_PAGE_BYTES // 8), dtype=np.uint64)

    def write_ctrl(self, value: int) -> None:
        """Begin or stop."""
        registers = self._registers
        if not int(value) & 1:
            # A transfer by message lets the guest in between. What is under way is written and counted before
            # the status says that it is over.
            self._stop_asked = self._stamping
            if not self._stamping:
                self._stop(WriterStatus.STOPPED)
        elif self._is_sane():
            self._epoch += 1
            self._stop_asked = False
            registers["writer_count"] = 0
            registers["writer_status"] = WriterStatus.WRITING
            self._last, self._owed_bytes = time.monotonic(), 0.0
        else:
            self._stop(WriterStatus.BAD_BUFFER)

    def reset(self) -> None:
        """Follow a reset; registers are reset elsewhere."""
        self._epoch += 1

    def block(self) -> None:
        """Nothing migrates beside the registers."""

    def _is_sane(self) -> bool:
        registers = self._registers
        buffer, length = registers["writer_buffer"], registers["writer_length"]
        aligned = not (buffer % STAMP_PAGE_BYTES or length % STAMP_PAGE_BYTES)
        in_range = length and buffer + length <= 1 << 64
        return bool(aligned and in_range and 0 < registers["writer_rate"] <= MAX_RATE_BYTES)

    def _stop(self, status: WriterStatus) -> None:
        self._registers["writer_ctrl"] = 0
        self._registers["writer_status"] = status
        if status is not WriterStatus.STOPPED:
            self._device.counters.dma_errors += 1

    @property
    def _writing(self) -> bool:
        status: int = self._registers["writer_status"]
        return status == WriterStatus.WRITING

    def due(self) -> float | None:
        """Return the seconds until there is work; None: not before a register is written."""
        if not self._writing:
            return None
        rate: int = max(1, self._registers["writer_rate"])
        wanted = max(STAMP_PAGE_BYTES, rate * _WAKE_SECONDS)
        left = (wanted - self._owed_bytes) / rate
        return max(0.0, self._last + left - time.monotonic())

    def advance(self, budget_seconds: float) -> None:
        """Make the stamps that are due, for about that long."""
        if not self._writing:
            return
        if not self._is_sane():  # arrived by migration, or the guest changed it meanwhile
            self._stop(WriterStatus.BAD_BUFFER)
            return
        now = time.monotonic()
        rate = self._registers["writer_rate"]
        most = max(STAMP_PAGE_BYTES, rate * _OWED_SECONDS)
        self._owed_bytes = min(most, self._owed_bytes + max(0.0, now - self._last) * rate)
        self._last = now
        while self._owed_bytes >= STAMP_PAGE_BYTES and self._writing:
            if not self._device.bus_master():
                self._stop(WriterStatus.NO_BUS_MASTER)
                return
            self._stamping = True
            try:
                self._stamp(int(self._owed_bytes // STAMP_PAGE_BYTES))
            finally:
                self._stamping = False
            if self._stop_asked and self._writing:
                self._stop(WriterStatus.STOPPED)
            self._stop_asked = False
            if time.monotonic() - now >= budget_seconds:
                return

    def _stamp(self, pages_due: int) -> None:
        registers, epoch = self._registers, self._epoch
        first = registers["writer_count"]
        pages = registers["writer_length"] // STAMP_PAGE_BYTES
        page = first % pages
        count = min(pages_due, pages - page, _SLICE_PAGES)
        address = registers["writer_buffer"] + page * STAMP_PAGE_BYTES
        rows = self._buffer[:count]
        raw = rows.data.cast("B")
        guest = self._device.guest_memory
        try:
            guest.read(address, raw)
            rows += stamp_words(first, count)[:, np.newaxis]
            guest.write(address, raw)
        except VfuDevError:
            if epoch == self._epoch:
                self._stop(WriterStatus.UNREACHABLE)
            return
        if epoch != self._epoch:
            return
        self._device.counters.dma_written_bytes += len(raw)
        self._owed_bytes -= len(raw)
        registers["writer_count"] = (first + count) & 0xFFFF_FFFF_FFFF_FFFF
