"""The PCI identity of a device, in configuration space."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PciIdentity:
    """What configuration space says the device is; `class_code` is base class, subclass, interface.

    The subsystem's ids are the device's own where None.
    """

    vendor: int
    device: int
    class_code: int
    revision: int
    subsystem_vendor: int | None = None
    subsystem: int | None = None

    @property
    def subsystem_ids(self) -> tuple[int, int]:
        """Vendor and id of the subsystem."""
        return (
            self.vendor if self.subsystem_vendor is None else self.subsystem_vendor,
            self.device if self.subsystem is None else self.subsystem,
        )
