"""The reference device: registers in BAR0, memory behind BAR2, MSI-X in BAR4; more memories if asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vfu_dev.device.base import Device
from vfu_dev.device.identity import PciIdentity
from vfu_dev.device.reference.dma import DmaEngine, EngineHost
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
from vfu_dev.device.regions import MemoryBar, MsixBar, RegisterBar
from vfu_dev.errors import ConfigError, judge_name, shown
from vfu_dev.memory import DeviceMemory
from vfu_dev.migration.engine import ALL_FLAGS
from vfu_dev.uapi import (
    VFIO_PCI_BAR0_REGION_INDEX,
    VFIO_PCI_BAR1_REGION_INDEX,
    VFIO_PCI_BAR2_REGION_INDEX,
    VFIO_PCI_BAR4_REGION_INDEX,
    MigrationFlags,
)
from vfu_dev.workload.spec import MAX_SEED
from vfu_dev.workload.splitmix import fill_words


@dataclass(frozen=True)
class MemorySpec:
    """A memory of the reference device.

    Attributes:
        name: under which it migrates.
        size_bytes: a multiple of the page size.
        bar: 2 or 4, None for a memory that only the device itself reaches.
        window_bytes: size of the BAR when it shows a part of the memory; which part, register `window` says.
        mapped: clients may map it.

    Raises:  ConfigError: the name is empty, or has control characters.
    """

    name: str
    size_bytes: int
    page_size_bytes: int = 4096
    bar: int | None = None
    window_bytes: int | None = None
    mapped: bool = False

    def __post_init__(self) -> None:
        judge_name("memory", self.name)


class ReferenceDevice(Device):
    """The device that `vfu-dev serve` serves.

    Args:
        name: for logs and status.
        memory_bytes: of the memory behind BAR2, a multiple of the page size.
        page_size_bytes: a power of two.
        mapped: clients may map that memory.
        more: further memories. BAR4 is free for one of them: the MSI-X table is in BAR1 then.
        fill_seed: of the initial content of the memories, 0 to 2**64 - 1, one more for each further one; 0
            leaves them untouched, and then nothing is initial.
        initial_limit_bytes, flags: see `Device`.

    Raises:  ConfigError: sizes or a seed that cannot be.
    """

    identity = PciIdentity(VENDOR_ID, DEVICE_ID, class_code=0x088000, revision=1)
    type_name = "vfu-dev reference 1"

    def __init__(
        self,
        name: str = "vfu-dev",
        *,
        memory_bytes: int = 256 << 20,
        page_size_bytes: int = 4096,
        mapped: bool = False,
        more: Sequence[MemorySpec] = (),
        fill_seed: int = 0,
        initial_limit_bytes: int | None = None,
        flags: MigrationFlags = ALL_FLAGS,
    ) -> None:
        super().__init__(name, flags=flags, initial_limit_bytes=initial_limit_bytes)
        if not 0 <= fill_seed <= MAX_SEED:
            raise ConfigError(f"fill {shown(fill_seed)}: expected a seed from 0 to {MAX_SEED:#x}")
        self._fill_seed = fill_seed
        bars = [spec.bar for spec in more if spec.bar is not None]
        if any(bar != VFIO_PCI_BAR4_REGION_INDEX for bar in bars) or len(bars) > 1:
            raise ConfigError(f"{name}: one further memory can have a BAR, BAR4; asked for: {bars}")
        self.memory = DeviceMemory("memory", memory_bytes, page_size_bytes, mapped=mapped)
        hooks = {
            "ctrl": self._write_ctrl,
            "irq_raise": self._write_irq_raise,
            "reinit": self._write_reinit,
            "window": lambda _: self._move_windows(),
        }
        hooks |= {"dma_ctrl": self._write_dma_ctrl, "writer_ctrl": self._write_writer_ctrl}
        hooks["desc_ctrl"] = lambda value: self.dma.write_descriptor_ctrl(value)
        hooks["load_ctrl"] = lambda value: self.load.write_ctrl(value)
        self.registers = RegisterBar(VFIO_PCI_BAR0_REGION_INDEX, "registers", 4096, FIELDS, hooks)
        registers = self.registers
        registers["id"] = REGISTER_ID
        registers["version"] = REGISTER_VERSION
        registers["memsize"] = memory_bytes
        registers["fill"] = self._fill_seed
        registers["status"] = STATUS_READY
        registers["page_size"] = page_size_bytes
        registers.set_initial()
        host = EngineHost(
            guest=lambda: self.guest_memory,
            bus_master=lambda: self.bus_master(),
            raise_irq=self.raise_irq,
            vectors=lambda: self.irq_vectors,
            counters=self.counters,
        )
        self.dma = DmaEngine(registers, self.memory, host)
        self.writer = DmaWriter(registers, host)
        self.load = RegisterWorkload(registers, self.memory, lambda: self.migration)
        self.workers += [self.dma, self.writer, self.load]
        self.add_bar(registers)
        self.add_bar(MemoryBar(VFIO_PCI_BAR2_REGION_INDEX, self.memory))
        unseen = []
        for spec in more:
            memory = DeviceMemory(spec.name, spec.size_bytes, spec.page_size_bytes, mapped=spec.mapped)
            if spec.bar is None:
                unseen.append(memory)
            else:
                self.add_bar(MemoryBar(spec.bar, memory, spec.window_bytes))
        self.add_bar(
            MsixBar(VFIO_PCI_BAR1_REGION_INDEX if bars else VFIO_PCI_BAR4_REGION_INDEX, MSIX_VECTORS)
        )
        self.finish(unseen)

    def _write_ctrl(self, value: int) -> None:
        self.registers["ctrl"] = 0
        if value & CTRL_RESET:
            self.registers.reset()
            self.interrupts.reset()
            for worker in self.workers:
                worker.reset()
            self._move_windows()

    def _write_dma_ctrl(self, value: int) -> None:
        self.dma.write_ctrl(value)

    def _write_writer_ctrl(self, value: int) -> None:
        self.writer.write_ctrl(value)

    def _write_irq_raise(self, vector: int) -> None:
        if vector < self.irq_vectors:
            # Wraps as the register does.
            self.registers["irq_count"] = (self.registers["irq_count"] + 1) & 0xFFFF_FFFF
        self.raise_irq(vector)

    def _write_reinit(self, pages: int) -> None:
        self.registers["reinits"] = (self.registers["reinits"] + 1) & 0xFFFF_FFFF
        count = min(pages, self.memory.page_count)
        self.migration.reinit(self.memory, np.arange(count, dtype=np.intp))

    def _move_windows(self) -> None:
        for bar in self.bars:
            if isinstance(bar, MemoryBar) and bar.size_bytes < bar.memory.size_bytes:
                bar.base_bytes = self.registers["window"]

    def initialise(self) -> None:
        """Fill the memories from the seed; a page written this way counts as written."""
        if self._fill_seed:
            for number, memory in enumerate(self.memories):
                fill_words(memory.data.view(np.uint64), self._fill_seed + number)
                memory.pages.mark(0, memory.size_bytes)

    def reset_registers(self) -> None:
        """Have windows where the register says."""
        self._move_windows()

    def resumed(self) -> None:
        """Count the migration."""
        self.registers["generation"] = (self.registers["generation"] + 1) & 0xFFFF_FFFF_FFFF_FFFF
        self.load.resumed()
        self._move_windows()
