"""The crash matrix: what has to be seen of every cell; tests/lab/test_crash_matrix.py compares.

`crash_page.py` writes docs/crash-matrix.md from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

VICTIMS = ("source server", "destination server", "source QEMU", "destination QEMU")
MOMENTS = ("before", "set-up", "PRE_COPY", "STOP_COPY", "accepting", "after")
BLOWS = ("killed", "stopped")
GONE = "gone"
# Where a run writes what it saw, a file for each cell.
FOLDER = "VFU_DEV_CRASH_FOLDER"

# What survivors do in the end: methods of tests/lab/crashkit.py.
STEPS = {
    "runs on": "the VM runs at the source; device memory and guest RAM are as written, and it writes on",
    "moves again": "to a fresh destination, with a fresh server on the same path; everything arrives",
    "has moved": "the VM runs at the destination; device memory and guest RAM are as written",
    "digests agree": "the servers' digests of what left and of what arrived are equal",
    "without its device": "the VM runs on, its RAM whole; the device reads as all ones, as if pulled out",
    "answers again": "a read of the guest's timed out, as all ones; after that the device answers",
    "cannot be moved": "the next try fails, and QEMU's reason names the device",
    "goes back": "`cont` at the source, whose VM goes on as it was when it left",
    "takes another": "the destination that waits takes the migration of another source",
    "source serves another": "the source's server keeps device memory for the next client, which moves it on",
    "destination serves another": "the destination's server has nothing of a half state for the next client",
    "report": "the lab's report says that the migration failed, and who is gone",
}


@dataclass(frozen=True)
class Outcome:
    """What everybody says in the end.

    Attributes:
        migration: QEMU's word for it at the source.
        source_vm, destination_vm: run states; `exit N` of a QEMU that ended.
        source_device, destination_device: state, what `status` says of the session, what was counted.
        says: texts that have to be in QEMU's reason or in a log; ` or ` as in states.
        then: what the survivors do after that.
        why: what decides between states with ` or `.
    """

    migration: str
    source_vm: str
    destination_vm: str
    source_device: str
    destination_device: str
    says: tuple[str, ...] = ()
    then: tuple[str, ...] = ()
    why: str = ""

    @property
    def states(self) -> tuple[str, ...]:
        """All but the texts."""
        return (
            self.migration,
            self.source_vm,
            self.destination_vm,
            self.source_device,
            self.destination_device,
        )

    def unsaid(self, found: Outcome) -> list[str]:
        """Return the texts that `found` lacks."""
        said = "\n".join(found.says)
        return [text for text in self.says if not any(one in said for one in text.split(" or "))]

    def agrees(self, found: Outcome) -> bool:
        """Whether `found` is in the same states; ` or ` stands between two that depend on who is first."""
        pairs = zip(self.states, found.states, strict=True)
        return all(other in expected.split(" or ") for expected, other in pairs)


@dataclass(frozen=True)
class Cell:
    """One cell."""

    victim: str
    moment: str
    blow: str

    @property
    def side(self) -> str:
        """The side of the victim."""
        return self.victim.partition(" ")[0]

    @property
    def is_qemu(self) -> bool:
        """Whether the victim is a QEMU."""
        return self.victim.endswith("QEMU")

    @property
    def slug(self) -> str:
        """A name for files."""
        return "-".join((self.victim, self.moment, self.blow)).replace(" ", "-")

    @property
    def expected(self) -> Outcome | None:
        """What the table says."""
        return TABLE.get((self.victim, self.moment, self.blow))

    def __str__(self) -> str:
        return f"{self.victim}, {self.moment}, {self.blow}"


CELLS = [Cell(victim, moment, blow) for blow in BLOWS for moment in MOMENTS for victim in VICTIMS]

# The source's device after a migration that failed, and that completed; `reset` where QEMU reset it.
CANCELLED, WAS_RESET = "RUNNING, aborted (cancelled)", "RUNNING, aborted (cancelled), reset"
LEFT = "STOP, completed (not counted yet)"
# Either device whose client left in the middle.
LOST = "RUNNING, aborted (disconnected)"
# The destination's device that has arrived.
ARRIVED = "RUNNING, completed (completed)"

SOURCE_SERVER, DESTINATION_SERVER, SOURCE_QEMU, DESTINATION_QEMU = VICTIMS
STAYED = ("report", "runs on", "moves again")
MOVED = ("has moved", "digests agree")
DEVICE_LOST = ("report", "without its device", "cannot be moved")
NO_CONNECTION = "vfio-user: lost the connection to unix:"
TIMED_OUT = "timed out waiting for reply"
GIVEN_UP = "incoming state given up (connection lost), memory is cleared"
MIGRATION_LOST = "the migration is lost; this device's memory is whole, and the next client gets it"
ONE_OF_TWO = "a destination may be running this state: use only one of the two"
# The source learns of it by the return path, or finds the connection closed while it sends.
# The program's name in front: a QEMU whose server is gone has a longer line that ends the same.
SIBLING = "Sibling indicated error 1 or qemu-system-x86_64: Unable to write to socket"
NOT_READ, NOT_WRITTEN = "Failed to read migration data", "Failed to write migration data"


def _failed(
    source: str, destination: str, *says: str, vm: str = "exit 1", then: tuple[str, ...] = STAYED
) -> Outcome:
    """The migration failed, and the VM is at the source."""
    return Outcome("failed", "running", vm, source, destination, says, then)


def _completed(
    source: str, destination: str, *says: str, vm: str = "running", then: tuple[str, ...] = MOVED
) -> Outcome:
    """The migration completed, and the VM is at the destination."""
    return Outcome("completed", "postmigrate", vm, source, destination, says, then)


def _orphaned(
    source: str, destination: str, *says: str, vm: str = "exit 1", then: tuple[str, ...]
) -> Outcome:
    """The source's QEMU is gone."""
    return Outcome(GONE, GONE, vm, source, destination, says, then)


