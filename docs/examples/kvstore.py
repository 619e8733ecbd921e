"""A key-value store as a PCI device: 64-bit keys and values, in a hash table that the guest can read."""

import numpy as np

from vfu_dev.device import Device, Field, Msix, PciIdentity, Region, Registers

SLOT = np.dtype([("state", "<u8"), ("key", "<u8"), ("value", "<u8"), ("spare", "<u8")])
FREE, USED, DELETED = range(3)
OK, NO_KEY, FULL, NO_COMMAND = range(4)


class KeyValueStore(Device):
    """The guest writes `key` and `value`, then `command`; interrupt 0 says that `status` has the answer."""

    identity = PciIdentity(vendor=0x4656, device=0x4B56, class_code=0x088000, revision=1)
    registers = Registers(
        0,
        [
            Field("key", 0x00, "<u8", "rw", "what the command is about", migrates=True),
            Field("value", 0x08, "<u8", "rw", "to put, or what get found", migrates=True),
            Field("command", 0x10, "<u4", "wo", "1 put, 2 get, 3 delete"),
            Field("status", 0x14, "<u4", "ro", "0 ok, 1 no key, 2 full, 3 no command", migrates=True),
            Field("count", 0x18, "<u8", "ro", "keys stored", migrates=True, survives_reset=True),
        ],
    )
    table = Region(2, size_bytes=1 << 20)
    msix = Msix(4, vectors=1)

    def region_write(self, region: Region, offset: int, data: memoryview) -> None:
        """Drop what the guest writes to the table: it may look, not touch."""

    @registers.written("command")
    def run(self, command: int) -> None:
        """Carry out a command in the slot that has the key, or the one where it would go."""
        slots = self.table.data.view(SLOT)
        key, status, probes = self.registers["key"], OK, 0
        at = key % len(slots)
        while slots["state"][at] != FREE and slots["key"][at] != key and probes < len(slots):
            at, probes = (at + 1) % len(slots), probes + 1
        found = probes < len(slots) and slots["state"][at] == USED
        if command == 1 and probes < len(slots):
            self.put(at, (USED, key, self.registers["value"], 0))
            self.registers["count"] += not found
        elif command == 2 and found:
            self.registers["value"] = int(slots["value"][at])
        elif command == 3 and found:
            self.put(at, (DELETED, key, 0, 0))  # the slot keeps its key: chains through it stay whole
            self.registers["count"] -= 1
        else:
            status = {1: FULL, 2: NO_KEY, 3: NO_KEY}.get(command, NO_COMMAND)
        self.registers["status"] = status
        self.raise_irq(0)

    def put(self, at: int, slot: tuple[int, int, int, int]) -> None:
        """Store through the region, which marks the page dirty: a migration under way sends it again."""
        self.table.store(at * SLOT.itemsize, np.array(slot, SLOT).tobytes())
