"""The client that times requests: the program of native/bench, a separate process, commanded from here.

`vfu_dev.client` checks every reply and serves requests of the server. A client in Python adds about 4 us to
each access of both sides, which would be a part of every ratio.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vfu_dev.bench.machine import keep_client
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
    """The target of MMIO: `count_bytes` at `offset` of a region, in `places` places, `stride_bytes` apart.

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
    """Bytes of migration data that were read or written, and the time in nanoseconds."""

    count_bytes: int
    nanoseconds: int


class RawClient(Closing):
    """One connection to the server at `path`. Raises: ClientError, from every method.

    Args: places: have migration data in a window, with as many requests of 4 MiB under way; 0: in
          messages.
    """

    def __init__(self, path: Path, places: int = 0) -> None:
        self._process = subprocess.Popen(
            [artifact("bench-client", build=True), path, *([str(places)] if places else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            self._answer()
            keep_client(self._process.pid)
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
        """Return nanoseconds per write of `calls` writes with No_reply, followed by one read."""
        return int(self._ask(f"post {calls} {where}")[0]) / calls

    def write_behind(self, where: Accesses) -> int:
        """Request 1 MiB of migration data, then write; return nanoseconds to the write's reply."""
        return int(self._ask(f"behind {where}")[0])

    def write_during(self, where: Accesses, delay_ns: int) -> int:
        """The same, with the write `delay_ns` later; return nanoseconds from there."""
        return int(self._ask(f"during {delay_ns} {where}")[0])

    # --- migration ----------------------------------------------------------------------------------------

    def set_state(self, state: DeviceState) -> None:
        """Take the device to `state`."""
        self._ask(f"state {int(state)}")

    def drain(self, file: Path | None = None) -> Moved:
        """Read all migration data available now, into `file` if given."""
        return Moved(*self._ask(f"drain {file or ''}".rstrip()).tolist())

    def feed(self, file: Path) -> Moved:
        """Write the whole state in `file`, from RESUMING to STOP; the device is in RUNNING afterwards."""
        return Moved(*self._ask(f"feed {file}").tolist())
