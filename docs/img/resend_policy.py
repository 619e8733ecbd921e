"""Draws resend-policy.png: what waits while a device is written, with the resend policy on and off.

    python docs/img/resend_policy.py [FILE.png]

Nothing is modelled but the writer: a real `SaveSession` over a real `DeviceMemory` is read in steps of
256 KiB, and between two steps the writer writes pages. Time is therefore counted in what the link
carried. The link's share that the writer needs is given as `LOAD`: below 1 it converges in the end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from vfu_dev.memory import DeviceMemory
from vfu_dev.migration import MigratableState, SaveSession

PAGES = 8192
PAGE_BYTES = 4096
STEP_BYTES = 256 * 1024
# Writes a step, as a share of the pages that a step carries.
LOADS = (0.75, 3.0)
HOT_SHARE, HOT_PAGES = 0.9, PAGES // 20
ROUNDS = 4.0  # at most this multiple of the memory's size is sent

Writer = Callable[[int], npt.NDArray[np.intp]]


def uniform(seed: int) -> Writer:
    """Write anywhere."""
    random = np.random.default_rng(seed)
    return lambda count: random.integers(0, PAGES, count)


def hot_set(seed: int) -> Writer:
    """Write nine times of ten to a twentieth of the memory, which lies all over it."""
    random = np.random.default_rng(seed)
    hot = random.choice(PAGES, HOT_PAGES, replace=False)

    def write(count: int) -> npt.NDArray[np.intp]:
        anywhere = random.integers(0, PAGES, count)
        return np.where(random.random(count) < HOT_SHARE, hot[random.integers(0, HOT_PAGES, count)], anywhere)

    return write


def sequential(seed: int) -> Writer:
    """Write one page after the other, around and around."""
    position = seed

    def write(count: int) -> npt.NDArray[np.intp]:
        nonlocal position
        chosen = (position + np.arange(count)) % PAGES
        position += count
        return chosen

    return write


WRITERS = {"uniform": uniform, "hot set": hot_set, "sequential": sequential}


@dataclass
class Run:
    """One migration: after each step, what the link had carried and what waited, in memory sizes."""

    carried: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    passes: list[tuple[float, float]] = field(default_factory=list)
    resent: int = 0


def steps(session: SaveSession, memory: DeviceMemory, write: Writer, load: float) -> Iterator[int]:
    """Let writer and reader take turns; yield the bytes that were read."""
    buffer = memoryview(bytearray(STEP_BYTES))
    writes = load * STEP_BYTES / PAGE_BYTES
    due = 0.0
    while True:
        due += writes
        memory.pages.mark_pages(write(int(due)))
        due -= int(due)
        yield session.read_into(buffer)


def migrate(name: str, load: float, cold_first: bool) -> Run:
    """Run one migration until the memory's size was sent `ROUNDS` times."""
    memory = DeviceMemory("memory", PAGES * PAGE_BYTES)
    memory.data[:] = 1
    memory.pages.mark(0, memory.size_bytes)
    session = SaveSession(MigratableState("figure", [memory], []), cold_first=cold_first)
    run = Run()
    carried = passes = 0
    for count in steps(session, memory, WRITERS[name](3), load):
        carried += count
        waiting = memory.pages.dirty_pages / PAGES
        run.carried.append(carried / memory.size_bytes)
        run.waiting.append(waiting)
        if session.counters.passes > passes:
            passes = session.counters.passes
            run.passes.append((run.carried[-1], waiting))
        if run.carried[-1] > ROUNDS:
            break
    run.resent = session.counters.pages_resent
    memory.close()
    return run


def panel(axis: Axes, name: str, load: float) -> None:
    """Draw one writer at one load, and print its figures."""
    for cold_first, colour, label in ((False, "#c0392b", "policy off"), (True, "#1f6f8b", "policy on")):
        run = migrate(name, load, cold_first)
        axis.plot(run.carried, np.array(run.waiting) * 100, color=colour, label=label, linewidth=1.3)
        axis.plot(*(np.array(run.passes).T * [[1], [100]]), "o", color=colour, markersize=2.5)
        last = np.mean(run.waiting[-50:]) * 100
        print(
            f"{name:12s} load {load:4.2f} {label:11s} {len(run.passes):3d} passes,"
            f" {run.resent:6d} pages again, {last:4.1f} % wait"
        )
    axis.set_title(f"{name}, {load:.0%} of the link", fontsize=10)
    axis.set_ylim(1, 110)
    axis.set_yscale("log", base=10)
    axis.set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def main(path: Path) -> None:
    """Draw and write the picture."""
    rows, columns = len(LOADS), len(WRITERS)
    figure, axes = plt.subplots(
        rows, columns, figsize=(11, 5.6), sharey=True, sharex=True, layout="constrained"
    )
    for row, load in zip(axes, LOADS, strict=True):
        for axis, name in zip(row, WRITERS, strict=True):
            panel(axis, name, load)
        row[0].set_ylabel("pages that wait (%)")
    for axis in axes[-1]:
        axis.set_xlabel("sent, in sizes of the memory")
    axes[0][-1].legend(loc="upper right", frameon=False)
    figure.suptitle("What waits to be sent while a device is written; dots are starts of passes")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "resend-policy.png")
