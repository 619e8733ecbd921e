"""DEVICE_GET_REGION_INFO, REGION_READ and REGION_WRITE, configuration space."""

from __future__ import annotations

import os
import struct

from vfu_dev import uapi
from vfu_dev.client import messages
from vfu_dev.conformance.model import PCI, Level, NotApplicableError, Source, check, require, spec
from vfu_dev.conformance.peer import Reply
from vfu_dev.conformance.session import CheckedRegion, Session

_INFO = "VFIO_USER_DEVICE_GET_REGION_INFO"
_READ, _WRITE = "VFIO_USER_REGION_READ", "VFIO_USER_REGION_WRITE"
_CONFIG = uapi.VFIO_PCI_CONFIG_REGION_INDEX
_CONFIG_BYTES = (256, 4096)
_ARGSZ = struct.Struct("<I")  # what information begins with
_MULTI, _COUNT = struct.Struct("<QII8s"), struct.Struct("<Q")  # one write, and wr_cnt
# PCI Local Bus Specification 3.0, chapter 6: offsets of configuration space.
_COMMAND, _STATUS, _CAPABILITIES, _INTERRUPT_LINE = 0x04, 0x06, 0x34, 0x3C
_COMMAND_BUS_MASTER, _STATUS_CAPABILITIES = 0x4, 0x10


def _read(session: Session, index: int, offset: int, count: int) -> bytes:
    request = messages.REGION_ACCESS.pack(offset, index, count)
    what = f"REGION_READ of {count} bytes of region {index} at {offset:#x}"
    payload = session.accepted(uapi.VFIO_USER_REGION_READ, request, what=what).payload
    return payload[messages.REGION_ACCESS.size :]


def _write(session: Session, index: int, offset: int, data: bytes) -> Reply:
    request = messages.REGION_ACCESS.pack(offset, index, len(data)) + data
    what = f"REGION_WRITE of {len(data)} bytes to region {index} at {offset:#x}"
    return session.accepted(uapi.VFIO_USER_REGION_WRITE, request, what=what)


@check(Level.MUST, spec(_INFO, "*index* is the index of memory region being queried"))
def region_info_is_about_its_index(session: Session) -> None:
    """Every region that the device says it has can be asked about, and the reply is about that one."""
    for index in range(session.info[1]):
        found = session.region(index).index
        require(found == index, f"info about region {found}, asked for {index}")


@check(
    Level.MUST,
    spec(
        _INFO,
        "*argsz* is the size required for the full reply payload (region info structure plus the size of any "
        "region capabilities)",
    ),
)
def region_info_has_its_size(session: Session) -> None:
    """argsz is the size of the whole reply, capabilities included."""
    for index in range(session.info[1]):
        payload = session.region(index).payload
        (argsz,) = _ARGSZ.unpack_from(payload)
        require(argsz == len(payload), f"info of region {index}: argsz {argsz} in {len(payload)} bytes")


@check(
    Level.MUST,
    spec(
        "Message sizes",
        "This may be larger than the requested maximum size: in that case, the full payload is not "
        "included in "
        "the reply",
    ),
)
def region_info_fits_its_room(session: Session) -> None:
    """A client with room for the structure alone gets no more, and learns how much there is."""
    room = messages.REGION_INFO.size
    for region in _with_capabilities(session):
        reply = session.ask_region(region.index, room)
        require(
            not reply.refused, f"info of region {region.index} with argsz {room} is refused: {reply.reason}"
        )
        require(len(reply.payload) <= room, f"{len(reply.payload)} bytes where there is room for {room}")
        require(len(reply.payload) >= _ARGSZ.size, f"info of {len(reply.payload)} bytes")
        (argsz,) = _ARGSZ.unpack_from(reply.payload)
        require(argsz == len(region.payload), f"argsz {argsz}, all of it has {len(region.payload)} bytes")


