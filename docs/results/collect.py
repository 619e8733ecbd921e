"""Copy results of `vfu-dev lab run` into the documentation: python docs/results/collect.py FOLDER.

FOLDER is the run's --out. Tables, pictures and CSV files are copied beside this file, and
docs/results.md is written again.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from vfu_dev.series.scenario import read_scenario, shipped
from vfu_dev.series.summary import read_summary

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "results.md"
HEADING = "# Results of the shipped scenarios\n"
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
ORDER += ["scale-devices", "scale-trapped", "scale-mapped", "scale-sparse"]
KEPT = ("scenario.toml", "summary.json", "moves.csv", "table.md")


def take(folder: Path) -> None:
    """Copy one scenario's result."""
    target = HERE / folder.name
    target.mkdir(exist_ok=True)
    for name in KEPT:
        shutil.copy(folder / name, target / name)
    for picture in ("downtime.png", "sweep.png", "scale.png"):
        (target / picture).unlink(missing_ok=True)
        if (folder / "plots" / picture).exists():
            shutil.copy(folder / "plots" / picture, target / picture)


def section(name: str) -> str:
    """Return what the page says about one scenario."""
    folder, scenario = HERE / name, read_scenario(name)
    summary = read_summary(folder)
    changes = "".join(f" --set {key}={value}" for key, value in summary["changes"].items())
    lines = [f"## {scenario.title}", "", scenario.about, "", f"    vfu-dev lab run {name}{changes}", ""]
    lines += [(folder / "table.md").read_text().strip(), ""]
    lines += [f"PROBLEM: {text}" for text in summary["problems"]]
    for picture, what in (
        ("downtime.png", "downtime and total time of every move"),
        ("sweep.png", "the sweep"),
        ("scale.png", "time, downtime and memory over the size"),
    ):
        if (folder / picture).exists():
            lines += [f"![{scenario.title}: {what}](results/{name}/{picture})", ""]
    return "\n".join(lines)


def main() -> None:
    """Take every shipped scenario that the folder has."""
    source = Path(sys.argv[1])
    for name in shipped():
        if (source / name / "summary.json").exists():
            take(source / name)
    names = [name for name in ORDER if (HERE / name / "summary.json").exists()]
    intro = (HERE / "intro.md").read_text().strip()
    PAGE.write_text("\n".join([HEADING, intro, "", *(section(name) for name in names)]).rstrip() + "\n")


if __name__ == "__main__":
    main()
