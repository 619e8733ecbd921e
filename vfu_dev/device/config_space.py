"""PCI configuration space: what reads return, which bits a guest may change, and which of them migrate.

Bits that were not declared writable keep their value whatever is written, as PCI Local Bus Specification 3.0,
section 6.1, requires; no access inside the space is refused.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vfu_dev.errors import StreamError
from vfu_dev.migration import RegisterBlock

CONVENTIONAL_BYTES = 256
EXPRESS_BYTES = 4096  # PCI_CFG_SPACE_SIZE and PCI_CFG_SPACE_EXP_SIZE, <linux/pci_regs.h>

# Registers that migrate, by the names under which `ConfigSpace.register` adds them: all that a guest can
# change, because a client keeps no copy of some of it. A device without one of them sends zeros.
_MIGRATES = [
    ("command", "<u2"),
    ("cache_line_size", "u1"),
    ("interrupt_line", "u1"),
    *((f"bar{index}", "<u4") for index in range(6)),
    ("pm_control", "<u2"),
    ("device_control", "<u2"),
    ("link_control", "<u2"),
    ("device_control_2", "<u2"),
    ("link_control_2", "<u2"),
    ("msix_control", "<u2"),
    ("msi_control", "<u2"),
    ("msi_address", "<u8"),
    ("msi_data", "<u2"),
    ("msi_mask", "<u4"),
]
# `known` is zero in a stream of a version, or from a device, that sends no configuration space.
_DTYPE = np.dtype([("known", "u1"), *_MIGRATES])

# Called after a write to a register with its value before, and what was written to it: 0 in other bytes.
Hook = Callable[[int, int], None]


class ConfigSpace:
    """The configuration space of one function; empty until registers are added, before it is served."""

    def __init__(self) -> None:
        self.size_bytes = CONVENTIONAL_BYTES
        self._content = bytearray(EXPRESS_BYTES)
        self._initial = bytes(EXPRESS_BYTES)
        self._writable = bytearray(EXPRESS_BYTES)
        self._registers: dict[str, tuple[int, int]] = {}  # name -> offset, size in bytes
        self._hooks: list[tuple[str, Hook]] = []

    # --- what there is --------------------------------------------------------------------------------------

    def register(self, name: str, offset: int, size: int, value: int = 0, writable: int = 0) -> None:
        """Add a register.

        Args:
            value: what it holds now and after a reset.
            writable: the bits that a guest may change.
        """
        self._registers[name] = (offset, size)
        self._content[offset : offset + size] = value.to_bytes(size, "little")
        self._writable[offset : offset + size] = writable.to_bytes(size, "little")
        self._initial = bytes(self._content)

    def on_write(self, name: str, hook: Hook) -> None:
        """Call `hook` after each write to the register `name`."""
        self._hooks.append((name, hook))

    def __contains__(self, name: str) -> bool:
        return name in self._registers

    def __getitem__(self, name: str) -> int:
        offset, size = self._registers[name]
        return int.from_bytes(self._content[offset : offset + size], "little")

    def __setitem__(self, name: str, value: int) -> None:
        """Set a register, writable or not, as the device itself may."""
        offset, size = self._registers[name]
        self._content[offset : offset + size] = value.to_bytes(size, "little")

    # --- accesses -------------------------------------------------------------------------------------------

    def read(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`, which lies inside with all of `out`."""
        out[:] = self._content[offset : offset + len(out)]

    def write(self, offset: int, data: memoryview) -> None:
        """Take `data` at `offset`, which lies inside with all of `data`; bits that are not writable stay."""
        end = offset + len(data)
        waiting = []
        for name, hook in self._hooks:
            start, size = self._registers[name]
            if start < end and offset < start + size:
                first, last = max(start, offset), min(start + size, end)
                written = int.from_bytes(data[first - offset : last - offset], "little")
                waiting.append((hook, self[name], written << 8 * (first - start)))
        for at, byte in enumerate(data, offset):
            mask = self._writable[at]
            self._content[at] = self._content[at] & ~mask | byte & mask
        for hook, before, written in waiting:
            hook(before, written)

    def reset(self) -> None:
        """Return to the initial values; a function level reset spares nothing of what there is."""
        self._content[:] = self._initial

    # --- migration ------------------------------------------------------------------------------------------

    def block(self) -> RegisterBlock:
        """Return what migrates: the writable bits of the registers that have a name in the stream."""
        defaults = dict.fromkeys(_DTYPE.names or (), 0)
        return RegisterBlock("pci", _DTYPE, self._pack, self._unpack, self._validate, defaults)

    def _mask(self, name: str) -> int:
        offset, size = self._registers.get(name, (0, 0))
        return int.from_bytes(self._writable[offset : offset + size], "little")

    def _pack(self) -> bytes:
        values = np.zeros(1, dtype=_DTYPE)
        values["known"] = bool(self._registers)
        for name, _ in _MIGRATES:
            if name in self._registers:
                values[name] = self[name] & self._mask(name)
        return values.tobytes()

    def _unpack(self, content: bytes) -> None:
        values = np.frombuffer(content, dtype=_DTYPE)[0]
        if not values["known"]:
            return
        for name, _ in _MIGRATES:
            if name in self._registers:
                self[name] = self[name] & ~self._mask(name) | int(values[name])

    def _validate(self, content: bytes) -> None:
        values = np.frombuffer(content, dtype=_DTYPE)[0]
        for name, _ in _MIGRATES if self._registers else ():
            foreign = int(values[name]) & ~self._mask(name)
            if foreign:
                raise StreamError(
                    f"configuration space: {name} has bits {foreign:#x}, which nobody can set here"
                )
