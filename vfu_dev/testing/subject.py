"""Tools of the contract's checks: devices, accesses to all their parts, and their visible state."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack

from vfu_dev.device import Device, Msix, Region, Registers
from vfu_dev.errors import AccessError
from vfu_dev.migration import StateHasher
from vfu_dev.testing.memory_client import InMemoryClient

# Offsets of one memory that are written, whatever its size: a check takes a moment, not the time of a scan.
_SPOTS = 48


class Found(Exception):  # noqa: N818 - an end of the check, which is no error of the program
    """What a check found wrong."""


class Subject:
    """Devices of the kind that is checked, new for each check, and a fixed random sequence."""

    def __init__(self, factory: Callable[[], Device], changed_by_resume: Collection[str]) -> None:
        self.changed_by_resume = changed_by_resume
        self.random = random.Random(0x5646)
        self._factory = factory
        self._stack = ExitStack()

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def client(self) -> InMemoryClient:
        """Return a client of a new device, which lives until the check is through."""
        return self._stack.enter_context(InMemoryClient(self._factory()))

    def used(self) -> InMemoryClient:
        """Return a client of a new device that somebody wrote to, everywhere."""
        client = self.client()
        self.write_memory(client)
        self.write_registers(client)
        self.write_memory(client)
        return client

    def write_memory(self, client: InMemoryClient) -> None:
        """Write to the first, the last and random places of each memory behind a BAR."""
        for bar in client.device.bars:
            if isinstance(bar, Region):
                size = min(bar.bar_bytes, bar.size_bytes)
                spots = [self.random.randrange(size) for _ in range(_SPOTS)]
                for at in (0, size - 1, *spots):
                    count = min(self.random.choice((1, 2, 4, 8, 64)), size - at)
                    attempt(lambda: client.region_write(bar.index, at, self.random.randbytes(count)))  # noqa: B023

    def write_registers(self, client: InMemoryClient) -> None:
        """Write extremes and random values to every register, whole, in part, and across their borders."""
        for bar in client.device.bars:
            if isinstance(bar, Registers):
                for at, count in _register_accesses(bar):
                    for data in (
                        b"\xff" * count,
                        self.random.randbytes(count),
                        bytes([1]).ljust(count, b"\0"),
                    ):
                        what = f"BAR{bar.index}: writing {data[:8].hex()} ({count} bytes) at {at:#x}"
                        attempt(lambda: client.region_write(bar.index, at, data), what)  # noqa: B023


def _register_accesses(bar: Registers) -> Iterator[tuple[int, int]]:
    """Yield (offset, count) of accesses to each register: whole, its first byte, its end and beyond."""
    for field in bar.fields.values():
        size = bar.dtype[field.name].itemsize
        yield field.offset, size
        yield field.offset, 1
        yield field.offset + size - 1, min(2, bar.bar_bytes - field.offset - size + 1)


def attempt(work: Callable[[], object], what: str = "an access") -> None:
    """Do what a guest may do: the device may refuse it, and nothing else may happen."""
    try:
        work()
    except AccessError:
        return
    except Exception as err:
        last = traceback.extract_tb(err.__traceback__)[-1]
        place = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
        raise Found(f"{what} raised {type(err).__name__}: {err} ({place})") from err


def require(condition: bool, text: str) -> None:
    """End the check with `text` unless `condition` holds."""
    if not condition:
        raise Found(text)


def digest(device: Device) -> str:
    """Return the digest of everything that migrates."""
    hasher = StateHasher(device.migration.contents)
    while not hasher.advance():
        pass
    return hasher.digest()


def visible(client: InMemoryClient) -> dict[str, bytes]:
    """Return what a guest sees: each register, and of each memory what was ever written or is now."""
    seen = {}
    for bar in client.device.bars:
        if isinstance(bar, Registers):
            for field in bar.fields.values():
                if field.access != "wo":
                    count = bar.dtype[field.name].itemsize
                    seen[field.name] = bytes(client.region_read(bar.index, field.offset, count))
        elif not isinstance(bar, Msix):  # the client emulates MSI-X
            seen[bar.name] = _sample(client, bar.index, bar.bar_bytes)
    return seen


def _sample(client: InMemoryClient, index: int, size: int, limit: int = 16 << 20) -> bytes:
    """Return a BAR's content, of a large one the two ends."""
    if size <= limit:
        return bytes(client.region_read(index, 0, size))
    half = limit // 2
    return bytes(client.region_read(index, 0, half) + client.region_read(index, size - half, half))
