"""One device's life in libvfio-user: create, set up, realize, attach, run, destroy."""

from __future__ import annotations

import errno
import logging
import math
import os
import select
import socket
from collections.abc import Callable
from typing import Any

from vfu_dev.errors import LibraryError, StateError
from vfu_dev.libvfio_user import _ffi
from vfu_dev.libvfio_user.callbacks import DeviceCallbacks, ResetKind, Vectors
from vfu_dev.libvfio_user.dma import DmaMemory
from vfu_dev.libvfio_user.irqs import Irqs
from vfu_dev.libvfio_user.library import Library, failed
from vfu_dev.libvfio_user.log import LibraryLog
from vfu_dev.libvfio_user.regions import (
    Gate,
    RegionHandler,
    RegionSetup,
    region_memory_struct,
    switched,
)
from vfu_dev.uapi import VFIO_PCI_CONFIG_REGION_INDEX, DeviceState, MigrationFlags

logger = logging.getLogger(__name__)

# The one place where libvfio-user's names for the states meet the kernel's.
_STATES = {
    _ffi.VFU_MIGR_STATE_STOP: DeviceState.STOP,
    _ffi.VFU_MIGR_STATE_RUNNING: DeviceState.RUNNING,
    _ffi.VFU_MIGR_STATE_STOP_AND_COPY: DeviceState.STOP_COPY,
    _ffi.VFU_MIGR_STATE_PRE_COPY: DeviceState.PRE_COPY,
    _ffi.VFU_MIGR_STATE_RESUME: DeviceState.RESUMING,
    _ffi.VFU_MIGR_STATE_RUNNING_P2P: DeviceState.RUNNING_P2P,
    _ffi.VFU_MIGR_STATE_PRE_COPY_P2P: DeviceState.PRE_COPY_P2P,
    _ffi.VFU_MIGR_STATE_ERROR: DeviceState.ERROR,
}


