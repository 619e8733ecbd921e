"""vfio-user replies: layouts, and the checks of a server's bytes.

Layouts: QEMU's docs/interop/vfio-user.rst and `<linux/vfio.h>`; little-endian, as all vfio-user hosts are.
"""

from __future__ import annotations

import itertools
import json
import struct
from dataclasses import dataclass
from typing import Any

from vfu_dev import uapi
from vfu_dev.errors import ProtocolError

VERSION = struct.Struct("<HH")  # major, minor, then JSON with its NUL
DMA_MAP = struct.Struct("<IIQQQ")  # argsz, flags, offset, iova, size
DMA_UNMAP = struct.Struct("<IIQQ")  # argsz, flags, iova, size
DEVICE_INFO = struct.Struct("<IIII")  # argsz, flags, num_regions, num_irqs
REGION_INFO = struct.Struct("<IIIIQQ")  # argsz, flags, index, cap_offset, size, offset
CAP_HEADER = struct.Struct("<HHI")  # id, version, next
SPARSE_HEADER = struct.Struct("<II")  # nr_areas, reserved
SPARSE_AREA = struct.Struct("<QQ")  # offset, size
IRQ_INFO = struct.Struct("<IIII")  # argsz, flags, index, count
IRQ_SET = struct.Struct("<IIIII")  # argsz, flags, index, start, count
REGION_ACCESS = struct.Struct("<QII")  # offset, region, count
DMA_ACCESS = struct.Struct("<QQ")  # address, count
FEATURE = struct.Struct("<II")  # argsz, flags
MIG_DATA = struct.Struct("<II")  # argsz, size
MIG_DATA_WINDOW = struct.Struct("<IIQ")  # argsz, flags, size
MIG_DATA_IN_WINDOW = struct.Struct("<IIQ")  # argsz, size, offset
PRECOPY_INFO = struct.Struct("<IIQQ")  # argsz, flags, initial_bytes, dirty_bytes
LOGGING_CONTROL = struct.Struct("<QII")  # page_size, num_ranges, reserved
LOGGING_RANGE = struct.Struct("<QQ")  # iova, length
LOGGING_REPORT = struct.Struct("<QQQ")  # iova, length, page_size

MAX_VERSION_BYTES = 64 << 10
MAX_REGION_INFO_BYTES = 64 << 10
MAX_REGIONS = 100  # QEMU's VFIO_USER_MAX_REGIONS
MAX_IRQ_TYPES = 50  # QEMU's VFIO_USER_MAX_IRQS
MAX_XFER_BYTES = 64 << 20  # QEMU's VFIO_USER_MAX_MAX_XFER
MAX_WINDOW_BYTES = 64 << 20  # of a window for migration data that we take part in
# What a socket holds at once with room to spare (net.core.wmem_default is 208 KiB). Upstream's libvfio-user
# of June 2026 receives the body of a message by one recv(), and is out of step after a longer one.
ONE_RECEIVE_BYTES = 128 << 10

DEVICE_FLAG_RESET = 1 << 0  # <linux/vfio.h>: VFIO_DEVICE_FLAGS_RESET
DEVICE_FLAG_PCI = 1 << 1  # <linux/vfio.h>: VFIO_DEVICE_FLAGS_PCI


@dataclass(frozen=True)
class Version:
    """What the server answered to VERSION; its limits apply to what we send."""

    major: int
    minor: int
    capabilities: dict[str, Any]
    max_data_xfer_size: int
    max_msg_fds: int
    max_dma_maps: int
    pgsizes: int
    precopy_info: bool
    data_window: int  # the largest window for migration data, bytes; 0: none


@dataclass(frozen=True)
class DeviceInfo:
    """struct vfio_device_info."""

    flags: int
    num_regions: int
    num_irqs: int

    @property
    def resettable(self) -> bool:
        """Whether DEVICE_RESET works."""
        return bool(self.flags & DEVICE_FLAG_RESET)


