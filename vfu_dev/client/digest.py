"""Whether two devices hold the same state after a move: by their servers' digests, or by reading both."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from vfu_dev import uapi
from vfu_dev.client.control import ControlClient, ControlError
from vfu_dev.client.device import VfioUserDevice
from vfu_dev.errors import ProtocolError
from vfu_dev.socket_paths import control_path
from vfu_dev.uapi import DeviceState

AUDIT_POLL_SECONDS = 0.02
BAR_INDICES = range(uapi.VFIO_PCI_BAR0_REGION_INDEX, uapi.VFIO_PCI_BAR5_REGION_INDEX + 1)


def find_control(
    socket_path: str | os.PathLike[str], control: str | os.PathLike[str] | None
) -> ControlClient | None:
    """Connect to `control`, or to the control socket beside the device's where there is one that answers.

    Raises: ControlError: `control` was given and nobody listens there.
    """
    if control is not None:
        return ControlClient(control_path(control))
    beside = control_path(socket_path)
    if beside == Path(socket_path):
        return None
    try:
        return ControlClient(beside)
    except ControlError:
        return None


def audit_over(status: dict[str, Any]) -> bool:
    """Return whether the digest of the last save is final: its server compares memory with it afterwards."""
    save = status.get("save")
    if not isinstance(save, dict) or save.get("status") not in ("sent", "completed"):
        return True
    return save.get("audited") is not False


def audited_status(control: ControlClient) -> dict[str, Any]:
    """Return the source's status once its audit is over: 0.2 s for 1 GiB.

    Raises: ControlError: the server is gone. ProtocolError: it is in STOP_COPY, where no audit advances.
    """
    while not audit_over(status := control.status()):
        if status.get("state") == DeviceState.STOP_COPY.name:
            raise ProtocolError("the source is in STOP_COPY; its audit begins in STOP")
        time.sleep(AUDIT_POLL_SECONDS)
    return status


def saved_digest(status: dict[str, Any]) -> str | None:
    """Return the digest of the state that a source's server saved last."""
    return _digest_of(status, "save")


def resumed_digest(status: dict[str, Any]) -> str | None:
    """Return the digest of the state that a destination's server resumed last."""
    return _digest_of(status, "resume")


def _digest_of(status: dict[str, Any], session: str) -> str | None:
    found = status.get(session)
    digest = found.get("digest") if isinstance(found, dict) else None
    if digest is not None and not isinstance(digest, str):
        raise ProtocolError(f"the control socket sent a {session} digest that is not text")
    return digest


def memory_region(device: VfioUserDevice) -> int:
    """Return the index of the device's largest readable BAR: the reference device's memory is BAR2.

    Raises: ProtocolError: it has none.
    """
    count = min(device.info().num_regions, BAR_INDICES.stop)
    infos = [device.region_info(index) for index in range(count)]
    readable = [info for info in infos if info.readable and info.size_bytes]
    if not readable:
        raise ProtocolError("the server offers no BAR that can be read")
    return max(readable, key=lambda info: info.size_bytes).index


def memory_digest(device: VfioUserDevice, index: int, reporter: Callable[[int], object]) -> str:
    """Return xxh3_64 (hex) over region `index`, read through REGION_READ; the device must stand still.

    Args: reporter: called with the number of bytes of each read.
    """
    digest = xxhash.xxh3_64()
    buffer = bytearray(device.max_data_xfer_size)
    size = device.region_info(index).size_bytes
    for offset in range(0, size, len(buffer)):
        piece = memoryview(buffer)[: min(len(buffer), size - offset)]
        device.region_read_into(index, offset, piece)
        digest.update(piece)
        reporter(len(piece))
    return digest.hexdigest()