@check(
    Level.MUST,
    spec(
        _INFO,
        "*next* specifies the offset of the next capability in the capability list. It is relative to the "
        "beginning of the VFIO region info structure.",
    ),
)
def region_capabilities_form_a_list(session: Session) -> None:
    """The list of a region's capabilities stays in the reply and ends."""
    for region in _with_capabilities(session):
        require(_capabilities(region), f"region {region.index} has CAPS set and no capability")


@check(Level.MUST, spec(_INFO, "*nr_areas* is the number of sparse mmap areas in the region."))
def region_sparse_areas_are_inside(session: Session) -> None:
    """Sparse areas lie in their region and do not overlap."""
    seen = False
    for region in _with_capabilities(session):
        for identity, at in _capabilities(region):
            if identity != uapi.VFIO_REGION_INFO_CAP_SPARSE_MMAP:
                continue
            seen = True
            _judge_areas(region, at)
    if not seen:
        raise NotApplicableError("no region has sparse areas")


def _judge_areas(region: CheckedRegion, at: int) -> None:
    body = region.payload[at:]
    name = f"region {region.index}"
    require(len(body) >= messages.SPARSE_HEADER.size, f"the sparse areas of {name} are cut short")
    count, _ = messages.SPARSE_HEADER.unpack_from(body)
    room = (len(body) - messages.SPARSE_HEADER.size) // messages.SPARSE_AREA.size
    require(count <= room, f"{count} sparse areas of {name} with room for {room}")
    end = 0
    for number in range(count):
        position = messages.SPARSE_HEADER.size + number * messages.SPARSE_AREA.size
        offset, size = messages.SPARSE_AREA.unpack_from(body, position)
        inside = size > 0 and offset + size <= region.size_bytes
        require(inside, f"area ({offset:#x}, {size:#x}) of {name}, which has {region.size_bytes:#x} bytes")
        require(offset >= end, f"areas of {name} that overlap or are out of order")
        end = offset + size


@check(
    Level.MUST,
    spec(
        _INFO,
        "When this flag is set, the reply will include a file descriptor in its meta-data.",
    ),
)
def region_that_maps_brings_a_file(session: Session) -> None:
    """A region with MMAP set brings a file descriptor, one without brings none."""
    for index in range(session.info[1]):
        reply = session.ask_region(index)
        require(not reply.refused, f"info of region {index} is refused: {reply.reason}")
        require(
            len(reply.payload) >= messages.REGION_INFO.size,
            f"info of region {index} of {len(reply.payload)} bytes",
        )
        _, flags, _, _, size, _ = messages.REGION_INFO.unpack_from(reply.payload)
        mapped = flags & uapi.VFIO_REGION_INFO_FLAG_MMAP and size
        count = len(reply.fds)
        session.peer.drop_fds()
        if mapped:
            require(count, f"region {index} has MMAP set and brings no file descriptor")
        else:
            require(not count, f"region {index} is not mappable and brings {count} file descriptors")


@check(
    Level.SHOULD,
    spec(
        _INFO,
        "*offset* is the offset that should be given to the mmap() system call for regions with the MMAP "
        "attribute.",
    ),
)
def region_file_is_long_enough(session: Session) -> None:
    """The file of a region reaches to the end of what is to be mapped; beyond it, an access is SIGBUS."""
    for region in _mappable(session):
        reply = session.ask_region(region.index)
        require(reply.fds, f"region {region.index} has MMAP set and brings no file descriptor")
        size = os.fstat(reply.fds[0]).st_size
        end = region.offset + region.size_bytes
        session.peer.drop_fds()
        require(size >= end, f"the file of region {region.index} has {size} bytes, {end} are to be mapped")


@check(
    Level.SHOULD,
    spec(_INFO, "*index* is the index of memory region being queried"),
)
def region_that_is_not_there(session: Session) -> None:
    """To ask about a region that the device does not have is an error."""
    reply = session.ask_region(session.info[1])
    require(reply.refused, f"info of region {session.info[1]} succeeds, there are {session.info[1]} regions")


