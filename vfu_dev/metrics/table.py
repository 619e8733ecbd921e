"""The table of all metrics, in Markdown.

`python -m vfu_dev.metrics.table docs/metrics.md` writes it into the page.
"""

from __future__ import annotations

import sys

from vfu_dev.generated import renew, renewed
from vfu_dev.metrics.collector import ALL_METRICS
from vfu_dev.metrics.families import DEVICE_LABEL

COMMAND = "python -m vfu_dev.metrics.table"


def table() -> str:
    """Return the table; `device` is left out of the labels, since every metric has it."""
    lines = [
        f"| Metric | Kind | Labels besides `{DEVICE_LABEL}` | What it is, what a rise means |",
        "|---|---|---|---|",
    ]
    for metric in ALL_METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels) or " "
        text = metric.help.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {text} |")
    return "\n".join(lines) + "\n"


def with_table(document: str) -> str:
    """Return `document` with the table between its two markers renewed."""
    return renewed(document, COMMAND, table())


if __name__ == "__main__":
    renew(sys.argv[1:], with_table)
