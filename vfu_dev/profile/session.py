"""One migration, as far as it is observed: calls, changes of state, sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from vfu_dev.profile.tally import CurveKeeper, Tally

Phase = Literal["initial", "dirty", "stop_copy"]
PHASES: tuple[Phase, ...] = ("initial", "dirty", "stop_copy")


@dataclass
class Duration:
    """How long something took.

    Attributes:
        exact: it took that long; otherwise at most that long.
        alone: nothing but the call and the sending of its data is in it.
    """

    seconds: float | None
    exact: bool = False
    alone: bool = False


@dataclass
class CallTally:
    """Reads, or writes, of a phase."""

    sizes: Tally = field(default_factory=lambda: Tally(whole=True))
    times: Tally = field(default_factory=lambda: Tally(whole=False))
    firsts: Tally = field(default_factory=lambda: Tally(whole=False))
    exact: bool = True

    def add(self, size: int | None, took: Duration, first: bool) -> None:
        """Count a call; None: its size is not seen."""
        if size is not None:
            self.sizes.add(size)
        if took.seconds is not None:
            apart = first and (took.exact or took.alone)
            (self.firsts if apart else self.times).add(took.seconds)
            self.exact = self.exact and took.exact


@dataclass
class ArcTally:
    """How long a change of state took."""

    times: Tally = field(default_factory=lambda: Tally(whole=False))
    exact: bool = True


class CallTallies:
    """Reads or writes of all migrations, by phase."""

    def __init__(self) -> None:
        self.phases: Mapping[Phase, CallTally] = {phase: CallTally() for phase in PHASES}
        self._begun: set[Phase] = set()

    def begin(self) -> None:
        """A migration begins: its first calls are apart."""
        self._begun.clear()

    def add(self, phase: Phase, size: int | None, took: Duration) -> None:
        """Count a call."""
        self.phases[phase].add(size, took, phase not in self._begun)
        self._begun.add(phase)


@dataclass(frozen=True)
class Reinited:
    """Initial data that appeared between two questions: when, and how much at least and at most."""

    after: float | None
    before: float | None
    least: int
    most: int


@dataclass
class Outgoing:
    """One migration of which this is the source.

    Attributes:
        whole: it was observed from its beginning.
        precopy_at, stopping_at: when PRE_COPY was entered, and when the client asked to leave it.
        initial: initial_bytes at first; None: nobody asked.
        initial_left: initial_bytes still to be read.
        dirtied: curve of bytes that became dirty, net.
        lengths: curve of stop_copy_length. extras: it less what was left then -> how often.
        extra_most: what it can have exceeded what was left by, where that is always the same; None: not seen.
        appeared_before: what had become dirty, or initial again, at the last answer before the length's.
    """

    whole: bool
    precopy_at: float | None = None
    stopping_at: float | None = None
    read_out_at: float | None = None
    initial: int | None = None
    initial_left: int = 0
    reinit_bytes: int = 0
    reinits: list[Reinited] = field(default_factory=list)
    asked_at: float | None = None
    read_when_asked: int = 0
    precopy_bytes: int = 0
    stop_copy_bytes: int = 0
    dirtied: CurveKeeper = field(default_factory=CurveKeeper)
    dirtied_most: float = 0.0
    dirtied_last: float = 0.0
    lengths: CurveKeeper = field(default_factory=CurveKeeper)
    length_range: tuple[int, int] | None = None
    extras: dict[int, int] = field(default_factory=dict)
    extra_most: float | None = None
    appeared_before: float = 0.0
    lengths_seen: int = 0
    empty_with_initial: bool = False
    first_read_at: float | None = None
    unseen: bool = False  # data of STOP_COPY went where it is not seen: multifd
    completed: bool = False
    ended: bool = False

    @property
    def appeared(self) -> float:
        """Bytes that became dirty, or initial again, until the last answer."""
        return self.dirtied_last + self.reinit_bytes


@dataclass
class Incoming:
    """One migration of which this is the destination."""

    written: int = 0
    initial_sent: bool = False
    last_initial: Duration | None = None
    last_write: Duration | None = None
    completed: bool = False
    ended: bool = False


@dataclass(frozen=True)
class Marks:
    """Where a stream of migration data changes its phase: bytes of initial data, bytes until STOP_COPY."""

    initial: int | None
    precopy: int | None