@check(Level.MUST, spec(_READ, "In this case, a client can read from a device region with this message."))
def config_space_can_be_read(session: Session) -> None:
    """Configuration space has 256 or 4096 bytes, and begins with a vendor."""
    region = session.region(_CONFIG)
    require(region.size_bytes in _CONFIG_BYTES, f"configuration space of {region.size_bytes} bytes")
    header = _read(session, _CONFIG, 0, 64)
    require(len(header) == 64, f"{len(header)} bytes for a read of 64")
    (vendor,) = struct.unpack_from("<H", header)
    require(vendor not in (0, 0xFFFF), f"vendor {vendor:#06x}")


@check(
    Level.SHOULD,
    Source(
        PCI,
        "6.7 Capabilities List",
        "Each capability in the list consists of an 8-bit ID field assigned by the PCI SIG, an 8 bit "
        "pointer in "
        "configuration space to the next capability, and some number of additional registers",
    ),
)
def config_capabilities_form_a_list(session: Session) -> None:
    """The capabilities in configuration space form a list that ends."""
    config = _read(session, _CONFIG, 0, 256)
    require(len(config) == 256, f"{len(config)} bytes for a read of 256")
    (status,) = struct.unpack_from("<H", config, _STATUS)
    if not status & _STATUS_CAPABILITIES:
        raise NotApplicableError("configuration space has no capabilities")
    at, seen = config[_CAPABILITIES] & ~3, set()
    while at:
        require(at >= 0x40, f"a capability at {at:#x}, in the header")
        require(at not in seen, f"the list of capabilities comes back to {at:#x}")
        seen.add(at)
        at = config[at + 1] & ~3


@check(Level.MUST, spec(_READ, "*count* is the size of the data transferred."))
def region_read_repeats_its_request(session: Session) -> None:
    """A reply to REGION_READ names what was asked for, and has the data that it says."""
    for offset, count in ((0, 4), (2, 2), (8, 1), (0, 64)):
        request = messages.REGION_ACCESS.pack(offset, _CONFIG, count)
        payload = session.accepted(uapi.VFIO_USER_REGION_READ, request).payload
        _judge_access(payload, offset, count, count)


@check(Level.MUST, spec(_WRITE, "*region* is the index of the region accessed."))
def region_write_repeats_its_request(session: Session) -> None:
    """A reply to REGION_WRITE names what was asked for, without the data."""
    line = _read(session, _CONFIG, _INTERRUPT_LINE, 1)  # what is there already: no device minds
    payload = _write(session, _CONFIG, _INTERRUPT_LINE, line).payload
    _judge_access(payload, _INTERRUPT_LINE, 1, 0)


def _judge_access(payload: bytes, offset: int, count: int, data_bytes: int) -> None:
    head = messages.REGION_ACCESS.size
    require(len(payload) >= head, f"{len(payload)} bytes in reply to a region access")
    found = messages.REGION_ACCESS.unpack_from(payload)
    require(
        found == (offset, _CONFIG, count), f"(offset, region, count) {found}, not {(offset, _CONFIG, count)}"
    )
    require(len(payload) - head == data_bytes, f"{len(payload) - head} bytes of data, not {data_bytes}")


@check(
    Level.SHOULD,
    Source(
        PCI,
        "6.2.2 Device Control",
        "Controls a device's ability to act as a master on the PCI bus.",
    ),
)
def region_write_arrives(session: Session) -> None:
    """What is written to the bus master bit of the command register can be read back."""
    before = _read(session, _CONFIG, _COMMAND, 2)
    require(len(before) == 2, f"{len(before)} bytes for a read of 2")
    (command,) = struct.unpack("<H", before)
    changed = struct.pack("<H", command ^ _COMMAND_BUS_MASTER)
    _write(session, _CONFIG, _COMMAND, changed)
    after = _read(session, _CONFIG, _COMMAND, 2)
    _write(session, _CONFIG, _COMMAND, before)
    require(after == changed, f"command {changed.hex()} was written, {after.hex()} read")


