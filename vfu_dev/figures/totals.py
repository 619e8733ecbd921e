"""What migrations counted since the server started: plain integers, one thread adds, others read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

# How an outgoing migration ended. `completed`: all was read, and the client went on to STOP. `sent`: all was
# read, and it left without that, so nobody here knows what became of it. `failed`: an error here.
SAVE_RESULTS = ("completed", "sent", "cancelled", "reset", "disconnected", "failed")
# Why an incoming one did. `refused`: the stream was damaged, foreign or cut off.
RESUME_RESULTS = ("completed", "refused", "reset", "disconnected", "failed")
SENT_PHASES = ("pre_copy_initial", "pre_copy_dirty", "stop_copy")


def _zeros(names: tuple[str, ...]) -> Callable[[], dict[str, int]]:
    return lambda: dict.fromkeys(names, 0)


@dataclass
class Totals:
    """Sums over all migrations of one device; bytes are of the stream, framing included."""

    saves_started: int = 0
    saves: dict[str, int] = field(default_factory=_zeros(SAVE_RESULTS))
    audit_failures: int = 0
    resumes_started: int = 0
    resumes: dict[str, int] = field(default_factory=_zeros(RESUME_RESULTS))
    sent_bytes: dict[str, int] = field(default_factory=_zeros(SENT_PHASES))
    received_bytes: int = 0
    passes: int = 0
    pages_sent: int = 0
    pages_resent: int = 0
    zero_pages: int = 0


class Interruption(StrEnum):
    """What ends a migration from outside, as transitions and records word it."""

    RESET = "reset"
    DISCONNECTED = "connection lost"


def interrupted_result(reason: str) -> str:
    """Return the result of a migration that ends for `reason`: any text but DISCONNECTED's is of a reset."""
    return "disconnected" if reason == Interruption.DISCONNECTED else "reset"
