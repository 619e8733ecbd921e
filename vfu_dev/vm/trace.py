"""QEMU's trace log (log backend) as data: what the VFIO migration code did and when."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vfu_dev.qemu_events import EVENTS, Kind, read
from vfu_dev.qemu_trace import split_line

# Of equal answers in a row: how many are kept besides the first and the last.
KEPT_REPEATS = 8
# Events that say how much is left, and that QEMU may repeat without end while nothing changes.
_QUESTIONS = frozenset(
    event.name
    for event in EVENTS
    if event.kind
    in (
        Kind.ITERATE,
        Kind.PENDING_ESTIMATE,
        Kind.PENDING_EXACT,
        Kind.PRECOPY_INFO,
        Kind.STOP_COPY_SIZE,
        Kind.EMPTY,
    )
)
_BEGINNING, _EXACT = "vfio_", " exact 1,"


@dataclass(frozen=True)
class TraceEvent:
    """One line of the log.

    Attributes:
        time: unix seconds, None without a timestamp.
        kind: what it tells, the same in all versions (`qemu_events.Kind`); None for all other events.
        values: its numbers; sizes are bytes.
        state: that QEMU asked for, of Kind.STATE.
        repeated: how many events like it came between it and the one before it, and are left out.
    """

    time: float | None
    event: str
    device: str
    text: str
    values: dict[str, int] = field(default_factory=dict)
    state: str | None = None
    kind: Kind | None = None
    repeated: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the event as a JSON object without empty members."""
        return {key: value for key, value in asdict(self).items() if value not in (None, {}, 0)}


def parse_trace(path: Path) -> list[TraceEvent]:
    """Return the VFIO events of a trace log in order; a missing file has none.

    A QEMU that waits asks the same again thousands of times a second. Of more than KEPT_REPEATS equal answers
    in a row the last one stands for the rest, and says for how many.
    """
    events = []
    with contextlib.suppress(OSError), path.open(errors="replace") as lines:
        for line, repeated in _folded(lines):
            if (event := _event(line, repeated)) is not None:
                events.append(event)
    return events


def _folded(lines: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yield lines, each with the number of equal ones that were left out before it.

    Equal answers are in a row while nothing else happens than questions whose answers stay the same.
    """
    answers: dict[str, _Answer] = {}  # of each event and device
    for number, line in enumerate(lines):
        at = line.find(_BEGINNING)
        name, text = line[at:].partition(" ")[0], line[at:]
        if at < 0 or name not in _QUESTIONS:
            yield from _rest(answers)
            yield line, 0
            continue
        # One event of 11.1 has both questions, by turns, and says which in `exact`.
        subject = text.partition(")")[0] + text.rpartition(_EXACT)[1]
        last = answers.get(subject)
        if last is None or last.text != text:
            if last is not None:
                yield from _rest(answers)
            answers[subject] = _Answer(text)
            yield line, 0
        elif last.repeats < KEPT_REPEATS:
            last.repeats += 1
            yield line, 0
        else:
            last.left_out += 1
            last.number, last.line = number, line
    yield from _rest(answers)


@dataclass
class _Answer:
    """An answer, how often it was repeated, and the last line of those that were left out."""

    text: str
    repeats: int = 0
    left_out: int = 0
    number: int = 0
    line: str = ""


def _rest(answers: dict[str, _Answer]) -> Iterator[tuple[str, int]]:
    """End the row: yield the last line of each answer, in the order of the log, and forget all."""
    found = sorted((one for one in answers.values() if one.left_out), key=lambda one: one.number)
    answers.clear()
    yield from ((one.line, one.left_out - 1) for one in found)


def _event(line: str, repeated: int) -> TraceEvent | None:
    found = split_line(line.rstrip("\n"))
    if found is None:
        return None
    kind, values = read(found.event, found.text)
    state = values.pop("state", None)
    return TraceEvent(
        time=found.time,
        event=found.event,
        device=found.device,
        text=found.text,
        values={key: int(value) for key, value in values.items()},
        state=state if kind is Kind.STATE else None,
        kind=kind,
        repeated=repeated,
    )


def states_set(events: list[TraceEvent], device: str | None = None) -> list[str]:
    """Return the states that QEMU asked for, in order, of one device or of all."""
    return [event.state for event in events if event.state and device in (None, event.device)]
