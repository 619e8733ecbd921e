"""Profiles from traces: which file is what, which device and migration is meant, both sides together."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from vfu_dev.errors import ConfigError
from vfu_dev.profile.build import Observed, build
from vfu_dev.profile.from_calls import MAGIC, Call, CallReader, read_calls
from vfu_dev.profile.from_qemu import QemuReader
from vfu_dev.profile.history import History
from vfu_dev.profile.model import MigrationSettings, Profile
from vfu_dev.profile.reading import parse_profile
from vfu_dev.profile.session import Marks
from vfu_dev.profile.writing import profile_text
from vfu_dev.qemu_trace import BIG_ENDIAN_MAGIC, SIMPLE_MAGIC, Traced, TraceError, read_log, read_simple
from vfu_dev.sizes import format_count

_GZIP, _XZ = b"\x1f\x8b", b"\xfd7zXZ\x00"


@dataclass(frozen=True)
class Wanted:
    """What of the traces is wanted.

    Attributes:
        device: its number in each trace, from 1, or its name; None: the only one.
        migration: its number on each side, from 1; None: all.
        lenient: whether what cannot be read is left out, with a note.
    """

    device: str | None = None
    migration: int | None = None
    lenient: bool = False


def import_profile(
    paths: Sequence[Path], name: str, wanted: Wanted, migration: MigrationSettings, about: str | None = None
) -> tuple[Profile, list[str]]:
    """Return the profile of a device in traces, and notes about it.

    Raises: ConfigError: a trace cannot be read, or it is not clear which device is meant.
    """
    traces = [_Trace(path, wanted, ()) for path in paths]
    marks = [trace.marks for trace in traces if any(trace.marks)]
    if marks and any(trace.has_incoming for trace in traces):
        # Only the source says where a stream's phases end: those of destinations are read once more with it.
        traces = [
            _Trace(trace.path, wanted, marks[0]) if trace.has_incoming and trace.can_again else trace
            for trace in traces
        ]
    observed = _together(traces, wanted)
    profile = build(observed, name, migration, about)
    # A trace may say what no device and no machine can; such a profile could not be read again.
    parse_profile(profile_text(profile), "the profile of this trace")
    return profile, observed.notes


class _Trace:
    """One file, read."""

    def __init__(self, path: Path, wanted: Wanted, marks: Sequence[Sequence[Marks]]) -> None:
        self.path = path
        self.problems, self.first_problem = 0, ""
        with _opened(path) as (file, self.can_again):
            try:
                self.format, events = _read(file, str(path))
                reader = CallReader if self.format == "calls" else QemuReader
                self.reader: QemuReader | CallReader = reader(wanted.migration, marks)
                tell: Callable[[Any], None] = self.reader.tell
                for event in events:
                    self._take(event, tell, wanted.lenient)
            except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
                raise ConfigError(f"{path}: cannot be read or decompressed: {error}") from error
        for history in self.reader.devices.values():
            history.finish()
        if not self.reader.devices:
            raise ConfigError(
                f"{path}: has no event of QEMU's VFIO migration code; record with -trace 'vfio_*' "
                "(vfu-dev docs recording)"
            )

    def _take(self, event: Any, tell: Callable[[Any], None], lenient: bool) -> None:
        try:
            if isinstance(event, TraceError):
                raise event
            tell(event)
        except TraceError as error:
            if not lenient:
                raise
            self.problems += 1
            self.first_problem = self.first_problem or str(error)

    @property
    def histories(self) -> list[tuple[str, History]]:
        return [(name, history) for (_, name), history in self.reader.devices.items()]

    @property
    def marks(self) -> list[list[Marks]]:
        return [history.marks for history in self.reader.devices.values()]

    @property
    def has_incoming(self) -> bool:
        return any(history.counts["incoming"] for _, history in self.histories)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, bool]]:
    """Open a trace, decompressed; gives the file, and whether it can be read once more."""
    try:
        raw = io.BufferedReader(io.FileIO(path), 1 << 20)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    with raw:
        begin = raw.peek(len(_XZ))
        file = cast(BinaryIO, raw)
        if begin.startswith(_GZIP):
            file = cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20))
        elif begin.startswith(_XZ):
            file = cast(BinaryIO, io.BufferedReader(lzma.LZMAFile(raw), 1 << 20))  # noqa: SIM115
        yield file, raw.seekable()


def _read(file: BinaryIO, name: str) -> tuple[str, Iterator[Traced | TraceError | Call]]:
    begin = cast(io.BufferedReader, file).peek(len(SIMPLE_MAGIC))
    if begin.startswith(MAGIC):
        return "calls", read_calls(file, name)
    if begin.startswith((SIMPLE_MAGIC, BIG_ENDIAN_MAGIC)):
        return "simple", read_simple(file, name)
    return "log", read_log(file, name)


def _together(traces: Sequence[_Trace], wanted: Wanted) -> Observed:
    observed = Observed(traces[0].format)
    chosen = [(trace, _choose(trace, wanted)) for trace in traces]
    for trace, history in chosen:
        for way, side in (("outgoing", "source"), ("incoming", "destination")):
            if not history.counts[way]:
                continue
            if (other := getattr(observed, side)) is not None and other is not history:
                raise ConfigError(f"{trace.path}: is a {side}, and so is a trace before it; give one of each")
            setattr(observed, side, history)
        observed.timed = observed.timed and trace.reader.timed is True
        if history.counts["outgoing"]:
            observed.ranges = max(observed.ranges, trace.reader.ranges)
            if isinstance(trace.reader, CallReader):
                observed.ranges_refused = trace.reader.refused
                observed.start_times, observed.report_times = (
                    trace.reader.start_times,
                    trace.reader.report_times,
                )
        if trace.problems:
            left_out = format_count(trace.problems, "event")
            observed.notes.append(f"{left_out} left out; the first: {trace.first_problem}")
        if history.clock_set_back:
            observed.notes.append(
                f"the clock was set back within a migration ({history.clock_set_back}); "
                "times across that are left out"
            )
    _judge(observed, traces, wanted)
    return observed


def _choose(trace: _Trace, wanted: Wanted) -> History:
    """Return the device that is meant. Raises: ConfigError: that is not clear."""
    found = [(name, history) for name, history in trace.histories if history.migrations]
    if not found:
        raise ConfigError(f"{trace.path}: has no migration from its beginning on, neither out nor in")
    if wanted.device is None and len(found) == 1:
        return found[0][1]
    listed = ", ".join(f"{number} {name}" for number, (name, _) in enumerate(found, 1))
    if wanted.device is None:
        raise ConfigError(f"{trace.path}: has {len(found)} devices ({listed}); say which: --device NUMBER")
    for number, (name, history) in enumerate(found, 1):
        if wanted.device in (str(number), name):
            return history
    raise ConfigError(f"{trace.path}: has no device {wanted.device}; there are {listed}")


def _judge(observed: Observed, traces: Sequence[_Trace], wanted: Wanted) -> None:
    """Note what limits the profile."""
    for side, way in ((observed.source, "outgoing"), (observed.destination, "incoming")):
        if side is None:
            continue
        if wanted.migration is not None and wanted.migration > side.counts[way]:
            raise ConfigError(f"migration {wanted.migration}: there are {side.counts[way]} {way} ones")
    source = observed.source
    if not observed.timed:
        observed.notes.append("there are no timestamps, so no times; record with -msg timestamp=on")
    if source is not None and len(source.initials) > 1:
        sizes = ", ".join(str(size) for size in sorted(source.initials)[:5])
        observed.notes.append(
            f"initial_bytes differs between migrations ({sizes}); sizes are of the last that completed"
        )
    if source is None:
        observed.notes.append("only the destination: sizes and the source's times are not known")
    if source is not None and source.outgoing is not None and source.kept is source.outgoing:
        if not source.kept.whole:
            observed.notes.append("the trace begins in the middle of the migration")
        elif source.cut_off:
            observed.notes.append("the trace is cut off in the middle of the migration")
        elif not source.kept.completed:
            observed.notes.append("no migration completed, so what STOP_COPY has is not known")