@dataclass(frozen=True)
class RegionInfo:
    """struct vfio_region_info; `areas`: what can be mapped, (offset, size), none overlapping."""

    index: int
    flags: int
    size_bytes: int
    offset: int
    areas: tuple[tuple[int, int], ...]

    @property
    def readable(self) -> bool:
        """VFIO_REGION_INFO_FLAG_READ."""
        return bool(self.flags & uapi.VFIO_REGION_INFO_FLAG_READ)

    @property
    def writable(self) -> bool:
        """VFIO_REGION_INFO_FLAG_WRITE."""
        return bool(self.flags & uapi.VFIO_REGION_INFO_FLAG_WRITE)

    @property
    def mappable(self) -> bool:
        """Whether there is anything to mmap."""
        return bool(self.areas)


@dataclass(frozen=True)
class IrqInfo:
    """struct vfio_irq_info."""

    index: int
    flags: int
    count: int


@dataclass(frozen=True)
class ClientPrecopyInfo:
    """struct vfio_precopy_info: bytes of the stream, framing included."""

    flags: int
    initial_bytes: int
    dirty_bytes: int

    @property
    def reinit(self) -> bool:
        """New initial data appeared (Linux 7.1, opt-in)."""
        return bool(self.flags & uapi.VFIO_PRECOPY_INFO_REINIT)


def require(condition: bool, what: str) -> None:
    """Raise ProtocolError saying `what` the server sent unless `condition`."""
    if not condition:
        raise ProtocolError(f"the server sent {what}")


def unpack(layout: struct.Struct, payload: memoryview, what: str) -> tuple[Any, ...]:
    """Unpack a reply whose size must be exactly that of `layout`."""
    require(len(payload) == layout.size, f"{len(payload)} bytes of {what}, expected {layout.size}")
    return layout.unpack(payload)


def parse_version(payload: memoryview) -> Version:
    """Check a VERSION reply: version 0.0, JSON that is an object, known limits integers in range."""
    require(len(payload) >= VERSION.size, f"a VERSION reply of {len(payload)} bytes")
    major, minor = VERSION.unpack_from(payload)
    require((major, minor) == (0, 0), f"version {major}.{minor}, 0.0 was proposed")
    capabilities = capabilities_of(bytes(payload[VERSION.size :]))
    _check_optional(capabilities)
    pgsizes = _limit(capabilities, "pgsizes", 4096)
    require(pgsizes % 4096 == 0, f"pgsizes {pgsizes:#x}, with pages below 4 KiB")
    return Version(
        major,
        minor,
        capabilities,
        max_data_xfer_size=_limit(capabilities, "max_data_xfer_size", uapi.VFIO_USER_DEF_MAX_XFER_BYTES),
        max_msg_fds=_limit(capabilities, "max_msg_fds", 1),
        max_dma_maps=_limit(capabilities, "max_dma_maps", 65535),
        pgsizes=pgsizes,
        precopy_info=capabilities.get("migration_precopy_info") is True,
        data_window=_limit(capabilities, "migration_data_window", 0, least=0),
    )


def capabilities_of(data: bytes) -> dict[str, Any]:
    """Return the capabilities in the data of a VERSION reply. Raises: ProtocolError: they are malformed."""
    if not data:  # the version data is optional
        return {}
    require(data.endswith(b"\0"), "version data without its final NUL")
    try:
        value = json.loads(data[:-1].decode())
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the server sent version data that is not JSON: {error}") from error
    require(isinstance(value, dict), "version data that is not an object")
    capabilities = value.get("capabilities", {})
    require(isinstance(capabilities, dict), "capabilities that are not an object")
    return dict(capabilities)


