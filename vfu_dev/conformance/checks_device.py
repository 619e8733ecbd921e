"""DEVICE_GET_INFO."""

from __future__ import annotations

from vfu_dev import uapi
from vfu_dev.client import messages
from vfu_dev.conformance.model import Level, check, require, spec
from vfu_dev.conformance.session import Session

_SECTION = "VFIO_USER_DEVICE_GET_INFO"


def _info(session: Session) -> tuple[int, int, int, int]:
    request = messages.DEVICE_INFO.pack(messages.DEVICE_INFO.size, 0, 0, 0)
    payload = session.accepted(uapi.VFIO_USER_DEVICE_GET_INFO, request).payload
    require(
        len(payload) == messages.DEVICE_INFO.size, f"device info of {len(payload)} bytes, 16 were asked for"
    )
    argsz, flags, regions, irqs = messages.DEVICE_INFO.unpack(payload)
    return argsz, flags, regions, irqs


@check(Level.MUST, spec(_SECTION, "*argsz* is the size required for the full reply payload (16 bytes today)"))
def device_info_has_its_size(session: Session) -> None:
    """The reply is as long as was asked for, and says how long all of it is."""
    argsz, *_ = _info(session)
    require(argsz >= messages.DEVICE_INFO.size, f"device info with argsz {argsz}")


@check(Level.MUST, spec(_SECTION, "This version of the protocol only supports PCI devices."))
def device_is_a_pci_device(session: Session) -> None:
    """VFIO_DEVICE_FLAGS_PCI is set."""
    _, flags, _, _ = _info(session)
    require(flags & messages.DEVICE_FLAG_PCI, f"device flags {flags:#x} without PCI")


@check(
    Level.MUST,
    spec(
        "Device-Specific Regions",
        "Thus, for PCI devices this value can be equal to, or higher than, ``VFIO_PCI_NUM_REGIONS``.",
    ),
)
def device_has_the_pci_regions(session: Session) -> None:
    """There are at least the nine regions of a PCI device, and no more than a client can ask for."""
    _, _, regions, irqs = _info(session)
    require(regions >= uapi.VFIO_PCI_NUM_REGIONS, f"{regions} regions, a PCI device has 9")
    require(regions <= messages.MAX_REGIONS, f"{regions} regions, QEMU takes {messages.MAX_REGIONS} at most")
    require(irqs <= messages.MAX_IRQ_TYPES, f"{irqs} interrupt types, QEMU takes {messages.MAX_IRQ_TYPES}")


@check(
    Level.OPTIONAL,
    spec(
        _SECTION,
        "``VFIO_DEVICE_FLAGS_RESET`` indicates that the device supports the ``VFIO_USER_DEVICE_RESET`` "
        "message.",
    ),
)
def device_can_be_reset(session: Session) -> None:
    """VFIO_DEVICE_FLAGS_RESET is set."""
    _, flags, _, _ = _info(session)
    require(flags & messages.DEVICE_FLAG_RESET, f"device flags {flags:#x} without RESET")
