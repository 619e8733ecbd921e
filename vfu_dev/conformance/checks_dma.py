"""DMA_MAP and DMA_UNMAP.

No check starts DMA, because that differs between devices. DMA_READ and DMA_WRITE requests of the server are
answered.
"""

from __future__ import annotations

import errno

from vfu_dev import uapi
from vfu_dev.client import messages
from vfu_dev.conformance.model import (
    NEWER_SPECIFICATION,
    Level,
    NotApplicableError,
    Source,
    check,
    require,
    spec,
)
from vfu_dev.conformance.session import IOVA, Session

_MAP, _UNMAP = "VFIO_USER_DMA_MAP", "VFIO_USER_DMA_UNMAP"
_MIB = 1 << 20
# A guest with hot-plugged memory has that number. Some servers accept 16 without saying so.
_MANY = 128
# Flags of DMA_MAP since July 2026.
_MMAP_ACCESS, _FILE_ACCESS = 1 << 2, 1 << 3

_EXISTS = spec(
    _MAP,
    "A command to map over an existing region must be failed by the server with ``EEXIST`` set in error "
    "field "
    "in the reply.",
)
_EXACT = spec(
    _UNMAP, "The address and size of the DMA region being unmapped must match exactly a previous mapping."
)
_MODES = Source(
    NEWER_SPECIFICATION, _MAP, "The access mode bits in the flags field indicate which access mode to use."
)
_VALIDATE = spec(
    "Security Considerations",
    "Standard tools and mechanisms should be used on both sides to validate input and prevent against denial "
    "of service scenarios, buffer overflow, etc.",
)


def _refused(
    session: Session, iova: int, size: int, what: str, number: int | None = None, **more: int
) -> None:
    """Send a DMA_MAP that must fail, with a file of 1 MiB; see `Session.dma_request` for `more`."""
    region = session.dma.create(iova, _MIB, 3, True)
    try:
        request = session.dma_request(iova, size, **more)
        reply = session.ask(uapi.VFIO_USER_DMA_MAP, request, [region.fd])
        if not reply.refused:
            session.unmap(iova, size)
        require(reply.refused, f"{what} succeeds")
        if number is not None:
            require(reply.error == number, f"{what} fails with {reply.reason}, not {errno.errorcode[number]}")
    finally:
        region.close()


@check(Level.MUST, spec(_MAP, "There is no payload in the reply message."))
def dma_map_is_accepted(session: Session) -> None:
    """Memory with a file descriptor can be mapped, and the reply has no payload."""
    session.map(IOVA, _MIB)
    region = session.dma.create(IOVA + _MIB, _MIB, 3, True)
    session.dma.regions[region.iova] = region
    reply = session.accepted(uapi.VFIO_USER_DMA_MAP, session.dma_request(region.iova, _MIB), [region.fd])
    session.undo.callback(session.unmap, region.iova, _MIB)
    require(not reply.payload, f"{len(reply.payload)} bytes in reply to DMA_MAP")


@check(
    Level.MUST,
    spec(
        _MAP,
        "Otherwise, if the DMA region cannot be directly mapped by the server, no file descriptor must be "
        "sent "
        "as part of the message meta-data and the DMA region can be accessed by the server using "
        "``VFIO_USER_DMA_READ`` and ``VFIO_USER_DMA_WRITE`` messages",
    ),
)
def dma_map_without_a_file_is_accepted(session: Session) -> None:
    """Memory without a file descriptor can be mapped."""
    session.map(IOVA, _MIB, shared=False)


@check(Level.MUST, _EXISTS)
def dma_map_twice_is_refused(session: Session) -> None:
    """The same mapping again is EEXIST."""
    session.map(IOVA, _MIB)
    _refused(session, IOVA, _MIB, "the same DMA_MAP again", errno.EEXIST)


