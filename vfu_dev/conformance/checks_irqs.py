"""DEVICE_GET_IRQ_INFO and DEVICE_SET_IRQS."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence

from vfu_dev import uapi
from vfu_dev.client import messages
from vfu_dev.conformance.model import Level, NotApplicableError, check, require, spec
from vfu_dev.conformance.peer import Reply
from vfu_dev.conformance.session import Session

_INFO, _SET = "VFIO_USER_DEVICE_GET_IRQ_INFO", "VFIO_USER_DEVICE_SET_IRQS"
EVENTFD = uapi.VFIO_IRQ_SET_DATA_EVENTFD | uapi.VFIO_IRQ_SET_ACTION_TRIGGER
_NONE = uapi.VFIO_IRQ_SET_DATA_NONE | uapi.VFIO_IRQ_SET_ACTION_TRIGGER
_BOOL = uapi.VFIO_IRQ_SET_DATA_BOOL | uapi.VFIO_IRQ_SET_ACTION_TRIGGER
_INFO_EVENTFD = 1 << 0  # VFIO_IRQ_INFO_EVENTFD
# INTx is a level: a trigger of the client raises it, and nothing lowers it again. It comes last.
_ORDER = (uapi.VFIO_PCI_MSIX_IRQ_INDEX, uapi.VFIO_PCI_MSI_IRQ_INDEX, uapi.VFIO_PCI_INTX_IRQ_INDEX)


def set_irqs(
    session: Session,
    index: int,
    flags: int,
    start: int,
    count: int,
    data: bytes = b"",
    fds: Sequence[int] = (),
) -> Reply:
    """Send DEVICE_SET_IRQS."""
    head = messages.IRQ_SET.pack(messages.IRQ_SET.size + len(data), flags, index, start, count)
    return session.ask(uapi.VFIO_USER_DEVICE_SET_IRQS, head + data, fds)


def first_irq(session: Session) -> tuple[int, int]:
    """Return (index, count) of an interrupt type that accepts eventfds.

    Raises: NotApplicableError: there is none.
    """
    for index in _ORDER:
        if index < session.info[2]:
            flags, count = session.irq(index)
            if count and flags & _INFO_EVENTFD:
                return index, count
    raise NotApplicableError("the device has no interrupt that takes an eventfd")


class _Eventfds:
    """Eventfds for the first interrupts of a type; they are removed and closed after the check."""

    def __init__(self, session: Session, wanted: int) -> None:
        self.session = session
        self.index, available = first_irq(session)
        self.fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(min(wanted, available))]
        session.undo.callback(self._close)
        reply = self.set(EVENTFD, len(self.fds), fds=self.fds)
        require(not reply.refused, f"eventfds for interrupt type {self.index} are refused: {reply.reason}")

    def set(self, flags: int, count: int, data: bytes = b"", fds: Sequence[int] = ()) -> Reply:
        return set_irqs(self.session, self.index, flags, 0, count, data, fds)

    def raised(self, wanted: Sequence[bool]) -> list[bool]:
        """Return the signalled interrupts, once all `wanted` are signalled or the check's time is over."""
        for fd, yes in zip(self.fds, wanted, strict=True):
            if yes:
                left = self.session.deadline - time.monotonic()
                select.select([fd], [], [], max(0.0, left))
        self.session.irq(self.index)  # a request later: what was signalled by then is all there is
        return [bool(select.select([fd], [], [], 0)[0]) for fd in self.fds]

    def _close(self) -> None:
        try:
            if not self.session.broken:
                self.set(_NONE, 0)
        finally:
            for fd in self.fds:
                os.close(fd)


@check(Level.MUST, spec(_INFO, "index is the index of IRQ type being queried"))
def irq_info_is_about_its_index(session: Session) -> None:
    """Every interrupt type can be asked about, and the reply is about that one."""
    for index in range(session.info[2]):
        request = messages.IRQ_INFO.pack(messages.IRQ_INFO.size, 0, index, 0)
        payload = session.accepted(uapi.VFIO_USER_DEVICE_GET_IRQ_INFO, request).payload
        require(len(payload) == messages.IRQ_INFO.size, f"interrupt info of {len(payload)} bytes, not 16")
        argsz, _, found, count = messages.IRQ_INFO.unpack(payload)
        require(found == index, f"info about interrupt type {found}, asked for {index}")
        require(argsz >= messages.IRQ_INFO.size, f"interrupt info with argsz {argsz}")
        require(count <= uapi.MAX_MSIX_VECTORS, f"{count} interrupts of type {index}, PCI has 2048 at most")


