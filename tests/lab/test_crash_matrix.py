"""The crash matrix: any of the four processes of a move is killed or stopped, at any moment of it.

`make crash-matrix` runs all cells and prints the table; docs/crash-matrix.md is the table as it has to be.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from crashkit import Crash, Seen, crash_options, recorded
from crashtable import CELLS, Cell, in_ci

from vfu_dev.lab.lab import Lab

CHOSEN = [pytest.param(cell, id=cell.slug, marks=[] if in_ci(cell) else pytest.mark.soak) for cell in CELLS]


@pytest.mark.parametrize("cell", CHOSEN)
def test_survivors_say_and_do_what_the_table_says(
    cell: Cell, qemu: Path, library: Path, tmp_path: Path
) -> None:
    """Status, result, counts, QEMU's words and exit, logs; then what they can do, every byte compared."""
    expected = cell.expected
    assert expected is not None

    async def scenario(seen: Seen) -> None:
        async with Lab(crash_options(qemu, library, cell), tmp_path / "logs") as lab:
            await lab.start()
            crash = Crash(lab, cell, tmp_path)
            await crash.reach()
            await crash.strike()
            found = await crash.settle()
            seen.states = list(found.states)
            assert expected.agrees(found), (expected.states, found.states, found.says)
            assert expected.unsaid(found) == [], found.says
            await crash.go_on()
            await crash.leave()
            seen.verdict = "as it should be"

    with recorded(cell) as seen:
        asyncio.run(scenario(seen))
