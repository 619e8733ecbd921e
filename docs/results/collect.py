"""Copy results of `vfu-dev lab run` into the documentation: python docs/results/collect.py FOLDER.

FOLDER is the run's --out. Tables, pictures and CSV files are copied beside this file, and
docs/results.md and docs/scale.md are written again.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

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
KEPT = ("scenario.toml", "summary.json", "moves.csv", "table.md")


def take(folder: Path) -> None:
    """Copy one scenario's result."""
    target = HERE / folder.name
    target.mkdir(exist_ok=True)
    for name in KEPT:
        shutil.copy(folder / name, target / name)
    for picture in ("downtime.png", "sweep.png", "scale.png"):
        (target / picture).unlink(missing_ok=True)
        if picture in shown(folder / "plots"):
            shutil.copy(folder / "plots" / picture, target / picture)


def shown(folder: Path) -> set[str]:
    """Return the pictures there are; over a size that of the sweep says the same once more."""
    there = {path.name for path in folder.glob("*.png")}
    return there - {"sweep.png"} if "scale.png" in there else there


def section(name: str) -> str:
    """Return what the page says about one scenario."""
    folder, scenario = HERE / name, read_scenario(name)
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
    write_page("results.md", HEADING, "intro.md", ORDER)
    write_page("scale.md", SCALE_HEADING, "scale-intro.md", SCALE_ORDER)


def write_page(page: str, heading: str, intro: str, order: list[str]) -> None:
    """Write a page of the scenarios in `order` whose results are here."""
    names = [name for name in order if (HERE / name / "summary.json").exists()]
    text = "\n".join([heading, (HERE / intro).read_text().strip(), "", *(section(name) for name in names)])
    (HERE.parent / page).write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main()