_SERVE_ANOTHER = ("source serves another", "destination serves another")
_STAYED_AND_SERVES = ("report", "runs on", "destination serves another", "moves again")
_REFUSED = "RUNNING, failed (refused)"

_KILLED = {
    "before": (
        _failed(GONE, LOST, "Failed to start DMA logging", NO_CONNECTION, GIVEN_UP, then=DEVICE_LOST),
        replace(
            _failed(f"RUNNING or {CANCELLED}", GONE, NO_CONNECTION, "load of migration failed"),
            why="the destination's QEMU finds its server gone and closes the connection. RUNNING: the "
            "source's QEMU learns of it before it asks its device for PRE_COPY; aborted: after that",
        ),
        _orphaned("RUNNING", "RUNNING", vm="inmigrate", then=("source serves another", "takes another")),
        _failed("RUNNING", "RUNNING", "Connection refused", vm=GONE, then=_STAYED_AND_SERVES),
    ),
    "set-up": (
        _failed(GONE, LOST, "Failed setting device state to PRE_COPY", NO_CONNECTION, then=DEVICE_LOST),
        _failed(CANCELLED, GONE, NO_CONNECTION, "load of migration failed"),
        _orphaned(LOST, LOST, MIGRATION_LOST, GIVEN_UP, "load of migration failed", then=_SERVE_ANOTHER),
        _failed(CANCELLED, LOST, GIVEN_UP, vm=GONE, then=_STAYED_AND_SERVES),
    ),
    "PRE_COPY": (
        _failed(GONE, LOST, NOT_READ, NO_CONNECTION, GIVEN_UP, then=DEVICE_LOST),
        _failed(CANCELLED, GONE, SIBLING, NO_CONNECTION, NOT_WRITTEN),
        _orphaned(LOST, LOST, MIGRATION_LOST, GIVEN_UP, "load of migration failed", then=_SERVE_ANOTHER),
        _failed(CANCELLED, LOST, GIVEN_UP, vm=GONE, then=_STAYED_AND_SERVES),
    ),
    "STOP_COPY": (
        _failed(GONE, LOST, NOT_READ, NO_CONNECTION, GIVEN_UP, then=DEVICE_LOST),
        _failed(CANCELLED, GONE, SIBLING, NO_CONNECTION, NOT_WRITTEN),
        _orphaned(LOST, LOST, MIGRATION_LOST, GIVEN_UP, then=_SERVE_ANOTHER),
        _failed(CANCELLED, LOST, GIVEN_UP, vm=GONE, then=_STAYED_AND_SERVES),
    ),
    "accepting": (
        _completed(GONE, ARRIVED, NO_CONNECTION, then=("has moved",)),
        _failed(CANCELLED, GONE, SIBLING, NO_CONNECTION, "Migration data was not accepted"),
        _orphaned("RUNNING, sent (sent)", ARRIVED, ONE_OF_TWO, vm="running", then=MOVED),
        _failed(CANCELLED, ARRIVED, vm=GONE),
    ),
    "after": (
        _completed(GONE, ARRIVED, NO_CONNECTION, then=("has moved",)),
        _completed(LEFT, GONE, NO_CONNECTION, then=("without its device",)),
        _orphaned("RUNNING, completed (completed)", ARRIVED, vm="running", then=MOVED),
        _completed(LEFT, ARRIVED, vm=GONE, then=("goes back", "moves again")),
    ),
}
_STOPPED = {
    "before": (
        _failed("RUNNING", LOST, "Failed to start DMA logging: Connection timed out", TIMED_OUT),
        _failed(CANCELLED, _REFUSED, TIMED_OUT, "load of migration failed"),
        _completed(LEFT, ARRIVED),
        _completed(LEFT, ARRIVED),
    ),
    "set-up": (
        _failed(WAS_RESET, LOST, "Failed setting device state to PRE_COPY", TIMED_OUT),
        _failed(CANCELLED, _REFUSED, TIMED_OUT, "load of migration failed"),
        _completed(LEFT, ARRIVED),
        _completed(LEFT, ARRIVED),
    ),
    "PRE_COPY": (
        _failed(CANCELLED, LOST, f"{NOT_READ}: Connection timed out", TIMED_OUT),
        _failed(CANCELLED, LOST, SIBLING, TIMED_OUT),
        _completed(LEFT, ARRIVED),
        _completed(LEFT, ARRIVED),
    ),
    "STOP_COPY": (
        _failed(WAS_RESET, LOST, f"{NOT_READ}: Connection timed out", TIMED_OUT),
        _failed(CANCELLED, LOST, SIBLING, TIMED_OUT),
        _completed(LEFT, ARRIVED),
        _completed(LEFT, ARRIVED),
    ),
    "accepting": (
        _completed("STOP, completed (completed), reset", ARRIVED, TIMED_OUT),
        _failed(CANCELLED, ARRIVED, SIBLING, TIMED_OUT, "Migration data was not accepted"),
        _completed(LEFT, ARRIVED),
        _completed(LEFT, ARRIVED),
    ),
    "after": (
        _completed(LEFT, ARRIVED),
        _completed(LEFT, ARRIVED, TIMED_OUT, then=(*MOVED, "answers again")),
        _completed(LEFT, ARRIVED),
        _completed(LEFT, ARRIVED),
    ),
}
TABLE = {
    (victim, moment, blow): outcome
    for blow, table in zip(BLOWS, (_KILLED, _STOPPED), strict=True)
    for moment, outcomes in table.items()
    for victim, outcome in zip(VICTIMS, outcomes, strict=True)
}

# What CI runs: each victim and each moment; one that is stopped takes 14 s of waiting.
DEFAULT_RUN = {
    (SOURCE_SERVER, "before", "killed"),
    (SOURCE_SERVER, "PRE_COPY", "killed"),
    (SOURCE_SERVER, "accepting", "killed"),
    (DESTINATION_SERVER, "set-up", "killed"),
    (DESTINATION_SERVER, "PRE_COPY", "killed"),
    (DESTINATION_SERVER, "accepting", "killed"),
    (DESTINATION_SERVER, "after", "killed"),
    (SOURCE_QEMU, "STOP_COPY", "killed"),
    (SOURCE_QEMU, "accepting", "killed"),
    (DESTINATION_QEMU, "before", "killed"),
    (DESTINATION_QEMU, "STOP_COPY", "killed"),
    (DESTINATION_QEMU, "accepting", "killed"),
    (DESTINATION_QEMU, "after", "killed"),
    (SOURCE_SERVER, "STOP_COPY", "stopped"),
}


def in_ci(cell: Cell) -> bool:
    """Whether a cell is of the default run; the others are of `make crash-matrix`."""
    return (cell.victim, cell.moment, cell.blow) in DEFAULT_RUN
