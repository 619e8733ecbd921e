"""MIG_DATA_READ and MIG_DATA_WRITE: the state as a stream, and its way back into the device."""

from __future__ import annotations

from collections.abc import Iterator

from vfu_dev import uapi
from vfu_dev.client import messages
from vfu_dev.conformance.model import (
    ADDITIONS,
    Level,
    NotApplicableError,
    Source,
    check,
    kernel,
    require,
    spec,
)
from vfu_dev.conformance.peer import Reply
from vfu_dev.conformance.session import Session
from vfu_dev.sizes import format_size
from vfu_dev.uapi import DeviceState

S = DeviceState
_READ, _WRITE = "VFIO_USER_MIG_DATA_READ", "VFIO_USER_MIG_DATA_WRITE"
# Small enough for servers that receive a message with one recv(); a separate check sends large ones.
SLICE = 64 << 10
# If PRE_COPY never stops sending, reading ends this number of slices after the size that it had at first.
_PRE_COPY_READS = 4096
_INVALID = spec(
    "Direct State Transitions",
    "If the delivered data is found to be incomplete, inconsistent, or otherwise invalid, fail the ``SET`` "
    "command and optionally transition to the ``ERROR`` state.",
)
_TAKEN_BACK = kernel(
    "enum vfio_device_mig_state",
    "The data stream fed into the data_fd should be taken from the data transfer output of a single FD "
    "during "
    "saving from a compatible device.",
)


def ask_read(session: Session, size: int) -> Reply:
    """Send MIG_DATA_READ for `size` bytes."""
    return session.ask(
        uapi.VFIO_USER_MIG_DATA_READ, messages.MIG_DATA.pack(messages.MIG_DATA.size + size, size)
    )


def read(session: Session, size: int) -> bytes:
    """Return the data of one MIG_DATA_READ; bytes beyond the size in the reply are left out."""
    reply = ask_read(session, size)
    require(not reply.refused, f"MIG_DATA_READ of {size} bytes is refused: {reply.reason}")
    require(len(reply.payload) >= messages.MIG_DATA.size, f"migration data of {len(reply.payload)} bytes")
    _, found = messages.MIG_DATA.unpack_from(reply.payload)
    data = reply.payload[messages.MIG_DATA.size :][:found]
    require(found <= size, f"{found} bytes of migration data, {size} were asked for")
    require(len(data) == found, f"{len(data)} bytes of migration data in a reply that says {found}")
    return data


def slices(session: Session) -> Iterator[bytes]:
    """Yield the rest of the stream in STOP_COPY."""
    size = min(SLICE, session.transfer_bytes)
    total = 0
    while data := read(session, size):
        total += len(data)
        if total > session.max_state_bytes:
            limit = format_size(session.max_state_bytes)
            raise NotApplicableError(f"the state is larger than {limit} (--max-state)")
        yield data


def save(session: Session) -> bytes:
    """Return the device's state, read in STOP_COPY; the device is in RUNNING before and after."""
    if session.saved is None:
        session.set_state(S.STOP_COPY)
        saved = b"".join(slices(session))
        session.set_state(S.RUNNING)
        session.saved = saved
    return session.saved


def ask_write(session: Session, data: bytes) -> Reply:
    """Send MIG_DATA_WRITE."""
    head = messages.MIG_DATA.pack(messages.MIG_DATA.size + len(data), len(data))
    return session.ask(uapi.VFIO_USER_MIG_DATA_WRITE, head + data)


def write(session: Session, data: bytes, size: int = SLICE) -> None:
    """Write `data` in slices of `size`."""
    for at in range(0, len(data), size):
        reply = ask_write(session, data[at : at + size])
        require(not reply.refused, f"MIG_DATA_WRITE at {at} of {len(data)} bytes is refused: {reply.reason}")


def resume(session: Session, *, data: bytes | None = None, size: int = SLICE, finish: bool = True) -> None:
    """Take the device to RESUMING and write a state; `finish` goes on to RUNNING.

    Args: data: the state; None for the device's own.
    """
    session.need_migration()
    data = save(session) if data is None else data
    session.set_state(S.RESUMING)
    write(session, data, min(size, session.transfer_bytes))
    if finish:
        session.set_state(S.STOP)
        session.set_state(S.RUNNING)


def _refused(session: Session, data: bytes, what: str) -> None:
    """Write `data`, which is no state; require that a write or the transition to STOP fails."""
    session.set_state(S.RESUMING)
    size = min(SLICE, session.transfer_bytes)
    if any(ask_write(session, data[at : at + size]).refused for at in range(0, len(data), size)):
        return
    require(session.ask_state(S.STOP).refused, f"{what} is accepted as a state")
    found = session.state()
    require(found in (S.RESUMING, S.ERROR), f"after {what} was refused the state is {found}")


