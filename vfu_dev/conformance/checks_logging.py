"""DMA logging: START, STOP and REPORT."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vfu_dev import uapi
from vfu_dev.client import messages
from vfu_dev.conformance.model import Level, NotApplicableError, check, kernel, require, spec
from vfu_dev.conformance.peer import Reply
from vfu_dev.conformance.session import GET, IOVA, SET, Session

_START = uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START
_STOP = uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP
_REPORT = uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT
_SECTION, _REPORT_SECTION = "VFIO_DEVICE_FEATURE_DMA_LOGGING_START", "VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT"
_PAGE = 4096
_MIB = 1 << 20


def _need_logging(session: Session) -> None:
    session.need_migration()
    for feature, method in ((_START, SET), (_STOP, SET), (_REPORT, GET)):
        if not session.has_feature(feature, method):
            raise NotApplicableError("the device does not log its DMA")


def _control(ranges: Sequence[tuple[int, int]], page_size: int = _PAGE) -> bytes:
    head = messages.LOGGING_CONTROL.pack(page_size, len(ranges), 0)
    return head + b"".join(messages.LOGGING_RANGE.pack(*one) for one in ranges)


def _ask_start(session: Session, data: bytes) -> Reply:
    reply = session.ask_feature(_START | SET, data, messages.FEATURE.size + len(data))
    if not reply.refused:
        session.undo.callback(session.ask_feature, _STOP | SET)
    return reply


def _start(session: Session, ranges: Sequence[tuple[int, int]] = ((IOVA, _MIB),)) -> bytes:
    reply = _ask_start(session, _control(ranges))
    require(not reply.refused, f"DMA_LOGGING_START is refused: {reply.reason}")
    return reply.payload[messages.FEATURE.size :]


def _ask_report(session: Session, length: int, page_size: int) -> Reply:
    request = messages.LOGGING_REPORT.pack(IOVA, length, page_size)
    pages = -(-length // max(page_size, 1))
    bitmap = -(-pages // 64) * 8
    return session.ask_feature(_REPORT | GET, request, messages.FEATURE.size + len(request) + bitmap)


def _report(session: Session, length: int, page_size: int = _PAGE) -> bytes:
    reply = _ask_report(session, length, page_size)
    require(not reply.refused, f"DMA_LOGGING_REPORT is refused: {reply.reason}")
    return reply.payload[messages.FEATURE.size :]


@check(
    Level.OPTIONAL,
    spec(_SECTION, "These features can also be probed to determine whether the device supports DMA logging."),
)
def logging_is_offered(session: Session) -> None:
    """The device logs its DMA; without it, QEMU treats all guest memory as dirty, or does not migrate."""
    session.need_migration()
    for feature, method in ((_START, SET), (_STOP, SET), (_REPORT, GET)):
        require(session.has_feature(feature, method), f"the device has no feature {feature}")


@check(
    Level.MUST,
    spec(
        _SECTION,
        "Upon success, the response data field will be the same as the request, unless the page size was "
        "changed, in "
        "which case this will be reflected in the response.",
    ),
)
def logging_start_repeats_its_request(session: Session) -> None:
    """The reply to START is the request, with the page size that was chosen."""
    _need_logging(session)
    session.map(IOVA, _MIB)
    data = _start(session)
    expected = _control([(IOVA, _MIB)])
    require(len(data) == len(expected), f"{len(data)} bytes in reply to START, {len(expected)} were sent")
    (page_size,) = struct.unpack_from("<Q", data)
    require(page_size > 0 and page_size & (page_size - 1) == 0, f"a page size of {page_size}")
    require(data[8:] == expected[8:], "the ranges in the reply to START are not those of the request")


@check(Level.MUST, spec(_SECTION, "A value of zero indicates that all writes should be logged."))
def logging_of_everything(session: Session) -> None:
    """START with no ranges logs all that is mapped."""
    _need_logging(session)
    session.map(IOVA, _MIB)
    _start(session, ())
    _report(session, _MIB)


@check(
    Level.MUST,
    spec(
        _REPORT_SECTION,
        "The data field of the response is identical, except with the bitmap added on the end at offset 24.",
    ),
)
def logging_report_has_its_bitmap(session: Session) -> None:
    """The reply to REPORT is the request and a bitmap in whole 64-bit words."""
    _need_logging(session)
    session.map(IOVA, _MIB)
    _start(session)
    for pages in (1, 64, 65, 256):
        length = pages * _PAGE
        data = _report(session, length)
        head = messages.LOGGING_REPORT.pack(IOVA, length, _PAGE)
        require(data[: len(head)] == head, f"the report of {pages} pages is about another range")
        wanted = -(-pages // 64) * 8
        require(len(data) - len(head) == wanted, f"{len(data) - len(head)} bytes of bitmap for {pages} pages")


@check(Level.MUST, spec(_REPORT_SECTION, "The bits outside of the requested range must be zero."))
def logging_report_ends_with_its_range(session: Session) -> None:
    """Bits beyond the last page of a report are zero."""
    _need_logging(session)
    session.map(IOVA, _MIB)
    _start(session)
    data = _report(session, 3 * _PAGE)
    bitmap = int.from_bytes(data[messages.LOGGING_REPORT.size :], "little")
    require(bitmap >> 3 == 0, f"bitmap {bitmap:#x} for three pages")


@check(
    Level.MUST,
    spec(
        _REPORT_SECTION,
        "This operation is only valid if logging of dirty pages has been previously started by setting "
        "``VFIO_DEVICE_FEATURE_DMA_LOGGING_START``.",
    ),
)
def logging_report_needs_a_start(session: Session) -> None:
    """REPORT without START is refused."""
    _need_logging(session)
    session.map(IOVA, _MIB)
    require(_ask_report(session, _MIB, _PAGE).refused, "DMA_LOGGING_REPORT before START succeeds")


@check(
    Level.MUST,
    kernel("VFIO_DEVICE_FEATURE_DMA_LOGGING_START", "Another start is not allowed in the meantime."),
)
def logging_starts_once(session: Session) -> None:
    """START while DMA is logged is refused."""
    _need_logging(session)
    session.map(IOVA, _MIB)
    _start(session)
    require(_ask_start(session, _control([(IOVA, _MIB)])).refused, "a second START succeeds")


@check(
    Level.SHOULD,
    spec(
        _REPORT_SECTION, "*page_size* is the unit of granularity of the bitmap, and must be a power of two."
    ),
)
def logging_page_size_is_a_power_of_two(session: Session) -> None:
    """REPORT with another page size, zero among them, is refused."""
    _need_logging(session)
    session.map(IOVA, _MIB)
    _start(session)
    for page_size in (3000, 0):
        reply = _ask_report(session, _MIB, page_size)
        require(reply.refused, f"DMA_LOGGING_REPORT with a page size of {page_size} succeeds")


@check(
    Level.OPTIONAL,
    kernel(
        "VFIO_DEVICE_FEATURE_DMA_LOGGING_START",
        "ranges is a pointer to an array of struct vfio_device_feature_dma_logging_range.",
    ),
)
def logging_start_takes_the_kernels_form(session: Session) -> None:
    """START with the kernel's structure, whose ranges are elsewhere, logs everything."""
    _need_logging(session)
    session.map(IOVA, _MIB)
    data = messages.LOGGING_CONTROL.pack(_PAGE, 3, 0) + struct.pack("<Q", 0x7FFF_0000_0000)
    reply = _ask_start(session, data)
    require(not reply.refused, f"START in the kernel's form, 24 bytes, is refused: {reply.reason}")
