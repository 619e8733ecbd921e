"""A device that raises an interrupt in the last instant in which it may, every time it has to be quiet."""

from __future__ import annotations

from typing import Any

from vfu_dev.device.bus import Bus
from vfu_dev.device.reference import ReferenceDevice
from vfu_dev.migration.fsm import P2P_STATES, RUNNING_GROUP
from vfu_dev.uapi import DeviceState

VECTOR = 1


class LastStop(ReferenceDevice):
    """QEMU waits for the reply to the change of state, so it cannot have noticed this interrupt."""

    quiet = False

    def _state_changed(self, state: DeviceState) -> None:
        was_quiet, self.quiet = self.quiet, state not in RUNNING_GROUP - P2P_STATES
        # Not at the destination, which is told to be quiet before it has begun.
        if self.quiet and not was_quiet and state is not DeviceState.RESUMING:
            self.raise_irq(VECTOR)
        super()._state_changed(state)


class Forgetful:
    """A layer around a bus, which takes nothing back."""

    def __init__(self, next_: Bus) -> None:
        self.next = next_

    def __getattr__(self, name: str) -> Any:
        return getattr(self.next, name)

    def take_back(self, vector: int) -> bool:
        """Not look whether the client has noticed."""
        return False


class LastStopLost(LastStop):
    """The same, and does not look whether QEMU has noticed: as it was, and how an interrupt is lost."""

    def attach(self, bus: Bus) -> None:
        """Forget what was raised."""
        super().attach(Forgetful(bus))
