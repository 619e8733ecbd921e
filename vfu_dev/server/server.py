"""The event loop that serves one device: vfio-user socket, control socket, signals, idle work."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfu_dev.device import Device
from vfu_dev.errors import LibraryError
from vfu_dev.figures import Figures
from vfu_dev.libvfio_user import Context, DeviceCallbacks, Library
from vfu_dev.logs import RateLimit
from vfu_dev.memory import kernels
from vfu_dev.migration.sampler import Sampler
from vfu_dev.server.commands import HIDDEN, Commands
from vfu_dev.server.control import MAX_CLIENTS, ControlSocket
from vfu_dev.server.door import (
    OWNER,
    Access,
    client_door,
    control_door,
    give_to_group,
    path_for_foreign,
    restrictive_umask,
)
from vfu_dev.server.faults import fault_board
from vfu_dev.server.feed import Feed
from vfu_dev.server.listener import MAX_NEWCOMERS, Listener
from vfu_dev.server.operator_workload import OperatorWorkload
from vfu_dev.server.register_trace import RegisterTrace
from vfu_dev.server.setup import set_up
from vfu_dev.server.snapshot import SnapshotMaker
from vfu_dev.server.sockets import OwnedPath
from vfu_dev.server.watch import Watch

if TYPE_CHECKING:
    from vfu_dev.replay.replay import Replay

logger = logging.getLogger(__name__)

# Time that requests are served before the other sockets are polled again.
_TURN_SECONDS = 0.01
# One step of work while no request waits on the vfio-user socket: short against the timeouts of client and
# guest.
_IDLE_STEP_SECONDS = 0.005
# One step of the device's own work, which goes on while a guest waits for its MMIO.
_WORK_STEP_SECONDS = 0.001


class Server:
    """Serves `device` on a vfio-user socket until it is stopped.

    Args:
        device: what to serve; the server does not close it.
        library: the libvfio-user to drive.
        client: where the client connects: a path to listen at, or a socket that listens. With one that is
            connected `run` ends when its client leaves.
        control: where commands are served, in the same way, or None.
        access: who may connect to either.
        must_migrate: refuse a client that shows no sign that it can migrate the device.
        data_window: let it have migration data in memory that it shares (native/spec).
        replay: of `device`: makes it behave in migration as a profile says.

    Raises: ConfigError, LibraryError: the device cannot be served that way; nothing is left behind.
    """

    def __init__(
        self,
        device: Device,
        library: Library,
        client: Path | socket.socket,
        control: Path | socket.socket | None = None,
        register_trace: RegisterTrace | None = None,
        *,
        access: Access = OWNER,
        must_migrate: bool = False,
        data_window: bool = True,
        replay: Replay | None = None,
    ) -> None:
        self.device = device
        self.replay = replay
        self.register_trace = register_trace
        self.library = library
        self.log_limit: RateLimit | None = None  # set by who set up logging
        self._stopping = False
        self._turn_was_full = False  # the client sent requests all through it
        self._signalled: signal.Signals | None = None  # by which one it is stopping
        self._sampler = Sampler(device.migration)
        self._snapshots = SnapshotMaker(device, library, "" if replay is None else replay.profile.name or "")
        self._feeds: list[Feed] = []
        self.load = OperatorWorkload(lambda: [*device.memories, *device.unmigrated], device.migration)
        self._control: ControlSocket | None = None
        self._listener: Listener | None = None
        self._path: OwnedPath | None = None
        kernels.open_kernels()  # fail now if they are missing
        with contextlib.ExitStack() as undo:
            self._selector = undo.enter_context(selectors.DefaultSelector())
            if library.is_ours:
                self._listener = Listener(
                    client_door(client, MAX_NEWCOMERS, access),
                    self._selector,
                    lambda: self.connected,
                    self._admit,
                    device.name,
                    must_migrate=must_migrate,
                )
                undo.callback(self._listener.close)
                self._context = Context(library, None, device.name)
                undo.callback(self._context.destroy)
            else:
                path = path_for_foreign(client, access, must_migrate=must_migrate)
                # The library binds and listens in one: nobody gets in before the socket is its group's.
                with restrictive_umask(OWNER.mode):
                    self._context = Context(library, os.fspath(path), device.name)
                undo.callback(self._context.destroy)
                # Bound by now, and the library leaves it behind.
                self._path = OwnedPath(path)
                undo.callback(self._path.remove)
                give_to_group(path, access)
                path.chmod(access.mode)
            # Ours waits for its client in C; what is registered here too would wake two.
            serve = None if library.is_ours else self._serve
            self._watch = Watch(self._selector, lambda: self._context.poll_fd, serve)
            undo.callback(device.attach, device.bus)
            served, bus = set_up(
                device, library, self._context, register_trace, self._request_waits, data_window=data_window
            )
            callbacks: DeviceCallbacks = served
            if replay is not None:
                callbacks = replay.around(callbacks, self._hold)
                self._context.exchange_callbacks(callbacks)
            if self._context.dma is not None:
                self._context.setup_wait(self._await_client)
            self.faults = fault_board(device, library, self._context, callbacks, bus, self._hold)
            self._snapshots.faults = self.faults.injected
            self._context.realize()
            self._watch.renew()
            if control is not None:
                door = control_door(control, MAX_CLIENTS, access)
                self._control = ControlSocket(door, self._selector, Commands(self).table(), HIDDEN)
            undo.pop_all()
        device.workers.append(self.load)

    # --- loop -----------------------------------------------------------------------------------------------

    def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until SIGTERM, SIGINT, the `quit` command, or the end of the only client there can be.

        Called once, in the main thread.
        """
        woken, waker = socket.socketpair()
        woken.setblocking(False)
        waker.setblocking(False)
        handlers = {number: signal.signal(number, self._signal) for number in (signal.SIGTERM, signal.SIGINT)}
        wakeup_before = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        self._selector.register(woken, selectors.EVENT_READ, lambda: woken.recv(64))
        # Everything made so far stays: the garbage collector need not scan it while a guest waits for its
        # MMIO.
        gc.collect()
        gc.freeze()
        on_ready()
        try:
            while not self._stopping and not self._is_over:
                timeout = self._timeout()
                if self.library.is_ours and self.connected:
                    self._serve_requests(timeout)
                    timeout = 0
                for key, _ in self._selector.select(timeout):
                    key.data()
                self._idle()
            if self._signalled is not None:
                logger.info("%s: %s, stopping", self.device.name, self._signalled.name)
            if self._control is not None:
                self._control.flush()
        finally:
            self._selector.unregister(woken)
            signal.set_wakeup_fd(wakeup_before)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            woken.close()
            waker.close()

    @property
    def _is_over(self) -> bool:
        """Whether no client is connected, and none can connect any more."""
        return self._listener is not None and self._listener.is_over and not self.connected

    def stop(self) -> None:
        """Leave `run` at the end of this turn. For its own thread: a loop that sleeps is not woken."""
        self._stopping = True

    def close(self) -> None:
        """Close all sockets and remove them; the device lives on."""
        self.device.workers.remove(self.load)
        self.device.detach()
        for feed in self._feeds:
            feed.close()
        if self._control is not None:
            self._control.close()
        self._context.destroy()
        if self._listener is not None:
            self._listener.close()
        if self._path is not None:
            self._path.remove()
        self._selector.close()

    def _signal(self, number: int, _frame: Any) -> None:
        # Do not log here: the interrupted code may be counting log lines.
        self._signalled = signal.Signals(number)
        self._stopping = True

    def _timeout(self) -> float | None:
        """Return how long the loop may sleep: no time when there is idle work, else until the next sample."""
        if self.device.migration.audit_pending or (self._control is not None and self._control.busy):
            return 0
        timeouts = [self._sampler.timeout(), self.device.work_due()]
        if self._listener is not None:
            timeouts.append(self._listener.timeout())
        if self.log_limit is not None:
            timeouts.append(self.log_limit.timeout())
        return min((seconds for seconds in timeouts if seconds is not None), default=None)

    def _idle(self) -> None:
        self._sampler.poll()
        if self.device.work_due() == 0:
            self._work()
        if self._listener is not None:
            self._listener.advance()
        if self.log_limit is not None:
            self.log_limit.advance()
        if self.device.migration.audit_pending:
            self.device.migration.advance_audit(_IDLE_STEP_SECONDS)
        if self._control is not None and self._control.busy:
            self._control.advance()

    def _request_waits(self) -> bool:
        """Return whether the device's own work has to end its step for a request.

        Not when requests took a whole turn of the loop: the client is not kept waiting then, and the work
        would get no more than one piece a turn. It gets its whole step.
        """
        return not self._turn_was_full and self._context.request_waits()

    def _work(self) -> None:
        """Let the device go on with its own work for a moment; DMA by message may find the client gone."""
        was_connected = self.connected
        self.device.work(_WORK_STEP_SECONDS)
        if was_connected and not self.connected:
            self._watch.renew()

    def _hold(self, seconds: float | None, over: Callable[[], bool]) -> None:
        """In the middle of a client's request: let the client wait, and serve all others meanwhile."""
        self._serve_others(seconds, over, 0)

    def _await_client(self, events: int, seconds: float) -> bool:
        """In the middle of DMA by message: wait for the client, and serve all others meanwhile."""
        return self._serve_others(seconds, lambda: False, events)

    def _serve_others(self, seconds: float | None, over: Callable[[], bool], events: int) -> bool:
        def turn() -> bool:
            self._sampler.poll()
            if self._listener is not None:
                self._listener.advance()
            if self._control is None or not self._control.busy:
                return False
            self._control.advance()
            return self._control.busy

        return self._watch.wait(seconds, lambda: self._stopping or over(), turn, events)

    def _serve(self) -> None:
        """Do what a foreign library's socket asks for: a new client, or the present one's next requests."""
        if not self.connected:
            self._attach()
        else:
            self._serve_requests(0)

    def _attach(self) -> None:
        """Take a client from a foreign library, which listens itself."""
        try:
            if not self._context.attach():
                return
        except LibraryError as err:
            if err.errno == errno.ENOMSG:  # a trial connection, as of a server that tests the path
                logger.debug("%s: a connection ended before its first message", self.device.name)
            else:
                self._not_acceptable(err)
            self._watch.renew()
            return
        self._attached()

    def _admit(self, connection: socket.socket, version: bytes) -> None:
        """Take a client from our listener."""
        try:
            self._context.take(connection, version)
        except LibraryError as err:
            connection.close()
            self._not_acceptable(err)
            return
        self._attached()

    def _not_acceptable(self, error: LibraryError) -> None:
        self.device.counters.protocol_errors += 1
        logger.warning("%s: a client does not speak vfio-user: %s", self.device.name, error)

    def _attached(self) -> None:
        self.device.migration.give_up_audit()  # its steps would be in this client's way
        self._watch.renew()
        self.device.counters.connections += 1
        logger.info("%s: a client is connected", self.device.name)

    def _serve_requests(self, timeout: float | None) -> None:
        """Serve the client; ours waits for it, and for all others, until `timeout` (None: no limit)."""
        deadline = time.monotonic() + _TURN_SECONDS
        self._turn_was_full = False
        try:
            if self.library.is_ours:
                self._context.serve(self._selector.fileno(), _TURN_SECONDS, timeout)
            else:
                while self._context.run() and time.monotonic() < deadline:
                    pass
            # With a timeout the time may have gone by in waiting for the first request.
            self._turn_was_full = timeout == 0 and time.monotonic() >= deadline
        except ConnectionResetError:
            self._watch.renew()
        except LibraryError as err:
            self.device.counters.protocol_errors += 1
            logger.warning("%s: protocol error: %s", self.device.name, err)
            self._watch.renew()

    # --- for commands and exporters -------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether there is a client."""
        return self._context.attached

    def figures(self, after: int = 0) -> Figures:
        """Return the figures of `vfu-dev top`, the live page and the metrics; cheap, it scans no page.

        Args: after: number of the last sample that the caller has, see `Figures`.
        """
        return self._snapshots.figures(self.connected, after)

    def feed(self, peer: socket.socket) -> None:
        """Answer figures to `peer`: for each line with the number of a sample one line of JSON.

        For an exporter in a process of its own; the server owns `peer` from now on.
        """
        self._feeds.append(Feed(peer, self._selector, self.figures))
