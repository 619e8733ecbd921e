"""Treat SIGTERM and SIGHUP as Ctrl-C: for commands that have processes and temporary folders to clean up."""

from __future__ import annotations

import signal
from typing import Any

# What came last, for the exit status.
_came = signal.SIGINT


def end_on_sigterm() -> None:
    """Have SIGTERM and SIGHUP raise KeyboardInterrupt as SIGINT does, so that `with` and `finally` run.

    `timeout`, systemd and CI send SIGTERM, a terminal that is closed sends SIGHUP, and by default either ends
    Python at once. It goes through SIGINT because asyncio.run() has a handler there that cancels its
    task first. SIGHUP stays ignored where it was: `nohup` wants that.
    """
    signal.signal(signal.SIGTERM, _as_interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _as_interrupt)


def interrupted_status() -> int:
    """Return the exit status of a command that KeyboardInterrupt ended: 130 for SIGINT, 143 for SIGTERM,
    129 for SIGHUP.
    """
    return 128 + _came


def _as_interrupt(number: int, _frame: Any) -> None:
    global _came
    _came = signal.Signals(number)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)
