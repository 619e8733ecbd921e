"""The table of all keys, in Markdown.

`python -m vfu_dev.profile.table docs/profiles.md` writes it into the page.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from vfu_dev.generated import renew, renewed
from vfu_dev.profile.kinds import Kind, keys_of
from vfu_dev.profile.model import Calls, Profile, Reinit
from vfu_dev.profile.reading import TABLES

COMMAND = "python -m vfu_dev.profile.table"


def _rows(prefix: str, cls: Any) -> Iterable[tuple[str, Kind, bool, str]]:
    for name, key in keys_of(cls).items():
        yield f"{prefix}{name}", key.kind, key.marked, key.about


def table() -> str:
    """Return the table of keys."""
    rows = [("version", "1", False, "of the format"), *_rows("", Profile)]
    for table, cls in TABLES.items():
        rows += _rows(f"{table}.", cls)
        if table in ("reads", "writes"):
            rows += _rows(f"{table}.PHASE.", Calls)
        if table == "writes":
            rows.append(
                ('arcs.SIDE."FROM->TO"', "spread of seconds", True, "how long a change of state takes")
            )
        if table == "loading":
            rows += _rows("reinit.", Reinit)
    lines = ["| Key | Value | Marked | What |", "|---|---|---|---|"]
    lines += [
        f"| `{key}` | {getattr(kind, 'name', kind)} | {'yes' if mark else ''} | {about} |"
        for key, kind, mark, about in rows
    ]
    return "\n".join(lines) + "\n"


def with_table(document: str) -> str:
    """Return `document` with the table between its two markers renewed."""
    return renewed(document, COMMAND, table())


if __name__ == "__main__":
    renew(sys.argv[1:], with_table)
