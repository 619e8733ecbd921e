"""What the library logs, in Python's log."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

# syslog(3) levels, as vfu_log uses them, to Python's. The library's LOG_INFO is a narration with errno texts
# ("vfu_reset_ctx: No message of desired type" is a client that left); the server logs the same in words.
_LOG_LEVELS = [logging.CRITICAL] * 3 + [
    logging.ERROR,
    logging.WARNING,
    logging.INFO,
    logging.DEBUG,
    logging.DEBUG,
]
_SYSLOG_DEBUG = 7
_SYSLOG_NOTICE = 5


class LibraryLog:
    """The callback of vfu_setup_log() of one context.

    Args: name: the device.

    Attributes:
        complaints: where warnings go instead, while the library checks a client; None: into the log.
    """

    def __init__(self, name: str) -> None:
        self.complaints: list[str] | None = None
        self._name = name

    @property
    def level(self) -> int:
        """Up to which of syslog's levels the library is to call."""
        return _SYSLOG_DEBUG if logger.isEnabledFor(logging.DEBUG) else _SYSLOG_NOTICE

    def __call__(self, level: int, text: bytes | None) -> None:
        """Log one line."""
        level = _LOG_LEVELS[level] if 0 <= level < len(_LOG_LEVELS) else logging.INFO
        line = (text or b"").decode(errors="replace").rstrip()
        if self.complaints is not None and level >= logging.WARNING:
            self.complaints.append(line)
            return
        # What a misbehaving client makes the library say is no error of ours.
        logger.log(level, "%s: %s", self._name, line)
