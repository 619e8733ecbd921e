"""What QEMU's VFIO migration code says, by version: trace events and their texts, states of its QMP event.

The names and texts are those of hw/vfio/trace-events and qapi/vfio.json; tests compare them with every QEMU
there is. A reader of a trace asks for a `Kind`, which has one meaning in all versions. Traces of somebody
else's QEMU may be older than any QEMU there is here: `Earlier` has the texts of 8.1 to 9.0, from its source.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

Release = tuple[int, int]

OLDEST: Release = (10, 0)
# The table was compared with 10.0, 10.2 and 11.1; later releases are taken to say the same.


class Kind(StrEnum):
    """What an event tells. Sizes are bytes: `initial`, `dirty`, `stop_copy`."""

    REALIZE = "realize"  # QEMU has the device from now on, in RUNNING
    STATE = "state"  # QEMU asks for a migration state
    DEVICE_STATE = "device-state"  # the same again, one step above
    VM_STATE = "vm-state"  # the VM stops or runs on, and the device has followed it to `state`
    SETUP = "setup"  # the source begins: `data_size`, the size of its buffer
    ITERATE_START = "iterate-start"  # the first read of a migration
    ITERATE = "iterate"  # PRE_COPY: what is left when a pass is over
    EMPTY = "empty"  # a read in PRE_COPY found nothing, for now (ENOMSG)
    PENDING_ESTIMATE = "pending-estimate"
    PENDING_EXACT = "pending-exact"
    REINIT = "reinit"  # initial data appeared again
    PRECOPY_INFO = "precopy-info"  # the answer of VFIO_MIG_GET_PRECOPY_INFO
    STOP_COPY_SIZE = "stop-copy-size"  # the answer of VFIO_DEVICE_FEATURE_MIG_DATA_SIZE
    BLOCK = "block"  # `data_size`: one read of migration data, told when it was sent too
    COMPLETE_START = "complete-start"  # the source begins with what STOP_COPY has
    COMPLETE = "complete"  # all of it was read; `ret`
    CONFIG_SAVED = "config-saved"  # configuration space is sent
    CLEANUP = "cleanup"  # the source is done, or gives up
    NOTIFIED = "notified"  # the migration ended, or failed: `event`, whose numbers are each version's own
    LOAD = "load"  # `data_size`: one write of migration data
    LOAD_RECORD = "load-record"  # a record of QEMU's own stream begins
    LOAD_CONFIG_START = "load-config-start"
    LOAD_CONFIG = "load-config"  # configuration space is there
    LOAD_CLEANUP = "load-cleanup"
    # Multifd: STOP_COPY's data goes in numbered buffers, by threads of their own.
    SAVE_THREAD_START = "save-thread-start"
    SAVE_THREAD_END = "save-thread-end"  # `ret` is 1 if it went well
    LOAD_THREAD_START = "load-thread-start"
    LOAD_THREAD_END = "load-thread-end"
    BUFFER_INCOMING = "buffer-incoming"  # `index` of the buffer
    BUFFERS_START = "buffers-start"
    BUFFER_STARVED = "buffer-starved"  # the one that is next, `index`, has not come
    BUFFER_LOAD_START = "buffer-load-start"
    BUFFER_LOAD_END = "buffer-load-end"
    BUFFERS_END = "buffers-end"
    SECTION = "section"  # the source turns to a device, or to RAM: whose data it is about to read and send
    FEATURES = "features"  # what the device announced: `flags`, `reinit` (PRECOPY_INFOv2), `dma_logging`
    DMA_LOGGING = "dma-logging"  # the log of DMA writes is asked for: `ranges`, of a device that is not named


@dataclass(frozen=True)
class Earlier:
    """What an event said in releases that are no longer tried.

    Attributes:
        kind: what it told then.
        text, fields: as of `Event`.
    """

    kind: Kind
    text: str
    fields: tuple[str, ...]

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """See `Event.pattern`."""
        return _pattern(self.text, self.fields)


@dataclass(frozen=True)
class Event:
    """One trace event.

    Attributes:
        text: as in hw/vfio/trace-events behind the device's name, with the sizes of an x86-64 build.
        fields: what each of its conversions is called; empty for one that nobody needs.
        since, until: first release that has it, and first that has it no more.
        ours: in the project's series only.
        named: its text begins with the device's name.
        lab: the lab traces it.
        earlier: other forms of it.
    """

    name: str
    kind: Kind
    text: str = ""
    fields: tuple[str, ...] = ()
    since: Release = OLDEST
    until: Release | None = None
    ours: bool = False
    named: bool = True
    lab: bool = True
    earlier: tuple[Earlier, ...] = ()

    def is_in(self, release: Release) -> bool:
        """Say whether a QEMU of that release, without patches, has it."""
        return not self.ours and self.since <= release and (self.until is None or release < self.until)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What its text looks like; every conversion that somebody needs has its field's name."""
        return _pattern(self.text, self.fields)

    @cached_property
    def arguments(self) -> tuple[tuple[str, bool], ...]:
        """(field, whether it is a string) of each argument behind the device's name, for simple traces."""
        conversions = (part for part in _SPLIT.split(self.text) if part in _CONVERSIONS)
        return tuple((name, part == "%s") for name, part in zip(self.fields, conversions, strict=True))


