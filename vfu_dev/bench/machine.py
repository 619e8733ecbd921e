"""The machine that figures come from: its description, and the processor time that others used."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vfu_dev.machine import processor

# Share of all processors' time. Above it, other work affects figures too much to judge them.
MOST_OTHER_WORK = 0.05

# proc(5), /proc/stat, the line `cpu`: everything but idle and iowait; guests are in user already.
_BUSY = ("user", "nice", "system", None, None, "irq", "softirq", "steal")


def machine() -> dict[str, object]:
    """Return the machine's properties that figures depend on."""
    return {
        "cpu": processor(),
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "kernel": os.uname().release,
    }


def _busy_seconds() -> float:
    """Return the seconds that all processors were busy since boot, time stolen by the host included."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    ticks = sum(int(field) for name, field in zip(_BUSY, fields, strict=False) if name)
    return ticks / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class OtherWork:
    """The work of other processes on this machine since this object was made."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.monotonic(), _busy_seconds(), _own_seconds()

    def busy_seconds(self) -> float:
        """Return the processor seconds that others used. All children of this process must have ended."""
        return max(0.0, (_busy_seconds() - self._busy) - (_own_seconds() - self._own))

    def share(self) -> float:
        """Return the same as a share of all processors' time, 0 to 1."""
        time_there = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        return self.busy_seconds() / time_there if time_there > 0 else 0.0


@contextmanager
def busy_core(wanted: bool) -> Iterator[None]:
    """Keep one processor busy if `wanted`, as a guest's virtual CPU does."""
    if not wanted:
        yield
        return
    chosen = max(os.sched_getaffinity(0))
    script = f"import os; os.sched_setaffinity(0, {{{chosen}}})\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", script]) as spinning:
        try:
            yield
        finally:
            spinning.kill()
