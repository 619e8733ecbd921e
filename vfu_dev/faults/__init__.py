"""Faults: layers around a device's callbacks, bus and regions, there while they are armed.

`Fault` defines what goes wrong and when, `FaultBoard` puts it around a served device. The data path does not
check for faults: without an armed fault, no code of this package runs (docs/faults.md).
"""

from vfu_dev.faults.board import FaultBoard, Seam
from vfu_dev.faults.injected import InjectedError
from vfu_dev.faults.spec import ACTIONS, OPERATIONS, Fault

__all__ = ["ACTIONS", "OPERATIONS", "Fault", "FaultBoard", "InjectedError", "Seam"]