def _check_optional(capabilities: dict[str, Any]) -> None:
    """Check what is neither a limit nor required: the migration object, switches, the twin socket."""
    migration = capabilities.get("migration", {})
    require(isinstance(migration, dict), f"migration {migration!r}, not an object")
    pgsize = _limit(migration, "pgsize", 4096)
    require(pgsize >= 4096 and pgsize & (pgsize - 1) == 0, f"a migration pgsize of {pgsize}")
    _limit(migration, "max_bitmap_size", 1)
    for name in ("write_multiple", "migration_precopy_info"):
        require(isinstance(capabilities.get(name, False), bool), f"{name} {capabilities.get(name)!r}")
    twin = capabilities.get("twin_socket", {})
    require(isinstance(twin, dict) and not twin.get("supported"), "a twin socket, which was not proposed")


def _limit(capabilities: dict[str, Any], name: str, default: int, least: int = 1) -> int:
    value = capabilities.get(name, default)
    valid = isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 64
    require(valid, f"{name} {value!r}")
    return int(value)


def parse_device_info(payload: memoryview) -> DeviceInfo:
    """Check a DEVICE_GET_INFO reply against the limits QEMU sets too."""
    argsz, flags, regions, irqs = unpack(DEVICE_INFO, payload, "device info")
    require(argsz >= DEVICE_INFO.size, f"device info with argsz {argsz}")
    require(bool(flags & DEVICE_FLAG_PCI), f"device info of something that is not PCI (flags {flags:#x})")
    require(regions <= MAX_REGIONS, f"{regions} regions (at most {MAX_REGIONS})")
    require(irqs <= MAX_IRQ_TYPES, f"{irqs} interrupt types (at most {MAX_IRQ_TYPES})")
    return DeviceInfo(flags, regions, irqs)


def region_argsz(payload: memoryview, index: int) -> int:
    """Return how much room the whole reply needs, from a first REGION_INFO reply about `index`."""
    require(len(payload) >= REGION_INFO.size, f"{len(payload)} bytes of region info")
    argsz, _, found, _, _, _ = REGION_INFO.unpack_from(payload)
    require(found == index, f"info about region {found}, asked for {index}")
    require(
        REGION_INFO.size <= argsz <= MAX_REGION_INFO_BYTES,
        f"info of region {index} with argsz {argsz} ({REGION_INFO.size} to {MAX_REGION_INFO_BYTES})",
    )
    return int(argsz)


def parse_region_info(payload: memoryview, index: int, fd_count: int) -> RegionInfo:
    """Check a whole REGION_INFO reply, its capability chain included.

    The chain must go forward, stay in the reply and end; areas must lie in the region and not overlap.
    """
    argsz = region_argsz(payload, index)
    require(len(payload) == argsz, f"{len(payload)} bytes of info of region {index} with argsz {argsz}")
    _, flags, _, cap_offset, size, offset = REGION_INFO.unpack_from(payload)
    require(size < 1 << 63, f"region {index} of {size} bytes")
    areas: list[tuple[int, int]] | None = None
    if flags & uapi.VFIO_REGION_INFO_FLAG_CAPS:
        require(cap_offset != 0, f"info of region {index} with CAPS set and no capability")
        for identity, version, body in _chain(payload, cap_offset, index):
            if identity == uapi.VFIO_REGION_INFO_CAP_SPARSE_MMAP:
                require(version == 1, f"a sparse mmap capability of version {version}")
                require(areas is None, f"two sparse mmap capabilities for region {index}")
                areas = _sparse_areas(body, size, index)
    mapped = bool(flags & uapi.VFIO_REGION_INFO_FLAG_MMAP) and size > 0
    if mapped:
        require(fd_count == 1, f"region {index} as mappable with {fd_count} file descriptors")
        require(offset + size < 1 << 63, f"region {index} at file offset {offset}")
        areas = [(0, size)] if areas is None else areas
    else:
        require(fd_count == 0, f"{fd_count} file descriptors for region {index}, which is not mappable")
    return RegionInfo(index, flags, size, offset, tuple(areas or ()) if mapped else ())


