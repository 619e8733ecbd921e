"""A profile: what a client can observe of a device in migration. docs/profiles.md describes every key.

A member that is None is not known, and a replay leaves it out: it takes no time, or does not happen. Bytes
are those of the device's migration data; seconds are those of the device and its driver, without the
client's. A curve's time begins when PRE_COPY is entered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from vfu_dev.profile.kinds import (
    BANDWIDTH,
    BYTES,
    BYTES_CURVE,
    BYTES_SPREAD,
    COUNT,
    FLAG,
    MILLISECONDS,
    PART,
    RATE,
    RATE_CURVE,
    SECONDS,
    SECONDS_SPREAD,
    TEXT,
    WordList,
    Words,
    marked,
    plain,
)
from vfu_dev.profile.values import Curve, Distribution, Value

FORMAT_VERSION = 1

ORIGINS = Words("recorded", "reconstructed", "made-up")
DIRTY_KINDS = Words("none", "rate", "steps", "curve", "refill")
LENGTH_KINDS = Words("constant", "following", "growing", "steps")
AFTER = Words("rate", "stop", "repeat")
OPERATIONS = ("arc", "read", "write")
TRACE_FORMATS = Words("log", "simple", "calls")


@dataclass(frozen=True)
class Features:
    """What the device announces."""

    pre_copy: Annotated[Value[bool] | None, marked(FLAG, "PRE_COPY (VFIO_MIGRATION_PRE_COPY)")] = None
    p2p: Annotated[Value[bool] | None, marked(FLAG, "the P2P states (VFIO_MIGRATION_P2P)")] = None
    data_size: Annotated[Value[bool] | None, marked(FLAG, "VFIO_DEVICE_FEATURE_MIG_DATA_SIZE")] = None
    precopy_info_v2: Annotated[
        Value[bool] | None, marked(FLAG, "VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2, so REINIT is announced")
    ] = None
    dma_logging: Annotated[
        Value[bool] | None, marked(FLAG, "VFIO_DEVICE_FEATURE_DMA_LOGGING_START and the rest")
    ] = None


@dataclass(frozen=True)
class Initial:
    """initial_bytes."""

    bytes: Annotated[Value[int] | None, marked(BYTES, "initial_bytes when PRE_COPY is entered")] = None
    ready_seconds: Annotated[
        Value[float] | None,
        marked(
            SECONDS,
            "time in PRE_COPY until initial data can be read; a read before it has no data (VFIO: ENOMSG)",
        ),
    ] = None


@dataclass(frozen=True)
class Dirty:
    """dirty_bytes: what `kind` says became dirty, less what was read, never more than `limit_bytes`."""

    kind: Annotated[str | None, plain(DIRTY_KINDS, "how it grows")] = None
    bytes_per_second: Annotated[
        Value[float] | None, marked(RATE, "`rate`: what becomes dirty, all the time")
    ] = None
    steps: Annotated[
        Value[Curve] | None,
        marked(
            RATE_CURVE,
            "`steps`: [seconds, bytes a second], each from its time to the next; 0 before the first",
        ),
    ] = None
    curve: Annotated[
        Value[Curve] | None,
        marked(
            BYTES_CURVE,
            "`curve`: [seconds, bytes] that became dirty so far, straight between points, or a jump",
        ),
    ] = None
    after: Annotated[
        Value[str] | None,
        marked(
            AFTER, "`steps`, `curve`: after the last point: the mean rate so far, nothing, or all over again"
        ),
    ] = None
    refill_bytes: Annotated[Value[int] | None, marked(BYTES, "`refill`: dirty_bytes jumps to this ...")] = (
        None
    )
    refill_seconds: Annotated[
        Value[float] | None, marked(SECONDS, "... when everything was read, but at most once in this time")
    ] = None
    limit_bytes: Annotated[Value[int] | None, marked(BYTES, "dirty_bytes is never more than this")] = None


@dataclass(frozen=True)
class StopCopy:
    """stop_copy_length, as MIG_DATA_SIZE says it, and what STOP_COPY really has."""

    kind: Annotated[str | None, plain(LENGTH_KINDS, "how stop_copy_length behaves in PRE_COPY")] = None
    bytes: Annotated[
        Value[int] | None, marked(BYTES, "`constant`: it; `growing`: it when PRE_COPY is entered")
    ] = None
    extra_bytes: Annotated[
        Value[int] | None, marked(BYTES, "`following`: by how much it exceeds initial_bytes + dirty_bytes")
    ] = None
    bytes_per_second: Annotated[Value[float] | None, marked(RATE, "`growing`: by how much it grows")] = None
    steps: Annotated[
        Value[Curve] | None,
        marked(
            BYTES_CURVE,
            "`steps`: [seconds, bytes], each from its time to the next; the first one before it too",
        ),
    ] = None
    limit_bytes: Annotated[Value[int] | None, marked(BYTES, "it is never more than this")] = None
    running_bytes: Annotated[
        Value[int] | None, marked(BYTES, "stop_copy_length in RUNNING, before PRE_COPY")
    ] = None
    carried_bytes: Annotated[
        Value[int] | None,
        marked(BYTES, "what can be read in STOP_COPY, where that is not what stop_copy_length says then"),
    ] = None


@dataclass(frozen=True)
class Calls:
    """Reads or writes of migration data of one phase."""

    bytes: Annotated[Value[Distribution] | None, marked(BYTES_SPREAD, "bytes of a call")] = None
    seconds: Annotated[
        Value[Distribution] | None, marked(SECONDS_SPREAD, "how long a call takes, the first apart")
    ] = None
    first_seconds: Annotated[
        Value[float] | None, marked(SECONDS, "how long the first call of the phase takes")
    ] = None


@dataclass(frozen=True)
class Phases:
    """Reads or writes of migration data, by phase."""

    initial: Calls = field(default_factory=Calls)
    dirty: Calls = field(default_factory=Calls)
    stop_copy: Calls = field(default_factory=Calls)


@dataclass(frozen=True)
class Reads(Phases):
    """Reads at the source."""

    buffer_bytes: Annotated[
        Value[int] | None,
        marked(
            BYTES, "the client's buffer: a read of that size filled it, and a replay fills any buffer there"
        ),
    ] = None


@dataclass(frozen=True)
class Loading:
    """What the destination pays for data besides writing it."""

    initial_seconds: Annotated[
        Value[float] | None,
        marked(
            SECONDS,
            "how long the write takes that has the last byte of the initial data; a replay pays for it with "
            "the first write of STOP_COPY where that byte did not come before",
        ),
    ] = None


@dataclass(frozen=True)
class Reinit:
    """Initial data that appears in PRE_COPY (VFIO_PRECOPY_INFO_REINIT)."""

    seconds: Annotated[Value[float] | None, marked(SECONDS, "when")] = None
    bytes: Annotated[Value[int] | None, marked(BYTES, "initial_bytes then")] = None


@dataclass(frozen=True)
class DmaLogging:
    """The log of DMA writes."""

    max_ranges: Annotated[
        Value[int] | None, marked(COUNT, "how many ranges DMA_LOGGING_START takes; more is EINVAL")
    ] = None
    start_seconds: Annotated[
        Value[Distribution] | None, marked(SECONDS_SPREAD, "how long DMA_LOGGING_START takes")
    ] = None
    report_seconds: Annotated[
        Value[Distribution] | None, marked(SECONDS_SPREAD, "how long DMA_LOGGING_REPORT takes")
    ] = None


@dataclass(frozen=True)
class Contention:
    """What several devices of one kind share: while one holds it, the others wait."""

    resource: Annotated[
        str | None, plain(TEXT, "name of the resource: of a lock file that the servers share")
    ] = None
    part: Annotated[
        Value[float] | None, marked(PART, "the part of an operation's time in which it holds the resource")
    ] = None
    operations: Annotated[
        tuple[str, ...],
        plain(WordList(OPERATIONS), "which operations do: `arc`, `read`, `write`; all where it is left out"),
    ] = OPERATIONS


@dataclass(frozen=True)
class Content:
    """The made-up content."""

    compressibility: Annotated[
        Value[float] | None, marked(PART, "the part of each 4 KiB that is zeros; the rest is random")
    ] = None


@dataclass(frozen=True)
class MigrationSettings:
    """QEMU's settings when it was recorded; no part of the device. A replay may take them as its own."""

    qemu: Annotated[str | None, plain(TEXT, "its version")] = None
    max_bandwidth: Annotated[int | None, plain(BANDWIDTH, "bytes a second")] = None
    downtime_limit_ms: Annotated[float | None, plain(MILLISECONDS, "milliseconds")] = None
    multifd_channels: Annotated[int | None, plain(COUNT, "0: no multifd")] = None
    switchover_ack: Annotated[bool | None, plain(FLAG, "whether it was on")] = None
    guest: Annotated[str | None, plain(TEXT, "what the guest did")] = None