@check(Level.SHOULD, spec(_INFO, "index is the index of IRQ type being queried"))
def irq_type_that_is_not_there(session: Session) -> None:
    """To ask about an interrupt type that the device does not have is an error."""
    index = session.info[2]
    request = messages.IRQ_INFO.pack(messages.IRQ_INFO.size, 0, index, 0)
    session.refused(uapi.VFIO_USER_DEVICE_GET_IRQ_INFO, request, what=f"info of interrupt type {index}")


@check(
    Level.MUST,
    spec(
        _SET,
        "A client may trigger a device IRQ itself, by sending a ``VFIO_USER_DEVICE_SET_IRQ`` message with "
        "``flags=(VFIO_IRQ_SET_DATA_NONE/BOOL|VFIO_IRQ_SET_ACTION_TRIGGER)``.",
    ),
)
def irq_is_signalled(session: Session) -> None:
    """An interrupt that the client triggers arrives at its eventfd."""
    eventfds = _Eventfds(session, 1)
    reply = eventfds.set(_NONE, 1)
    require(not reply.refused, f"to trigger interrupt 0 is refused: {reply.reason}")
    require(eventfds.raised([True]) == [True], "the eventfd of a triggered interrupt is not signalled")


@check(Level.MUST, spec(_SET, "The action is performed if the corresponding boolean is true."))
def irq_is_signalled_where_true(session: Session) -> None:
    """Of interrupts triggered by an array of booleans, those arrive whose boolean is true."""
    eventfds = _Eventfds(session, 3)
    wanted = [number % 2 == len(eventfds.fds) % 2 for number in range(1, len(eventfds.fds) + 1)]
    reply = eventfds.set(_BOOL, len(wanted), bytes(wanted))
    require(not reply.refused, f"to trigger interrupts by booleans is refused: {reply.reason}")
    found = eventfds.raised(wanted)
    require(found == wanted, f"the eventfds signalled are {found}, {wanted} was asked for")


@check(
    Level.MUST,
    spec(
        _SET,
        "As a special case, a count (and start) of 0, with data flags of ``VFIO_IRQ_SET_DATA_NONE`` disables "
        "all interrupts of the index.",
    ),
)
def irq_can_be_disabled(session: Session) -> None:
    """After a count of 0 no eventfd of the type is signalled."""
    eventfds = _Eventfds(session, 1)
    reply = eventfds.set(_NONE, 0)
    require(not reply.refused, f"to disable interrupts is refused: {reply.reason}")
    eventfds.set(_NONE, 1)  # refused or in vain
    require(eventfds.raised([False]) == [False], "an eventfd is signalled after its interrupts were disabled")


@check(
    Level.MUST,
    spec(
        _SET,
        "If no file descriptors are provided, this de-assigns the specified previously configured "
        "interrupts.",
    ),
)
def irq_can_be_taken_back(session: Session) -> None:
    """An eventfd is not signalled after a request without file descriptors for its interrupt."""
    eventfds = _Eventfds(session, 1)
    reply = eventfds.set(EVENTFD, 1)
    require(not reply.refused, f"a request without file descriptors is refused: {reply.reason}")
    eventfds.set(_NONE, 1)
    require(eventfds.raised([False]) == [False], "an eventfd is signalled after it was taken back")


@check(Level.MUST, spec(_SET, "There is no payload in the reply."))
def irq_reply_is_a_header_alone(session: Session) -> None:
    """The reply to SET_IRQS has no payload."""
    index, _ = first_irq(session)
    reply = set_irqs(session, index, _NONE, 0, 0)
    require(not reply.refused, f"to disable interrupts is refused: {reply.reason}")
    require(not reply.payload, f"{len(reply.payload)} bytes in reply to SET_IRQS")


@check(Level.SHOULD, spec(_SET, "*count* describes the number of sub-indexes being set."))
def irq_out_of_range_is_refused(session: Session) -> None:
    """Interrupts beyond those of the type are refused, also where start and count wrap around."""
    index, available = first_irq(session)
    for start, count in ((available, 1), (0, min(available + 1, 0xFFFFFFFF)), (0xFFFFFFFF, 2)):
        reply = set_irqs(session, index, _NONE, start, count)
        require(reply.refused, f"to trigger {count} from {start} succeeds, there are {available}")
