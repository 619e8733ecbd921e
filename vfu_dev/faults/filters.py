"""The filters: one function for each operation, which returns what stands around the real one."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from vfu_dev.device.guest_memory import GuestMemory
from vfu_dev.errors import VfuDevError
from vfu_dev.faults.injected import ArmedFault, InjectedError
from vfu_dev.faults.spec import RANDOM
from vfu_dev.libvfio_user import ResetKind
from vfu_dev.migration import Migration
from vfu_dev.uapi import DeviceState

# How much a size that grows grows each time it is asked for.
GROWTH_BYTES = 16 << 20
HUGE = (1 << 64) - 1
# What a bus returns for what nobody answers.
_NO_ANSWER = 0xFF

RegionHandler = Callable[[memoryview, int, bool], None]
Sizes = Callable[[], tuple[int, int, int]]


class _Strikes(Protocol):
    def __call__(self, one: ArmedFault, here: bool = True, target: DeviceState | None = None) -> bool: ...


class Reach(NamedTuple):
    """What filters know of the device, and do to it.

    Attributes:
        strikes: counts a call and says whether the fault happens in it.
        act: does what changes no content: fails, waits, disconnects, ends.
    """

    migration: Migration
    strikes: _Strikes
    act: Callable[[ArmedFault], None]


def _flip(one: ArmedFault, data: memoryview | bytearray, at: int | None) -> None:
    """Flip the lowest bit of byte `at`, or any bit."""
    if at is not None:
        data[at] ^= 1
    elif len(data):
        data[one.random.randrange(len(data))] ^= 1 << one.random.randrange(8)


def _place(one: ArmedFault, begin: int, count: int) -> tuple[bool, int | None]:
    """Return whether corruption falls into `count` bytes from `begin`, and where; None for anywhere."""
    at = one.fault.corrupt
    if at == RANDOM:
        return count > 0, None
    assert isinstance(at, int)
    return begin <= at < begin + count, at - begin


# --- migration ----------------------------------------------------------------------------------------------


def transition(one: ArmedFault, reach: Reach, inner: Callable[[DeviceState], None]) -> Callable[..., None]:
    """Around an arc."""

    def arc(target: DeviceState) -> None:
        if reach.strikes(one, target=target):
            reach.act(one)
        inner(target)

    return arc


def _act_in_session(one: ArmedFault, reach: Reach) -> None:
    """Act; a failure leaves a hole in the stream, which the session under way does not survive."""
    try:
        reach.act(one)
    except VfuDevError as err:
        reach.migration.break_session(err)
        raise


def mig_read(one: ArmedFault, reach: Reach, inner: Callable[[memoryview], int]) -> Callable[..., int]:
    """Around MIG_DATA_READ."""
    fault, migration = one.fault, reach.migration

    def counted(buffer: memoryview) -> int:
        stored = inner(buffer) if len(buffer) else 0
        one.seen_bytes += stored
        return stored

    def read_into(buffer: memoryview) -> int:
        position = migration.sent()[0]
        match fault.action:
            case "truncate":
                end = fault.truncate or 0
                if reach.strikes(one, here=position + len(buffer) > end):
                    return counted(buffer[: max(0, end - position)])
            case "short":
                if reach.strikes(one):
                    return counted(buffer[: fault.short])
            case "corrupt":
                stored = counted(buffer)
                here, at = _place(one, position, stored)
                if reach.strikes(one, here=here):
                    _flip(one, buffer[:stored], at)
                return stored
            case _:
                if reach.strikes(one):
                    _act_in_session(one, reach)
        return counted(buffer)

    return read_into


def mig_write(one: ArmedFault, reach: Reach, inner: Callable[[memoryview], None]) -> Callable[..., None]:
    """Around MIG_DATA_WRITE; `data` is the library's buffer and stays as it is."""
    fault, migration = one.fault, reach.migration

    def counted(data: memoryview) -> None:
        if len(data):
            inner(data)
            one.seen_bytes += len(data)

    def when_received(data: memoryview) -> None:
        before = migration.initial_received
        inner(data)
        if reach.strikes(one, here=migration.initial_received > before):
            _act_in_session(one, reach)

    def write(data: memoryview) -> None:
        position = migration.received()
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
                    copy = bytearray(data)
                    _flip(one, copy, at)
                    data = memoryview(copy)
            case _:
                if reach.strikes(one):
                    _act_in_session(one, reach)
        counted(data)

    return write if fault.when == "always" else when_received


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


def precopy_info(one: ArmedFault, reach: Reach, inner: Sizes) -> Sizes:
    """Around MIG_GET_PRECOPY_INFO; a lie is about the dirty bytes, and `zero` about the initial ones too."""

    def precopy_sizes() -> tuple[int, int, int]:
        struck = reach.strikes(one)
        if struck and one.fault.lie is None:
            reach.act(one)
        initial, dirty, flags = inner()
        if struck and one.fault.lie is not None:
            initial, dirty = 0 if one.fault.lie == "zero" else initial, _lie(one, dirty)
        return initial, dirty, flags

    return precopy_sizes