@dataclass(frozen=True)
class Recorded:
    """What was recorded; a replay is compared with it, and keeps to none of it."""

    format: Annotated[
        str | None, plain(TRACE_FORMATS, "QEMU's log, its simple trace, or calls of `profile record`")
    ] = None
    source: Annotated[bool | None, plain(FLAG, "whether the source was recorded")] = None
    destination: Annotated[bool | None, plain(FLAG, "whether the destination was")] = None
    timestamps: Annotated[bool | None, plain(FLAG, "whether there are times")] = None
    migrations: Annotated[int | None, plain(COUNT, "how many, cancelled and failed ones among them")] = None
    completed: Annotated[int | None, plain(COUNT, "how many of them completed")] = None
    cut_off: Annotated[bool | None, plain(FLAG, "whether it ends in the middle of a migration")] = None
    precopy_seconds: Annotated[
        float | None, plain(SECONDS, "time in PRE_COPY, of the migration that curves are of")
    ] = None
    precopy_bytes: Annotated[int | None, plain(BYTES, "read in PRE_COPY")] = None
    stop_seconds: Annotated[
        float | None, plain(SECONDS, "from the request to stop until STOP_COPY was read out")
    ] = None
    stop_copy_bytes: Annotated[int | None, plain(BYTES, "read in STOP_COPY")] = None


