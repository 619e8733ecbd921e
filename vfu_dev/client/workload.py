"""A load made by a vfio-user client: no VM, no guest; it can follow the device through a migration."""

from __future__ import annotations

import threading
import time
from collections import deque

import numpy as np
import numpy.typing as npt

from vfu_dev.client.device import VfioUserDevice
from vfu_dev.client.target import MemoryInfo, Target, read_memory, target_of
from vfu_dev.closing import Closing
from vfu_dev.workload import ArrayWriter, Program, Workload, WorkloadFigures

_NS = 1_000_000_000
# Writes between two checks of the clock and of the stop request: some milliseconds of messages.
_SLICE_WRITES = 256
_SLICE_BYTES = 1 << 20
# The longest and the shortest sleep: short enough to notice the end, long enough not to spin.
_NAP_SECONDS = 0.05
_WAKE_SECONDS = 0.001


class ClientWorkload(Closing):
    """Writes to the memory of `device` from a thread of its own, until it is closed.

    The connection is shared with the migrator of the device. While the device stands still the
    load is to be paused; afterwards it goes on, on another device if it moved.

    Args:
        spec: the load.
        index: region to write, None for the largest BAR.
        access: `auto`, `mmap` or `trap`.
        journal: remember what the memory has to hold, for `mismatched_bytes`; reads all of it first.

    Raises: ConfigError: the load does not fit the device; ProtocolError and others from the connection.
    """

    def __init__(
        self,
        device: VfioUserDevice,
        spec: Workload,
        *,
        index: int | None = None,
        access: str = "auto",
        journal: bool = False,
    ) -> None:
        self.spec = spec
        self.memory = MemoryInfo(device, index)
        self._access = access
        self._device = device
        self._program = Program(spec, self.memory.size_bytes, self.memory.page_bytes)
        self._target: Target = target_of(device, self.memory, access)
        self._held: npt.NDArray[np.uint8] | None = None
        self._journals: list[ArrayWriter | None] = []
        if journal:
            self._held = read_memory(device, self.memory)
            self._journals = [
                None if writes is None else ArrayWriter(self._held, self.memory.page_bytes, writes)
                for writes in self._program.writes
            ]
        sizes = [writes.write_bytes or 4096 for writes in self._program.writes if writes is not None]
        self._limit = max(1, min(_SLICE_WRITES, _SLICE_BYTES // max(sizes, default=1)))
        self._allowed = threading.Event()
        self._ending = threading.Event()
        self._writing = threading.Lock()
        self._error: Exception | None = None
        self._began = self._paused_at = time.monotonic_ns()
        self._ended: int | None = None
        self._quiet_ns = 0
        self._written_bytes = 0
        self._window: deque[tuple[int, int]] = deque([(self._began, 0)], maxlen=12)
        self._pacer = self._program.pacer(self._began)
        self._thread = threading.Thread(target=self._run, name="vfu-load", daemon=True)
        self._allowed.set()
        self._thread.start()

    def close(self) -> None:
        """Stop writing; the figures stay."""
        self._ending.set()
        self._allowed.set()
        self._thread.join()
        if self._ended is None:
            self._ended = time.monotonic_ns()
            self._pacer.settle(self._ended)
            self._target.close()

    def pause(self) -> None:
        """Write nothing any more until `go_on`; returns when the last write has its reply."""
        if not self._allowed.is_set():
            return
        self._allowed.clear()
        with self._writing:
            self._paused_at = time.monotonic_ns()

    def go_on(self, device: VfioUserDevice | None = None) -> None:
        """Go on writing, to `device` if the state moved there."""
        if self._allowed.is_set():
            return
        with self._writing:
            if device is not None:
                self._target.close()
                self._device = device
                memory = MemoryInfo(device, self.memory.index)
                self._target = target_of(device, memory, self._access)
            passed = time.monotonic_ns() - self._paused_at
            self._quiet_ns += passed
            self._pacer.hold(passed)
        self._allowed.set()

    def check(self) -> None:
        """Raise what ended the load, if something did."""
        if self._error is not None:
            raise self._error

    def figures(self) -> WorkloadFigures:
        """Return what it did so far."""
        now = time.monotonic_ns() if self._ended is None else self._ended
        quiet = self._quiet_ns
        if not self._allowed.is_set():
            quiet += max(0, now - self._paused_at)
        since, had = self._window[0]
        return WorkloadFigures.of(
            self._pacer,
            asked_rate_bytes=self._program.asked_rate_bytes,
            recent_rate_bytes=(self._written_bytes - had) * _NS / max(1, now - since),
            written_bytes=self._written_bytes,
            seconds=max(0, now - self._began - quiet) / _NS,
            quiet_seconds=quiet / _NS,
        )

    def mismatched_bytes(self) -> int | None:
        """Return how many bytes of the memory are not what was written; None without a journal.

        To be called while the load is paused or closed.
        """
        if self._held is None:
            return None
        return int(np.count_nonzero(read_memory(self._device, self.memory) != self._held))

    def _run(self) -> None:
        try:
            while not self._ending.is_set():
                if not self._allowed.wait(_NAP_SECONDS):
                    continue
                with self._writing:
                    busy = self._allowed.is_set() and not self._ending.is_set() and self._write_due()
                if not busy:
                    self._sleep()
        except Exception as error:  # raised again in the thread that waits for the load
            self._error = error

    def _write_due(self) -> bool:
        """Make a slice of what is due; returns whether there may be more."""
        now = time.monotonic_ns()
        made = 0
        for run in self._pacer.take(now, self._limit):
            writes = self._program.writes[run.phase]
            assert writes is not None
            self._written_bytes += self._target.write(writes, run.first, run.count)
            made += run.count
            if self._journals and (journal := self._journals[run.phase]) is not None:
                journal.write(run.first, run.count)
        if now - self._window[-1][0] >= _NS // 10:
            self._window.append((now, self._written_bytes))
        return made == self._limit

    def _sleep(self) -> None:
        following = self._pacer.next_ns()
        seconds = _NAP_SECONDS if following is None else (following - time.monotonic_ns()) / _NS
        self._ending.wait(min(max(seconds, _WAKE_SECONDS), _NAP_SECONDS))