def data_size(one: ArmedFault, reach: Reach, inner: Callable[[], int]) -> Callable[[], int]:
    """Around MIG_DATA_SIZE."""

    def stop_copy_length() -> int:
        struck = reach.strikes(one)
        if struck and one.fault.lie is None:
            reach.act(one)
        length = inner()
        return _lie(one, length) if struck and one.fault.lie is not None else length

    return stop_copy_length


# --- regions, interrupts, resets ----------------------------------------------------------------------------


def region(one: ArmedFault, reach: Reach, inner: RegionHandler) -> RegionHandler:
    """Around the accesses to one region, those of one direction."""
    fault = one.fault
    writes = fault.op == "region-write"

    def access(data: memoryview, offset: int, is_write: bool) -> None:
        if is_write is not writes:
            inner(data, offset, is_write)
            return
        here, at = (True, None) if fault.corrupt is None else _place(one, 0, len(data))
        struck = reach.strikes(one, here=here)
        one.seen_bytes += len(data)
        if struck and fault.corrupt is not None:
            _corrupted(data, offset, at)
        elif struck and fault.short is not None:
            _cut(data, offset)
        else:
            if struck:
                reach.act(one)
            inner(data, offset, is_write)

    def _corrupted(data: memoryview, offset: int, at: int | None) -> None:
        if writes:
            copy = bytearray(data)
            _flip(one, copy, at)
            inner(memoryview(copy), offset, True)
        else:
            inner(data, offset, False)
            _flip(one, data, at)

    def _cut(data: memoryview, offset: int) -> None:
        kept = data[: fault.short]
        if len(kept):
            inner(kept, offset, writes)
        if not writes:
            data[len(kept) :] = bytes([_NO_ANSWER]) * (len(data) - len(kept))

    return access


def irq(one: ArmedFault, reach: Reach, inner: Callable[[int], None]) -> Callable[[int], None]:
    """Around raising an interrupt, of whatever kind; one that fails is lost."""

    def raise_vector(vector: int) -> None:
        if reach.strikes(one):
            if one.fault.action == "error":
                return
            reach.act(one)
        inner(vector)

    return raise_vector


def reset(one: ArmedFault, reach: Reach, inner: Callable[[ResetKind], None]) -> Callable[..., None]:
    """Around a reset that the client asks for; a lost connection is none."""

    def follow(kind: ResetKind) -> None:
        if kind is not ResetKind.LOST_CONNECTION and reach.strikes(one):
            reach.act(one)
        inner(kind)

    return follow


# --- the device's own DMA -----------------------------------------------------------------------------------


class FaultyGuestMemory:
    """Guest memory that one fault stands around; looking whether a range is there is never struck."""

    def __init__(self, one: ArmedFault, reach: Reach, inner: GuestMemory) -> None:
        self._one = one
        self._reach = reach
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        # The log switch, counters, maps: whatever else the real one has.
        return getattr(self._inner, name)

    def check(self, address: int, count: int, *, write: bool) -> None:
        """See `GuestMemory`."""
        self._inner.check(address, count, write=write)

    def read(self, address: int, out: memoryview) -> None:
        """See `GuestMemory`; a fault changes what comes, or how much."""
        one = self._one
        struck, at = self._struck("dma-read", len(out))
        if struck and one.fault.short is not None:
            self._inner.read(address, out[: one.fault.short])
            raise InjectedError(errno.EIO, str(one.fault))
        if struck and one.fault.corrupt is None:
            self._reach.act(one)
        self._inner.read(address, out)
        if struck and one.fault.corrupt is not None:
            _flip(one, out, at)

    def write(self, address: int, data: memoryview | bytes) -> None:
        """See `GuestMemory`; a fault changes what goes, or how much."""
        one = self._one
        struck, at = self._struck("dma-write", len(data))
        if struck and one.fault.short is not None:
            self._inner.write(address, data[: one.fault.short])
            raise InjectedError(errno.EIO, str(one.fault))
        if struck and one.fault.corrupt is not None:
            copy = bytearray(data)
            _flip(one, copy, at)
            data = memoryview(copy)
        elif struck:
            self._reach.act(one)
        self._inner.write(address, data)

    def _struck(self, op: str, count: int) -> tuple[bool, int | None]:
        """Return whether a transfer of `count` bytes is struck, and where its content is."""
        one = self._one
        if one.fault.op != op:
            return False, None
        here, at = (True, None) if one.fault.corrupt is None else _place(one, 0, count)
        struck = self._reach.strikes(one, here=here)
        one.seen_bytes += count
        return struck, at


FILTERS: dict[str, Callable[[ArmedFault, Reach, Any], Any]] = {
    "region-read": region,
    "region-write": region,
    "transition": transition,
    "mig-read": mig_read,
    "mig-write": mig_write,
    "precopy-info": precopy_info,
    "data-size": data_size,
    "dma-read": FaultyGuestMemory,
    "dma-write": FaultyGuestMemory,
    "irq": irq,
    "reset": reset,
}