@check(Level.MUST, _EXISTS)
def dma_map_over_another_is_refused(session: Session) -> None:
    """A mapping that overlaps another is EEXIST."""
    session.map(IOVA, _MIB)
    _refused(session, IOVA + _MIB // 2, _MIB, "a DMA_MAP over half of another", errno.EEXIST)


@check(Level.MUST, spec(_UNMAP, "The server responds with the original DMA entry in the request."))
def dma_unmap_repeats_its_request(session: Session) -> None:
    """The reply to DMA_UNMAP is the range that was asked for."""
    session.map(IOVA, _MIB)
    payload = session.unmap(IOVA, _MIB).payload
    require(len(payload) == messages.DMA_UNMAP.size, f"{len(payload)} bytes in reply to DMA_UNMAP")
    _, _, iova, size = messages.DMA_UNMAP.unpack(payload)
    require((iova, size) == (IOVA, _MIB), f"a reply about ({iova:#x}, {size:#x}), not ({IOVA:#x}, {_MIB:#x})")


@check(Level.MUST, _EXACT)
def dma_unmap_of_a_part_is_refused(session: Session) -> None:
    """Half of a mapping cannot be unmapped."""
    session.map(IOVA, _MIB)
    request = messages.DMA_UNMAP.pack(messages.DMA_UNMAP.size, 0, IOVA, _MIB // 2)
    session.refused(uapi.VFIO_USER_DMA_UNMAP, request, what="DMA_UNMAP of half a mapping")


@check(Level.SHOULD, _EXACT)
def dma_unmap_of_nothing_is_refused(session: Session) -> None:
    """What is not mapped cannot be unmapped, and says so."""
    session.map(IOVA, _MIB)  # whether the server has DMA at all
    request = messages.DMA_UNMAP.pack(messages.DMA_UNMAP.size, 0, IOVA + 16 * _MIB, _MIB)
    session.refused(uapi.VFIO_USER_DMA_UNMAP, request, what="DMA_UNMAP of what is not mapped")


@check(
    Level.MUST,
    spec(
        "VFIO_USER_VERSION",
        "Maximum number DMA map windows that can be valid simultaneously. Optional, with a value of 65535 "
        "(64k-1).",
    ),
)
def dma_maps_are_as_many_as_said(session: Session) -> None:
    """As many mappings as VERSION says, 128 at most, can exist at a time."""
    for number in range(min(_MANY, session.limit("max_dma_maps", 65535))):
        try:
            session.map(IOVA + number * 2 * _MIB, 4096)
        except NotApplicableError:
            raise
        except Exception as error:
            error.add_note(f"after {number} mappings")
            raise


@check(
    Level.MUST,
    Source(
        NEWER_SPECIFICATION,
        _MAP,
        "If an access mode requiring a file descriptor is specified, but the client does not provide a file "
        "descriptor, the server must fail the request with ``EINVAL``.",
    ),
)
def dma_mode_without_a_file_is_refused(session: Session) -> None:
    """An access mode that needs a file, without one, is EINVAL."""
    session.map(IOVA, _MIB)
    for mode, name in ((_MMAP_ACCESS, "mmap"), (_FILE_ACCESS, "file I/O")):
        request = session.dma_request(IOVA + 16 * _MIB, _MIB, 3 | mode)
        what = f"DMA_MAP in mode {name} without a file"
        session.refused(uapi.VFIO_USER_DMA_MAP, request, what=what, number=errno.EINVAL)


@check(Level.OPTIONAL, _MODES)
def dma_mode_mmap_is_accepted(session: Session) -> None:
    """Access mode mmap (bit 2) is accepted, with a file."""
    session.map(IOVA, _MIB)
    session.map(IOVA + 16 * _MIB, _MIB, flags=3 | _MMAP_ACCESS)


@check(Level.OPTIONAL, _MODES)
def dma_mode_file_is_accepted(session: Session) -> None:
    """Access mode file I/O (bit 3) is accepted, with a file."""
    session.map(IOVA, _MIB)
    session.map(IOVA + 16 * _MIB, _MIB, flags=3 | _FILE_ACCESS)


@check(Level.SHOULD, _VALIDATE)
def dma_map_beyond_its_file_is_refused(session: Session) -> None:
    """A mapping larger than its file is refused: to touch what is missing would be SIGBUS."""
    session.map(IOVA, _MIB)
    _refused(session, IOVA + 16 * _MIB, 2 * _MIB, "DMA_MAP of 2 MiB with a file of 1 MiB")


@check(Level.SHOULD, _VALIDATE)
def dma_map_that_wraps_is_refused(session: Session) -> None:
    """A mapping that reaches beyond 2^64 is refused."""
    session.map(IOVA, _MIB)
    _refused(session, (1 << 64) - 4096, _MIB, "DMA_MAP of 1 MiB at 2^64 - 4096")
