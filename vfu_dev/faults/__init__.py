"""Faults: filters around a device's interface, put there when armed and taken away when cleared.

`Fault` says what goes wrong and when, `FaultBoard` puts it around a served device. Nothing that serves data
asks whether there are faults: without one armed, no code of this package runs (docs/faults.md).
"""

from vfu_dev.faults.board import FaultBoard, Wrapped
from vfu_dev.faults.injected import InjectedError
from vfu_dev.faults.spec import ACTIONS, OPERATIONS, Fault

__all__ = ["ACTIONS", "OPERATIONS", "Fault", "FaultBoard", "InjectedError", "Wrapped"]
