"""The part of the server that commands and faults use: a Protocol, so that neither imports the server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from vfu_dev.device import Device
from vfu_dev.faults import FaultBoard
from vfu_dev.figures import Figures
from vfu_dev.libvfio_user import Library
from vfu_dev.server.operator_workload import OperatorWorkload
from vfu_dev.server.register_trace import RegisterTrace

if TYPE_CHECKING:
    from vfu_dev.replay.replay import Replay


class Served(Protocol):
    """A device that is served.

    Attributes:
        load: the generator of an operator.
        register_trace: what a driver does to registers, where that is traced.
        replay: of a profile, where the device behaves as one.
    """

    device: Device
    library: Library
    load: OperatorWorkload
    faults: FaultBoard
    register_trace: RegisterTrace | None
    replay: Replay | None

    @property
    def connected(self) -> bool:
        """Whether there is a client."""

    def figures(self, after: int = 0) -> Figures:
        """Return the figures, and the samples after number `after`."""

    def stop(self) -> None:
        """End serving after this turn of the loop."""
