"""The sizes that a server reports as left: GET_PRECOPY_INFO and MIG_DATA_SIZE, and whether they agree."""

from __future__ import annotations

import errno

from vfu_dev import uapi
from vfu_dev.client import messages
from vfu_dev.conformance.checks_stream import SLICE, read, slices
from vfu_dev.conformance.model import ADDITIONS, Level, NotApplicableError, Source, check, kernel, require
from vfu_dev.conformance.peer import Reply
from vfu_dev.conformance.session import GET, Session
from vfu_dev.uapi import DeviceState

S = DeviceState
_PRECOPY = "VFIO_MIG_GET_PRECOPY_INFO"
_DATA_SIZE = uapi.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE
_INITIAL = kernel(
    _PRECOPY,
    "This field should have a non-zero initial value and decrease as migration data is read from the device.",
)
# The largest error of an estimate: an eighth of the state, or this.
_LEEWAY_BYTES = 1 << 20


def _ask(session: Session, argsz: int = messages.PRECOPY_INFO.size) -> Reply:
    request = messages.PRECOPY_INFO.pack(argsz, 0, 0, 0)
    return session.ask(uapi.VFIO_USER_MIG_GET_PRECOPY_INFO, request)


def _precopy(session: Session) -> tuple[int, int]:
    reply = _ask(session)
    require(not reply.refused, f"GET_PRECOPY_INFO in PRE_COPY is refused: {reply.reason}")
    size = messages.PRECOPY_INFO.size
    require(len(reply.payload) == size, f"pre-copy info of {len(reply.payload)} bytes, not {size}")
    argsz, _, initial, dirty = messages.PRECOPY_INFO.unpack(reply.payload)
    require(argsz >= size, f"pre-copy info with argsz {argsz}")
    return initial, dirty


def _need_precopy_info(session: Session) -> None:
    session.need_states(S.PRE_COPY)
    session.peer  # noqa: B018 - negotiates
    if session.capabilities.get("migration_precopy_info") is not True:
        raise NotApplicableError("the server does not offer migration_precopy_info")


def _need_data_size(session: Session) -> None:
    session.need_migration()
    if not session.has_feature(_DATA_SIZE, GET):
        raise NotApplicableError("the device has no MIG_DATA_SIZE")


def _data_size(session: Session) -> int:
    return int.from_bytes(session.get_feature(_DATA_SIZE, 8, what="MIG_DATA_SIZE")[:8], "little")


@check(
    Level.OPTIONAL,
    kernel(
        _PRECOPY, "Support for this ioctl is mandatory if a driver claims to support VFIO_MIGRATION_PRE_COPY."
    ),
)
def precopy_info_is_offered(session: Session) -> None:
    """A device with PRE_COPY says how much it has to send."""
    session.need_states(S.PRE_COPY)
    session.peer  # noqa: B018 - negotiates
    offered = session.capabilities.get("migration_precopy_info") is True
    require(
        offered, "the VERSION reply has no migration_precopy_info: the client cannot ask how much is left"
    )


@check(
    Level.MUST,
    kernel(
        _PRECOPY,
        "The vfio_precopy_info data structure returned by this ioctl provides estimates of data available "
        "from the "
        "device during the PRE_COPY states.",
    ),
)
def precopy_info_has_its_size(session: Session) -> None:
    """In PRE_COPY, GET_PRECOPY_INFO is answered with the structure."""
    _need_precopy_info(session)
    session.set_state(S.PRE_COPY)
    _precopy(session)


@check(
    Level.MUST,
    kernel(
        _PRECOPY,
        "This ioctl is valid only in PRE_COPY states and kernel driver should return -EINVAL from any "
        "other migration "
        "state.",
    ),
)
def precopy_info_needs_precopy(session: Session) -> None:
    """GET_PRECOPY_INFO in RUNNING, STOP and STOP_COPY is EINVAL."""
    _need_precopy_info(session)
    for state in (S.RUNNING, S.STOP, S.STOP_COPY):
        session.set_state(state)
        reply = _ask(session)
        require(reply.refused, f"GET_PRECOPY_INFO in {state.name} succeeds")
        require(reply.error == errno.EINVAL, f"GET_PRECOPY_INFO in {state.name} fails with {reply.reason}")


@check(Level.SHOULD, _INITIAL)
def precopy_initial_begins_above_zero(session: Session) -> None:
    """initial_bytes is not zero when PRE_COPY begins."""
    _need_precopy_info(session)
    session.set_state(S.PRE_COPY)
    initial, _ = _precopy(session)
    require(initial > 0, "initial_bytes is 0 from the start")