def _chain(payload: memoryview, start: int, index: int) -> list[tuple[int, int, memoryview]]:
    """Return (id, version, bytes up to the end of the reply) of each capability."""
    found = []
    position, lowest = start, REGION_INFO.size
    while position:
        require(
            lowest <= position <= len(payload) - CAP_HEADER.size and position % 4 == 0,
            f"a capability of region {index} at offset {position}",
        )
        identity, version, following = CAP_HEADER.unpack_from(payload, position)
        found.append((identity, version, payload[position + CAP_HEADER.size :]))
        lowest, position = position + CAP_HEADER.size, following
    return found


def _sparse_areas(body: memoryview, size: int, index: int) -> list[tuple[int, int]]:
    require(len(body) >= SPARSE_HEADER.size, f"a sparse mmap capability of region {index} cut short")
    count, _ = SPARSE_HEADER.unpack_from(body)
    room = (len(body) - SPARSE_HEADER.size) // SPARSE_AREA.size
    require(count <= room, f"{count} sparse areas of region {index} with room for {room}")
    areas = []
    for number in range(count):
        offset, length = SPARSE_AREA.unpack_from(body, SPARSE_HEADER.size + number * SPARSE_AREA.size)
        inside = offset <= size and 0 < length <= size - offset
        require(inside, f"a sparse area ({offset}, {length}) outside region {index} of {size} bytes")
        areas.append((offset, length))
    areas.sort()
    for (first, length), (second, _) in itertools.pairwise(areas):
        require(first + length <= second, f"sparse areas of region {index} that overlap")
    return areas


def parse_irq_info(payload: memoryview, index: int) -> IrqInfo:
    """Check a GET_IRQ_INFO reply; the count is bounded by what PCI can have."""
    argsz, flags, found, count = unpack(IRQ_INFO, payload, "interrupt info")
    require(argsz >= IRQ_INFO.size, f"interrupt info with argsz {argsz}")
    require(found == index, f"info about interrupt type {found}, asked for {index}")
    most = uapi.MAX_MSIX_VECTORS
    require(count <= most, f"{count} interrupts of type {index} (at most {most})")
    return IrqInfo(index, flags, count)


def check_access(payload: memoryview, offset: int, region: int, count: int) -> None:
    """Check that the head of a REGION_READ or REGION_WRITE reply repeats the request."""
    found = unpack(REGION_ACCESS, payload, "region access reply")
    expected = (offset, region, count)
    require(found == expected, f"(offset, region, count) {found} in reply to an access of {expected}")


def parse_feature(payload: memoryview, flags: int, data_bytes: int | None) -> memoryview:
    """Return the data of a DEVICE_FEATURE reply, of `data_bytes` (None: any size)."""
    require(len(payload) >= FEATURE.size, f"a DEVICE_FEATURE reply of {len(payload)} bytes")
    argsz, found = FEATURE.unpack_from(payload)
    require(found == flags, f"flags {found:#x} in reply to DEVICE_FEATURE {flags:#x}")
    data = payload[FEATURE.size :]
    if data_bytes is not None:
        feature = flags & uapi.VFIO_DEVICE_FEATURE_MASK
        require(len(data) == data_bytes, f"{len(data)} bytes of feature {feature}, expected {data_bytes}")
        require(argsz == len(payload), f"feature {feature} with argsz {argsz} in {len(payload)} bytes")
    return data


def parse_precopy_info(payload: memoryview) -> ClientPrecopyInfo:
    """Check a MIG_GET_PRECOPY_INFO reply (native/spec/)."""
    argsz, flags, initial_bytes, dirty_bytes = unpack(PRECOPY_INFO, payload, "pre-copy info")
    require(argsz >= PRECOPY_INFO.size, f"pre-copy info with argsz {argsz}")
    return ClientPrecopyInfo(flags, initial_bytes, dirty_bytes)
