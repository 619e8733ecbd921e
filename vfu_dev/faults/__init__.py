"""Faults: layers around a device's callbacks, bus and regions, there while they are armed.

`Fault` says what goes wrong and when, `FaultBoard` puts it around a served device. Nothing that serves data
asks whether there are faults: without one armed, no code of this package runs (docs/faults.md).
"""

from vfu_dev.faults.board import FaultBoard, Seam
from vfu_dev.faults.injected import InjectedError
from vfu_dev.faults.spec import ACTIONS, OPERATIONS, Fault

__all__ = ["ACTIONS", "OPERATIONS", "Fault", "FaultBoard", "InjectedError", "Seam"]