def _pattern(text: str, names: tuple[str, ...]) -> re.Pattern[str]:
    fields = iter(names)
    found = ""
    for part in _SPLIT.split(text):
        if part in _CONVERSIONS:
            name = next(fields)
            found += f"(?P<{name}>{_CONVERSIONS[part]})" if name else _CONVERSIONS[part]
        else:
            found += re.escape(part)
    return re.compile(found)


_SPLIT = re.compile(r"(0x%lx|%lu|%u|%d|%s)")
_CONVERSIONS = {"%lu": r"\d+", "0x%lx": r"0x[0-9a-f]+", "%u": r"\d+", "%d": r"-?\d+", "%s": r"[^\s,]+"}

_VM_STATE = ("running %d reason %s device state %s", ("running", "", "state"))
_BUFFER = ("idx %u", ("index",))

EVENTS = (
    Event(
        "vfio_migration_set_state",
        Kind.STATE,
        "new state %s, recover state %s",
        ("state", ""),
        # It came when the device was there.
        earlier=(Earlier(Kind.DEVICE_STATE, "state %s", ("state",)),),
    ),
    Event("vfio_migration_set_device_state", Kind.DEVICE_STATE, "state %s", ("state",)),
    Event(
        "vfio_save_iterate",
        Kind.ITERATE,
        "precopy initial size %lu precopy dirty size %lu",
        ("initial", "dirty"),
        earlier=(
            Earlier(
                Kind.ITERATE,
                "precopy initial size 0x%lx precopy dirty size 0x%lx",
                ("initial", "dirty"),
            ),
        ),
    ),
    Event(
        "vfio_state_pending_estimate",
        Kind.PENDING_ESTIMATE,
        "precopy %lu postcopy %lu precopy initial size %lu precopy dirty size %lu",
        ("total", "", "initial", "dirty"),
        until=(11, 1),
        earlier=(
            Earlier(
                Kind.PENDING_ESTIMATE,
                "precopy 0x%lx postcopy 0x%lx precopy initial size 0x%lx precopy dirty size 0x%lx",
                ("total", "", "initial", "dirty"),
            ),
        ),
    ),
    Event(
        "vfio_state_pending_exact",
        Kind.PENDING_EXACT,
        "precopy %lu postcopy %lu stopcopy size %lu precopy initial size %lu precopy dirty size %lu",
        ("total", "", "stop_copy", "initial", "dirty"),
        until=(11, 1),
        earlier=(
            Earlier(
                Kind.PENDING_EXACT,
                "precopy 0x%lx postcopy 0x%lx stopcopy size 0x%lx precopy initial size 0x%lx "
                "precopy dirty size 0x%lx",
                ("total", "", "stop_copy", "initial", "dirty"),
            ),
        ),
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
    Event(
        "vfio_save_setup",
        Kind.SETUP,
        "data buffer size %lu",
        ("data_size",),
        earlier=(Earlier(Kind.SETUP, "data buffer size 0x%lx", ("data_size",)),),
    ),
    Event("vfio_save_iterate_start", Kind.ITERATE_START),
    Event("vfio_save_block_precopy_empty_hit", Kind.EMPTY),
    Event("vfio_save_block", Kind.BLOCK, "data_size %d", ("data_size",)),
    Event("vfio_save_complete_precopy_start", Kind.COMPLETE_START),
    Event("vfio_save_complete_precopy", Kind.COMPLETE, "ret %d", ("ret",)),
    Event("vfio_save_device_config_state", Kind.CONFIG_SAVED),
    Event("vfio_save_cleanup", Kind.CLEANUP),
    Event(
        "vfio_migration_state_notifier",
        Kind.NOTIFIED,
        "state %d",
        ("event",),
        earlier=(Earlier(Kind.NOTIFIED, "state %s", ("",)),),
    ),
    Event("vfio_vmstate_change_prepare", Kind.VM_STATE, *_VM_STATE),
    Event("vfio_vmstate_change", Kind.VM_STATE, *_VM_STATE),
    Event("vfio_load_state", Kind.LOAD_RECORD, "data 0x%lx", ("flag",)),
    Event(
        "vfio_load_state_device_data",
        Kind.LOAD,
        "size %lu ret %d",
        ("data_size", "ret"),
        earlier=(Earlier(Kind.LOAD, "size 0x%lx ret %d", ("data_size", "ret")),),
    ),
    Event("vfio_load_device_config_state", Kind.LOAD_CONFIG, until=OLDEST),
    Event("vfio_load_device_config_state_start", Kind.LOAD_CONFIG_START),
    Event("vfio_load_device_config_state_end", Kind.LOAD_CONFIG),
    Event("vfio_load_cleanup", Kind.LOAD_CLEANUP),
    Event(
        "vfio_save_complete_precopy_thread_start",
        Kind.SAVE_THREAD_START,
        "idstr %s instance %u",
        ("", "instance"),
    ),
    Event("vfio_save_complete_precopy_thread_end", Kind.SAVE_THREAD_END, "ret %d", ("ret",)),
    Event("vfio_load_bufs_thread_start", Kind.LOAD_THREAD_START),
    Event("vfio_load_bufs_thread_end", Kind.LOAD_THREAD_END),
    Event("vfio_load_state_device_buffer_incoming", Kind.BUFFER_INCOMING, *_BUFFER),
    Event("vfio_load_state_device_buffer_start", Kind.BUFFERS_START),
    Event("vfio_load_state_device_buffer_starved", Kind.BUFFER_STARVED, *_BUFFER),
    Event("vfio_load_state_device_buffer_load_start", Kind.BUFFER_LOAD_START, *_BUFFER),
    Event("vfio_load_state_device_buffer_load_end", Kind.BUFFER_LOAD_END, *_BUFFER),
    Event("vfio_load_state_device_buffer_end", Kind.BUFFERS_END),
    Event("vfio_migration_realize", Kind.REALIZE),
    Event(
        "vfio_migration_init",
        Kind.FEATURES,
        "mig_flags 0x%lx, precopy_info_v2_used %d, dirty_pages_supported %d",
        ("flags", "reinit", "dma_logging"),
        since=(11, 1),
    ),
    Event(
        "vfio_device_dirty_tracking_start",
        Kind.DMA_LOGGING,
        "nr_ranges %d 32:[0x%lx - 0x%lx], 64:[0x%lx - 0x%lx], pci64:[0x%lx - 0x%lx]",
        ("ranges", "", "", "", "", "", ""),
        named=False,
    ),
    # Of all sections: not for the lab, whose traces are to disturb nothing.
    Event("savevm_section_start", Kind.SECTION, "%s, section_id %u", ("", ""), named=False, lab=False),
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
    "vfio_device_dirty_tracking_start",
)

# `device-state` of the QMP event VFIO_MIGRATION -> first release that has it.
EVENT_STATES: dict[str, Release] = {
    **dict.fromkeys(
        ("stop", "running", "stop-copy", "resuming", "running-p2p", "pre-copy", "pre-copy-p2p"), OLDEST
    ),
    "pre-copy-p2p-prepare": (11, 1),
}


# What QEMU puts before a record of its own stream (hw/vfio/vfio-migration-internal.h): `flag` of LOAD_RECORD.
DATA_RECORD = 0xFFFFFFFFEF100004
INITIAL_DATA_SENT = 0xFFFFFFFFEF100005


def read(name: str, text: str) -> tuple[Kind | None, dict[str, str]]:
    """Return what the event `name` tells, from its text behind the device; nothing if it is unknown.

    Numbers are decimal, whatever the text has.
    """
    event = BY_NAME.get(name)
    forms: tuple[Event | Earlier, ...] = (event, *event.earlier) if event else ()
    for form in forms:
        if found := form.pattern.fullmatch(text):
            values = {
                key: str(int(value, 16)) if value.startswith("0x") and key != "state" else value
                for key, value in found.groupdict().items()
            }
            return kind_now(form.kind, values.get("exact")), values
    return None, {}


def kind_now(kind: Kind, exact: object) -> Kind:
    """Return what an event tells whose `exact`, if it has one, is this."""
    return Kind.PENDING_ESTIMATE if str(exact) == "0" else kind


def kind_of(event: dict[str, object]) -> str | None:
    """Return the kind of an event of a report; reports written before there were kinds have names alone."""
    known = BY_NAME.get(str(event.get("event", "")))
    kind = event.get("kind", known.kind if known else None)
    return None if kind is None else str(kind)
