"""The layers: one for each operation, around the real object; it calls `next` to go on.

A layer overrides the methods of its operation. Around callbacks and the bus it is an object of the same
Protocol, around a region's accesses a function, as the handler itself is.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from vfu_dev.device.bus import Bus
from vfu_dev.errors import VfuDevError
from vfu_dev.faults.injected import ArmedFault, InjectedError
from vfu_dev.faults.spec import RANDOM
from vfu_dev.libvfio_user import DeviceCallbacks, ResetKind
from vfu_dev.migration import Migration
from vfu_dev.uapi import DeviceState

# How much a size that grows grows each time it is asked for.
GROWTH_BYTES = 16 << 20
HUGE = (1 << 64) - 1
# What a bus returns for what nobody answers.
_NO_ANSWER = 0xFF

RegionHandler = Callable[[memoryview, int, bool], None]
T = TypeVar("T")


class _Strikes(Protocol):
    def __call__(self, one: ArmedFault, here: bool = True, target: DeviceState | None = None) -> bool: ...


class Reach(NamedTuple):
    """What layers know of the device, and do to it.

    Attributes:
        strikes: counts a call and says whether the fault happens in it.
        act: does what changes no content: fails, waits, disconnects, ends.
        write_unlogged: see `FaultHost`.
    """

    migration: Migration
    strikes: _Strikes
    act: Callable[[ArmedFault], None]
    write_unlogged: Callable[[int, memoryview | bytes], None]


def _flip(one: ArmedFault, data: memoryview | bytearray, at: int | None) -> None:
    """Flip the lowest bit of byte `at`, or any bit."""
    if at is not None:
        data[at] ^= 1
    elif len(data):
        data[one.random.randrange(len(data))] ^= 1 << one.random.randrange(8)


def _corrupted(one: ArmedFault, data: memoryview | bytes, at: int | None) -> memoryview:
    """Return a copy of `data` with a bit flipped."""
    copy = bytearray(data)
    _flip(one, copy, at)
    return memoryview(copy)


def _place(one: ArmedFault, begin: int, count: int) -> tuple[bool, int | None]:
    """Return whether corruption falls into `count` bytes from `begin`, and where; None for anywhere."""
    at = one.fault.corrupt
    if at == RANDOM:
        return count > 0, None
    assert isinstance(at, int)
    return begin <= at < begin + count, at - begin


class Layer(Generic[T]):
    """Stands around `next` for one fault: a subclass has what it changes, all else is `next`'s."""

    def __init__(self, one: ArmedFault, reach: Reach, next_: T) -> None:
        self.one = one
        self.reach = reach
        self.next = next_

    def __getattr__(self, name: str) -> Any:
        return getattr(self.next, name)


# --- callbacks ----------------------------------------------------------------------------------------------


class TransitionLayer(Layer[DeviceCallbacks]):
    """Around an arc."""

    def arc(self, target: DeviceState) -> None:
        """Act before it is gone along."""
        if self.reach.strikes(self.one, target=target):
            self.reach.act(self.one)
        self.next.arc(target)


class ResetLayer(Layer[DeviceCallbacks]):
    """Around a reset that the client asks for; a lost connection is none."""

    def reset(self, kind: ResetKind) -> None:
        """Act before it is followed."""
        if kind is not ResetKind.LOST_CONNECTION and self.reach.strikes(self.one):
            self.reach.act(self.one)
        self.next.reset(kind)


def _act_in_session(one: ArmedFault, reach: Reach) -> None:
    """Act; a failure leaves a hole in the stream, which the session under way does not survive."""
    try:
        reach.act(one)
    except VfuDevError as err:
        reach.migration.break_session(err)
        raise


