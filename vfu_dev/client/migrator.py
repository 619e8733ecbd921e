"""Device-to-device migration without a VM: what QEMU does with two servers, on two connections in one thread.

The convergence rule is QEMU's (migration/migration.c of 10.2.2): every 100 ms bandwidth = bytes / time and
threshold = bandwidth x downtime limit; the exact size is asked only when the estimate fits under the
threshold, and the source stops once the exact size does. Unlike QEMU without switchover-ack, all initial data
goes first: `<linux/vfio.h>` says that leaving earlier makes the stop phase slower.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vfu_dev.client.device import VfioUserDevice
from vfu_dev.client.frames import Call, ClientCommandError
from vfu_dev.client.migration import ClientMigration, two_buffers
from vfu_dev.convergence import (
    DOWNTIME_LIMIT_SECONDS,
    WINDOW_SECONDS,
    remaining_text,
    threshold_bytes,
    threshold_note,
)
from vfu_dev.errors import StateError, VfuDevError
from vfu_dev.sizes import format_size
from vfu_dev.uapi import DeviceState, MigrationFlags

MIN_SLICE_BYTES = 4096
IDLE_SECONDS = 0.02  # how long to leave the device alone when PRE_COPY has nothing to read
# stop_copy_length is an estimate (native/spec/); a stream longer than it by more than this counts as endless.
STOP_COPY_SLACK_BYTES = 16 << 20


class MigrationError(VfuDevError):
    """The move failed; `phase` says where, and the source is running again unless the text says otherwise."""

    def __init__(self, phase: str, reason: str) -> None:
        self.phase = phase
        self.reason = reason
        super().__init__(f"migration failed in {phase}: {reason}")


@dataclass(frozen=True)
class ClientOptions:
    """Options of `migrate`; `None` means no limit."""

    downtime_limit_seconds: float = DOWNTIME_LIMIT_SECONDS
    max_bandwidth: int | None = None  # bytes per second; kept from 40 KiB/s on
    max_passes: int | None = 30
    timeout_seconds: float | None = None
    pre_copy: bool = True
    resume_source: bool = False


@dataclass
class ClientProgress:
    """Progress of a migration; the progress callback gets the same object each time."""

    phase: str = "setup"
    initial_bytes: int = 0  # first report
    remaining_initial_bytes: int = 0
    remaining_dirty_bytes: int = 0
    stop_copy_length: int | None = None  # last asked
    precopy_bytes: int = 0
    stop_copy_bytes: int = 0
    passes: int = 0
    reinits: int = 0  # number of times that the device had new initial data (VFIO_PRECOPY_INFO_REINIT)
    transfer_rate: float = 0.0  # bytes per second, last window
    threshold_bytes: float = 0.0
    total_seconds: float = 0.0
    downtime_seconds: float = 0.0  # source stopped to destination running, verification left out
    verify_seconds: float = 0.0

    @property
    def transferred_bytes(self) -> int:
        """Stream bytes moved so far."""
        return self.precopy_bytes + self.stop_copy_bytes

    @property
    def remaining_bytes(self) -> int:
        """Bytes known to be left."""
        return self.remaining_initial_bytes + self.remaining_dirty_bytes


class _Side:
    """One end of a move: an error of it has its role as `side`, for the text to say which server it was."""

    def __init__(self, role: str, migration: ClientMigration) -> None:
        self._role = role
        self._migration = migration

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._migration, name)
        return self._blamed(found) if callable(found) else found

    def _blamed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            try:
                return method(*arguments)
            except VfuDevError as error:
                error.__dict__["side"] = self._role
                raise

        return call


def _told(error: VfuDevError) -> str:
    side = getattr(error, "side", None)
    return str(error) if side is None else f"{side}: {error}"


class Migrator:
    """Moves the state of `source` into `destination`.

    Args: reporter: called often, from this thread, with the live Progress.
          verify: called once while both devices stand still, before the destination runs; raises to refuse.
    """

    def __init__(
        self,
        source: VfioUserDevice,
        destination: VfioUserDevice,
        options: ClientOptions | None = None,
        *,
        reporter: Callable[[ClientProgress], None] | None = None,
        verify: Callable[[], None] | None = None,
    ) -> None:
        self.source = _Side("source", source.migration)
        self.destination = _Side("destination", destination.migration)
        self.options = options or ClientOptions()
        self.progress = ClientProgress()
        self._reporter = reporter or (lambda _: None)
        self._verify = verify
        size = min(source.max_data_xfer_size, destination.max_data_xfer_size)
        self._buffers = two_buffers(source.migration, destination.migration, size)
        # A read is at most one window's worth: an excess in one window is not made up for in the next.
        self._slice = size
        if self.options.max_bandwidth is not None:
            self._slice = min(size, max(MIN_SLICE_BYTES, int(self.options.max_bandwidth * WINDOW_SECONDS)))
        self._turn = 0
        self._read: Call | None = None  # the reads and writes under way
        self._write: Call | None = None
        self._began = self._stopped = 0.0  # the migration; the source's device
        self._window_began = 0.0
        self._window_bytes = 0

    def run(self) -> ClientProgress:
        """Migrate; afterwards the destination is RUNNING and the source in STOP (or RUNNING, if asked).

        Raises: MigrationError: with the source back in RUNNING wherever that was possible. The destination
                may hold half a state then; its server drops it with the connection.
        """
        state = self.progress
        self._began = time.monotonic()
        try:
            pre_copy = self._setup()
            if pre_copy:
                self._pre_copy()
            self._stop_copy()
            self._finish()
        except VfuDevError as error:
            first = self._first_error(error)
            raise MigrationError(state.phase, _told(first) + self._recover()) from first
        except BaseException:  # Ctrl-C among them: the source must not stay behind in PRE_COPY
            self._recover()
            raise
        self._enter("completed")
        return state

    # --- phases ---------------------------------------------------------------------------------------------

    def _setup(self) -> bool:
        """Check both ends and open the stream; return whether PRE_COPY is used."""
        flags = self.source.flags()
        for name, found in (("source", flags), ("destination", self.destination.flags())):
            if not found:
                raise StateError(f"the {name} does not support migration")
        state = self.source.get_state()
        if state is not DeviceState.RUNNING:
            raise StateError(f"the source is in {state.name}, not RUNNING")
        self.destination.set_state(DeviceState.RESUMING)
        self._window_began = self._began
        pre_copy = self.options.pre_copy and MigrationFlags.VFIO_MIGRATION_PRE_COPY in flags
        if pre_copy:
            if self.source.has_precopy_info:
                with contextlib.suppress(ClientCommandError):  # a server that never has new initial data
                    self.source.enable_precopy_info_v2()
            self._enter("pre-copy")
            self.source.set_state(DeviceState.PRE_COPY)
        return pre_copy

    def _pre_copy(self) -> None:
        """Read and write until the bytes left fit into the downtime limit, or another limit is reached."""
        state = self.progress
        self._query()
        state.initial_bytes = state.remaining_initial_bytes
        left_in_pass = max(1, state.remaining_bytes)
        call = self._submit_read()
        leaving = False
        while True:
            count, following = self._take(call, again=not leaving)
            state.precopy_bytes += count
            left_in_pass -= count
            window_over = self._window(count)
            if left_in_pass <= 0 or count == 0 or window_over or leaving:
                self._query()
                if left_in_pass <= 0 or (count == 0 and not leaving):
                    state.passes += 1
                    left_in_pass = max(1, state.remaining_bytes)
                # Sizes leave out what a read under way was promised, and the device goes on while that passes
                # the link: the sizes that decide are those after a read with none behind it.
                leaving = self._converged()
                if leaving and following is None:
                    return
                self._check_limits()
                self._reporter(state)
            if count == 0:
                self._idle()
            call = following or self._submit_read()

    def _stop_copy(self) -> None:
        state = self.progress
        self._enter("stop-copy")
        self._stopped = time.monotonic()
        self.source.set_state(DeviceState.STOP_COPY)
        announced = self._data_size()
        state.stop_copy_length = announced
        state.remaining_initial_bytes = 0
        call: Call | None = self._submit_read()
        while call is not None:
            count, call = self._take(call)
            state.stop_copy_bytes += count
            state.remaining_dirty_bytes = max(0, (announced or 0) - state.stop_copy_bytes)
            if announced is not None and state.stop_copy_bytes > 2 * announced + STOP_COPY_SLACK_BYTES:
                raise StateError(
                    f"the source announced {announced} bytes for STOP_COPY and sent {state.stop_copy_bytes}"
                )
            if self._window(count):
                self._check_time()
                self._reporter(state)
        self._finish_write()
        state.remaining_dirty_bytes = 0
        state.downtime_seconds = time.monotonic() - self._stopped

    def _finish(self) -> None:
        state = self.progress
        self.source.set_state(DeviceState.STOP)
        self.destination.set_state(DeviceState.STOP)  # fails unless the whole stream was verified
        state.downtime_seconds = time.monotonic() - self._stopped
        if self._verify is not None:
            self._enter("verify")
            began = time.monotonic()
            self._verify()
            state.verify_seconds = time.monotonic() - began
        self._enter("switchover")
        began = time.monotonic()
        self.destination.set_state(DeviceState.RUNNING)
        state.downtime_seconds += time.monotonic() - began
        if self.options.resume_source:
            self.source.set_state(DeviceState.RUNNING)

    def _first_error(self, error: VfuDevError) -> VfuDevError:
        """Return why a read under way failed, if it did: a request sent after it fails because of that."""
        call, self._read = self._read, None
        if call is not None and isinstance(error, ClientCommandError):
            try:
                self.source.finish_read(call)
            except VfuDevError as before:
                return before
        return error

    def _recover(self) -> str:
        """Take the source back to RUNNING; return what to add to the reason."""
        try:
            current = self.source.get_state()
            if current is not DeviceState.RUNNING:
                self.source.set_state(DeviceState.RUNNING)
        except VfuDevError as error:
            return f"; the source could not be taken back to RUNNING: {error}"
        return ""

    # --- data -----------------------------------------------------------------------------------------------

    def _submit_read(self) -> Call:
        """Ask for the next slice, into the buffer that no write is using."""
        self._read = self.source.submit_read(self._buffers[self._turn].first(self._slice))
        return self._read

    def _take(self, call: Call, *, again: bool = True) -> tuple[int, Call | None]:
        """Finish a read, ask for the next one and send this one on.

        Both servers work at the same time this way: the source gathers a slice while the destination
        scatters the one before.

        Returns: bytes read, and the read that is under way now; None after an empty one, or if not `again`.
        """
        self._read = None
        try:
            count = self.source.finish_read(call)
        except ClientCommandError as error:
            if error.errno != errno.ENOMSG or self.progress.phase != "pre-copy":
                raise
            count = 0  # nothing now, in the kernel's words
        self._finish_write()  # its buffer takes the next read
        data = self._buffers[self._turn].first(count)
        self._turn ^= 1
        following = self._submit_read() if count and again else None
        if count:
            self._write = self.destination.submit_write(data)
        return count, following

    def _finish_write(self) -> None:
        if self._write is not None:
            call, self._write = self._write, None
            self.destination.finish_write(call)

    # --- figures --------------------------------------------------------------------------------------------

    def _query(self) -> None:
        """Refresh what PRE_COPY has left."""
        state = self.progress
        if self.source.has_precopy_info:
            info = self.source.precopy_info()
            state.remaining_initial_bytes = info.initial_bytes
            state.remaining_dirty_bytes = info.dirty_bytes
            state.reinits += info.reinit

    def _data_size(self) -> int | None:
        """Return stop_copy_length, None if the server does not report it."""
        try:
            return int(self.source.data_size())
        except ClientCommandError:
            return None

    def _converged(self) -> bool:
        """Apply QEMU's rule; without sizes, one whole pass has to do."""
        state = self.progress
        if not self.source.has_precopy_info:
            return state.passes > 0
        if state.remaining_initial_bytes or state.remaining_bytes > state.threshold_bytes:
            return False
        state.stop_copy_length = self._data_size()
        exact = state.remaining_bytes if state.stop_copy_length is None else state.stop_copy_length
        return exact <= state.threshold_bytes

    def _window(self, count: int) -> bool:
        """Account for `count` bytes; once a window is over, renew rate and threshold."""
        state = self.progress
        self._window_bytes += count
        now = time.monotonic()
        state.total_seconds = now - self._began
        elapsed = now - self._window_began
        limit = self.options.max_bandwidth
        if limit is not None and self._window_bytes > limit * elapsed:
            time.sleep(min(self._window_bytes / limit - elapsed, WINDOW_SECONDS))
            elapsed = time.monotonic() - self._window_began
        first = state.transfer_rate == 0.0 and elapsed > 0
        if elapsed < WINDOW_SECONDS and not first:
            return False
        # A window with next to no data says nothing about the link; QEMU uses it nevertheless.
        if self._window_bytes >= self._slice // 2 or first:
            state.transfer_rate = self._window_bytes / elapsed
            state.threshold_bytes = threshold_bytes(state.transfer_rate, self.options.downtime_limit_seconds)
        if elapsed >= WINDOW_SECONDS:
            self._window_began, self._window_bytes = time.monotonic(), 0
        return True

    def _check_limits(self) -> None:
        self._check_time()
        limit = self.options.max_passes
        if limit is not None and self.progress.passes >= limit:
            raise StateError(f"it did not converge in {limit} passes: {self._shortfall()}")

    def _check_time(self) -> None:
        limit = self.options.timeout_seconds
        if limit is not None and time.monotonic() - self._began > limit:
            raise StateError(f"not completed after {limit:g} s: {self._shortfall()}")

    def _shortfall(self) -> str:
        state = self.progress
        left = max(state.remaining_bytes, state.stop_copy_length or 0)
        note = threshold_note("measured", state.transfer_rate, self.options.downtime_limit_seconds)
        initial = state.remaining_initial_bytes
        before = f"; {format_size(initial)} of it is initial data, which is read first" if initial else ""
        return remaining_text(left, state.threshold_bytes, note) + before

    def _idle(self) -> None:
        """PRE_COPY has nothing now: finish what is under way and let the device work."""
        self._finish_write()
        time.sleep(IDLE_SECONDS)

    def _enter(self, phase: str) -> None:
        self.progress.phase = phase
        self.progress.total_seconds = time.monotonic() - self._began
        self._reporter(self.progress)
