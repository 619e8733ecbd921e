"""Recorded moves: what a `Forecaster` was fed in a real migration, kept in a file, and fed to it again.

A file is JSON lines in xz, one line a move. Events are the calls of `Forecaster`'s methods in their order.
Times are in nanoseconds, and each is stored as the difference to the one before: thousands of reads become a
few kilobytes. The rest of a move says what it was: the machine by CPU model and cores alone, the load, and
what the client measured.
"""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vfu_dev.machine import processor
from vfu_dev.migration.forecast import Forecaster

MOVES = Path(__file__).parents[1] / "data" / "moves"

# Which arguments of a call are times.
_TIMES = {"read": (2, 3), "stop": (0,), "end": (0,)}

Event = list[Any]  # the method's name, then its arguments


@dataclass(frozen=True)
class Move:
    """One recorded migration, of one device or of all that a VM has.

    Attributes:
        cpu, cores: the machine: its CPU model, and how many cores the move could use.
        others: share of these cores' time that other work on the machine took meanwhile, 0 to 1.
        real_time: whether all that took part had the processors before these others.
        kind: what was moved, in a word; a scene of `record_moves.py`.
        client: `qemu` or `migrator`.
        server: moves of one kind with the same number left the same server, one after the other.
        settings: of the move, for whoever looks at one.
        measured_ms: the downtime as the client saw it.
        devices: the events of each, see the module.
    """

    cpu: str
    cores: int
    others: float
    real_time: bool
    kind: str
    client: str
    server: int
    settings: dict[str, Any]
    measured_ms: float
    devices: list[list[Event]]


@dataclass(frozen=True)
class Replayed:
    """What became of a move in an estimator; seconds."""

    move: Move
    predicted: float | None
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted over measured; nothing predicted is 0."""
        return (self.predicted or 0.0) / self.measured

    @property
    def close(self) -> bool:
        """Whether they are within a fifth of what was measured, or 5 ms, whichever is more."""
        return self.predicted is not None and abs(self.predicted - self.measured) <= max(
            0.2 * self.measured, 0.005
        )


class Recorder(Forecaster):
    """A forecaster that keeps what it is fed; a migration that was completed is handed to `done`."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []

    def done(self) -> None:
        """Take the events of a completed migration; they are dropped when the next one begins."""

    def begin(self) -> None:
        """Keep it; a device without PRE_COPY is stopped first."""
        self.events = [*(one for one in self.events[-1:] if one[0] == "stop"), ["begin"]]
        super().begin()

    def tell(self, length_bytes: int) -> None:
        """Keep it."""
        self.events.append(["tell", length_bytes])
        super().tell(length_bytes)

    def ask(self, left_bytes: int, *, by_client: bool) -> None:
        """Keep it."""
        self.events.append(["ask", left_bytes, by_client])
        super().ask(left_bytes, by_client=by_client)

    def sample(self, seconds: float, written_bytes: int, scan_seconds: float = 0.0) -> None:
        """Keep it, as exactly as it will be replayed."""
        seconds, scan_seconds = round(seconds, 6), round(scan_seconds, 6)
        self.events.append(["sample", seconds, written_bytes, scan_seconds])
        super().sample(seconds, written_bytes, scan_seconds)

    def read(self, asked: int, stored: int, began_ns: int, ended_ns: int) -> None:
        """Keep it."""
        self.events.append(["read", asked, stored, began_ns, ended_ns])
        super().read(asked, stored, began_ns, ended_ns)

    def stop(self, now_ns: int) -> None:
        """Keep it."""
        self.events.append(["stop", now_ns])
        super().stop(now_ns)

    def end(self, now_ns: int) -> float:
        """Keep it, and hand the migration on."""
        self.events.append(["end", now_ns])
        seconds = super().end(now_ns)
        self.done()
        return seconds


def _deltas(events: Iterable[Event], sign: int) -> Iterator[Event]:
    """Make times differences to the time before (`sign` -1), or differences times (1)."""
    before = 0
    for name, *arguments in events:
        for place in _TIMES.get(name, ()):
            value = arguments[place]
            arguments[place] = value + sign * before
            before = value if sign < 0 else arguments[place]
        yield [name, *arguments]


def read_moves(path: Path) -> list[Move]:
    """Return the moves of a file."""
    with lzma.open(path, "rt") as lines:
        found = [json.loads(line) for line in lines]
    return [
        Move(**{**one, "devices": [list(_deltas(events, 1)) for events in one["devices"]]}) for one in found
    ]


def write_moves(path: Path, moves: Iterable[Move]) -> None:
    """Write `moves`, with times that count from the first of each device."""
    beside = path.with_suffix(".new")
    with lzma.open(beside, "wt", preset=9) as file:
        for move in moves:
            devices = [list(_deltas(events, -1)) for events in move.devices]
            for events in devices:
                first = next(one for one in events if one[0] in _TIMES)
                first[1 + _TIMES[first[0]][0]] = 0
            file.write(json.dumps({**asdict(move), "devices": devices}, separators=(",", ":")) + "\n")
    beside.rename(path)


def feed(forecaster: Forecaster, events: Iterable[Event]) -> tuple[float | None, float | None]:
    """Feed it events; return the downtime in seconds as predicted at the stop, and as measured at the end."""
    measured = None
    for name, *arguments in events:
        match name:
            case "ask":
                forecaster.ask(arguments[0], by_client=arguments[1])
            case "end":
                measured = forecaster.end(*arguments)
            case _:
                getattr(forecaster, name)(*arguments)
    return forecaster.predicted_seconds, measured


def replay(moves: Iterable[Move], make: Callable[[], Forecaster] = Forecaster) -> Iterator[Replayed]:
    """Feed all moves to forecasters, a new one for each server.

    A VM's devices are saved and resumed one after the other: each one's prediction is a part of the VM's.
    """
    servers: dict[tuple[str, int], list[Forecaster]] = {}
    for move in moves:
        there = servers.setdefault((move.kind, move.server), [make() for _ in move.devices])
        found = [feed(one, events) for one, events in zip(there, move.devices, strict=True)]
        predicted = [seconds for seconds, _ in found if seconds is not None]
        measured = [seconds for _, seconds in found if seconds is not None]
        assert len(measured) == len(found), "a migration without an end"
        whole = sum(predicted) if len(predicted) == len(found) else None
        yield Replayed(move, whole, max(measured))


def machine(real_time: bool) -> dict[str, Any]:
    """Return what a move says of its machine: nothing that tells one from another of its kind."""
    return {"cpu": processor(), "cores": len(os.sched_getaffinity(0)), "real_time": real_time}
