"""The checks' access to the server: connections, facts about it, and clean-up after each check."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vfu_dev import uapi
from vfu_dev.client import messages
from vfu_dev.client.dma import ClientDmaRegion, DmaSpace
from vfu_dev.client.frames import Buffer, command_name
from vfu_dev.conformance.model import CheckFailedError, NotApplicableError, require
from vfu_dev.conformance.peer import MAX_FDS, Peer, Reply
from vfu_dev.conformance.version import version_capabilities, version_request
from vfu_dev.uapi import DeviceState, MigrationFlags

GET, SET, PROBE = (
    uapi.VFIO_DEVICE_FEATURE_GET,
    uapi.VFIO_DEVICE_FEATURE_SET,
    uapi.VFIO_DEVICE_FEATURE_PROBE,
)
# The proposed capabilities; a server may leave out any of them.
PROPOSED: dict[str, Any] = {
    "max_msg_fds": MAX_FDS,
    "max_data_xfer_size": uapi.VFIO_USER_DEF_MAX_XFER_BYTES,
    "max_dma_maps": 65535,
    "pgsizes": 4096,
    "migration": {"pgsize": 4096},
    "migration_precopy_info": True,
    "migration_data_window": messages.MAX_WINDOW_BYTES,
    "write_multiple": True,
}
# 64 GiB: an address that every PC's device can reach, far from those that other programs map.
IOVA = 0x10_0000_0000
_ROOM = 64 << 10
# A server that still disconnects the previous client replies EBUSY.
_RETRY_SECONDS = 0.02


@dataclass(frozen=True)
class CheckedRegion:
    """The whole reply to DEVICE_GET_REGION_INFO."""

    index: int
    flags: int
    cap_offset: int
    size_bytes: int
    offset: int
    payload: bytes

    @property
    def mappable(self) -> bool:
        """VFIO_REGION_INFO_FLAG_MMAP."""
        return bool(self.flags & uapi.VFIO_REGION_INFO_FLAG_MMAP)

    @property
    def has_capabilities(self) -> bool:
        """VFIO_REGION_INFO_FLAG_CAPS."""
        return bool(self.flags & uapi.VFIO_REGION_INFO_FLAG_CAPS)


class Session:
    """The server, one check after the other.

    Args: connect: opens a new connection. Raises VfuDevError where there is no server.
          timeout_seconds: time limit of one check.
          max_state_bytes: size limit of a state that checks move.
    """

    def __init__(
        self, connect: Callable[[], socket.socket], timeout_seconds: float, max_state_bytes: int
    ) -> None:
        self._connect = connect
        self._peer: Peer | None = None
        self.timeout_seconds = timeout_seconds
        self.max_state_bytes = max_state_bytes
        self.deadline = time.monotonic() + timeout_seconds
        self.dma = DmaSpace()
        self.undo = contextlib.ExitStack()  # undoes what a check did
        self.capabilities: dict[str, Any] = {}
        self.saved: bytes | None = None  # the device's own state, see stream.py

    # --- connections ----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the time limit of the next check."""
        self.deadline = time.monotonic() + self.timeout_seconds
        if self._peer is not None:
            self._peer.deadline = self.deadline

    def drop(self) -> None:
        """Close the shared connection."""
        if self._peer is not None:
            self._peer.close()
            self._peer = None
        self.dma.close()

    def open(self) -> Peer:
        """Return a new connection before its VERSION; the caller closes it. See `fresh`."""
        return Peer(self._connect(), self.dma, self.deadline)

    @contextlib.contextmanager
    def fresh(self) -> Iterator[Peer]:
        """Yield a new connection before its VERSION; the shared one is closed first."""
        self.drop()
        peer = self.open()
        try:
            yield peer
        finally:
            peer.close()

    def hello(self, payload: bytes, fds: Sequence[int] = ()) -> tuple[Peer, Reply]:
        """Send VERSION with `payload` as the first message; return connection and reply.

        Raises: CheckFailedError: no reply, or the connection is closed; never OSError.
        """
        while True:
            self.drop()
            peer = self.open()
            try:
                reply = peer.ask(uapi.VFIO_USER_VERSION, payload, fds)
            except BaseException:
                peer.close()
                raise
            if not (reply.refused and reply.error == errno.EBUSY):
                return peer, reply
            peer.close()
            require(
                time.monotonic() < self.deadline, "the server reports that it is busy with another client"
            )
            time.sleep(_RETRY_SECONDS)

    @property
    def peer(self) -> Peer:
        """The shared connection, negotiated."""
        if self._peer is None or self._peer.broken:
            peer, reply = self.hello(version_request(PROPOSED))
            try:
                require(not reply.refused, f"VERSION is refused: {reply.reason}")
                self.capabilities = version_capabilities(reply.payload)
            except BaseException:
                peer.close()
                raise
            self._peer = peer
        return self._peer

    @property
    def broken(self) -> bool:
        """Whether the shared connection has ended or cannot be trusted."""
        return self._peer is not None and self._peer.broken

    # --- requests -------------------------------------------------------------------------------------------

    def ask(self, command: int, payload: Buffer = b"", fds: Sequence[int] = ()) -> Reply:
        """Send a request on the shared connection; return its reply, which may be an error."""
        return self.peer.ask(command, payload, fds)

    def accepted(
        self, command: int, payload: Buffer = b"", fds: Sequence[int] = (), *, what: str = ""
    ) -> Reply:
        """Send a request that must succeed; return its reply."""
        reply = self.ask(command, payload, fds)
        require(not reply.refused, f"{what or command_name(command)} is refused: {reply.reason}")
        return reply

    def refused(
        self,
        command: int,
        payload: Buffer = b"",
        fds: Sequence[int] = (),
        *,
        what: str,
        number: int | None = None,
    ) -> Reply:
        """Send a request that must fail, with errno `number` if given; return the error reply."""
        reply = self.ask(command, payload, fds)
        require(reply.refused, f"{what} succeeds")
        if number is not None:
            wrong = f"{what} fails with {reply.reason}, not {os.strerror(number)}"
            require(reply.error == number, wrong)
        return reply

    # --- what there is --------------------------------------------------------------------------------------

    def limit(self, name: str, default: int) -> int:
        """Return a number of the VERSION reply, `default` if it is missing."""
        self.peer  # noqa: B018 - negotiates
        value = self.capabilities.get(name, default)
        return value if isinstance(value, int) and value > 0 else default

    @property
    def transfer_bytes(self) -> int:
        """The largest count that both sides accept."""
        own = uapi.VFIO_USER_DEF_MAX_XFER_BYTES
        return min(self.limit("max_data_xfer_size", own), own)

    @cached_property
    def info(self) -> tuple[int, int, int]:
        """(flags, num_regions, num_irqs) of DEVICE_GET_INFO, bounded."""
        request = messages.DEVICE_INFO.pack(messages.DEVICE_INFO.size, 0, 0, 0)
        payload = self.accepted(uapi.VFIO_USER_DEVICE_GET_INFO, request).payload
        require(len(payload) >= messages.DEVICE_INFO.size, f"device info of {len(payload)} bytes")
        _, flags, regions, irqs = messages.DEVICE_INFO.unpack_from(payload)
        return flags, min(regions, messages.MAX_REGIONS), min(irqs, messages.MAX_IRQ_TYPES)

    def ask_region(self, index: int, room: int = _ROOM) -> Reply:
        """Send DEVICE_GET_REGION_INFO with argsz `room`."""
        request = messages.REGION_INFO.pack(room, 0, index, 0, 0, 0)
        return self.ask(uapi.VFIO_USER_DEVICE_GET_REGION_INFO, request)

    def region(self, index: int) -> CheckedRegion:
        """Return the description of region `index`."""
        reply = self.ask_region(index)
        require(not reply.refused, f"GET_REGION_INFO of region {index} is refused: {reply.reason}")
        size = messages.REGION_INFO.size
        require(len(reply.payload) >= size, f"info of region {index} of {len(reply.payload)} bytes")
        _, flags, found, cap_offset, length, offset = messages.REGION_INFO.unpack_from(reply.payload)
        return CheckedRegion(found, flags, cap_offset, length, offset, reply.payload)

    def regions(self) -> list[CheckedRegion]:
        """Return every region that is not empty."""
        found = [self.region(index) for index in range(self.info[1])]
        return [region for region in found if region.size_bytes]

    def irq(self, index: int) -> tuple[int, int]:
        """Return (flags, count) of interrupt type `index`."""
        request = messages.IRQ_INFO.pack(messages.IRQ_INFO.size, 0, index, 0)
        payload = self.accepted(uapi.VFIO_USER_DEVICE_GET_IRQ_INFO, request).payload
        require(len(payload) >= messages.IRQ_INFO.size, f"interrupt info of {len(payload)} bytes")
        _, flags, _, count = messages.IRQ_INFO.unpack_from(payload)
        return flags, count

    # --- DMA ------------------------------------------------------------------------------------------------

    def dma_request(self, iova: int, size_bytes: int, flags: int = 3, offset: int = 0) -> bytes:
        """Return the payload of a DMA_MAP."""
        return messages.DMA_MAP.pack(messages.DMA_MAP.size, flags, offset, iova, size_bytes)

    def map(self, iova: int, size_bytes: int, *, shared: bool = True, flags: int = 3) -> ClientDmaRegion:
        """Map new memory, which is unmapped after the check.

        Raises: NotApplicableError: the server has no DMA at all.
        """
        region = self.dma.create(iova, size_bytes, flags, shared)
        try:
            fds = [region.fd] if shared else []
            reply = self.ask(uapi.VFIO_USER_DMA_MAP, self.dma_request(iova, size_bytes, flags), fds)
            if reply.refused and reply.error in (errno.ENOSYS, errno.ENOTSUP, errno.ENOTTY):
                raise NotApplicableError("the server does no DMA")
            require(not reply.refused, f"DMA_MAP of {size_bytes} bytes is refused: {reply.reason}")
        except BaseException:
            region.close()
            raise
        self.dma.regions[iova] = region
        self.undo.callback(self._unmap, iova, size_bytes)
        return region

    def _unmap(self, iova: int, size_bytes: int) -> None:
        if iova in self.dma.regions:
            self.unmap(iova, size_bytes)

    def unmap(self, iova: int, size_bytes: int) -> Reply:
        """Send DMA_UNMAP for a range that `map` mapped."""
        request = messages.DMA_UNMAP.pack(messages.DMA_UNMAP.size, 0, iova, size_bytes)
        reply = self.accepted(uapi.VFIO_USER_DMA_UNMAP, request)
        region = self.dma.regions.pop(iova, None)
        if region is not None:
            region.close()
        return reply

    # --- features and migration states ----------------------------------------------------------------------

    def ask_feature(self, flags: int, data: bytes = b"", argsz: int | None = None) -> Reply:
        """Send DEVICE_FEATURE; by default `argsz` has room for any reply."""
        room = _ROOM if argsz is None else argsz
        return self.ask(uapi.VFIO_USER_DEVICE_FEATURE, messages.FEATURE.pack(room, flags) + data)

    def has_feature(self, feature: int, methods: int) -> bool:
        """Return whether PROBE succeeds."""
        return not self.ask_feature(feature | methods | PROBE).refused

    def get_feature(self, feature: int, data_bytes: int, request: bytes = b"", what: str = "") -> bytes:
        """Return the data of a GET."""
        room = messages.FEATURE.size + max(data_bytes, len(request))
        reply = self.ask_feature(feature | GET, request, room)
        require(not reply.refused, f"{what or f'feature {feature}'} is refused: {reply.reason}")
        data = reply.payload[messages.FEATURE.size :]
        require(
            len(data) >= data_bytes, f"{len(data)} bytes of {what or f'feature {feature}'}, not {data_bytes}"
        )
        return data

    @cached_property
    def flags(self) -> MigrationFlags:
        """The device's migration flags; 0 if it does not migrate."""
        reply = self.ask_feature(uapi.VFIO_DEVICE_FEATURE_MIGRATION | GET)
        if reply.refused or len(reply.payload) < messages.FEATURE.size + 8:
            return MigrationFlags(0)
        (flags,) = struct.unpack_from("<Q", reply.payload, messages.FEATURE.size)
        return MigrationFlags(flags & 0x7)

    def need_migration(self) -> None:
        """Raise NotApplicableError if the device does not migrate."""
        if not self.flags:
            raise NotApplicableError("the device does not migrate")

    def need_states(self, *states: DeviceState) -> None:
        """Raise NotApplicableError if the device lacks one of `states`."""
        self.need_migration()
        optional = {
            DeviceState.PRE_COPY: MigrationFlags.VFIO_MIGRATION_PRE_COPY,
            DeviceState.RUNNING_P2P: MigrationFlags.VFIO_MIGRATION_P2P,
            DeviceState.PRE_COPY_P2P: MigrationFlags.VFIO_MIGRATION_PRE_COPY
            | MigrationFlags.VFIO_MIGRATION_P2P,
        }
        for state in states:
            needed = optional.get(state, MigrationFlags(0))
            if needed & self.flags != needed:
                raise NotApplicableError(f"the device has no {state.name}")

    def state(self) -> int:
        """Return the device's migration state."""
        data = self.get_feature(uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, 8, what="the migration state")
        return int(struct.unpack_from("<I", data)[0])

    def ask_state(self, state: int, argsz: int | None = None) -> Reply:
        """Request `state`; return the reply."""
        data = struct.pack("<II", state, 0xFFFFFFFF)
        room = messages.FEATURE.size + len(data) if argsz is None else argsz
        return self.ask_feature(uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE | SET, data, room)

    def set_state(self, state: DeviceState) -> None:
        """Take the device to `state`."""
        reply = self.ask_state(state)
        require(not reply.refused, f"the way to {state.name} is refused: {reply.reason}")

    # --- clean-up ---------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Undo what a check did: mappings, interrupts, the migration state.

        If that fails, the connection is closed, and the next check opens another.
        Raises: CheckFailedError, VfuDevError: there is no server any more, or none that answers.
        """
        self.begin()
        broken = self.broken
        try:
            self.undo.close()
            if not broken:
                self._back_to_running()
        except CheckFailedError:
            self.drop()
        if self._peer is not None:
            self._peer.drop_fds()
        if self.broken:
            self.drop()
        self.begin()
        # Whether it still answers: on the shared connection, or on a new one if that was lost.
        request = messages.DEVICE_INFO.pack(messages.DEVICE_INFO.size, 0, 0, 0)
        self.ask(uapi.VFIO_USER_DEVICE_GET_INFO, request)

    def _back_to_running(self) -> None:
        if self._peer is None or not self.flags or self.state() == DeviceState.RUNNING:
            return
        if not self.ask_state(DeviceState.RUNNING).refused:
            return
        self.accepted(uapi.VFIO_USER_DEVICE_RESET)
        if self.state() != DeviceState.RUNNING:
            self.set_state(DeviceState.RUNNING)
