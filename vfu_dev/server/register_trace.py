"""Trace of a driver's register accesses by name: the last accesses, accesses outside of registers, spinning.

The trace is a layer around the handler of each BAR with registers. Without --trace-registers there is no
layer.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vfu_dev.device import Registers

logger = logging.getLogger(__name__)

Handler = Callable[[memoryview, int, bool], None]

DEFAULT_ACCESSES = 1000
# All of them are one answer of the control socket, some 2 MB.
MAX_ACCESSES = 10_000
# More bytes of a value are not kept: registers of `V` format can be large.
VALUE_BYTES = 32
# Maximum number of places outside of registers that are counted separately: a hostile guest could touch them
# all.
MAX_UNKNOWN = 1000
# This number of equal reads of one register within this time, with nothing in between: a guest that waits in
# a loop, each turn of which is a message to this server. MMIO by messages does 10 to 20 thousand a second.
SPIN_READS = 5000
SPIN_SECONDS = 5.0


@dataclass
class Access:
    """One access, or the same one several times in a row.

    Attributes:
        time: of the first (Unix seconds).
        register: `dma_ctrl`, of a part of it `dma_table[4:8]`, of several `a, b`; "" where there is none.
        value: little endian, as hex; of more than 8 bytes the first ones as they are.
        error: why it was refused; None where it was not.
        count: how often in a row.
    """

    time: float
    bar: int
    write: bool
    offset: int
    size: int
    register: str
    value: str
    error: str | None = None
    count: int = 1

    def same(self, other: Access) -> bool:
        """Return whether `other` is the same read again; two writes are two events."""
        mine = (self.bar, self.offset, self.size, self.value, self.error)
        return not self.write and not other.write and mine == (
            other.bar, other.offset, other.size, other.value, other.error
        )  # fmt: skip


class RegisterTrace:
    """The last `accesses` of one device.

    Attributes:
        unknown: (BAR, offset, size, whether written) -> how often, of places that are no register.
        spinning: registers that a guest was seen to spin on.
    """

    def __init__(self, device: str, accesses: int = DEFAULT_ACCESSES) -> None:
        self._device = device
        self._accesses: deque[Access] = deque(maxlen=accesses)
        self._total = 0
        self._spin_since, self._spin_reads = 0.0, 0
        self.unknown: dict[tuple[int, int, int, bool], int] = {}
        self.spinning: list[str] = []

    def wrap(self, bar: Registers, handler: Handler) -> Handler:
        """Return a handler of accesses to `bar` that notes each and lets `handler` serve it."""
        names: dict[tuple[int, int], str] = {}

        def access(data: memoryview, offset: int, is_write: bool) -> None:
            size = len(data)
            if (name := names.get((offset, size))) is None:
                name = _names(bar, offset, size)
                if len(names) < MAX_UNKNOWN:
                    names[offset, size] = name
            written = _hex(data) if is_write else ""
            found = Access(time.time(), bar.index, is_write, offset, size, name, written)
            try:
                handler(data, offset, is_write)
                if not is_write:
                    found.value = _hex(data)
            except Exception as error:
                found.error = str(error) or type(error).__name__
                raise
            finally:
                self._note(found)

        return access

    def _note(self, access: Access) -> None:
        self._total += 1
        if not access.register:
            place = (access.bar, access.offset, access.size, access.write)
            if place in self.unknown or len(self.unknown) < MAX_UNKNOWN:
                self.unknown[place] = self.unknown.get(place, 0) + 1
        last = self._accesses[-1] if self._accesses else None
        if last is None or not last.same(access):
            self._accesses.append(access)
            self._spin_since, self._spin_reads = access.time, 1
            return
        last.count += 1
        self._spin_reads += 1
        if access.time - self._spin_since > SPIN_SECONDS:
            self._spin_since, self._spin_reads = access.time, 1
        elif self._spin_reads == SPIN_READS:
            self._warn(access, access.time - self._spin_since)

    def _warn(self, access: Access, seconds: float) -> None:
        name = access.register or f"{access.offset:#x}"
        if name in self.spinning:
            return
        self.spinning.append(name)
        logger.warning(
            "%s: the guest spins on %s of BAR%d: %d reads of %s in %.1f s; an interrupt would save them",
            self._device, name, access.bar, SPIN_READS, access.value, seconds,
        )  # fmt: skip

    def clear(self) -> None:
        """Forget everything so far."""
        self._accesses.clear()
        self.unknown.clear()
        self.spinning.clear()
        self._total = 0

    def as_dict(self, last: int | None = None) -> dict[str, Any]:
        """Return what JSON knows of it; of the accesses the `last`, all that are kept for None."""
        kept = list(self._accesses)
        return {
            "accesses_total": self._total,
            "accesses": [vars(access) for access in (kept if last is None else kept[-last:] if last else [])],
            "unknown": [
                {"bar": bar, "offset": offset, "size": size, "write": write, "count": count}
                for (bar, offset, size, write), count in sorted(self.unknown.items())
            ],
            "spinning": list(self.spinning),
        }


def _names(bar: Registers, offset: int, size: int) -> str:
    """Return the registers that an access touches, each with the part of it where that is not all."""
    found = []
    for field in bar.fields.values():
        start, stop = max(offset, field.offset), min(offset + size, field.end)
        if start < stop:
            whole = (start, stop) == (field.offset, field.end)
            part = "" if whole else f"[{start - field.offset}:{stop - field.offset}]"
            found.append((start, f"{field.name}{part}"))
    return ", ".join(name for _, name in sorted(found))


def _hex(data: memoryview) -> str:
    if len(data) <= 8:
        return f"{int.from_bytes(data, 'little'):#x}"
    more = "..." if len(data) > VALUE_BYTES else ""
    return bytes(data[:VALUE_BYTES]).hex() + more
