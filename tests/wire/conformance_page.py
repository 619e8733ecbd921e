"""The table of docs/conformance.md: written from the files of `vfu-dev check --json`, and read by a test.

    python tests/wire/conformance_page.py "vfu-dev serve=ours.json" "QEMU 10.2.2=qemu.json" ...

Servers that are not named keep their column.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from vfu_dev.conformance import CHECKS, choose

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
WORDS = {"pass": "yes", "fail": "**no**", "skip": "-"}
_TABLE = re.compile(r"(?<=<!-- table -->\n).*(?=<!-- end of table -->)", re.DOTALL)


def columns(text: str) -> dict[str, dict[str, str]]:
    """Return what the page says: server -> check -> one of WORDS."""
    found = _TABLE.search(text)
    assert found, "the page has no table"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found[0].splitlines()]
    if not rows:
        return {}
    servers = rows[0][2:]
    return {server: {row[0].strip("`"): row[2 + at] for row in rows[2:]} for at, server in enumerate(servers)}


def statuses(path: Path) -> dict[str, str]:
    """Return check -> one of WORDS of a file."""
    return {one["name"]: WORDS[one["status"]] for one in json.loads(path.read_text())["checks"]}


def table(found: dict[str, dict[str, str]]) -> str:
    """Return the table of all checks, in the order in which they run."""
    lines = [f"| Check | Level | {' | '.join(found)} |", "|---" * (2 + len(found)) + "|"]
    for check in choose([], []):
        cells = [column.get(check.name, "?") for column in found.values()]
        lines.append(f"| `{check.name}` | {CHECKS[check.name].level.value} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Bring the page up to date."""
    text = PAGE.read_text()
    found = columns(text)
    for argument in sys.argv[1:]:
        server, _, path = argument.partition("=")
        found[server] = statuses(Path(path))
    PAGE.write_text(_TABLE.sub(lambda _: table(found), text))


if __name__ == "__main__":
    main()
