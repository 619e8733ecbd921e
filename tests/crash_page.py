"""The generated part of docs/crash-matrix.md, and the run of all cells.

python tests/crash_page.py docs/crash-matrix.md
python tests/crash_page.py run FILE
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from crashtable import BLOWS, CELLS, FOLDER, MOMENTS, STEPS, TABLE, Cell, Outcome

from vfu_dev.generated import renew, renewed

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "crash-matrix.md"
COMMAND = "python tests/crash_page.py"
HEAD = (
    "Moment", "Victim", "Migration", "VM at the source", "VM at the destination",
    "Source's device", "Destination's device", "Then",
)  # fmt: skip
TITLES = {"killed": "Killed (SIGKILL)", "stopped": "Stopped for 14 s (SIGSTOP, SIGCONT)"}


def render(table: dict[tuple[str, str, str], Outcome]) -> str:
    """Return the tables, and what the words of the last column are."""
    lines = []
    for blow in BLOWS:
        lines += [f"### {TITLES[blow]}", "", _row(HEAD), f"|{'---|' * len(HEAD)}"]
        lines += [_line(cell, table) for cell in CELLS if cell.blow == blow]
        lines.append("")
    if whys := [(cell, outcome.why) for cell in CELLS if (outcome := table.get(_key(cell))) and outcome.why]:
        lines += ["### Which of two states it is", ""]
        lines += [f"- **{cell.victim}, {cell.moment}, {cell.blow}**: {why}." for cell, why in whys]
        lines.append("")
    lines += ["### What each does then", ""]
    lines += [f"- **{step}**: {meaning}." for step, meaning in STEPS.items()]
    lines += ["", "### What has to be said, in QEMU's `error-desc` or in a log", ""]
    for text, cells in _said(table).items():
        lines.append(f"- `{text}`: {'; '.join(cells)}.")
    return "\n".join(lines) + "\n"


def with_tables(document: str) -> str:
    """Return `document` with its generated part renewed."""
    return renewed(document, COMMAND, render(TABLE))


def _key(cell: Cell) -> tuple[str, str, str]:
    return cell.victim, cell.moment, cell.blow


def _row(columns: tuple[str, ...]) -> str:
    return f"| {' | '.join(columns)} |"


def _line(cell: Cell, table: dict[tuple[str, str, str], Outcome]) -> str:
    outcome = table.get(_key(cell))
    if outcome is None:
        return _row((cell.moment, cell.victim, *["MISSING"] * (len(HEAD) - 2)))
    return _row((cell.moment, cell.victim, *outcome.states, ", ".join(outcome.then)))


def _said(table: dict[tuple[str, str, str], Outcome]) -> dict[str, list[str]]:
    """Return where each text is said: by blow and victim, the moments."""
    found: dict[str, dict[tuple[str, str], list[str]]] = {}
    for cell in CELLS:
        outcome = table.get(_key(cell))
        for text in outcome.says if outcome else ():
            moments = found.setdefault(text, {}).setdefault((cell.victim, cell.blow), [])
            moments.append(cell.moment)
    return {
        text: [
            f"{victim} {blow} ({'always' if len(moments) == len(MOMENTS) else ', '.join(moments)})"
            for (victim, blow), moments in who.items()
        ]
        for text, who in found.items()
    }


def run(report: Path, arguments: list[str]) -> int:
    """Run all cells; print the table as it was seen, write it as JSON, return pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-m", "", "tests/lab/test_crash_matrix.py", *arguments]
        done = subprocess.run(command, env=os.environ | {FOLDER: folder}, cwd=TESTS.parent, check=False)
        rows = []
        for cell in CELLS:
            file = Path(folder, f"{cell.slug}.json")
            seen = json.loads(file.read_text()) if file.exists() else None
            expected = list(cell.expected.states) if cell.expected else None
            place = {"victim": cell.victim, "moment": cell.moment, "blow": cell.blow}
            rows.append({**place, "expected": expected, "seen": seen})
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps({"kind": "crash-matrix", "version": 1, "cells": rows}, indent=1) + "\n")
    for row in rows:
        if (seen := row["seen"]) is not None:
            words = (row["victim"], row["moment"], row["blow"], seen["verdict"], *seen["states"])
            print("  ".join(f"{word:<{width}}" for word, width in zip(words, WIDTHS, strict=True)).rstrip())
    print(f"{sum(row['seen'] is not None for row in rows)} of {len(CELLS)} cells were run: {report}")
    return done.returncode


# Of the printed columns.
WIDTHS = (18, 9, 7, 8, 9, 10, 13, 44, 44)

if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        sys.exit(run(Path(sys.argv[2]), sys.argv[3:]))
    renew(sys.argv[1:], with_tables)
