"""One message as a vfio-user server sees it, and the names that lies and reports use for commands."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field

from vfu_dev import uapi
from vfu_dev.uapi import VFIO_USER_HEADER as HEADER

COMMANDS = {
    "version": uapi.VFIO_USER_VERSION,
    "dma-map": uapi.VFIO_USER_DMA_MAP,
    "dma-unmap": uapi.VFIO_USER_DMA_UNMAP,
    "get-info": uapi.VFIO_USER_DEVICE_GET_INFO,
    "region-info": uapi.VFIO_USER_DEVICE_GET_REGION_INFO,
    "irq-info": uapi.VFIO_USER_DEVICE_GET_IRQ_INFO,
    "set-irqs": uapi.VFIO_USER_DEVICE_SET_IRQS,
    "region-read": uapi.VFIO_USER_REGION_READ,
    "region-write": uapi.VFIO_USER_REGION_WRITE,
    "reset": uapi.VFIO_USER_DEVICE_RESET,
    "write-multi": uapi.VFIO_USER_REGION_WRITE_MULTI,
    "feature": uapi.VFIO_USER_DEVICE_FEATURE,
    "mig-read": uapi.VFIO_USER_MIG_DATA_READ,
    "mig-write": uapi.VFIO_USER_MIG_DATA_WRITE,
    "precopy-info": uapi.VFIO_USER_MIG_GET_PRECOPY_INFO,
    "mig-window": uapi.VFIO_USER_MIG_DATA_WINDOW,
}
FEATURES = {
    "migration": uapi.VFIO_DEVICE_FEATURE_MIGRATION,
    "state": uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
    "log-start": uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
    "log-stop": uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP,
    "log-report": uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT,
    "data-size": uapi.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE,
    "precopy-info-v2": uapi.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2,
}
_NAMES = {number: name for name, number in COMMANDS.items()}
_FEATURE_NAMES = {number: name for name, number in FEATURES.items()}


@dataclass
class Request:
    """One message from the client, its body received whole."""

    id: int
    command: int
    flags: int
    payload: bytes
    fds: list[int]

    @property
    def name(self) -> str:
        """The command as lies name it, with the feature's name behind it; its number where it has none."""
        name = _NAMES.get(self.command, f"command {self.command}")
        return f"{name} {_FEATURE_NAMES.get(self.feature, self.feature)}" if self.feature else name

    @property
    def feature(self) -> int:
        """The feature index of a DEVICE_FEATURE request, else 0."""
        if self.command != COMMANDS["feature"] or len(self.payload) < 8:
            return 0
        return int(struct.unpack_from("<I", self.payload, 4)[0]) & uapi.VFIO_DEVICE_FEATURE_MASK


@dataclass
class Reply:
    """What goes back; a lie changes any of it. `size` None means the true one."""

    id: int
    command: int
    payload: bytearray = field(default_factory=bytearray)
    fds: list[int] = field(default_factory=list)
    flags: int = uapi.VFIO_USER_REPLY
    error: int = 0
    size: int | None = None
    before: bytes = b""  # raw bytes sent ahead of this reply
    after: bytes = b""  # and behind it
    send_bytes: int | None = None  # only this part of header and payload
    trickle: bool = False  # one byte a send: slow, but no lie
    delay_seconds: float = 0.0
    silent: bool = False
    close: bool = False

    def encode(self) -> bytes:
        """Return header and payload, cut to `send_bytes`."""
        size = HEADER.size + len(self.payload) if self.size is None else self.size
        header = HEADER.pack(
            self.id & 0xFFFF, self.command & 0xFFFF, size & 0xFFFFFFFF, self.flags, self.error & 0xFFFFFFFF
        )
        return (header + bytes(self.payload))[: self.send_bytes]


class RefusedError(Exception):
    """The honest device answers this request with an errno."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number
