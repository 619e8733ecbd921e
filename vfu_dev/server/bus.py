"""The bus of a served device: libvfio-user's DMA and interrupts, as configuration space allows them."""

from __future__ import annotations

from collections.abc import Callable

from vfu_dev.device import Device
from vfu_dev.device.bus import GuestMemory, NoBus
from vfu_dev.libvfio_user import Context
from vfu_dev.server import pci


class ServedBus:
    """The `Bus` of `device`, whose configuration space and DMA are set up in `context`.

    Args: request_waits: see `Bus`; the server's loop decides it.
    """

    def __init__(self, context: Context, device: Device, request_waits: Callable[[], bool]) -> None:
        self.request_waits = request_waits
        self._config = device.config
        self._irqs = context.irqs
        self.irq_kind, self.raise_message = context.irqs.kind, context.irqs.trigger
        self.take_back = context.irqs.take_back
        memory: GuestMemory = context.dma or NoBus()
        self.check, self.read, self.write = memory.check, memory.read, memory.write

    def is_master(self) -> bool:
        """See `Bus`."""
        return pci.is_bus_master(self._config)

    def set_line(self, pending: bool, *, quiet: bool) -> None:
        """See `Bus`; with a foreign library there is no INTx."""
        if self._irqs.all_kinds:
            pci.show_line(self._config, pending)
            self._irqs.set_level(pending and not quiet and not pci.is_line_disabled(self._config))
