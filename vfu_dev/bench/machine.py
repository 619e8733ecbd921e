"""The machine that figures come from: who runs where, memory that is there, and the work of others."""

from __future__ import annotations

import mmap
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from vfu_dev.bench.cgroup import memory_left_bytes
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


def _core(cpu: int) -> str:
    """Return the processors on the core of `cpu`, as sysfs lists them; that one alone if it does not say."""
    siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return siblings.read_text().strip() if siblings.exists() else str(cpu)


def _processors() -> tuple[int, int]:
    """Return the client's processor and the server's: two cores, if this process may use two."""
    allowed = sorted(os.sched_getaffinity(0))
    client = allowed[0]
    on_other_cores = (cpu for cpu in allowed if _core(cpu) != _core(client))
    return client, next(on_other_cores, allowed[-1])


def keep_client(pid: int) -> None:
    """Keep the process `pid` on the client's processor."""
    _keep(pid, _processors()[0])


def keep_server(pid: int) -> None:
    """Keep the process `pid`, all threads that it has now, on the server's processor."""
    _keep(pid, _processors()[1])


def _keep(pid: int, processor_number: int) -> None:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {processor_number})


# Ends with its parent, however that one ends. Children of `chrt -f` would be in its class, too.
_SPIN = """import os
os.sched_setaffinity(0, {{{cpu}}})
os.sched_setscheduler(0, os.{policy}, os.sched_param(0))
while os.getppid() == {parent}:
    for _ in range(100000): pass
"""


@contextmanager
def _spinning(cpu: int, policy: str) -> Iterator[int]:
    """Keep `cpu` busy; yields the process id. Its session is its own, so Ctrl-C goes to the command only."""
    script = _SPIN.format(cpu=cpu, policy=policy, parent=os.getpid())
    with subprocess.Popen([sys.executable, "-ISc", script], start_new_session=True) as child:
        try:
            yield child.pid
        finally:
            child.kill()


def _give_way_to_other_sessions(pid: int) -> None:
    """Give the session of the process `pid` the least weight against others.

    Source:  sched(7), The autogroup feature: processor time is shared between sessions first, and a class
             such as SCHED_IDLE counts only within one. Measured servers have sessions of their own.
    """
    group = Path(f"/proc/{pid}/autogroup")
    while group.exists():
        try:
            group.write_text("19")
            return
        except BlockingIOError:  # without privileges the kernel takes one in 100 ms
            time.sleep(0.01)


@contextmanager
def awake() -> Iterator[None]:
    """Let no processor become idle: one process of the class SCHED_IDLE on each.

    Everybody else preempts it at once. An idle virtual processor halts, and the host decides when it comes
    back: up to some 35 us later, several times what an access takes.
    """
    with ExitStack() as stack:
        for cpu in sorted(os.sched_getaffinity(0)):
            _give_way_to_other_sessions(stack.enter_context(_spinning(cpu, "SCHED_IDLE")))
        yield


@contextmanager
def busy_core(wanted: bool) -> Iterator[None]:
    """Keep one processor busy if `wanted`, as a guest's virtual CPU does; the rest uses the others."""
    allowed = os.sched_getaffinity(0)
    if not wanted:
        yield
        return
    chosen = max(allowed)
    with _spinning(chosen, "SCHED_OTHER"):
        os.sched_setaffinity(0, (allowed - {chosen}) or allowed)
        try:
            yield
        finally:
            os.sched_setaffinity(0, allowed)


def _available_bytes() -> int:
    """Return MemAvailable of proc(5), /proc/meminfo, or what the limit of a container leaves of it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    host = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) << 10
    own = memory_left_bytes()
    return host if own is None else min(host, own)


def touch_memory(size_bytes: int) -> int:
    """Write to `size_bytes` of memory, at most half of what is available, and give it back; return how much.

    A host may take back what a virtual machine has freed. The first process to touch such memory waits for
    the host. A process that starts now gets memory that is there.
    """
    size_bytes = min(size_bytes, _available_bytes() // 2) // mmap.PAGESIZE * mmap.PAGESIZE
    if not size_bytes:
        return 0  # a control group may be full, and mmap() refuses a size of 0
    with mmap.mmap(-1, size_bytes) as memory:
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        np.ndarray(size_bytes, np.uint8, memory)[:: mmap.PAGESIZE] = 1
    return size_bytes
