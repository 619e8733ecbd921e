"""Saving and resuming a device's stream through the client."""

from __future__ import annotations

import contextlib

from vfu_dev.client import ClientCommandError, VfioUserDevice
from vfu_dev.uapi import DeviceState

MAX_STREAM_BYTES = 1 << 30


def read_all(device: VfioUserDevice, count: int) -> bytes:
    """Read slices of at most `count` bytes until an empty one; nobody may be writing in PRE_COPY."""
    parts, total = [], 0
    while data := device.migration.read(count):
        parts.append(data)
        total += len(data)
        assert total < MAX_STREAM_BYTES, "the stream does not end: does somebody write to the device?"
    return b"".join(parts)


def save(device: VfioUserDevice, count: int = 1 << 20) -> bytes:
    """Read a device's rest of the stream in STOP_COPY, from whatever state, and leave it RUNNING."""
    device.migration.set_state(DeviceState.STOP_COPY)
    stream = read_all(device, count)
    device.migration.set_state(DeviceState.RUNNING)
    return stream


def abandon_resume(device: VfioUserDevice) -> None:
    """Take a device whose resume failed back to RUNNING: only a reset after a failed arc leads there."""
    if device.migration.get_state() is DeviceState.RESUMING:
        with contextlib.suppress(ClientCommandError):
            device.migration.set_state(DeviceState.STOP)
    device.reset()


def resume(device: VfioUserDevice, stream: bytes, *, count: int = 1 << 20, resuming: bool = False) -> None:
    """Write a whole stream in slices of `count` bytes and take the device to RUNNING."""
    if not resuming:
        device.migration.set_state(DeviceState.RESUMING)
    for start in range(0, len(stream), count):
        device.migration.write(stream[start : start + count])
    device.migration.set_state(DeviceState.RUNNING)
