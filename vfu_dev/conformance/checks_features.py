"""DEVICE_FEATURE itself: probe, get, set, and the room for replies."""

from __future__ import annotations

import struct

from vfu_dev import uapi
from vfu_dev.client import messages
from vfu_dev.conformance.model import Level, check, require, spec
from vfu_dev.conformance.session import GET, PROBE, SET, Session
from vfu_dev.uapi import DeviceState

_SECTION = "VFIO_USER_DEVICE_FEATURE"
_MIGRATION = uapi.VFIO_DEVICE_FEATURE_MIGRATION
_STATE = uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
_UNKNOWN = 0x7FF0
_ARGSZ = spec(_SECTION, "*argsz* is the maximum size of the reply payload.")
_SAME = spec(
    _SECTION, "The reply payload must be the same as the request payload for setting or probing a feature."
)


@check(
    Level.MUST,
    spec(
        _SECTION,
        "``VFIO_DEVICE_FEATURE_PROBE`` instructs the server to probe for feature support.",
    ),
)
def feature_that_is_unknown(session: Session) -> None:
    """A feature that no server has cannot be probed, got or set."""
    for method, name in ((PROBE, "PROBE"), (GET, "GET"), (SET, "SET")):
        reply = session.ask_feature(_UNKNOWN | method)
        require(reply.refused, f"{name} of feature {_UNKNOWN:#x} succeeds")


@check(
    Level.MUST,
    spec(
        _SECTION,
        "If ``VFIO_DEVICE_FEATURE_GET`` and/or ``VFIO_DEVICE_FEATURE_SET`` are also set, the probe will only "
        "return success if all of the indicated methods are supported.",
    ),
)
def feature_probe_minds_its_methods(session: Session) -> None:
    """MIGRATION can be probed for GET, and not for SET, which it has not."""
    session.need_migration()
    require(session.has_feature(_MIGRATION, GET), "a probe for GET of MIGRATION fails, and GET works")
    require(not session.has_feature(_MIGRATION, SET), "a probe for SET of MIGRATION succeeds")
    require(not session.has_feature(_MIGRATION, GET | SET), "a probe for GET and SET of MIGRATION succeeds")


@check(Level.MUST, _SAME)
def feature_probe_repeats_its_request(session: Session) -> None:
    """The reply to a probe is the request."""
    session.need_migration()
    request = messages.FEATURE.pack(messages.FEATURE.size, _STATE | PROBE | GET | SET)
    reply = session.accepted(uapi.VFIO_USER_DEVICE_FEATURE, request, what="a probe of MIG_DEVICE_STATE")
    require(reply.payload == request, f"the reply is {reply.payload.hex()}, the request was {request.hex()}")


@check(Level.MUST, _SAME)
def feature_set_repeats_its_request(session: Session) -> None:
    """The reply to a SET is the request."""
    session.need_migration()
    data = struct.pack("<II", DeviceState.RUNNING, 0xFFFFFFFF)
    request = messages.FEATURE.pack(messages.FEATURE.size + len(data), _STATE | SET) + data
    reply = session.accepted(uapi.VFIO_USER_DEVICE_FEATURE, request, what="SET of RUNNING in RUNNING")
    require(len(reply.payload) == len(request), f"{len(reply.payload)} bytes, the request had {len(request)}")
    # data_fd is unused: what comes back in it says nothing.
    require(reply.payload[:12] == request[:12], f"the reply is {reply.payload.hex()}, not {request.hex()}")


@check(
    Level.MUST,
    spec(
        _SECTION,
        "For getting a feature's data, the data is added in the data section and its length is added to "
        "``argsz``.",
    ),
)
def feature_get_has_its_size(session: Session) -> None:
    """The reply to a GET is as long as its argsz says: the structure and the data."""
    session.need_migration()
    for feature in (_MIGRATION, _STATE):
        reply = session.ask_feature(feature | GET)
        require(not reply.refused, f"GET of feature {feature} is refused: {reply.reason}")
        size = messages.FEATURE.size + 8
        require(len(reply.payload) == size, f"{len(reply.payload)} bytes of feature {feature}, not {size}")
        (argsz,) = struct.unpack_from("<I", reply.payload)
        require(argsz == size, f"feature {feature} with argsz {argsz} in {size} bytes")


@check(
    Level.MUST,
    spec(
        _SECTION,
        "``VFIO_DEVICE_FEATURE_GET`` and ``VFIO_DEVICE_FEATURE_SET`` are mutually exclusive, except for "
        "use with "
        "``VFIO_DEVICE_FEATURE_PROBE``.",
    ),
)
def feature_get_and_set_exclude_each_other(session: Session) -> None:
    """A request for GET and SET at once is refused."""
    session.need_migration()
    data = struct.pack("<II", DeviceState.RUNNING, 0xFFFFFFFF)
    reply = session.ask_feature(_STATE | GET | SET, data)
    require(reply.refused, "GET and SET of MIG_DEVICE_STATE at once succeeds")


@check(Level.SHOULD, _ARGSZ)
def feature_set_minds_its_argsz(session: Session) -> None:
    """A SET whose argsz has no room for its own data is refused, as the kernel does."""
    session.need_migration()
    reply = session.ask_state(DeviceState.RUNNING, argsz=messages.FEATURE.size)
    require(reply.refused, "SET of MIG_DEVICE_STATE with argsz 8 succeeds")


@check(Level.SHOULD, _ARGSZ)
def feature_get_minds_its_argsz(session: Session) -> None:
    """A GET whose argsz has no room for the answer does not get more than it has room for."""
    session.need_migration()
    reply = session.ask_feature(_MIGRATION | GET, argsz=messages.FEATURE.size)
    if not reply.refused:
        require(
            len(reply.payload) <= messages.FEATURE.size,
            f"{len(reply.payload)} bytes where there is room for 8",
        )
