"""The generated part of docs/qemu-versions.md, from what tests claim.

python tests/versions_page.py docs/qemu-versions.md
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from versionkit import CLAIMS_FILE, FEATURES, ROWS, Cell, Row

from vfu_dev.generated import renew, renewed

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "qemu-versions.md"
COMMAND = "python tests/versions_page.py"
DEFAULT, LONG, ABSENT, MISSING = "test", "long run", "no", "MISSING"

# Who claims a cell: the test without its parameters, and whether it is of the long run.
Claims = dict[Cell, list[tuple[str, bool]]]


def collect() -> Claims:
    """Return what all tests claim, without running any; in a process of its own."""
    files = [str(path) for path in sorted(TESTS.rglob("test_*.py")) if "versionkit" in path.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder, "claims.json")
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "versionkit"]
        path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
        env = os.environ | {CLAIMS_FILE: str(where), "PYTHONPATH": path}
        subprocess.run(
            [*command, "-p", "no:cacheprovider", *files],
            env=env, cwd=TESTS.parent, check=True, capture_output=True,
        )  # fmt: skip
        found = json.loads(where.read_text())
    claims: Claims = {}
    for cell, tests in found.items():
        *row, feature = json.loads(cell)
        claims[Row(*row), feature] = [(test, soak) for test, soak in tests]
    return claims


def render(claims: Claims) -> str:
    """Return the table, why there are cells without a test, and the tests of each feature."""
    head = ["QEMU", "Front end", "IOMMU path", *FEATURES]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [
        f"| {row.qemu} | `{row.front_end}` | {row.iommu or 'its own'} | "
        f"{' | '.join(_cell(claims, row, feature) for feature in FEATURES)} |"
        for row in ROWS
    ]
    lines += ["", "Why there is a `no`:", "", *_reasons()]
    lines += ["", "What each column is, and which tests show it:", ""]
    for feature, meaning in FEATURES.items():
        tests = sorted({test for cell, who in claims.items() if cell[1] == feature for test, _ in who})
        lines.append(f"- **{feature}**: {meaning}.")
        lines += [f"  - `{test}`" for test in tests]
    return "\n".join(lines) + "\n"


def _cell(claims: Claims, row: Row, feature: str) -> str:
    if row.absent(feature):
        return ABSENT
    found = claims.get((row, feature), [])
    if not found:
        return MISSING
    return LONG if all(soak for _, soak in found) else DEFAULT


def _reasons() -> list[str]:
    """Return a line for each reason, with the QEMUs and features that it is about."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in ROWS:
        for feature in FEATURES:
            if reason := row.absent(feature):
                features = found.setdefault((reason, row.front_end), {}).setdefault(row.qemu, [])
                if feature not in features:
                    features.append(feature)
    lines = []
    for (reason, front_end), about in found.items():
        names = next(iter(about.values()))
        which = "" if len(names) == len(FEATURES) else f" ({', '.join(names)})"
        lines.append(f"- `{front_end}` of {', '.join(about)}{which}: {reason}.")
    return lines


def with_table(document: str, claims: Claims) -> str:
    """Return `document` with its generated part renewed."""
    return renewed(document, COMMAND, render(claims))


if __name__ == "__main__":
    renew(sys.argv[1:], lambda page: with_table(page, collect()))