@check(Level.SHOULD, _INITIAL)
def precopy_initial_falls(session: Session) -> None:
    """initial_bytes falls as data is read, and ends at zero."""
    _need_precopy_info(session)
    session.set_state(S.PRE_COPY)
    first, _ = _precopy(session)
    last = first
    for _ in range(1 + 2 * first // SLICE):
        data = read(session, min(SLICE, session.transfer_bytes))
        now, _ = _precopy(session)
        require(now <= last, f"initial_bytes rises from {last} to {now}")
        last = now
        if not data or not now:
            break
    require(last < first, f"initial_bytes stays at {first} while data is read")
    require(last == 0, f"initial_bytes ends at {last}")


@check(
    Level.MUST,
    kernel(_PRECOPY, "This field starts at zero and may increase as the internal device state is modified"),
)
def precopy_dirty_begins_at_zero(session: Session) -> None:
    """dirty_bytes is zero when PRE_COPY begins."""
    _need_precopy_info(session)
    session.set_state(S.PRE_COPY)
    _, dirty = _precopy(session)
    require(dirty == 0, f"dirty_bytes is {dirty} from the start")


@check(
    Level.OPTIONAL,
    Source(
        ADDITIONS,
        "VFIO_USER_MIG_GET_PRECOPY_INFO",
        "A server should take zero for 24: there are clients that send it so.",
    ),
)
def precopy_info_takes_argsz_zero(session: Session) -> None:
    """GET_PRECOPY_INFO with argsz 0 is answered: there is a client that sends it so."""
    _need_precopy_info(session)
    session.set_state(S.PRE_COPY)
    reply = _ask(session, argsz=0)
    require(not reply.refused, f"GET_PRECOPY_INFO with argsz 0 is refused: {reply.reason}")


@check(
    Level.OPTIONAL,
    kernel(
        "VFIO_DEVICE_FEATURE_MIG_DATA_SIZE",
        "Upon VFIO_DEVICE_FEATURE_GET read back the estimated data length that will be required to "
        "complete stop copy.",
    ),
)
def data_size_is_offered(session: Session) -> None:
    """The device says how much it would have to send if it stopped now; without, QEMU assumes 100 GiB."""
    session.need_migration()
    require(session.has_feature(_DATA_SIZE, GET), "the device has no MIG_DATA_SIZE")


@check(Level.MUST, kernel("VFIO_DEVICE_FEATURE_MIG_DATA_SIZE", "Note: Can be called on each device state."))
def data_size_in_each_state(session: Session) -> None:
    """MIG_DATA_SIZE can be read in every state that the device has."""
    _need_data_size(session)
    states = [S.RUNNING, S.STOP, S.STOP_COPY, S.RUNNING]
    if session.flags & uapi.MigrationFlags.VFIO_MIGRATION_PRE_COPY:
        states.append(S.PRE_COPY)
    for state in states:
        session.set_state(state)
        _data_size(session)


@check(
    Level.SHOULD,
    Source(
        ADDITIONS,
        "VFIO_DEVICE_FEATURE_MIG_DATA_SIZE",
        "Upon ``VFIO_DEVICE_FEATURE_GET``, returns the amount of migration data that would have to be "
        "read to "
        "complete the migration if the device was stopped now.",
    ),
)
def data_size_is_what_is_read(session: Session) -> None:
    """What MIG_DATA_SIZE says when STOP_COPY begins is what is read until its end, within an eighth."""
    _need_data_size(session)
    session.set_state(S.STOP_COPY)
    said = _data_size(session)
    found = sum(len(data) for data in slices(session))
    leeway = max(_LEEWAY_BYTES, found // 8)
    require(abs(said - found) <= leeway, f"MIG_DATA_SIZE says {said} bytes, {found} are read")


@check(
    Level.SHOULD,
    Source(ADDITIONS, "VFIO_DEVICE_FEATURE_MIG_DATA_SIZE", "It is therefore important that they agree"),
)
def sizes_agree(session: Session) -> None:
    """In PRE_COPY, MIG_DATA_SIZE contains initial_bytes and dirty_bytes, and is not far above them."""
    _need_precopy_info(session)
    _need_data_size(session)
    session.set_state(S.PRE_COPY)
    for _ in range(8):
        initial, dirty = _precopy(session)
        size = _data_size(session)
        require(
            size >= initial + dirty, f"MIG_DATA_SIZE {size}, initial_bytes {initial}, dirty_bytes {dirty}"
        )
        if not read(session, min(SLICE, session.transfer_bytes)):
            break
    initial, dirty = _precopy(session)
    rest = _data_size(session) - initial - dirty
    # QEMU spins between the two figures if more is left than it may send within the downtime limit.
    limit = 128 << 20
    require(rest <= limit, f"{rest} bytes are for STOP_COPY alone, beside {initial} and {dirty}")
