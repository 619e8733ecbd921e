"""A client that calls the device instead of sending messages to it.

Its methods are those of `vfu_dev.client.VfioUserDevice`, so that what drives a device in memory drives a
served one too. The differences: nothing is negotiated, and only the device is tested.
"""

from __future__ import annotations

from vfu_dev.closing import Closing
from vfu_dev.device import Device
from vfu_dev.errors import AccessError
from vfu_dev.figures import Interruption
from vfu_dev.migration import PrecopyInfo
from vfu_dev.testing.bus import GuestRegion, InMemoryBus
from vfu_dev.uapi import DeviceState, MigrationFlags

Buffer = bytes | bytearray | memoryview


def _kill(data: bytearray) -> None:
    """Invalidate `data`, as a server's buffer is after the call, to expose a device that kept a view."""
    data[:] = b"\xdd" * len(data)


class InMemoryMigration:
    """Migration commands; see `vfu_dev.client.migration.Migration`."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def flags(self) -> MigrationFlags:
        """Return what the device announces."""
        return self._device.flags

    def get_state(self) -> DeviceState:
        """Return the migration state."""
        return self._device.migration.state

    def set_state(self, state: DeviceState) -> None:
        """Go to `state`, along single arcs. Raises: VfuDevError: an arc failed or does not exist."""
        self._device.migration.set_state(state)

    def data_size(self) -> int:
        """Return stop_copy_length."""
        return self._device.migration.stop_copy_length()

    def precopy_info(self) -> PrecopyInfo:
        """Return initial_bytes and dirty_bytes. Raises: StateError: not in PRE_COPY."""
        return self._device.migration.precopy_info()

    def read(self, count: int) -> bytes:
        """Read up to `count` bytes of the stream; nothing: none now (PRE_COPY), or the end (STOP_COPY)."""
        buffer = bytearray(count)
        stored = self._device.migration.read_into(memoryview(buffer))
        return bytes(buffer[:stored])

    def read_all(self, slice_bytes: int = 1 << 20) -> bytes:
        """Read until nothing comes."""
        parts = []
        while part := self.read(slice_bytes):
            parts.append(part)
        return b"".join(parts)

    def write(self, data: Buffer) -> None:
        """Take a slice of the stream. Raises: StreamError: refused, now and from now on."""
        copy = bytearray(data)
        try:
            self._device.migration.write(memoryview(copy))
        finally:
            _kill(copy)


class InMemoryClient(Closing):
    """Drives `device`, and closes it at the end.

    Attributes:
        bus: the device's bus: guest memory, mapped by `dma_map`, and interrupts.
        irqs: every vector raised as a message so far, in order.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.migration = InMemoryMigration(device)
        self.bus = InMemoryBus()
        self.irqs = self.bus.irqs
        device.attach(self.bus)
        self._handlers = {bar.index: device.region_handler(bar) for bar in device.bars}

    def close(self) -> None:
        """Give the device's memory back."""
        self.device.close()

    def region_read(self, index: int, offset: int, count: int) -> bytearray:
        """Read `count` bytes of BAR `index`. Raises: AccessError: refused."""
        data = bytearray(count)
        self._access(index, data, offset, False)
        return data

    def region_write(self, index: int, offset: int, data: Buffer) -> None:
        """Write `data` to BAR `index`. Raises: AccessError: refused."""
        copy = bytearray(data)
        try:
            self._access(index, copy, offset, True)
        finally:
            _kill(copy)

    def _access(self, index: int, data: bytearray, offset: int, is_write: bool) -> None:
        if index not in self._handlers:
            raise AccessError(f"there is no BAR{index}")
        self._handlers[index](memoryview(data), offset, is_write)

    def dma_map(self, iova: int, size_bytes: int) -> GuestRegion:
        """Give the device new zeroed memory at `iova`."""
        region = GuestRegion(iova, bytearray(size_bytes))
        self.bus.regions.append(region)
        return region

    def dma_unmap(self, region: GuestRegion) -> None:
        """Take `region` back."""
        self.bus.regions.remove(region)

    def work(self, turns: int = 1000) -> None:
        """Let the device do by itself what is due now, as a server's loop does between requests."""
        for _ in range(turns):
            if self.device.work_due() != 0:
                return
            self.device.work(0.001)

    def reset(self) -> None:
        """DEVICE_RESET: out of ERROR, else the migration state stays."""
        state = self.device.migration.state
        if state is DeviceState.ERROR:
            state = DeviceState.RUNNING
        self.device.reset(state, Interruption.RESET)

    def disconnect(self) -> None:
        """Lose the connection, which resets the device and ends every migration; the client stays usable."""
        self.device.reset(DeviceState.RUNNING, Interruption.DISCONNECTED)


def move(source: InMemoryClient, target: InMemoryClient, slice_bytes: int = 1 << 20) -> int:
    """Migrate: PRE_COPY while there is data, then STOP_COPY; returns the stream's length.

    `source` is in STOP afterwards, `target` runs.
    """
    target.migration.set_state(DeviceState.RESUMING)
    moved = 0
    states = [DeviceState.STOP_COPY]
    if MigrationFlags.VFIO_MIGRATION_PRE_COPY in source.migration.flags():
        states.insert(0, DeviceState.PRE_COPY)
    for state in states:
        source.migration.set_state(state)
        while data := source.migration.read(slice_bytes):
            target.migration.write(data)
            moved += len(data)
    source.migration.set_state(DeviceState.STOP)
    target.migration.set_state(DeviceState.RUNNING)
    return moved
