"""The kernel's VFIO and iommufd interface in Python: what a program does that knows nothing of vfio-user.

Standard library only, and through the C library alone (`fcntl.ioctl`, `os.pread`, `mmap`), so that a
preloaded library sees every call. Layouts: `<linux/vfio.h>`, `<linux/iommufd.h>`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from typing import Any, Literal

Path = Literal["iommufd-cdev", "iommufd-fd", "type1"]
PATHS: tuple[Path, ...] = ("iommufd-cdev", "iommufd-fd", "type1")

PAGE = 4096
FIRST_GROUP = 1_000_000
FIRST_FD = 100  # descriptors that a test's process opens for the way by descriptor

(GET_API_VERSION, CHECK_EXTENSION, SET_IOMMU, GROUP_GET_STATUS, GROUP_SET_CONTAINER, GROUP_UNSET_CONTAINER,
 GROUP_GET_DEVICE_FD, DEVICE_GET_INFO, DEVICE_GET_REGION_INFO, DEVICE_GET_IRQ_INFO, DEVICE_SET_IRQS,
 DEVICE_RESET) = range(0x3B64, 0x3B70)  # fmt: skip
GET_PCI_HOT_RESET_INFO, PCI_HOT_RESET, IOEVENTFD, DEVICE_FEATURE = 0x3B70, 0x3B71, 0x3B74, 0x3B75
BIND_IOMMUFD, ATTACH_PT, DETACH_PT, MIG_GET_PRECOPY_INFO = 0x3B76, 0x3B77, 0x3B78, 0x3B79
IOMMU_GET_INFO, IOMMU_MAP_DMA, IOMMU_UNMAP_DMA, IOMMU_DIRTY_PAGES = 0x3B70, 0x3B71, 0x3B72, 0x3B75
(DESTROY, IOAS_ALLOC, IOAS_ALLOW_IOVAS, IOAS_COPY, IOAS_IOVA_RANGES, IOAS_MAP, IOAS_UNMAP, OPTION, VFIO_IOAS,
 HWPT_ALLOC, GET_HW_INFO, HWPT_SET_DIRTY, HWPT_GET_DIRTY, HWPT_INVALIDATE, FAULT_QUEUE_ALLOC, IOAS_MAP_FILE,
 VIOMMU_ALLOC, VDEVICE_ALLOC, IOAS_CHANGE_PROCESS) = range(0x3B80, 0x3B93)  # fmt: skip

READ, WRITE = 1, 2  # VFIO_DMA_MAP_FLAG_*
FIXED, IOMMU_WRITE, IOMMU_READ = 1, 2, 4  # IOMMU_IOAS_MAP_*
GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18
MIGRATION, DEVICE_STATE, LOG_START, LOG_STOP, LOG_REPORT, DATA_SIZE, DMA_BUF, PRECOPY_INFO_V2 = (
    1, 2, 6, 7, 8, 9, 11, 12,
)  # fmt: skip
ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = range(8)
DATA_NONE, DATA_BOOL, DATA_EVENTFD, MASK, UNMASK, TRIGGER = (1 << bit for bit in range(6))
INTX, MSI, MSIX, ERR_IRQ, REQ_IRQ = range(5)
CONFIG = 7


def refused(call: Callable[..., Any], *arguments: Any) -> str:
    """Return the name of the errno that `call` fails with; "ok" if it does not."""
    try:
        call(*arguments)
    except OSError as error:
        name = errno.errorcode[error.errno or 0]
        return "EOPNOTSUPP" if name == "ENOTSUP" else name  # two names for one number
    return "ok"


def ioctl(fd: int, request: int, layout: str, *values: int, room: int = 0) -> tuple[int, ...]:
    """Call with a structure of `values` and return what is in it afterwards."""
    data = bytearray(struct.pack("<" + layout, *values)) + bytearray(room)
    fcntl.ioctl(fd, request, data, True)
    return struct.unpack_from("<" + layout, data)


def address_of(memory: mmap.mmap | bytearray) -> int:
    """Return where `memory` is; it must stay alive."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Memory:
    """Guest memory: a shared mapping of a file, or memory that no descriptor leads to."""

    def __init__(self, size: int, shared: bool = True) -> None:
        self.size = size
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC) if shared else -1
        if shared:
            os.ftruncate(self.fd, size)
            self.map = mmap.mmap(self.fd, size)
        else:
            self.map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = address_of(self.map)

    def __getitem__(self, place: slice) -> bytes:
        return self.map[place]

    def __setitem__(self, place: slice, data: bytes) -> None:
        self.map[place] = data