@check(
    Level.MUST,
    spec(
        _READ,
        "Hence, the migration data is treated like a stream, so the client must continue reading until no "
        "more migration data remains.",
    ),
)
def stream_can_be_read(session: Session) -> None:
    """In STOP_COPY the state can be read, from its first byte to an end."""
    session.need_migration()
    session.saved = None
    require(save(session), "the state has no bytes")


@check(
    Level.MUST,
    spec(
        _READ,
        "*size* indicates the size of returned migration data. If this is less than the requested size, "
        "there is no "
        "more migration data to read.",
    ),
)
def stream_ends_with_a_short_reply(session: Session) -> None:
    """In STOP_COPY a reply with less than was asked for is the last one that has data."""
    session.need_migration()
    session.set_state(S.STOP_COPY)
    size = min(SLICE, session.transfer_bytes)
    total, short = 0, None
    while data := read(session, size):
        require(short is None, f"after a reply of {short} of {size} bytes comes one with data")
        short = len(data) if len(data) < size else None
        total += len(data)
        if total > session.max_state_bytes:
            raise NotApplicableError(f"the state is larger than {format_size(session.max_state_bytes)}")


@check(
    Level.MUST,
    spec(_READ, "*argsz* is the size of the above structure, including the size of the data."),
)
def stream_reply_has_its_size(session: Session) -> None:
    """A reply to MIG_DATA_READ is as long as the data in it, and says so; the last one too."""
    session.need_migration()
    session.set_state(S.STOP_COPY)
    head = messages.MIG_DATA.size
    size = min(SLICE, session.transfer_bytes)
    for _ in range(session.max_state_bytes // size + 2):
        reply = ask_read(session, size)
        require(not reply.refused, f"MIG_DATA_READ is refused: {reply.reason}")
        require(len(reply.payload) >= head, f"migration data of {len(reply.payload)} bytes")
        argsz, found = messages.MIG_DATA.unpack_from(reply.payload)
        behind = len(reply.payload) - head
        require(found == behind, f"a reply that says it has {found} bytes of data has {behind}")
        require(argsz == head + found, f"argsz {argsz} of {head} and {found} bytes")
        if not found:
            return


@check(
    Level.MUST,
    kernel(
        "VFIO_MIG_GET_PRECOPY_INFO",
        "Once in STOP_COPY the migration data FD has a permanent end of stream signaled in the usual way "
        "by read() "
        "always returning 0",
    ),
)
def stream_end_stays(session: Session) -> None:
    """After the end of the stream every read finds nothing, and is no error."""
    session.need_migration()
    session.set_state(S.STOP_COPY)
    for _ in slices(session):
        pass
    for _ in range(3):
        require(not read(session, SLICE), "after the end of the stream there is more")


@check(Level.MUST, spec(_READ, "*size* is the size of the migration data to read."))
def stream_reply_is_no_longer_than_asked(session: Session) -> None:
    """A read of 17 bytes gets 17 bytes at most, and those that follow are the next ones."""
    session.need_migration()
    whole = save(session)
    session.set_state(S.STOP_COPY)
    for at in (0, 17, 34):
        found = read(session, 17)
        require(
            len(found) == min(17, max(0, len(whole) - at)), f"{len(found)} bytes for a read of 17 at {at}"
        )


@check(
    Level.SHOULD,
    Source(
        ADDITIONS,
        "Migration data",
        "In particular, no data at all is not an error in ``PRE_COPY``, where ``read()`` on VFIO's file "
        "descriptor fails with ``ENOMSG``.",
    ),
)
def stream_pause_is_no_error(session: Session) -> None:
    """In PRE_COPY a read that finds nothing is answered with no data."""
    session.need_states(S.PRE_COPY)
    session.set_state(S.PRE_COPY)
    for _ in range(_PRE_COPY_READS):
        if not read(session, min(SLICE, session.transfer_bytes)):
            return
    raise NotApplicableError(f"the device is never out of data in PRE_COPY, in {_PRE_COPY_READS} reads")


@check(
    Level.MUST,
    spec(
        _READ,
        "This command is used to read data from the source migration server while it is in a saving group "
        "state (``PRE_COPY`` or ``STOP_COPY``).",
    ),
)
def stream_read_needs_a_saving_state(session: Session) -> None:
    """MIG_DATA_READ in RUNNING, STOP and RESUMING is refused."""
    session.need_migration()
    for state in (S.RUNNING, S.STOP, S.RESUMING):
        session.set_state(state)
        require(ask_read(session, 64).refused, f"MIG_DATA_READ in {state.name} succeeds")


@check(
    Level.MUST,
    spec(
        _WRITE,
        "This command is used to write data to the destination migration server while it is in the "
        "``RESUMING`` state.",
    ),
)
def stream_write_needs_resuming(session: Session) -> None:
    """MIG_DATA_WRITE in RUNNING, STOP and STOP_COPY is refused."""
    session.need_migration()
    for state in (S.RUNNING, S.STOP, S.STOP_COPY):
        session.set_state(state)
        require(ask_write(session, bytes(64)).refused, f"MIG_DATA_WRITE in {state.name} succeeds")


@check(Level.MUST, spec(_WRITE, "There is no reply payload for this message."))
def stream_write_is_answered(session: Session) -> None:
    """A slice written in RESUMING is acknowledged, without a payload."""
    session.need_migration()
    data = save(session)
    session.set_state(S.RESUMING)
    reply = ask_write(session, data[: min(SLICE, session.transfer_bytes)])
    require(not reply.refused, f"MIG_DATA_WRITE is refused: {reply.reason}")
    require(not reply.payload, f"{len(reply.payload)} bytes in reply to MIG_DATA_WRITE")


@check(Level.MUST, _TAKEN_BACK)
def stream_round_trip(session: Session) -> None:
    """The device takes its own state back: STOP_COPY, RESUMING, STOP, RUNNING."""
    resume(session)


@check(Level.MUST, _TAKEN_BACK)
def stream_round_trip_with_precopy(session: Session) -> None:
    """The device takes its own state back, the first part of which was read in PRE_COPY."""
    session.need_states(S.PRE_COPY)
    size = min(SLICE, session.transfer_bytes)
    session.set_state(S.PRE_COPY)
    first, total = [], 0
    while total <= session.max_state_bytes and (data := read(session, size)):
        first.append(data)
        total += len(data)
    session.set_state(S.STOP_COPY)
    stream = b"".join((*first, *slices(session)))
    session.set_state(S.RUNNING)
    resume(session, data=stream)


@check(
    Level.MUST,
    kernel(
        "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE",
        "The user is not required to preserve buffer segmentation when writing the data stream during the "
        "RESUMING "
        "operation.",
    ),
)
def stream_in_other_slices(session: Session) -> None:
    """The state may be written in other slices than it was read in."""
    session.need_migration()
    data = save(session)
    resume(session, size=max(997, len(data) // 512))


@check(
    Level.SHOULD,
    spec(
        "VFIO_USER_VERSION",
        "Maximum ``count`` for data transfer messages; see `Read and Write Operations`_. Optional, with a "
        "default "
        "value of 1048576 bytes.",
    ),
)
def stream_in_slices_of_the_limit(session: Session) -> None:
    """The state may be written in slices as large as max_data_xfer_size."""
    session.need_migration()
    if len(save(session)) <= SLICE:
        raise NotApplicableError("the state has less than one slice")
    resume(session, size=session.transfer_bytes)


@check(
    Level.SHOULD,
    Source(
        ADDITIONS,
        "Migration data",
        "*size* in ``VFIO_USER_MIG_DATA_READ`` must not exceed the ``max_data_xfer_size`` of either side",
    ),
)
def stream_read_beyond_the_limit(session: Session) -> None:
    """A read of more than max_data_xfer_size is refused, or answered with no more than that."""
    session.need_migration()
    limit = session.limit("max_data_xfer_size", uapi.VFIO_USER_DEF_MAX_XFER_BYTES)
    if limit > messages.MAX_XFER_BYTES:
        raise NotApplicableError(f"max_data_xfer_size is {limit}, more than any client asks for")
    session.set_state(S.STOP_COPY)
    reply = ask_read(session, limit + 4096)
    too_much = len(reply.payload) - messages.MIG_DATA.size > limit
    require(reply.refused or not too_much, f"a read of {limit + 4096} bytes gets {len(reply.payload)}")


@check(Level.SHOULD, _INVALID)
def stream_that_is_cut_is_refused(session: Session) -> None:
    """Half of a state does not become a device."""
    session.need_migration()
    data = save(session)
    _refused(session, data[: len(data) // 2], "half of a state")


@check(Level.SHOULD, _INVALID)
def stream_that_is_empty_is_refused(session: Session) -> None:
    """No data at all does not become a device."""
    session.need_migration()
    save(session)
    _refused(session, b"", "no data at all")


@check(Level.OPTIONAL, _INVALID)
def stream_that_is_damaged_is_refused(session: Session) -> None:
    """A state with one bit flipped in its middle does not become a device."""
    session.need_migration()
    data = bytearray(save(session))
    data[len(data) // 2] ^= 0x10
    _refused(session, bytes(data), "a state with one bit flipped")
