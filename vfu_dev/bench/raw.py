"""The client that requests are timed with: native/bench/client.c, in a process of its own, asked from here.

`vfu_dev.client` checks whatever it gets and serves requests of the server, and a client in Python takes some
4 us of each access for itself, on both sides alike: that would be a part of every ratio.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vfu_dev.builds import artifact
from vfu_dev.closing import Closing
from vfu_dev.errors import VfuDevError
from vfu_dev.uapi import DeviceState

Nanoseconds = npt.NDArray[np.int64]

_STOP_SECONDS = 30.0


class ClientError(VfuDevError):
    """The client ended: the server is gone, or replied with an error."""


@dataclass(frozen=True)
class Accesses:
    """Where MMIO goes: `count_bytes` at `offset` of a region, in `places` places, `stride_bytes` apart.

    The client visits the places, a power of two, in an order of its own.
    """

    index: int
    offset: int = 0
    count_bytes: int = 8
    stride_bytes: int = 0
    places: int = 1

    def __str__(self) -> str:
        return f"{self.index} {self.offset} {self.count_bytes} {self.stride_bytes} {self.places}"


class Moved(NamedTuple):
    """Migration data that went one way, and how long that took."""

    count_bytes: int
    nanoseconds: int


class RawClient(Closing):
    """One connection to the server at `path`. Raises: ClientError, from every method."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [artifact("bench-client", build=True), path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Disconnect."""
        self._process.kill()
        self._process.communicate(timeout=_STOP_SECONDS)

    def _ask(self, command: str) -> Nanoseconds:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n".encode())
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Nanoseconds:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._process.stderr.read().decode(errors="replace").strip()
            raise ClientError(f"the measuring client ended: {said}")
        count = int(line)
        return np.frombuffer(self._process.stdout.read(8 * count), dtype=np.int64)

    # --- MMIO ---------------------------------------------------------------------------------------------

    def reads(self, where: Accesses, calls: int) -> Nanoseconds:
        """Return nanoseconds from request to reply of each of `calls` reads, shape (calls,)."""
        return self._ask(f"read {calls} {where}")

    def writes(self, where: Accesses, calls: int) -> Nanoseconds:
        """Return the same of writes."""
        return self._ask(f"write {calls} {where}")

    def posted(self, where: Accesses, calls: int) -> float:
        """Return nanoseconds a write, of `calls` that ask for no reply and a read at the end."""
        return int(self._ask(f"post {calls} {where}")[0]) / calls

    def write_behind(self, where: Accesses) -> int:
        """Ask for 1 MiB of migration data, and write right behind; return nanoseconds to that reply."""
        return int(self._ask(f"behind {where}")[0])

    # --- migration ----------------------------------------------------------------------------------------

    def set_state(self, state: DeviceState) -> None:
        """Take the device to `state`."""
        self._ask(f"state {int(state)}")

    def drain(self, file: Path | None = None) -> Moved:
        """Read all migration data that is there now, into `file` if that is given."""
        return Moved(*self._ask(f"drain {file or ''}".rstrip()).tolist())

    def feed(self, file: Path) -> Moved:
        """Hand over the whole state in `file`, from RESUMING to STOP; the device is running afterwards."""
        return Moved(*self._ask(f"feed {file}").tolist())
