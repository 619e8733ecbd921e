"""A ring of descriptors in guest memory, worked off by DMA: the shape of most devices that move data."""

import time
import zlib

import numpy as np

from vfu_dev.device import Device, Field, Msix, PciIdentity, Region, Registers, Worker
from vfu_dev.errors import AccessError

# A descriptor in guest memory: the driver fills in address and length, the device crc and status.
DESCRIPTOR = np.dtype(
    [("address", "<u8"), ("length", "<u4"), ("reserved", "<u4"), ("crc", "<u4"), ("status", "<u4")]
)
# crc and status are adjacent, and written at once: a driver that sees the status sees the crc.
CRC_OFFSET = 16
DONE, FAILED = 1, 2
MAX_DESCRIPTORS = 1024
SLOT_BYTES, SLOTS = 2048, 64


class Engine:
    """Works the ring off. What it knows is in registers: so a migration may come between any two packets."""

    def __init__(self, device: "Ring") -> None:
        self.device = device
        self.epoch = 0  # changes when what is under way is over: by a reset, or a new ring

    def due(self) -> float | None:
        """Say when there is work: now, or not before somebody writes a register."""
        registers = self.device.registers
        size, head, tail = registers["size"], registers["head"], registers["tail"]
        # The guest may write anything, and a state may come from another version: judged where it is used.
        sane = 0 < size <= MAX_DESCRIPTORS and head < size and tail < size and not registers["error"]
        return 0.0 if sane and head != tail and self.device.bus_master() else None

    def advance(self, budget_seconds: float) -> None:
        """Work for about that long; the server's loop serves the guest in between."""
        deadline = time.monotonic() + budget_seconds
        while self.due() == 0 and self.device.may_start:
            epoch = self.epoch
            try:
                self.packet(epoch)
            except AccessError:  # the ring itself is out of reach: stop, or this would be tried for ever
                if epoch == self.epoch:
                    self.device.registers["error"] = 1
                    self.device.raise_irq(0)
            if time.monotonic() >= deadline:
                return

    def packet(self, epoch: int) -> None:
        """Take one packet. Each access to guest memory may wait, and a reset may come meanwhile."""
        device, registers, memory = self.device, self.device.registers, self.device.guest_memory
        head = registers["head"]
        at = (registers["base"] + head * DESCRIPTOR.itemsize) % 2**64
        raw = bytearray(DESCRIPTOR.itemsize)
        memory.read(at, memoryview(raw))
        address, length, *_ = np.frombuffer(raw, DESCRIPTOR)[0].item()
        crc, status, content = 0, FAILED, bytearray(length if length <= SLOT_BYTES else 0)
        if content:
            try:
                memory.read(address, memoryview(content))
                crc, status = zlib.crc32(content), DONE
            except AccessError:
                pass  # the driver's mistake; the next packet may be good
        if epoch != self.epoch:
            return
        if status == DONE:
            device.packets.store(registers["done"] % SLOTS * SLOT_BYTES, content)  # marks the page dirty
        memory.write(at + CRC_OFFSET, np.array([crc, status], "<u4").tobytes())
        if epoch != self.epoch:
            return
        registers["head"] = (head + 1) % registers["size"]
        registers["done"] += 1
        device.raise_irq(0)

    def reset(self) -> None:
        """Forget what is under way; registers are back at their initial values already."""
        self.epoch += 1

    def block(self) -> None:
        """Nothing migrates beside the registers."""


class Ring(Device):
    """The driver fills descriptors and writes `tail`; the device copies each packet and says its CRC-32."""

    identity = PciIdentity(vendor=0x4656, device=0x0200, class_code=0x028000, revision=1)
    registers = Registers(
        0,
        [
            Field("base", 0x00, "<u8", "rw", "guest address of the descriptors", migrates=True),
            Field("size", 0x08, "<u4", "rw", "how many; writing it begins anew, 0 is off", migrates=True),
            Field("tail", 0x0C, "<u4", "rw", "behind the last descriptor that is ready", migrates=True),
            Field("head", 0x10, "<u4", "ro", "the descriptor that is taken next", migrates=True),
            Field("error", 0x14, "<u4", "ro", "1: the descriptors are out of reach", migrates=True),
            Field("done", 0x18, "<u8", "ro", "packets so far", migrates=True),
        ],
    )
    packets = Region(2, size_bytes=SLOTS * SLOT_BYTES)  # the last of them, for the guest to look at
    msix = Msix(4, vectors=1)

    def make_workers(self) -> list[Worker]:
        """Return what the device does by itself."""
        self.engine = Engine(self)
        return [self.engine]

    @registers.written("size")
    def restart(self, size: int) -> None:
        """Begin with the first descriptor; `tail` needs no hook, because `due` looks at it."""
        self.engine.epoch += 1
        self.registers["head"] = self.registers["tail"] = self.registers["error"] = 0

    def region_write(self, region: Region, offset: int, data: memoryview) -> None:
        """Drop what the guest writes to the packets: it may look, not touch."""