class MigReadLayer(Layer[DeviceCallbacks]):
    """Around MIG_DATA_READ."""

    def gather(self, count: int) -> None:
        """Have a copy asked for: what lies in device memory is not to be changed."""

    def read_into(self, buffer: memoryview) -> int:
        """Change what is read, or how much of it."""
        one, fault, reach = self.one, self.one.fault, self.reach
        position = reach.migration.sent()[0]
        match fault.action:
            case "truncate":
                end = fault.truncate or 0
                if reach.strikes(one, here=position + len(buffer) > end):
                    return self._counted(buffer[: max(0, end - position)])
            case "short":
                if reach.strikes(one):
                    return self._counted(buffer[: fault.short])
            case "corrupt":
                stored = self._counted(buffer)
                here, at = _place(one, position, stored)
                if reach.strikes(one, here=here):
                    _flip(one, buffer[:stored], at)
                return stored
            case _:
                if reach.strikes(one):
                    _act_in_session(one, reach)
        return self._counted(buffer)

    def _counted(self, buffer: memoryview) -> int:
        stored = self.next.read_into(buffer) if len(buffer) else 0
        self.one.seen_bytes += stored
        return stored


class MigWriteLayer(Layer[DeviceCallbacks]):
    """Around MIG_DATA_WRITE; `data` is the library's buffer and stays as it is."""

    def write(self, data: memoryview) -> None:
        """Change what is written, or how much of it."""
        one, fault, reach = self.one, self.one.fault, self.reach
        if fault.when == "initial-received":
            before = reach.migration.initial_received
            self.next.write(data)
            if reach.strikes(one, here=reach.migration.initial_received > before):
                _act_in_session(one, reach)
            return
        position = reach.migration.received()
        match fault.action:
            case "truncate":
                end = fault.truncate or 0
                if reach.strikes(one, here=position + len(data) > end):
                    data = data[: max(0, end - position)]
            case "short":
                if reach.strikes(one):
                    data = data[: fault.short]
            case "corrupt":
                here, at = _place(one, position, len(data))
                if reach.strikes(one, here=here):
                    data = _corrupted(one, data, at)
            case _:
                if reach.strikes(one):
                    _act_in_session(one, reach)
        if len(data):
            self.next.write(data)
            one.seen_bytes += len(data)


def _lie(one: ArmedFault, true: int) -> int:
    lie = one.fault.lie
    match lie:
        case "zero":
            return 0
        case "huge":
            return HUGE
        case "grow":
            return min(HUGE, true + one.hits * GROWTH_BYTES)
    assert isinstance(lie, int)
    return lie


class PrecopyInfoLayer(Layer[DeviceCallbacks]):
    """Around MIG_GET_PRECOPY_INFO."""

    def precopy_sizes(self) -> tuple[int, int, int]:
        """Lie about the dirty bytes, with `zero` about the initial ones too."""
        lie = self.one.fault.lie
        struck = self.reach.strikes(self.one)
        if struck and lie is None:
            self.reach.act(self.one)
        initial, dirty, flags = self.next.precopy_sizes()
        if struck and lie is not None:
            initial, dirty = 0 if lie == "zero" else initial, _lie(self.one, dirty)
        return initial, dirty, flags


class DataSizeLayer(Layer[DeviceCallbacks]):
    """Around MIG_DATA_SIZE."""

    def stop_copy_length(self) -> int:
        """Lie about the length."""
        lie = self.one.fault.lie
        struck = self.reach.strikes(self.one)
        if struck and lie is None:
            self.reach.act(self.one)
        length = self.next.stop_copy_length()
        return _lie(self.one, length) if struck and lie is not None else length


# --- regions ------------------------------------------------------------------------------------------------