class Iommufd:
    """/dev/iommu."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.open("/dev/iommu", os.O_RDWR) if fd is None else fd

    def alloc(self) -> int:
        """A new address space."""

        return ioctl(self.fd, IOAS_ALLOC, "III", 12, 0, 0)[2]

    def destroy(self, identity: int) -> None:
        """Destroy an object."""

        ioctl(self.fd, DESTROY, "II", 8, identity)

    def map(self, ioas: int, iova: int, address: int, size: int, flags: int = READ | WRITE) -> None:
        """Map memory."""

        bits = FIXED | (IOMMU_READ if flags & READ else 0) | (IOMMU_WRITE if flags & WRITE else 0)
        ioctl(self.fd, IOAS_MAP, "IIIIQQQ", 40, bits, ioas, 0, address, size, iova)

    def map_file(
        self, ioas: int, iova: int, fd: int, start: int, size: int, flags: int = READ | WRITE
    ) -> None:
        """Map a part of a file."""

        bits = FIXED | (IOMMU_READ if flags & READ else 0) | (IOMMU_WRITE if flags & WRITE else 0)
        ioctl(self.fd, IOAS_MAP_FILE, "IIIiQQQ", 40, bits, ioas, fd, start, size, iova)

    def unmap(self, ioas: int, iova: int, size: int) -> int:
        """Unmap a range; returns how many bytes."""

        return ioctl(self.fd, IOAS_UNMAP, "IIQQ", 24, ioas, iova, size)[3]

    def hwpt(self, device: int, ioas: int, flags: int = 0, kind: int = 0) -> int:
        """A page table of an address space, for a device."""

        return ioctl(self.fd, HWPT_ALLOC, "IIIIIIIIQII", 48, flags, device, ioas, 0, 0, kind, 0, 0, 0, 0)[4]

    def hw_info(self, device: int) -> tuple[int, ...]:
        """What hardware the device is behind."""

        return ioctl(self.fd, GET_HW_INFO, "IIIIQIIQ", 40, 0, device, 0, 0, 0, 0, 0)


class Device:
    """A device descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def bind(self, iommufd: int) -> int:
        """Bind it to an iommufd; returns its id there."""

        return ioctl(self.fd, BIND_IOMMUFD, "IIiI", 16, 0, iommufd, 0)[3]

    def attach(self, pt: int) -> None:
        """Attach it to an address space or a page table."""

        ioctl(self.fd, ATTACH_PT, "III", 12, 0, pt)

    def detach(self) -> None:
        """Detach it."""

        ioctl(self.fd, DETACH_PT, "II", 8, 0)

    def info(self) -> tuple[int, ...]:
        """flags, regions, kinds of interrupts."""
        return ioctl(self.fd, DEVICE_GET_INFO, "IIIII", 20, 0, 0, 0, 0)[1:4]

    def region(self, index: int) -> tuple[int, int, int, list[tuple[int, bytes]]]:
        """flags, size, offset, capabilities as (id, bytes behind the header)."""
        needed = ioctl(self.fd, DEVICE_GET_REGION_INFO, "IIIIQQ", 32, 0, index, 0, 0, 0)[0]
        data = bytearray(struct.pack("<IIIIQQ", needed, 0, index, 0, 0, 0)) + bytearray(needed - 32)
        fcntl.ioctl(self.fd, DEVICE_GET_REGION_INFO, data, True)
        _, flags, _, at, size, offset = struct.unpack_from("<IIIIQQ", data)
        capabilities = []
        while at:
            identity, _, following = struct.unpack_from("<HHI", data, at)
            capabilities.append((identity, bytes(data[at + 8 : following or None])))
            at = following
        return flags, size, offset, capabilities

    def read(self, region: int, offset: int, size: int) -> bytes:
        """Read from a region."""

        return os.pread(self.fd, size, (region << 40) + offset)

    def write(self, region: int, offset: int, data: bytes) -> int:
        """Write to a region."""

        return os.pwrite(self.fd, data, (region << 40) + offset)

    def irq(self, index: int) -> tuple[int, int]:
        """flags, count."""
        _, flags, _, count = ioctl(self.fd, DEVICE_GET_IRQ_INFO, "IIII", 16, 0, index, 0)
        return flags, count

    def set_irqs(self, flags: int, index: int, start: int, count: int, data: bytes = b"") -> None:
        """DEVICE_SET_IRQS."""

        buffer = bytearray(struct.pack("<IIIII", 20 + len(data), flags, index, start, count)) + data
        fcntl.ioctl(self.fd, DEVICE_SET_IRQS, buffer, True)

    def reset(self) -> None:
        """DEVICE_RESET."""

        fcntl.ioctl(self.fd, DEVICE_RESET)

    def feature(self, flags: int, layout: str = "", *values: int) -> tuple[int, ...]:
        """DEVICE_FEATURE; returns the data."""

        size = struct.calcsize("<" + layout)
        return ioctl(self.fd, DEVICE_FEATURE, "II" + layout, 8 + size, flags, *values)[2:]

    def migration_flags(self) -> int:
        """VFIO_MIGRATION_*."""

        return self.feature(GET | MIGRATION, "Q", 0)[0]

    def state(self) -> int:
        """The migration state."""

        return self.feature(GET | DEVICE_STATE, "Ii", 0, 0)[0]

    def set_state(self, state: int) -> int:
        """Return data_fd. The structure is zeroed before, as QEMU does it."""
        return self.feature(SET | DEVICE_STATE, "Ii", state, 0)[1]

    def data_size(self) -> int:
        """stop_copy_length."""

        return self.feature(GET | DATA_SIZE, "Q", 0)[0]

    def log_start(self, *ranges: tuple[int, int], page_size: int = PAGE) -> int:
        """Start the log of DMA writes; returns its page size."""

        array = bytearray(struct.pack(f"<{2 * len(ranges)}Q", *(part for one in ranges for part in one)))
        return self.feature(SET | LOG_START, "QIIQ", page_size, len(ranges), 0, address_of(array))[0]

    def log_stop(self) -> None:
        """Stop it."""

        self.feature(SET | LOG_STOP)

    def log_report(self, iova: int, size: int, page_size: int = PAGE, before: int = 0) -> set[int]:
        """Return which pages are dirty; the bitmap is `before` in each byte at first."""
        pages = -(-size // page_size)
        bitmap = bytearray([before]) * (-(-pages // 64) * 8)
        self.feature(GET | LOG_REPORT, "QQQQ", iova, size, page_size, address_of(bitmap))
        return {8 * at + bit for at, byte in enumerate(bitmap) if byte for bit in range(8) if byte >> bit & 1}

    def hot_reset_info(self, room: int = 1) -> tuple[int, int, list[tuple[int, ...]]]:
        """flags, count, the dependent devices."""

        data = bytearray(struct.pack("<III", 12 + 8 * room, 0, 0)) + bytearray(8 * room)
        fcntl.ioctl(self.fd, GET_PCI_HOT_RESET_INFO, data, True)
        _, flags, count = struct.unpack_from("<III", data)
        return flags, count, [struct.unpack_from("<IHBB", data, 12 + 8 * one) for one in range(count)]


def precopy_info(fd: int, argsz: int = 24) -> tuple[int, int, int]:
    """flags, initial_bytes, dirty_bytes."""
    return ioctl(fd, MIG_GET_PRECOPY_INFO, "IIQQ", argsz, 0, 0, 0)[1:]


class Attached:
    """A device that may do DMA, reached by one of the three ways, and its address space."""

    def __init__(self, path: Path, number: int = 0, beside: Attached | None = None) -> None:
        self.path = path
        self.number = number
        self.memories: list[Memory] = []  # alive for as long as the device may reach them
        if path == "type1":
            self._by_group(beside)
        else:
            self._by_iommufd(beside)

    def _by_iommufd(self, beside: Attached | None) -> None:
        if beside is not None:
            self.iommufd, self.ioas = beside.iommufd, beside.ioas
        else:
            self.iommufd = Iommufd(FIRST_FD if self.path == "iommufd-fd" else None)
        if self.path == "iommufd-fd":
            fd = FIRST_FD + 1 + self.number
        else:
            fd = os.open(f"/dev/vfio/devices/vfio-user{self.number}", os.O_RDWR)
        self.device = Device(fd)
        self.id = self.device.bind(self.iommufd.fd)
        if beside is None:
            self.ioas = self.iommufd.alloc()
        self.device.attach(self.ioas)

    def _by_group(self, beside: Attached | None) -> None:
        self.group = os.open(f"/dev/vfio/{FIRST_GROUP + self.number}", os.O_RDWR)
        self.container = os.open("/dev/vfio/vfio", os.O_RDWR) if beside is None else beside.container
        ioctl(self.group, GROUP_SET_CONTAINER, "i", self.container)
        if beside is None:
            fcntl.ioctl(self.container, SET_IOMMU, 3)
        self.device = Device(fcntl.ioctl(self.group, GROUP_GET_DEVICE_FD, bytearray(b"any-name\0"), True))

    def map(
        self, iova: int, memory: Memory, flags: int = READ | WRITE, start: int = 0, size: int = 0
    ) -> None:
        """Map memory."""

        length = size or memory.size - start
        self.memories.append(memory)
        if self.path == "type1":
            values = (32, flags, memory.address + start, iova, length)
            ioctl(self.container, IOMMU_MAP_DMA, "IIQQQ", *values)
        else:
            self.iommufd.map(self.ioas, iova, memory.address + start, length, flags)

    def unmap(self, iova: int, size: int) -> int:
        """Unmap a range; returns how many bytes."""

        if self.path == "type1":
            return ioctl(self.container, IOMMU_UNMAP_DMA, "IIQQ", 24, 0, iova, size)[3]
        return self.iommufd.unmap(self.ioas, iova, size)

    def close(self) -> None:
        """Let go of everything, in QEMU's order."""
        if self.path == "type1":
            os.close(self.device.fd)
            os.close(self.group)
            os.close(self.container)
        else:
            self.device.detach()
            self.iommufd.destroy(self.ioas)
            os.close(self.iommufd.fd)
            os.close(self.device.fd)
