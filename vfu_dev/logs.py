"""Log lines on standard error: for people, or one JSON object each with the same figures as fields.

A call that has figures passes them as `extra={"fields": {...}}`; the text says the same in words. Every
object has `time` (ISO 8601, UTC), `level`, `logger` and `message`; `traceback` where there is one.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

HUMAN_FORMAT = "%(asctime)s %(levelname)s %(message)s"


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
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        # A name that is not valid text is escaped rather than lost with its line.
        return json.dumps(entry, default=str)


def set_up_logging(log_format: str, level: str) -> None:
    """Send this package's log lines to standard error, once a process.

    Args:
        log_format: human or json.
        level: of this package; others speak from WARNING on.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(HUMAN_FORMAT))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("vfu_dev").setLevel(level.upper())
