"""Registers behind a BAR: a table of fields, their values, and what happens when a guest writes them."""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar, cast

import numpy as np

from vfu_dev.device.bar import Bar, Handler, Owner, Unmade
from vfu_dev.device.fields import Access, Field, layout
from vfu_dev.errors import ConfigError, nearest
from vfu_dev.migration import RegisterBlock

# What gets the value that a guest wrote: an int, of "V" format bytes.
Hook = Callable[[Any], None]
M = TypeVar("M", bound=Callable[[Any, Any], None])


@dataclass(slots=True)
class _Slot:
    """One register, with all that an access to it needs."""

    start: int
    stop: int
    stores: bool
    hook: Hook | None
    codec: struct.Struct
    number: int  # in the table


_number = attrgetter("number")


class Registers(Bar):
    """A BAR of registers, described by a table of fields.

    A guest's write to a field calls its hook with the new value: an int, whatever the access, or bytes for a
    field of "V" format. A write that covers a part of a field calls it with the rest unchanged (zero, as it
    reads, for "wo"), as a device with byte enables sees it. Offsets outside the table read zero and drop
    writes.

    Args:
        fields: the table. What a guest can write, or the device computes, is migrated when it says so.
        size_bytes: of the BAR, a power of two.
        initial: values at the start and after a reset, where not 0.

    Attributes:
        fields: the table, by name.
        hooks: functions called, by name of the register; of a device's own.
        dtype, values: all registers as one numpy structure; of a device's own.

    Raises: ConfigError: an impossible table; the text names the register.
    """

    _slots: dict[str, _Slot] = cast(Any, Unmade())

    def __init__(
        self,
        index: int,
        fields: Sequence[Field],
        *,
        size_bytes: int = 4096,
        initial: Mapping[str, int | bytes] | None = None,
    ) -> None:
        super().__init__(index, size_bytes)
        layout(f"BAR{index}", fields, size_bytes)  # checked here, where the traceback shows the author's line
        self.fields = {field.name: field for field in fields}
        self.initial = dict(initial or {})
        self._methods: dict[str, str] = {}
        for name, value in self.initial.items():
            self._field(name).judge(value, "initial")

    def _field(self, name: str) -> Field:
        if name not in self.fields:
            near = nearest(name, self.fields)
            hint = f"did you mean {near!r}?" if near else f"there are {', '.join(self.fields)}"
            raise ConfigError(f"no register {name!r}; {hint}")
        return self.fields[name]

    def _judge_hook(self, name: str) -> None:
        access = self._field(name).access
        if access in (Access.READ_ONLY, Access.INTX):
            raise ConfigError(f"a hook for register {name}, which is {access}: no write would call it")

    # --- what a write does ----------------------------------------------------------------------------------

    def written(self, name: str) -> Callable[[M], M]:
        """Call the decorated method with the new value when the guest writes register `name`.

        Raises: ConfigError: there is no such register, or no write would call it.
        """
        self._judge_hook(name)

        def remember(method: M) -> M:
            self._methods[name] = method.__name__  # looked up by name: a subclass may override it
            return method

        return remember

    def on_write(self, name: str, hook: Hook) -> None:
        """Call `hook` with the new value when the guest writes register `name` of this device.

        It is `written` for a register whose name is known at run time, as one of several queues.

        Raises: ConfigError: see `written`.
        """
        self._judge_hook(name)
        self._slots[name].hook = self.hooks[name] = hook

    def on_acknowledge(self, name: str, hook: Callable[[int], None]) -> None:
        """Call `hook` with the causes that the guest acknowledges in `name`, the "intx" register."""
        self._slots[name].hook = hook

    # --- one device's own -----------------------------------------------------------------------------------

    def _make(self, device: Owner) -> None:
        fields = list(self.fields.values())
        self.dtype = layout(self.name, fields, self.bar_bytes)
        self.values = np.zeros(1, dtype=self.dtype)
        self._bytes = self.values.view(np.uint8).data
        self._slots = {
            field.name: _Slot(
                field.offset, field.end, field.access == Access.READ_WRITE, None, field.codec, number
            )
            for number, field in enumerate(fields)
        }
        self._exact = {(slot.start, slot.stop - slot.start): slot for slot in self._slots.values()}
        self._by_start = sorted(self._slots.values(), key=lambda slot: slot.start)
        self._starts = [slot.start for slot in self._by_start]
        for name, value in self.initial.items():
            self[name] = value
        self._initial = bytes(self._bytes)
        self.hooks: dict[str, Hook] = {}
        for name, method in self._methods.items():
            self.on_write(name, getattr(device, method))
        migrating = [f for f in fields if f.migrates and f.access != Access.INTX]  # that is in `Interrupts`
        # Explicit and packed: what travels does not depend on where a register sits in the BAR.
        self._migrating = np.dtype([(f.name, f.format) for f in migrating])

    def __getitem__(self, name: str) -> Any:
        """Return the value of a register: an int, or bytes for one of "V" format."""
        slot = self._slots[name]
        return slot.codec.unpack_from(self._bytes, slot.start)[0]

    def __setitem__(self, name: str, value: int | bytes) -> None:
        """Store the value of a register, without its hook.

        Raises: OverflowError, TypeError: it does not fit, or is no value of such a register.
        """
        slot = self._slots[name]
        if isinstance(value, int):
            try:
                # Not pack_into, which leaves zeros behind when it fails.
                self._bytes[slot.start : slot.stop] = slot.codec.pack(value)
                return
            except struct.error:
                pass  # `encode` says what is wrong with it
        self._bytes[slot.start : slot.stop] = self.fields[name].encode(value)

    def accesses(self) -> tuple[Handler, Handler]:
        """See `Bar`."""
        return self.read, self.write

    def read(self, offset: int, out: memoryview) -> None:
        """Fill `out` with register contents."""
        out[:] = self._bytes[offset : offset + len(out)]

    def write(self, offset: int, data: memoryview) -> None:
        """Write every field that `data` touches, in the order of the table."""
        slot = self._exact.get((offset, len(data)))
        if slot is not None:
            self._write_slot(slot, 0, data)
            return
        end = offset + len(data)
        # Registers do not overlap: the first one touched is the last to begin at `offset` or before.
        first = bisect_right(self._starts, offset) - 1
        touched = self._by_start[max(0, first) : bisect_left(self._starts, end)]
        touched.sort(key=_number)
        for slot in touched:
            start = max(offset, slot.start)
            stop = min(end, slot.stop)
            if start < stop:
                self._write_slot(slot, start - slot.start, data[start - offset : stop - offset])

    def _write_slot(self, slot: _Slot, offset: int, data: memoryview) -> None:
        """Write `data` at `offset` of one register."""
        hook = slot.hook
        if slot.stores:
            at = slot.start + offset
            self._bytes[at : at + len(data)] = data
            if hook is not None:
                hook(slot.codec.unpack_from(self._bytes, slot.start)[0])
        elif hook is not None:
            if len(data) < slot.stop - slot.start:
                data = memoryview((bytes(offset) + data).ljust(slot.stop - slot.start, b"\0"))
            hook(slot.codec.unpack(data)[0])

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
