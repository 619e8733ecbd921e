"""Whether processes grow: what they hold, sampled move after move, and the slope of each series.

A difference of the last sample and the first is whatever the two happened to be. The slope is that of Theil
and Sen, the median over all pairs of samples: single samples, high or low, do not move it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# Samples of this first share of the moves are left out: caches fill, and rings of the last thousand.
WARM_UP = 0.3
PER_MOVES = 1000
# What a server keeps of the most recent, 3000 samples and 1000 changes of state, once that is full.
RINGS_BYTES = 1536 << 10
# The folder into which the long runs write their samples, if there is one.
FIGURES = "VFU_DEV_SOAK_FIGURES"
# What may be added in a thousand moves. An allocator's noise is some pages.
LIMITS = {"rss_bytes": 256 << 10, "descriptors": 0.5, "threads": 0.5, "maps": 2.0}
# A log has lines for each move, of every state: it grows by as much with the last moves as with the first.
LOG_BYTES_A_MOVE = 4096


def look(pid: int, log: Path) -> dict[str, int]:
    """Return what a process holds now."""
    proc = Path("/proc", str(pid))
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    return {
        "rss_bytes": int(status["VmRSS"].split()[0]) << 10,
        "descriptors": len(os.listdir(proc / "fd")),
        "threads": int(status["Threads"]),
        "maps": len((proc / "maps").read_text().splitlines()),
        "log_bytes": log.stat().st_size,
    }


def slope(moves: list[int], values: list[int]) -> float:
    """Return the slope of `values` over `moves`, as Theil and Sen have it."""
    x, y = np.asarray(moves, float), np.asarray(values, float)
    first, second = np.triu_indices(len(x), 1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))


@dataclass
class Growth:
    """The samples of some processes, by name: each with its pid and its log.

    Attributes:
        filling_bytes: what may be added once, beside what each move may add: of a run that ends before the
            servers have filled what they keep.
    """

    processes: dict[str, tuple[int, Path]]
    filling_bytes: int = 0
    moves: list[int] = field(default_factory=list)
    samples: dict[str, list[dict[str, int]]] = field(default_factory=dict)

    def sample(self, moves: int) -> None:
        """Sample all, after that number of moves."""
        self.moves.append(moves)
        for name, (pid, log) in self.processes.items():
            self.samples.setdefault(name, []).append(look(pid, log))

    def slopes(self) -> dict[str, dict[str, float]]:
        """Return what is added in a thousand moves, by process and quantity, after the warm-up."""
        first = sum(moves < WARM_UP * self.moves[-1] for moves in self.moves)
        assert len(self.moves) - first >= 20, "too few samples for a slope"
        return {
            name: {
                quantity: PER_MOVES * slope(self.moves[first:], [row[quantity] for row in rows[first:]])
                for quantity in rows[0]
            }
            for name, rows in self.samples.items()
        }

    def problems(self) -> list[str]:
        """Return what grows by more than it may."""
        found = []
        measured = (1 - WARM_UP) * self.moves[-1]
        limits = {**LIMITS, "log_bytes": PER_MOVES * LOG_BYTES_A_MOVE}
        limits["rss_bytes"] += self.filling_bytes * PER_MOVES / measured
        for name, slopes in self.slopes().items():
            for quantity, added in slopes.items():
                limit = limits[quantity]
                if added > limit:
                    found.append(f"{name}: {quantity} +{added:g} in {PER_MOVES} moves, limit {limit:g}")
        return found

    def to_json(self) -> dict[str, object]:
        """Return samples and slopes, for a closing note."""
        return {"moves": self.moves, "samples": self.samples, "per_1000_moves": self.slopes()}