@check(
    Level.SHOULD,
    spec(
        "Security Considerations",
        "Standard tools and mechanisms should be used on both sides to validate input and prevent against "
        "denial of service scenarios, buffer overflow, etc.",
    ),
)
def region_access_outside_is_refused(session: Session) -> None:
    """Reads and writes beyond a region's end are errors, also where offset and count wrap around."""
    size = session.region(_CONFIG).size_bytes
    require(size in _CONFIG_BYTES, f"configuration space of {size} bytes")
    for offset in (size, size - 2, (1 << 64) - 4):
        request = messages.REGION_ACCESS.pack(offset, _CONFIG, 4)
        session.refused(uapi.VFIO_USER_REGION_READ, request, what=f"a read at {offset:#x} of {size:#x} bytes")
        session.refused(
            uapi.VFIO_USER_REGION_WRITE, request + bytes(4), what=f"a write at {offset:#x} of {size:#x} bytes"
        )


@check(
    Level.MUST,
    spec(
        "Read and Write Operations",
        "Note that all of these operations must be supported by the client and/or server, even if the "
        "corresponding memory or device region has been shared as mappable.",
    ),
)
def region_that_maps_can_be_read(session: Session) -> None:
    """A region that can be mapped can be read by message as well."""
    for region in _mappable(session):
        offset = 0
        for identity, at in _capabilities(region) if region.has_capabilities else ():
            body = region.payload[at:]
            if identity == uapi.VFIO_REGION_INFO_CAP_SPARSE_MMAP and len(body) >= 24:
                (offset,) = struct.unpack_from("<Q", body, messages.SPARSE_HEADER.size)
        require(len(_read(session, region.index, offset, 4)) == 4, f"region {region.index} cannot be read")


@check(
    Level.MUST,
    spec("VFIO_USER_REGION_WRITE_MULTI", "*wr_cnt* is the number of device writes completed."),
)
def write_multi_counts_its_writes(session: Session) -> None:
    """A server that takes several writes in one message says how many it did."""
    session.peer  # noqa: B018 - negotiates
    if session.capabilities.get("write_multiple") is not True:
        raise NotApplicableError("the server does not offer write_multiple")
    line = _read(session, _CONFIG, _INTERRUPT_LINE, 1)
    one = _MULTI.pack(_INTERRUPT_LINE, _CONFIG, 1, line)
    request = _COUNT.pack(2) + one * 2
    payload = session.accepted(uapi.VFIO_USER_REGION_WRITE_MULTI, request).payload
    require(len(payload) == _COUNT.size, f"{len(payload)} bytes in reply to WRITE_MULTI")
    (done,) = _COUNT.unpack(payload)
    require(done == 2, f"{done} of 2 writes are done")


# --- regions of a kind --------------------------------------------------------------------------------------


def _with_capabilities(session: Session) -> list[CheckedRegion]:
    found = [region for region in session.regions() if region.has_capabilities]
    if not found:
        raise NotApplicableError("no region has capabilities")
    return found


def _mappable(session: Session) -> list[CheckedRegion]:
    found = [region for region in session.regions() if region.mappable]
    session.peer.drop_fds()
    if not found:
        raise NotApplicableError("no region can be mapped")
    return found


def _capabilities(region: CheckedRegion) -> list[tuple[int, int]]:
    """Return (id, offset of what follows the header) of each capability."""
    found, seen = [], set()
    at = region.cap_offset
    while at:
        inside = messages.REGION_INFO.size <= at <= len(region.payload) - messages.CAP_HEADER.size
        require(inside, f"a capability of region {region.index} at {at:#x}, outside of the reply")
        require(at not in seen, f"the capabilities of region {region.index} come back to {at:#x}")
        seen.add(at)
        identity, _, following = messages.CAP_HEADER.unpack_from(region.payload, at)
        found.append((identity, at + messages.CAP_HEADER.size))
        at = following
    return found
