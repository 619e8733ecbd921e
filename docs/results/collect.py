"""Copy results of `vfu-dev lab run` into the documentation: python docs/results/collect.py FOLDER.

FOLDER is the run's --out. Scenarios, tables, pictures and CSV files are copied beside this file, and
docs/results.md and docs/scale.md are written again.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from vfu_dev.machine import anonymous
from vfu_dev.report.series import markdown
from vfu_dev.series.rows import read_rows, write_rows
from vfu_dev.series.scenario import read_scenario, shipped
from vfu_dev.series.summary import read_summary

HERE = Path(__file__).resolve().parent
HEADING = "# Results of the shipped scenarios\n"
SCALE_HEADING = "# Scale: what more devices, and larger ones, cost\n"
# The order of the page.
ORDER = [
    "idle",
    "steady",
    "hotset",
    "bursty",
    "precopy",
    "switchover-ack",
    "devices",
    "many-small",
    "one-large",
]
ORDER += ["non-convergent", "rescued"]
SCALE_ORDER = ["scale-devices", "scale-trapped", "scale-mapped", "scale-sparse"]


def take(folder: Path) -> None:
    """Copy one scenario's result."""
    target = HERE / folder.name
    target.mkdir(exist_ok=True)
    shutil.copy(folder / "scenario.toml", target)
    names: dict[str, str] = {}
    summary = anonymous(read_summary(folder), names)
    (target / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (target / "table.md").write_text(markdown(summary))
    rows = read_rows(folder / "moves.csv")
    write_rows(
        target / "moves.csv", (replace(row, machine=names.get(row.machine, row.machine)) for row in rows)
    )
    for picture in ("downtime.png", "sweep.png", "scale.png"):
        (target / picture).unlink(missing_ok=True)
        if picture in shown(folder / "plots"):
            shutil.copy(folder / "plots" / picture, target / picture)


def shown(folder: Path) -> set[str]:
    """Return the pictures there are; over a size that of the sweep says the same once more."""
    there = {path.name for path in folder.glob("*.png")}
    return there - {"sweep.png"} if "scale.png" in there else there


def section(name: str) -> str:
    """Return what the page says about one scenario, as it was when it ran."""
    folder = HERE / name
    scenario = read_scenario(folder / "scenario.toml")
    summary = read_summary(folder)
    changes = "".join(f" --set {key}={value}" for key, value in summary["changes"].items())
    lines = [f"## {scenario.title}", "", scenario.about, "", f"    vfu-dev lab run {name}{changes}", ""]
    lines += [(folder / "table.md").read_text().strip(), ""]
    if summary["problems"]:
        lines += [*(f"- PROBLEM: {text}" for text in summary["problems"]), ""]
    for picture, what in (
        ("downtime.png", "downtime and total time of every move"),
        ("sweep.png", "the sweep"),
        ("scale.png", "time, downtime and memory over the size"),
    ):
        if picture in shown(folder):
            lines += [f"![{scenario.title}: {what}](results/{name}/{picture})", ""]
    return "\n".join(lines)


def main() -> None:
    """Take every shipped scenario that the folder has."""
    source = Path(sys.argv[1])
    for name in shipped():
        if (source / name / "summary.json").exists():
            take(source / name)
    for name, text in pages().items():
        (HERE.parent / name).write_text(text)


def pages() -> dict[str, str]:
    """Return the text of each page, by the name of its file in docs."""
    return {
        "results.md": page(HEADING, "intro.md", ORDER),
        "scale.md": page(SCALE_HEADING, "scale-intro.md", SCALE_ORDER),
    }


def page(heading: str, intro: str, order: list[str]) -> str:
    """Return a page of the scenarios in `order` whose results are here."""
    names = [name for name in order if (HERE / name / "summary.json").exists()]
    text = "\n".join([heading, (HERE / intro).read_text().strip(), "", *(section(name) for name in names)])
    return text.rstrip() + "\n"


if __name__ == "__main__":
    main()