def region(one: ArmedFault, reach: Reach, next_: RegionHandler) -> RegionHandler:
    """Around the accesses to one region, those of one direction."""
    fault = one.fault
    writes = fault.op == "region-write"

    def access(data: memoryview, offset: int, is_write: bool) -> None:
        if is_write is not writes:
            next_(data, offset, is_write)
            return
        here, at = (True, None) if fault.corrupt is None else _place(one, 0, len(data))
        struck = reach.strikes(one, here=here)
        one.seen_bytes += len(data)
        if struck and fault.corrupt is not None:
            _changed(data, offset, at)
        elif struck and fault.short is not None:
            _cut(data, offset)
        else:
            if struck:
                reach.act(one)
            next_(data, offset, is_write)

    def _changed(data: memoryview, offset: int, at: int | None) -> None:
        if writes:
            next_(_corrupted(one, data, at), offset, True)
        else:
            next_(data, offset, False)
            _flip(one, data, at)

    def _cut(data: memoryview, offset: int) -> None:
        kept = data[: fault.short]
        if len(kept):
            next_(kept, offset, writes)
        if not writes:
            data[len(kept) :] = bytes([_NO_ANSWER]) * (len(data) - len(kept))

    return access


# --- the bus ------------------------------------------------------------------------------------------------


class _TransferLayer(Layer[Bus]):
    def _struck(self, count: int) -> tuple[bool, int | None]:
        """Return whether a transfer of `count` bytes is struck, and where its content is."""
        one = self.one
        here, at = (True, None) if one.fault.corrupt is None else _place(one, 0, count)
        struck = self.reach.strikes(one, here=here)
        one.seen_bytes += count
        return struck, at


class IrqLayer(Layer[Bus]):
    """Around an interrupt, of whatever kind, when it leaves the device; an error loses it."""

    def raise_message(self, vector: int) -> bool:
        """Lose the message, of which the device knows nothing."""
        return True if self._lost() else self.next.raise_message(vector)

    def set_line(self, pending: bool, *, quiet: bool) -> None:
        """Leave the line as it is when it would rise; the next change may find it well."""
        one = self.one  # this layer is made anew when another fault comes or goes
        before, one.line = one.line, pending and not quiet
        lost = one.line and not before and self._lost()
        self.next.set_line(pending, quiet=quiet or lost)

    def _lost(self) -> bool:
        if not self.reach.strikes(self.one):
            return False
        if self.one.fault.action == "error":
            return True
        try:
            self.reach.act(self.one)
        except VfuDevError:  # the client is gone; who raises an interrupt hears nothing of where it went
            return True
        return False


class DmaReadLayer(_TransferLayer):
    """Around the device's reading of guest memory; looking whether a range is there is never struck."""

    def read(self, address: int, out: memoryview) -> None:
        """Change what comes, or how much."""
        one = self.one
        struck, at = self._struck(len(out))
        if struck and one.fault.short is not None:
            self.next.read(address, out[: one.fault.short])
            raise InjectedError(errno.EIO, str(one.fault))
        if struck and one.fault.corrupt is None:
            self.reach.act(one)
        self.next.read(address, out)
        if struck and one.fault.corrupt is not None:
            _flip(one, out, at)


class DmaWriteLayer(_TransferLayer):
    """Around the device's writing to guest memory."""

    def write(self, address: int, data: memoryview | bytes) -> None:
        """Change what goes, how much, or who learns of it."""
        one = self.one
        struck, at = self._struck(len(data))
        if struck:
            match one.fault.action:
                case "unlogged":
                    self.reach.write_unlogged(address, data)
                    return
                case "short":
                    self.next.write(address, data[: one.fault.short])
                    raise InjectedError(errno.EIO, str(one.fault))
                case "corrupt":
                    data = _corrupted(one, data, at)
                case _:
                    self.reach.act(one)
        self.next.write(address, data)


LAYERS: dict[str, Callable[[ArmedFault, Reach, Any], Any]] = {
    "region-read": region,
    "region-write": region,
    "transition": TransitionLayer,
    "mig-read": MigReadLayer,
    "mig-write": MigWriteLayer,
    "precopy-info": PrecopyInfoLayer,
    "data-size": DataSizeLayer,
    "dma-read": DmaReadLayer,
    "dma-write": DmaWriteLayer,
    "irq": IrqLayer,
    "reset": ResetLayer,
}
