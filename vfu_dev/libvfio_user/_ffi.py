"""The ABI of libvfio-user: prototypes, callback types, struct layouts, and the guard around every callback.

The only module of this folder that imports ctypes. Source: include/libvfio-user.h of the pinned QEMU tree
with our patches; the layouts are compared with a compiled C probe in tests/abi.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import time
from collections.abc import Callable
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_int,
    c_int64,
    c_size_t,
    c_ssize_t,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any

import numpy as np
import numpy.typing as npt

from vfu_dev.errors import REFUSALS, LibraryError, errno_of

logger = logging.getLogger(__name__)

# --- enums and flags ---------------------------------------------------------------------------------------

VFU_TRANS_SOCK = 0
VFU_DEV_TYPE_PCI = 0
LIBVFIO_USER_FLAG_ATTACH_NB = 1 << 0
LIBVFIO_USER_FLAG_ATTACH_FD = 1 << 1

VFU_REGION_FLAG_READ = 1 << 0
VFU_REGION_FLAG_WRITE = 1 << 1
VFU_REGION_FLAG_RW = VFU_REGION_FLAG_READ | VFU_REGION_FLAG_WRITE
VFU_REGION_FLAG_MEM = 1 << 2
VFU_REGION_FLAG_ALWAYS_CB = 1 << 3

VFU_RESET_DEVICE = 0
VFU_RESET_LOST_CONN = 1
VFU_RESET_PCI_FLR = 2

VFU_PCI_TYPE_CONVENTIONAL = 0
VFU_PCI_TYPE_EXPRESS = 3

VFU_MIGR_STATE_STOP = 0
VFU_MIGR_STATE_RUNNING = 1
VFU_MIGR_STATE_STOP_AND_COPY = 2
VFU_MIGR_STATE_PRE_COPY = 3
VFU_MIGR_STATE_RESUME = 4
VFU_MIGR_STATE_RUNNING_P2P = 5
VFU_MIGR_STATE_PRE_COPY_P2P = 6
VFU_MIGR_STATE_ERROR = 7

VFU_DMA_WRITE = 1 << 0
VFU_DMA_UNLOGGED = 1 << 1

VFU_MIGR_CALLBACKS_VERS = 2
VFU_MIGR_EXT_VERS = 1

# --- callback types: all with use_errno, or what the guard sets would be lost -------------------------------

LogCallback = CFUNCTYPE(None, c_void_p, c_int, c_char_p, use_errno=True)
RegionCallback = CFUNCTYPE(c_ssize_t, c_void_p, c_void_p, c_size_t, c_int64, c_bool, use_errno=True)
ResetCallback = CFUNCTYPE(c_int, c_void_p, c_int, use_errno=True)
WaitCallback = CFUNCTYPE(c_int, c_void_p, c_int, c_int, c_int, use_errno=True)
DmaCallback = CFUNCTYPE(None, c_void_p, c_void_p, use_errno=True)
TransitionCallback = CFUNCTYPE(c_int, c_void_p, c_int, use_errno=True)
DataCallback = CFUNCTYPE(c_ssize_t, c_void_p, c_void_p, c_uint64, use_errno=True)
GatherCallback = CFUNCTYPE(c_ssize_t, c_void_p, c_uint64, POINTER(c_void_p), use_errno=True)
PrecopyInfoCallback = CFUNCTYPE(c_int, c_void_p, c_void_p, use_errno=True)
DataSizeCallback = CFUNCTYPE(c_int, c_void_p, POINTER(c_uint64), use_errno=True)
PrecopyInfoV2Callback = CFUNCTYPE(c_int, c_void_p, c_bool, use_errno=True)


class IoVec(Structure):
    """struct iovec, <sys/uio.h>."""

    _fields_ = [("iov_base", c_void_p), ("iov_len", c_size_t)]


class DmaInfo(Structure):
    """vfu_dma_info_t."""

    _fields_ = [
        ("iova", IoVec),
        ("vaddr", c_void_p),
        ("mapping", IoVec),
        ("page_size", c_size_t),
        ("prot", c_uint32),
    ]


class MigrationCallbacksStruct(Structure):
    """vfu_migration_callbacks_t, version 2."""

    _fields_ = [
        ("version", c_int),
        ("transition", TransitionCallback),
        ("read_data", DataCallback),
        ("write_data", DataCallback),
    ]


class MigrationExtStruct(Structure):
    """vfu_migration_ext_t, version 1."""

    _fields_ = [
        ("version", c_int),
        ("reserved", c_uint32),
        ("migration_flags", c_uint64),
        ("precopy_info", PrecopyInfoCallback),
        ("data_size", DataSizeCallback),
        ("precopy_info_v2", PrecopyInfoV2Callback),
    ]


class RegionMemoryStruct(Structure):
    """vfu_region_memory_t."""

    _fields_ = [
        ("data", c_void_p),
        ("size", c_uint64),
        ("marks", c_void_p),
        ("page_shift", c_uint32),
        ("mark", c_uint8),
        ("enabled", c_uint8),
        ("nr_edges", c_uint16),
        ("edges", c_void_p),
        ("window", c_void_p),
        ("running", c_void_p),
        ("reads", c_void_p),
        ("writes", c_void_p),
    ]


class PrecopyInfoStruct(Structure):
    """struct vfio_precopy_info, <linux/vfio.h>."""

    _fields_ = [
        ("argsz", c_uint32),
        ("flags", c_uint32),
        ("initial_bytes", c_uint64),
        ("dirty_bytes", c_uint64),
    ]


# name -> (restype, argtypes). A pointer returned as ctypes' default int would be cut short.
PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "vfu_create_ctx": (c_void_p, (c_int, c_char_p, c_int, c_void_p, c_int)),
    "vfu_realize_ctx": (c_int, (c_void_p,)),
    "vfu_attach_ctx": (c_int, (c_void_p,)),
    "vfu_get_poll_fd": (c_int, (c_void_p,)),
    "vfu_run_ctx": (c_int, (c_void_p,)),
    "vfu_destroy_ctx": (None, (c_void_p,)),
    "vfu_setup_log": (c_int, (c_void_p, LogCallback, c_int)),
    "vfu_setup_region": (
        c_int,
        (c_void_p, c_int, c_size_t, RegionCallback, c_int, POINTER(IoVec), c_uint32, c_int, c_uint64),
    ),
    "vfu_setup_device_reset_cb": (c_int, (c_void_p, ResetCallback)),
    "vfu_setup_device_nr_irqs": (c_int, (c_void_p, c_int, c_uint32)),
    "vfu_irq_trigger": (c_int, (c_void_p, c_uint32)),
    "vfu_pci_init": (c_int, (c_void_p, c_int, c_int, c_int)),
    "dma_sg_size": (c_size_t, ()),
    "vfu_addr_to_sgl": (c_int, (c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_int)),
    "vfu_sgl_get": (c_int, (c_void_p, c_void_p, POINTER(IoVec), c_size_t, c_int)),
    "vfu_sgl_put": (None, (c_void_p, c_void_p, POINTER(IoVec), c_size_t)),
    "vfu_sgl_read": (c_int, (c_void_p, c_void_p, c_size_t, c_void_p)),
    "vfu_sgl_write": (c_int, (c_void_p, c_void_p, c_size_t, c_void_p)),
}
# Prototypes of what not every library has.
MIGRATION_V1_MARK = (c_size_t, ())
SETUP_DMA_3 = (c_int, (c_void_p, DmaCallback, DmaCallback))
# Upstream's forms, old and new under one name: a C function leaves an argument too many alone. max_regions
# stands before the callbacks since March 2026 (see Context.setup_dma), VFU_SGL_* last since April.
SETUP_DMA_ANY = (c_int, (c_void_p, DmaCallback, DmaCallback, DmaCallback))
SGL_COPY_ANY = (c_int, (c_void_p, c_void_p, c_size_t, c_void_p, c_int))
SGL_DIRECT_ACCESS = 1 << 0
SETUP_MIGRATION_V2 = (c_int, (c_void_p, POINTER(MigrationCallbacksStruct)))
SETUP_MIGRATION_EXT = (c_int, (c_void_p, POINTER(MigrationExtStruct)))
EXT_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "vfu_setup_device_migration_ext": SETUP_MIGRATION_EXT,
    "vfu_setup_region_memory": (c_int, (c_void_p, c_int, POINTER(RegionMemoryStruct))),
    "vfu_serve_ctx": (c_int, (c_void_p, c_int, c_int, c_int, POINTER(c_int))),
    "vfu_setup_migration_gather": (c_int, (c_void_p, GatherCallback)),
    "vfu_setup_migration_window": (c_int, (c_void_p, c_size_t)),
    "vfu_serve_accesses": (c_int, (c_void_p,)),
    "vfu_migration_get_state": (c_int, (c_void_p,)),
    "vfu_migration_fail": (c_int, (c_void_p,)),
    "vfu_reset_device": (c_int, (c_void_p, c_int)),
    "vfu_ext_api_version": (c_uint32, ()),
    "vfu_attach_fd": (c_int, (c_void_p, c_int, c_char_p, c_size_t)),
    "vfu_setup_wait_cb": (None, (c_void_p, WaitCallback)),
    "vfu_dma_access": (c_int, (c_void_p, c_void_p, c_void_p, c_size_t, c_int)),
    "vfu_irq_get_type": (c_int, (c_void_p, POINTER(c_uint32))),
    "vfu_irq_set_level": (c_int, (c_void_p, c_bool)),
    "vfu_irq_take_back": (c_int, (c_void_p, c_uint32)),
    "vfu_client_has_precopy_info": (c_bool, (c_void_p,)),
}


def open_library(path: str) -> ctypes.CDLL:
    """Load the shared object.

    Raises: LibraryError: it cannot be opened, with the loader's own reason.
    """
    try:
        return ctypes.CDLL(path, use_errno=True)
    except OSError as err:
        raise LibraryError(f"cannot open libvfio-user: {err}") from err


def declare(library: ctypes.CDLL, name: str, prototype: tuple[Any, tuple[Any, ...]]) -> bool:
    """Give the function `name` its types; False when the library does not have it."""
    try:
        function = getattr(library, name)
    except AttributeError:
        return False
    function.restype, function.argtypes = prototype[0], list(prototype[1])
    return True


def io_vectors(areas: list[tuple[int, int]]) -> Any:
    """Return (offset, size) pairs as an array of struct iovec, as vfu_setup_region takes them."""
    return (IoVec * len(areas))(*(IoVec(offset, size) for offset, size in areas))


def last_errno() -> int:
    """Return errno as the last call into the library left it."""
    return ctypes.get_errno()


def view(address: int, count: int) -> memoryview:
    """Return `count` bytes at `address` as a writable view.

    The memory is the library's: the view is dead when the callback that received the address returns. Nobody
    may keep it.
    """
    return memoryview((c_uint8 * count).from_address(address)).cast("B")


_byte_of = ctypes.c_char.from_buffer


def address_of(buffer: memoryview | bytes | npt.NDArray[Any]) -> int:
    """Return where the bytes of `buffer` are; the caller keeps it alive."""
    if isinstance(buffer, memoryview) and not buffer.readonly and buffer:
        return ctypes.addressof(_byte_of(buffer))
    # By way of numpy, because ctypes refuses what may only be read.
    return np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]  # type: ignore[no-any-return]


def not_implemented() -> int:
    """Return what a callback does that has another one called in its place: -1, and ENOSYS in errno."""
    ctypes.set_errno(errno.ENOSYS)
    return -1


def count() -> Any:
    """Return a number for C to store, passed as its address."""
    return c_uint32()


def signed_count() -> Any:
    """Return the same for an int."""
    return c_int()


def scratch(count: int) -> Any:
    """Return `count` zeroed bytes of our own that C may write to; they live as long as the object."""
    return (c_uint8 * count)()


def dma_info(address: int) -> tuple[int, int, int, bool]:
    """Read the vfu_dma_info_t at `address`: guest address, bytes, PROT_* bits, whether it is mapped here."""
    info = DmaInfo.from_address(address)
    return info.iova.iov_base or 0, info.iova.iov_len, info.prot, info.vaddr is not None


# A call that takes longer ends the turn of the loop in any case. vfu_serve_ctx looks at the clock after every
# eighth request, and the indices in 1 MiB of migration data may make 1 GiB of pages zero.
LONG_SECONDS = 0.001


def guard(
    callback_type: Any,
    device: str,
    name: str,
    leave: Any,
    function: Callable[..., Any],
    failure: Any = -1,
    *,
    leave_after: float = 0,
) -> Any:
    """Return `function` as a C callback from which nothing escapes.

    An exception that leaves a ctypes callback is printed, and C receives an undefined value. Here it is
    logged with the device and the callback's name, errno says what went wrong, and C receives `failure`.

    Args:
        leave: a `signed_count` that a call sets: see vfu_serve_ctx.
        leave_after: seconds; a call that takes less, and does not fail, leaves `leave` alone.
        function: called without the context argument.
        failure: None for a callback that returns nothing.
    """

    def guarded(_ctx: int, *arguments: Any) -> Any:
        started = time.monotonic()
        try:
            result = function(*arguments)
            if time.monotonic() - started >= leave_after:
                leave.value = 1
            return result
        except BaseException as error:  # the boundary to C: nothing may pass
            leave.value = 1
            report(device, name, error)
            ctypes.set_errno(errno_of(error))
            return failure

    return callback_type(guarded)


RegionHandler = Callable[[memoryview, int, bool], None]


def guard_region(
    device: str, name: str, leave: Any, handler: RegionHandler, has_work: Callable[[], bool]
) -> tuple[Any, Callable[[RegionHandler], None]]:
    """Return the callback of one region; `handler` gets (data, offset, is_write) and fills or takes `data`.

    The same as `guard`, written out because every MMIO access comes through here. Also returned is what puts
    another handler in the place of this one, which costs accesses nothing.

    Args: has_work: called after a write that succeeded, which sets `leave` only if it returns True.
    """
    array_of = c_uint8.__mul__
    set_errno = ctypes.set_errno

    def guarded(_ctx: int, buffer: int, count: int, offset: int, is_write: bool) -> int:
        try:
            handler(memoryview(array_of(count).from_address(buffer)).cast("B"), offset, is_write)
            if is_write and has_work():
                leave.value = 1
            return count
        except BaseException as error:  # the boundary to C: nothing may pass
            leave.value = 1
            report(device, name, error)
            set_errno(errno_of(error))
            return -1

    def exchange(other: RegionHandler) -> None:
        nonlocal handler
        handler = other

    return RegionCallback(guarded), exchange


def report(device: str, callback: str, error: BaseException) -> None:
    """Log what a callback raised: a refusal in one line, a defect with its traceback."""
    if isinstance(error, REFUSALS):
        logger.info("%s: %s refused: %s", device, callback, error)
    else:
        logger.error("%s: exception in callback %s", device, callback, exc_info=error)
