"""The reference device: registers in BAR0, memory behind BAR2, MSI-X in BAR4; more memories if asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from vfu_dev.device.bar import NO_BAR, Bar, Msix
from vfu_dev.device.base import Device, Worker
from vfu_dev.device.identity import PciIdentity
from vfu_dev.device.reference.dma import DmaEngine
from vfu_dev.device.reference.layout import (
    CTRL_RESET,
    DEVICE_ID,
    FIELDS,
    MSIX_VECTORS,
    REGISTER_ID,
    REGISTER_VERSION,
    STATUS_READY,
    VENDOR_ID,
)
from vfu_dev.device.reference.workload_registers import RegisterWorkload
from vfu_dev.device.reference.writer import DmaWriter
from vfu_dev.device.region import Region
from vfu_dev.device.registers import Registers
from vfu_dev.errors import ConfigError, judge_name, shown
from vfu_dev.logs import SlowWork
from vfu_dev.workload.spec import MAX_SEED
from vfu_dev.workload.splitmix import fill_words

logger = logging.getLogger(__name__)

# Words filled between two reports: 8 MiB, some 20 ms.
_FILL_WORDS = 1 << 20


class ReferenceDevice(Device):
    """The device that `vfu-dev serve` serves.

    Args:
        name: for logs and status.
        memory_bytes: of the memory behind BAR2, a multiple of the page size.
        page_size_bytes: a power of two.
        mapped: clients may map that memory.
        more: further memories, by the name that they migrate under. One can have a BAR, BAR4: the MSI-X table
            is in BAR1 then. The register `window` says where those begin that are larger than their BAR.
        fill_seed: of the initial content of the memories, 0 to 2**64 - 1, one more for each further one; 0
            leaves them untouched, and then nothing is initial.

    Raises: ConfigError: impossible sizes, an invalid name or seed.
    """

    identity = PciIdentity(VENDOR_ID, DEVICE_ID, class_code=0x088000, revision=1)
    type_name = "vfu-dev reference 1"
    registers = Registers(
        0, FIELDS, initial={"id": REGISTER_ID, "version": REGISTER_VERSION, "status": STATUS_READY}
    )

    def __init__(
        self,
        name: str = "vfu-dev",
        *,
        memory_bytes: int = 256 << 20,
        page_size_bytes: int = 4096,
        mapped: bool = False,
        more: Mapping[str, Region] | None = None,
        fill_seed: int = 0,
    ) -> None:
        if not 0 <= fill_seed <= MAX_SEED:
            raise ConfigError(f"fill {shown(fill_seed)}: expected a seed from 0 to {MAX_SEED:#x}")
        self._fill_seed = fill_seed
        self._more = dict(more or {})
        bars = [region.index for region in self._more.values() if region.index != NO_BAR]
        if bars not in ([], [4]):
            raise ConfigError(f"{name}: one further memory can have a BAR, BAR4; asked for: {bars}")
        self.memory = Region(2, size_bytes=memory_bytes, page_size_bytes=page_size_bytes, mapped=mapped)
        self.msix = Msix(1 if bars else 4, vectors=MSIX_VECTORS)
        super().__init__(name)

    def declarations(self) -> dict[str, Bar]:
        """Add the further memories, whose names only the user knows."""
        found = super().declarations()
        for name in self._more:
            judge_name("memory", name)
            if name in found:
                raise ConfigError(f"memory {name}: this device has {name} already; choose another name")
        return found | self._more

    def make_workers(self) -> list[Worker]:
        """Return the engines behind the registers."""
        self.dma = DmaEngine(self, self.registers, self.memory)
        self.writer = DmaWriter(self, self.registers)
        self.load = RegisterWorkload(self, self.registers, self.memory)
        return [self.dma, self.writer, self.load]

    def initialise(self) -> None:
        """Fill the memories from the seed; a page written this way counts as written."""
        self.registers["memsize"] = self.memory.size_bytes
        self.registers["page_size"] = self.memory.page_size_bytes
        self.registers["fill"] = self._fill_seed
        if self._fill_seed:
            total = sum(memory.size_bytes for memory in self.memories)
            work = SlowWork(f"{self.name}: filling memory", total, logger.info)
            for number, memory in enumerate(self.memories):
                words = memory.data.view(np.uint64)
                for first in range(0, len(words), _FILL_WORDS):
                    part = words[first : first + _FILL_WORDS]
                    fill_words(part, self._fill_seed + number, first)
                    work.add(part.nbytes)
                memory.pages.mark(0, memory.size_bytes)

    @registers.written("ctrl")
    def _write_ctrl(self, value: int) -> None:
        self.registers["ctrl"] = 0
        if value & CTRL_RESET:
            self.registers.reset()
            self.interrupts.reset()
            for worker in self.workers:
                worker.reset()
            self._move_windows()

    @registers.written("irq_raise")
    def _write_irq_raise(self, vector: int) -> None:
        if vector < self.irq_vectors:
            # Wraps as the register does.
            self.registers["irq_count"] = (self.registers["irq_count"] + 1) & 0xFFFF_FFFF
        self.raise_irq(vector)

    @registers.written("reinit")
    def _write_reinit(self, pages: int) -> None:
        self.registers["reinits"] = (self.registers["reinits"] + 1) & 0xFFFF_FFFF
        memory = self.memory.memory
        self.migration.reinit(memory, np.arange(min(pages, memory.page_count), dtype=np.intp))

    @registers.written("window")
    def _write_window(self, _: int) -> None:
        self._move_windows()

    @registers.written("dma_ctrl")
    def _write_dma_ctrl(self, value: int) -> None:
        self.dma.write_ctrl(value)

    @registers.written("desc_ctrl")
    def _write_desc_ctrl(self, value: int) -> None:
        self.dma.write_descriptor_ctrl(value)

    @registers.written("writer_ctrl")
    def _write_writer_ctrl(self, value: int) -> None:
        self.writer.write_ctrl(value)

    @registers.written("load_ctrl")
    def _write_load_ctrl(self, value: int) -> None:
        self.load.write_ctrl(value)

    def _move_windows(self) -> None:
        for bar in self.bars:
            if isinstance(bar, Region) and bar.bar_bytes < bar.size_bytes:
                bar.base_bytes = self.registers["window"]

    def reset_registers(self) -> None:
        """Move the windows to where the register says."""
        self._move_windows()

    def resumed(self) -> None:
        """Count the migration."""
        self.registers["generation"] = (self.registers["generation"] + 1) & 0xFFFF_FFFF_FFFF_FFFF
        self.load.resumed()
        self._move_windows()