class Context:
    """A vfu_ctx_t and the callbacks that must live as long as it does.

    Args:
        library: what to drive.
        socket_path: where it listens, from `realize` on; None for one that is given its clients, see `take`.
        name: the device, for logs.

    Attributes:
        attached: whether there is a client.
        dma: guest memory, where the library has DMA; see `setup_dma`.
        gates: the ways into all regions but the configuration space.

    Raises: LibraryError: from every method, when the library refuses.
    """

    _callbacks: DeviceCallbacks

    def __init__(self, library: Library, socket_path: str | None, name: str) -> None:
        self._library = library
        self._name = name
        self._leave = _ffi.signed_count()  # set by callbacks after which the loop checks for work
        self._alive: list[Any] = []  # callbacks and structs that C points to
        self.attached = False
        self.dma: DmaMemory | None = None
        self._dma_form = 0  # arguments of vfu_setup_device_dma, where that turned out to be 4
        self.gates: list[Gate] = []
        ctx = library.function("vfu_create_ctx")(
            _ffi.VFU_TRANS_SOCK,
            os.fsencode(socket_path or ""),
            _ffi.LIBVFIO_USER_FLAG_ATTACH_NB
            | (0 if socket_path is not None else _ffi.LIBVFIO_USER_FLAG_ATTACH_FD),
            None,
            _ffi.VFU_DEV_TYPE_PCI,
        )
        if not ctx:
            raise failed("vfu_create_ctx")
        self._ctx: int | None = ctx
        self._run = library.function("vfu_run_ctx")
        self._get_poll_fd = library.function("vfu_get_poll_fd")
        self._poll, self._polled = select.poll(), -1  # see `request_waits`
        self.irqs = Irqs(library, ctx)
        if library.is_ours:
            self._serve_accesses = library.function("vfu_serve_accesses")
            self._serve = library.function("vfu_serve_ctx")
        self._log = LibraryLog(name)
        self._check("vfu_setup_log", self._guard(_ffi.LogCallback, "log", self._log, None), self._log.level)

    def _check(self, function: str, *arguments: Any) -> int:
        return self._library.check(function, self._ctx, *arguments)

    def _guard(self, kind: Any, name: str, function: Any, failure: Any = -1, leave_after: float = 0) -> Any:
        callback = _ffi.guard(kind, self._name, name, self._leave, function, failure, leave_after=leave_after)
        self._alive.append(callback)
        return callback

    # --- set up -------------------------------------------------------------------------------------------

    def setup_pci(self, *, express: bool) -> None:
        """Make it a PCI Express function, or a conventional one; ids and the rest are the config region's."""
        kind = _ffi.VFU_PCI_TYPE_EXPRESS if express else _ffi.VFU_PCI_TYPE_CONVENTIONAL
        self._check("vfu_pci_init", kind, 0, 0)

    def setup_region(self, region: RegionSetup) -> None:
        """Set up a memory region; accesses to what is not mapped go to its handler, or its memory."""
        callback, exchange = _ffi.guard_region(
            self._name, region.name, self._leave, region.handler, region.has_work
        )
        self._alive.append(callback)
        flags = _ffi.VFU_REGION_FLAG_RW | _ffi.VFU_REGION_FLAG_MEM
        areas = None if region.fd < 0 else _ffi.io_vectors([(0, region.mapped_bytes)])
        self._check(
            "vfu_setup_region",
            region.index,
            region.size_bytes,
            callback,
            flags,
            areas,
            0 if areas is None else len(areas),
            region.fd,
            0,
        )
        if region.memory is not None and self._library.is_ours:
            struct, others = region_memory_struct(region.memory)
            self._alive += [struct, region.memory, others]
            self._check("vfu_setup_region_memory", region.index, struct)
            exchange = switched(struct, region.handler, exchange)
        self.gates.append(Gate(region.index, region.handler, exchange))

    def setup_config_region(self, size_bytes: int, handler: RegionHandler) -> None:
        """Have `handler` serve all of the configuration space, after `setup_pci`.

        The library's own idea of it knows few capabilities, and writes only as wide as a register.
        """
        callback, _ = _ffi.guard_region(self._name, "config", self._leave, handler, lambda: True)
        self._alive.append(callback)
        flags = _ffi.VFU_REGION_FLAG_RW | _ffi.VFU_REGION_FLAG_ALWAYS_CB
        self._check(
            "vfu_setup_region", VFIO_PCI_CONFIG_REGION_INDEX, size_bytes, callback, flags, None, 0, -1, 0
        )

    def setup_callbacks(self, callbacks: DeviceCallbacks) -> None:
        """Have `callbacks` follow every reset and lost connection, and serve what else is set up."""
        self.exchange_callbacks(callbacks)

        def reset(number: int) -> int:
            kind = ResetKind(number)
            if kind is ResetKind.LOST_CONNECTION:
                self._lost()
            else:
                self._callbacks.reset(kind)
            return 0

        self._check("vfu_setup_device_reset_cb", self._guard(_ffi.ResetCallback, "reset", reset))

    def exchange_callbacks(self, callbacks: DeviceCallbacks) -> None:
        """Have these called from the next call on: a layer around them, or themselves again."""
        self._callbacks = callbacks

    def _lost(self) -> None:
        """The client is gone, of which the library may tell twice."""
        if self.attached:
            self.attached = False
            self._callbacks.reset(ResetKind.LOST_CONNECTION)

    def reset(self, kind: ResetKind) -> None:
        """Reset the device as a client's request would, which comes back as a call of the callbacks.

        A foreign library is not asked: nothing but its migration state would need to know.
        """
        if self._library.is_ours:
            self._check("vfu_reset_device", kind.value)
        else:
            self._callbacks.reset(kind)

    def setup_dma(self) -> None:
        """Let the client map guest memory, which is `dma` from then on, and answer DMA logging."""
        if self._ctx is None:
            return
        self.dma = dma = DmaMemory(self._library, self._ctx)
        register = self._guard(_ffi.DmaCallback, "dma_register", dma.registered, None)
        unregister = self._guard(_ffi.DmaCallback, "dma_unregister", dma.unregistered, None)
        if self._library.is_ours:
            self._check("vfu_setup_device_dma", register, unregister)
            return

        # Nothing in a shared object says which form this is, (register, unregister) or (max_regions,
        # register, unregister). The second place is unregister in one and register in the other, so that its
        # first call tells: nothing is unregistered before something was registered. In the longer form the
        # first place is a number, of which a function's address is a large one.
        def second(info: int) -> None:
            if dma.is_empty or self._dma_form == 4:
                self._dma_form = 4
                dma.registered(info)
            else:
                dma.unregistered(info)

        ambiguous = self._guard(_ffi.DmaCallback, "dma_register", second, None)
        self._check("vfu_setup_device_dma", register, ambiguous, unregister)

    def setup_migration(self, flags: MigrationFlags, max_window_bytes: int = 0) -> None:
        """Make the device migratable; with a foreign library in reduced form, and a warning that says so.

        Args: max_window_bytes: of the memory that a client may have migration data in; 0: in none.
        """

        def transition(state: int) -> int:
            self._callbacks.arc(_STATES[state])
            return 0

        def read_data(buffer: int, count: int) -> int:
            return self._callbacks.read_into(_ffi.view(buffer, count)) if count else 0

        def write_data(buffer: int, count: int) -> int:
            if count:
                self._callbacks.write(_ffi.view(buffer, count))
            return count

        struct = _ffi.MigrationCallbacksStruct(
            version=_ffi.VFU_MIGR_CALLBACKS_VERS,
            transition=self._guard(_ffi.TransitionCallback, "transition", transition),
            read_data=self._guard(_ffi.DataCallback, "read_data", read_data),
            # Data that was taken leaves the loop no work, and the loop checks for work every turn anyway.
            write_data=self._guard(_ffi.DataCallback, "write_data", write_data, -1, _ffi.LONG_SECONDS),
        )
        self._alive.append(struct)
        self._check("vfu_setup_device_migration_callbacks", struct)
        if self._library.is_ours:
            self._setup_migration_ext(flags)
            self._check("vfu_setup_migration_window", max_window_bytes)
        else:
            logger.warning(
                "%s: %s is not vfu-dev's libvfio-user; the device lacks: %s",
                self._name,
                self._library.path,
                "; ".join(self._library.missing),
            )

    def _setup_migration_ext(self, flags: MigrationFlags) -> None:
        def precopy_info(address: int) -> int:
            info = _ffi.PrecopyInfoStruct.from_address(address)
            info.initial_bytes, info.dirty_bytes, info.flags = self._callbacks.precopy_sizes()
            return 0

        vectors: list[Vectors] = []  # of the last reply, which live until the next one

        def gather(count: int, iov: Any) -> int:
            found = self._callbacks.gather(count)
            if found is None:
                return _ffi.not_implemented()
            vectors[:] = [found]
            iov[0] = _ffi.address_of(found.data)
            return len(found)

        def data_size(length: Any) -> int:
            length[0] = self._callbacks.stop_copy_length()
            return 0

        def precopy_info_v2(enabled: bool) -> int:
            self._callbacks.opt_in(enabled)
            return 0

        struct = _ffi.MigrationExtStruct(
            version=_ffi.VFU_MIGR_EXT_VERS,
            reserved=0,
            migration_flags=flags,
            precopy_info=self._guard(_ffi.PrecopyInfoCallback, "precopy_info", precopy_info),
            data_size=self._guard(_ffi.DataSizeCallback, "data_size", data_size),
            precopy_info_v2=self._guard(_ffi.PrecopyInfoV2Callback, "precopy_info_v2", precopy_info_v2),
        )
        self._alive.append(struct)
        self._check("vfu_setup_device_migration_ext", struct)
        self._check("vfu_setup_migration_gather", self._guard(_ffi.GatherCallback, "gather", gather))

    # --- run ----------------------------------------------------------------------------------------------

    def realize(self) -> None:
        """Finish the set-up and listen."""
        self._check("vfu_realize_ctx")

    def attach(self) -> bool:
        """Accept a client and negotiate; False when nobody waits.

        Raises: LibraryError: the client was not acceptable, with what the library says of it; the next one
                may be. ENOMSG: it left without a word.
        """
        complaints: list[str] = []
        self._log.complaints = complaints
        try:
            if self._library.function("vfu_attach_ctx")(self._ctx) == 0:
                self.attached = True
                return True
        finally:
            self._log.complaints = None
        number = _ffi.last_errno()
        if number in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR):
            return False
        error = LibraryError("; ".join(complaints) or os.strerror(number))
        error.errno = number
        raise error

    def run(self) -> int:
        """Serve one request; returns how many were served, 0 when none waits.

        Raises: ConnectionResetError: the client is gone; `DeviceCallbacks.reset` was called.
                LibraryError: something else, and the connection may live on.
        """
        return self._served(self._run(self._ctx), "vfu_run_ctx")

    def serve(self, others_fd: int, turn_seconds: float, wait_seconds: float | None) -> None:
        """Serve requests, and wait for the next ones, until there is something else to do.

        Args:
            others_fd: return when it is readable and no request waits.
            turn_seconds: return that long after the first request, whether more come or not.
            wait_seconds: return after that time when no request waits then; None: wait for the first one.

        Raises: see `run`. A foreign library cannot do it.
        """
        self._leave.value = 0
        turn_ms, wait_ms = math.ceil(turn_seconds * 1000), -1
        if wait_seconds is not None:
            wait_ms = math.ceil(wait_seconds * 1000)
        self._served(self._serve(self._ctx, others_fd, turn_ms, wait_ms, self._leave), "vfu_serve_ctx")

    def _served(self, served: int, function: str) -> int:
        if served >= 0:
            return served
        number = _ffi.last_errno()
        if number in (errno.EINTR, errno.EAGAIN):
            return 0
        if number in (errno.ENOTCONN, errno.ECONNRESET, errno.EPIPE, errno.ESHUTDOWN):
            self._lost()
            raise ConnectionResetError(number, os.strerror(number))
        raise failed(function)

    def serve_accesses(self) -> None:
        """In the middle of a request: serve the accesses to regions that have come meanwhile.

        Raises: StateError: the client is gone; `DeviceCallbacks.reset` was called.
        """
        if self._library.is_ours and self._serve_accesses(self._ctx) < 0:
            raise StateError("the client left in the middle of its request")

    def take(self, connection: socket.socket, version: bytes) -> None:
        """Attach to a client that has connected, and has sent its whole VERSION message.

        Raises: LibraryError: the client was not acceptable; it got an error reply if possible.
        """
        connection.setblocking(True)  # ours waits in recv(), and says MSG_DONTWAIT where it does not
        self._check("vfu_attach_fd", connection.fileno(), version, len(version))
        connection.detach()
        self.attached = True

    def setup_wait(self, wait: Callable[[int, float], bool]) -> None:
        """Have `wait` called while the client is waited for in the middle of DMA by message.

        Args: wait: called with poll(2)'s events and seconds; returns whether the connection is ready.
        """
        if self._library.is_ours:
            callback = self._guard(
                _ffi.WaitCallback, "wait", lambda _, events, ms: int(wait(events, ms / 1000)), 0
            )
            self._library.function("vfu_setup_wait_cb")(self._ctx, callback)

    @property
    def poll_fd(self) -> int:
        """What to wait on: the connection, or the listening socket while there is none; -1 for neither."""
        return int(self._get_poll_fd(self._ctx))

    def request_waits(self) -> bool:
        """Return whether the client has sent something, or is gone."""
        if (fd := self.poll_fd) != self._polled:
            self._poll, self._polled = select.poll(), fd
            if fd >= 0:
                self._poll.register(fd, select.POLLIN)
        return bool(self._poll.poll(0))

    def migration_state(self) -> DeviceState | None:
        """Return the library's migration state; None when it is a foreign one, which does not tell."""
        if not self._library.is_ours:
            return None
        return _STATES[self._check("vfu_migration_get_state")]

    def fail_migration(self) -> None:
        """Enter ERROR; a foreign library has no such thing and stays where it is."""
        if self._library.is_ours:
            self._check("vfu_migration_fail")

    def destroy(self) -> None:
        """Close everything; the object is of no use afterwards. Calling it again does nothing."""
        if self._ctx is None:
            return
        ctx, self._ctx = self._ctx, None
        self._library.function("vfu_destroy_ctx")(ctx)
        self._alive.clear()