@dataclass(frozen=True)
class Profile:
    """A device in migration."""

    name: Annotated[str | None, plain(TEXT, "of the profile")] = None
    origin: Annotated[str | None, plain(ORIGINS, "where its figures are from")] = None
    source: Annotated[
        str | None, plain(TEXT, "the publication of a reconstructed one, how a recorded one was recorded")
    ] = None
    about: Annotated[str | None, plain(TEXT, "what a reader has to know")] = None
    features: Features = field(default_factory=Features)
    initial: Initial = field(default_factory=Initial)
    dirty: Dirty = field(default_factory=Dirty)
    stop_copy: StopCopy = field(default_factory=StopCopy)
    reads: Reads = field(default_factory=Reads)
    writes: Phases = field(default_factory=Phases)
    source_arcs: Mapping[str, Value[Distribution]] = field(default_factory=dict)
    destination_arcs: Mapping[str, Value[Distribution]] = field(default_factory=dict)
    loading: Loading = field(default_factory=Loading)
    reinits: tuple[Reinit, ...] = ()
    dma_logging: DmaLogging = field(default_factory=DmaLogging)
    contention: Contention = field(default_factory=Contention)
    content: Content = field(default_factory=Content)
    migration: MigrationSettings = field(default_factory=MigrationSettings)
    recorded: Recorded = field(default_factory=Recorded)
