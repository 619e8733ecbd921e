"""How predictions compare with the recorded moves, as the tables of docs/predictions.md.

`python tests/observe/moves_table.py docs/predictions.md` writes them into it.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from movekit import MOVES, Replayed, read_moves, replay  # noqa: E402

from vfu_dev.generated import renew, renewed  # noqa: E402

COMMAND = "python tests/observe/moves_table.py"
# File of moves -> what to call it.
MACHINES = {
    "two-cores": "2 cores, undisturbed",
    "one-core": "1 core, undisturbed",
    "two-cores-busy": "2 cores, busy",
}
ABOUT = {
    "idle": "8 MiB, nothing written, Linux",
    "steady": "16 MiB, 1000 pages/s, Linux",
    "one-large": "256 MiB, 500 pages/s, Linux",
    "precopy": "1 GiB, 500 pages/s",
    "devices-four": "four devices of 4 MiB, Linux",
    "many-small": "eight devices of 1 MiB, Linux",
    "stop-20": "48 MiB, 3072 pages/s",
    "stop-20-ram": "the same, guest memory filled",
    "stop-20-written": "the same, 16 MiB/s of guest memory written",
    "stop-20-limit": "the same, QEMU keeps a limit of 48 MiB/s",
    "stop-70": "192 MiB, 4096 pages/s",
    "stop-40-linux": "128 MiB, 4096 pages/s, Linux",
    "mapped": "48 MiB, mapped",
    "link": "48 MiB over a link of 100 MiB/s",
    "link-written": "the same, guest memory written",
    "link-slow": "32 MiB over a link of 20 MiB/s",
    "migrator": "`vfu-dev migrate`, 16 MiB/s",
    "migrator-slowly": "the same, a limit of 60 ms",
    "migrator-slow": "`vfu-dev migrate`, 4 MiB/s",
    "migrator-fast": "`vfu-dev migrate`, no limit",
    "migrator-idle": "the same, 256 MiB, nothing written",
}


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _ms(seconds: Iterable[float]) -> str:
    return f"{statistics.median(seconds) * 1000:.0f}"


def _close(found: Sequence[Replayed]) -> str:
    return f"{statistics.fmean(one.close for one in found) * 100:.0f} %"


def _ratios(found: Sequence[Replayed]) -> str:
    """Return quartiles of predicted over measured, of moves that took longer than 5 ms."""
    quarters = statistics.quantiles((one.ratio for one in found if one.measured > 0.005), n=4)
    return " / ".join(f"{ratio:.2f}" for ratio in quarters)


def tables() -> str:
    """Return both tables."""
    found = {name: list(replay(read_moves(MOVES / f"{name}.jsonl.xz"))) for name in MACHINES}
    text = (
        _row(("Machine", "Moves", "Predicted / measured: 25 %, 50 %, 75 %", "Close")) + "|---|---|---|---|\n"
    )
    for name, title in MACHINES.items():
        text += _row((title, str(len(found[name])), _ratios(found[name]), _close(found[name])))
    columns = [f"{title}: predicted, measured ms" for title in MACHINES.values()]
    text += "\n" + _row(("Move", *columns)) + "|---" * (1 + len(columns)) + "|\n"
    for kind, about in ABOUT.items():
        cells = []
        for replayed in found.values():
            these = [one for one in replayed if one.move.kind == kind]
            both = (
                (_ms(one.predicted or 0.0 for one in these), _ms(one.measured for one in these))
                if these
                else ()
            )
            cells.append(", ".join(both) or "-")
        text += _row((about, *cells))
    return text


def with_tables(document: str) -> str:
    """Return `document` with both tables renewed."""
    return renewed(document, COMMAND, tables())


if __name__ == "__main__":
    renew(sys.argv[1:], with_tables)
