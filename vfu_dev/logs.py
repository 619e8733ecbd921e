"""Log lines on standard error: for people, or one JSON object each with the same figures as fields.

A call that has figures passes them as `extra={"fields": {...}}`; the text says the same in words. Every
object has `time` (ISO 8601, UTC), `level`, `logger` and `message`; `traceback` where there is one, and
`left_out` where lines like it were left out before it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

from vfu_dev.sizes import format_left

# The levels that commands and options name.
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

HUMAN_FORMAT = "%(asctime)s %(levelname)s %(message)s"

# Log lines allowed per line of code: BURST at once, and one more every LINE_SECONDS.
BURST = 20
LINE_SECONDS = 1.0

# Seconds between two reports of slow work.
SLOW_SECONDS = 2.0


class SlowWork:
    """Says how far work is, in percent and time left, every `SLOW_SECONDS` that it takes.

    Args:
        what: the work, such as `filling memory`.
        total: its size, in any unit.
        say: gets each report, one line.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        what: str,
        total: float,
        say: Callable[[str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._say, self._clock = what, total, say, clock
        self._done = 0.0
        self._began = self._said = clock()

    def add(self, done: float) -> None:
        """Note that `done` more of the total is done."""
        self._done += done
        now = self._clock()
        if now - self._said >= SLOW_SECONDS and self._done < self._total:
            self._said = now
            self._say(
                f"{self._what}: {format_left(self._done, self._total, self._done / (now - self._began))}"
            )


class _Place:
    """What was logged by one line of code, at one level.

    Attributes:
        allowance: lines it may log now, as of `since`.
        left_out: lines that were logged and left out.
    """

    def __init__(self, now: float) -> None:
        self.allowance = float(BURST)
        self.since = now
        self.left_out = 0
        self.record: logging.LogRecord | None = None  # the last one of those


class RateLimit(logging.Filter):
    """Lets no more lines through than can be read, and says how many it left out.

    A guest that hammers on a register, or a client that sends nonsense, would fill a disk otherwise. The
    limit is for each line of code that logs, so that one flood hides no other; DEBUG has no limit,
    because its readers want everything. `left_out` of a record is the number of such records left out before
    it.

    Args:
        handler: where the lines go; this filter is to be added to it.
        clock: seconds, for tests.
    """

    def __init__(self, handler: logging.Handler, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._handler = handler
        self._clock = clock
        self._places: dict[tuple[str, int, int], _Place] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether this one may go out."""
        if record.levelno <= logging.DEBUG:
            return True
        now = self._clock()
        key = record.pathname, record.lineno, record.levelno
        place = self._places.setdefault(key, _Place(now))
        place.allowance = min(BURST, place.allowance + (now - place.since) / LINE_SECONDS)
        place.since = now
        if place.allowance < 1:
            place.left_out += 1
            place.record = record
            return False
        place.allowance -= 1
        if place.left_out:
            record.left_out, place.left_out, place.record = place.left_out, 0, None
        return True

    def timeout(self) -> float | None:
        """Return in how many seconds `advance` has something to tell; None for nothing."""
        now = self._clock()
        waits = [self._wait(place, now) for place in self._places.values() if place.left_out]
        return max(0.0, min(waits)) if waits else None

    def advance(self, *, at_once: bool = False) -> None:
        """Log the last line of each flood that is over, with how many were left out.

        Args: at_once: of those that are not over, too.
        """
        now = self._clock()
        for place in self._places.values():
            if place.record is not None and (at_once or self._wait(place, now) <= 0):
                # The line itself is one of them.
                record, place.record, place.left_out = place.record, None, place.left_out - 1
                record.left_out, place.left_out = place.left_out, 0
                place.allowance, place.since = 0.0, now
                self._handler.acquire()
                try:
                    self._handler.emit(record)
                finally:
                    self._handler.release()

    def _wait(self, place: _Place, now: float) -> float:
        return place.since + (1 - place.allowance) * LINE_SECONDS - now


class HumanFormatter(logging.Formatter):
    """One line for people; a traceback makes more."""

    def __init__(self) -> None:
        super().__init__(HUMAN_FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base class's name
        """Return the line, and how many like it were left out."""
        left_out = getattr(record, "left_out", 0)
        return super().formatMessage(record) + (f" ({left_out} more like it left out)" if left_out else "")


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON, without a line end."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= getattr(record, "fields", {})
        if left_out := getattr(record, "left_out", 0):
            entry["left_out"] = left_out
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        # A name that is not valid text is escaped rather than lost with its line.
        return json.dumps(entry, default=str)


def set_up_logging(log_format: str, level: str) -> RateLimit:
    """Send this package's log lines to standard error, once a process.

    Args:
        log_format: human or json.
        level: of this package; others log from WARNING on.

    Returns: the limit, which the caller's loop advances.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else HumanFormatter())
    limit = RateLimit(handler)
    handler.addFilter(limit)
    logging.basicConfig(handlers=[handler])
    logging.getLogger("vfu_dev").setLevel(level.upper())
    return limit
