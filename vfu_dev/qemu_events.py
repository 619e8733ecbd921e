"""What QEMU's VFIO migration code says, by version: trace events and their texts, states of its QMP event.

The names and texts are those of hw/vfio/trace-events and qapi/vfio.json; tests compare them with every QEMU
there is. Whoever reads a trace asks for a `Kind`, which has one meaning in all versions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

Release = tuple[int, int]

OLDEST: Release = (10, 0)
# The newest that the table was compared with: later ones are taken to say the same. 11.0 was not looked at.
NEWEST: Release = (11, 1)


class Kind(StrEnum):
    """What an event tells. Sizes are bytes: `initial`, `dirty`, `stop_copy`."""

    STATE = "state"  # QEMU asks for a migration state
    DEVICE_STATE = "device-state"  # the same again, one step above
    ITERATE = "iterate"  # PRE_COPY: what is left when a pass begins
    PENDING_ESTIMATE = "pending-estimate"
    PENDING_EXACT = "pending-exact"
    REINIT = "reinit"  # initial data appeared again
    PRECOPY_INFO = "precopy-info"  # the answer of VFIO_MIG_GET_PRECOPY_INFO
    STOP_COPY_SIZE = "stop-copy-size"  # the answer of VFIO_DEVICE_FEATURE_MIG_DATA_SIZE
    BLOCK = "block"  # `data_size`: one read of migration data
    LOAD = "load"  # `data_size`: one write of migration data


@dataclass(frozen=True)
class Event:
    """One trace event.

    Attributes:
        text: as in hw/vfio/trace-events behind the device's name, with the sizes of an x86-64 build.
        fields: what each of its conversions is called; empty for one that nobody needs.
        since, until: first release that has it, and first that has it no more.
        ours: in the project's series only.
    """

    name: str
    kind: Kind
    text: str
    fields: tuple[str, ...]
    since: Release = OLDEST
    until: Release | None = None
    ours: bool = False

    def is_in(self, release: Release) -> bool:
        """Say whether a QEMU of that release, without patches, has it."""
        return not self.ours and self.since <= release and (self.until is None or release < self.until)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What its text looks like; every number has its field's name."""
        parts = re.split(r"(%lu|%d|%s)", self.text)
        fields = iter(self.fields)
        found = ""
        for part in parts:
            if part in _CONVERSIONS:
                name = next(fields)
                found += f"(?P<{name}>{_CONVERSIONS[part]})" if name else _CONVERSIONS[part]
            else:
                found += re.escape(part)
        return re.compile(found)


_CONVERSIONS = {"%lu": r"\d+", "%d": r"-?\d+", "%s": r"\w+"}

EVENTS = (
    Event("vfio_migration_set_state", Kind.STATE, "new state %s, recover state %s", ("state", "")),
    Event("vfio_migration_set_device_state", Kind.DEVICE_STATE, "state %s", ("state",)),
    Event(
        "vfio_save_iterate",
        Kind.ITERATE,
        "precopy initial size %lu precopy dirty size %lu",
        ("initial", "dirty"),
    ),
    Event(
        "vfio_state_pending_estimate",
        Kind.PENDING_ESTIMATE,
        "precopy %lu postcopy %lu precopy initial size %lu precopy dirty size %lu",
        ("total", "", "initial", "dirty"),
        until=(11, 1),
    ),
    Event(
        "vfio_state_pending_exact",
        Kind.PENDING_EXACT,
        "precopy %lu postcopy %lu stopcopy size %lu precopy initial size %lu precopy dirty size %lu",
        ("total", "", "stop_copy", "initial", "dirty"),
        until=(11, 1),
    ),
    # One event for both: `exact` says which.
    Event(
        "vfio_state_pending",
        Kind.PENDING_EXACT,
        "stopcopy size %lu, precopy initial size %lu, precopy dirty size %lu, request switchover ack %d, "
        "exact %d, final %d",
        ("stop_copy", "initial", "dirty", "request_ack", "exact", "final"),
        since=(11, 1),
    ),
    Event(
        "vfio_query_precopy_size",
        Kind.PRECOPY_INFO,
        "init %lu, dirty %lu, reinit %d, ret %d",
        ("initial", "dirty", "reinit", "ret"),
        since=(11, 1),
    ),
    Event(
        "vfio_query_stop_copy_size",
        Kind.STOP_COPY_SIZE,
        "stopcopy size %lu ret %d",
        ("stop_copy", "ret"),
        since=(11, 1),
    ),
    Event(
        "vfio_precopy_reinit",
        Kind.REINIT,
        "precopy initial size %lu precopy dirty size %lu",
        ("initial", "dirty"),
        ours=True,
    ),
    Event("vfio_save_block", Kind.BLOCK, "data_size %d", ("data_size",)),
    Event("vfio_load_state_device_data", Kind.LOAD, "size %lu ret %d", ("data_size", "ret")),
)
BY_NAME = {event.name: event for event in EVENTS}

# For QEMU's -trace option; a pattern that matches nothing in a version is no error there.
TRACE_PATTERNS = (
    "vfio_save_*",
    "vfio_load_*",
    "vfio_precopy_*",
    "vfio_state_pending*",
    "vfio_query_*",
    "vfio_migration_*",
    "vfio_vmstate_change*",
)

# `device-state` of the QMP event VFIO_MIGRATION -> first release that has it.
EVENT_STATES: dict[str, Release] = {
    **dict.fromkeys(
        ("stop", "running", "stop-copy", "resuming", "running-p2p", "pre-copy", "pre-copy-p2p"), OLDEST
    ),
    "pre-copy-p2p-prepare": (11, 1),
}


def read(name: str, text: str) -> tuple[Kind | None, dict[str, str]]:
    """Return what the event `name` tells, from its text behind the device; nothing if it is unknown."""
    event = BY_NAME.get(name)
    found = event.pattern.search(text) if event else None
    if event is None or found is None:
        return None, {}
    values = found.groupdict()
    if values.get("exact") == "0":
        return Kind.PENDING_ESTIMATE, values
    return event.kind, values


def kind_of(event: dict[str, object]) -> str | None:
    """Return the kind of an event of a report; reports written before there were kinds have names alone."""
    known = BY_NAME.get(str(event.get("event", "")))
    kind = event.get("kind", known.kind if known else None)
    return None if kind is None else str(kind)
