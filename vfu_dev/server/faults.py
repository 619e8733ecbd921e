"""The places for faults around a served device, and what faults may do to its server."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from vfu_dev.device import Device
from vfu_dev.device.bus import Bus
from vfu_dev.faults import FaultBoard, Seam
from vfu_dev.libvfio_user import Context, DeviceCallbacks, Library


class ServerHost:
    """The `FaultHost` of one server."""

    def __init__(
        self, device: Device, context: Context, hold: Callable[[float | None, Callable[[], bool]], None]
    ) -> None:
        self.hold = hold
        self._device = device
        self._context = context

    def disconnect(self) -> None:
        """See `FaultHost`."""
        if not self._context.attached:
            return
        # The library keeps its descriptor, and finds the connection closed with its next call.
        with socket.socket(fileno=os.dup(self._context.poll_fd)) as connection:
            connection.shutdown(socket.SHUT_RDWR)

    def fail_device(self, reason: str) -> None:
        """See `FaultHost`."""
        self._context.fail_migration()
        self._device.migration.fail(reason)

    def write_unlogged(self, address: int, data: memoryview | bytes) -> None:
        """See `FaultHost`; called of a bus that has guest memory alone."""
        assert self._context.dma is not None
        self._context.dma.write_unlogged(address, data)


def fault_board(
    device: Device,
    library: Library,
    context: Context,
    callbacks: DeviceCallbacks,
    bus: Bus,
    hold: Callable[[float | None, Callable[[], bool]], None],
) -> FaultBoard:
    """Return the faults of a device that is set up in `context`; none is armed, and no layer stands anywhere.

    Args: hold: see `FaultHost`.
    """
    called = ["transition", "mig-read", "mig-write", "reset"]
    if library.is_ours:
        called += ["precopy-info", "data-size"]
    reached = ["irq"] if context.dma is None else ["irq", "dma-read", "dma-write"]
    accesses = ("region-read", "region-write")
    return FaultBoard(
        device,
        ServerHost(device, context, hold),
        [
            Seam(tuple(called), callbacks, context.exchange_callbacks),
            Seam(tuple(reached), bus, device.attach),
            *(Seam(accesses, gate.handler, gate.exchange, gate.region) for gate in context.gates),
        ],
    )
