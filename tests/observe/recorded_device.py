"""The reference device with a forecaster that keeps what it is fed: `serve --device recorded_device.py:…`.

Each completed migration is one line of JSON, the events of `movekit`, appended to the file that the
environment names, with the device's name in place of `{}`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from movekit import Recorder

from vfu_dev.device.reference import ReferenceDevice

FILE_VARIABLE = "VFU_DEV_RECORDED_MOVES"


class _ToFile(Recorder):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def done(self) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(self.events) + "\n")


class RecordedDevice(ReferenceDevice):
    """A reference device, but for that; both ends of a migration take it for one."""

    def initialise(self) -> None:
        """Put the forecaster in; it is called once, when the migration was made."""
        super().initialise()
        if not isinstance(self.migration.observer.forecaster, Recorder):
            path = os.environ[FILE_VARIABLE].replace("{}", self.name)
            self.migration.observer.forecaster = _ToFile(Path(path))
