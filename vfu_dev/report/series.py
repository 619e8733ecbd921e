"""The results of `vfu-dev lab run` as tables, pictures and one page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vfu_dev.machine import describe_machine
from vfu_dev.report.distributions import comparison_figure, course_figure, downtime_figure, sweep_figure
from vfu_dev.report.drawing import svg_text, themed, write_png
from vfu_dev.report.scale import memory_lines, scale_figure
from vfu_dev.report.template import render_template
from vfu_dev.series.rows import METRICS, Row, read_rows
from vfu_dev.series.summary import read_summary
from vfu_dev.sizes import format_count, format_size
from vfu_dev.whole import write_whole

NOTHING = "-"
CAPTIONS = {
    "downtime": "Downtime and total time of every completed move, by point",
    "course": "Every move, in order",
    "sweep": "What the sweep changed",
    "scale": "Time, downtime and memory over the size",
}
# Id -> heading, in the order of the page.
PARTS = {
    "checks": "What it must show",
    "percentiles": "Percentiles",
    "pictures": "Pictures",
    "columns": "What the columns are",
    "scenario": "The scenario",
}
# Heading, metric, factor: the columns of every table, each with its 25th, 50th and 95th percentile.
_COLUMNS = (
    ("downtime ms", "downtime_ms"),
    ("device outage ms", "outage_ms"),
    ("predicted ms", "predicted_ms"),
    ("total ms", "total_ms"),
    ("passes", "passes"),
    ("device bytes", "vfio_bytes"),
    ("stop-copy bytes", "stop_copy_bytes"),
)
HEADINGS = ("point", "n", *(heading for heading, _ in _COLUMNS))


def table_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return one row of texts for each point, as `HEADINGS` names them; n counts completed moves."""
    rows = []
    for point in summary["points"]:
        statuses = point["statuses"]
        count = str(statuses.get("completed", 0))
        others = [f"{number} {status}" for status, number in statuses.items() if status != "completed"]
        cells = [_three(point["metrics"].get(metric), METRICS[metric].unit) for _, metric in _COLUMNS]
        rows.append([point["name"], " + ".join([count, *others]), *cells])
    return rows


def _three(figures: Mapping[str, float] | None, unit: str) -> str:
    if not figures:
        return NOTHING
    values = [figures[name] for name in ("p25", "p50", "p95")]
    if unit == "bytes":
        texts = [format_size(value) for value in values]
        return texts[1] if len(set(texts)) == 1 else f"{texts[1]} (95 %: {texts[2]})"
    texts = [f"{value:.0f}" for value in values]
    return " / ".join(texts)


def markdown(summary: Mapping[str, Any]) -> str:
    """Return the table as Markdown, with the notes needed to read it."""
    machine, versions = summary["machine"], summary["versions"]
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    lines += ["| " + " | ".join(row) + " |" for row in table_rows(summary)]
    lines += [
        "",
        "Three figures are the 25th, 50th and 95th percentile of n completed moves of one running VM. "
        f"{machines_text(summary)}; "
        f"QEMU {versions['qemu']}, Linux {machine['kernel']}.",
    ]
    told = [f"{point}, given up: {text}" for point, text in (summary.get("stood") or {}).items()]
    told += comparison_lines(summary) + memory_lines(summary)
    if told or summary["checks"]:
        lines.append("")
    lines += [f"- {line}" for line in told]
    lines += [f"- {'holds' if check['ok'] else 'FAILS'}: {check['text']}" for check in summary["checks"]]
    return "\n".join(lines) + "\n"


def machines_text(summary: Mapping[str, Any]) -> str:
    """Return which machine made the points, and how busy it was; or which machines did, and how many points.

    Results of before November 2026 have the one `machine` alone.
    """
    machines = summary.get("machines") or [summary["machine"]]
    if len(machines) == 1:
        one = machines[0]
        load = one["load_average"][0]
        return f"{one['processor']}, {one['cores']} cores, load average {load:.1f} when it began"
    counts = Counter(point["machine"]["id"] for point in summary["points"])
    texts = (f"{describe_machine(one)}: {format_count(counts[one['id']], 'point')}" for one in machines)
    return f"{len(machines)} machines: {', '.join(texts)}"


def comparison_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each variant against the first, where both were measured."""
    lines = []
    for entry in summary.get("comparisons") or []:
        ratio = entry["ratios"]["p50"]
        if ratio is None:
            continue
        interval = (
            "" if entry["low"] is None else f", 95 % interval {entry['low']:.3g} to {entry['high']:.3g}"
        )
        what = f"{entry['metric']}, {entry['second']} over {entry['first']}"
        lines.append(f"{what}: medians' ratio {ratio:.3g}{interval}; {entry['text']}")
    return lines


def figures_of(summary: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Return matplotlib's figures by name; those without data are left out."""
    figures = {
        "downtime": downtime_figure(summary, rows),
        "course": course_figure(summary, rows),
        "sweep": sweep_figure(summary),
        "scale": scale_figure(summary),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def write_series(folder: Path) -> Path:
    """Write plots/NAME.png and .svg, table.md and report.html into a result folder; return the page's path.

    Raises: ConfigError: there is no result in `folder`.
    """
    summary = read_summary(folder)
    figures = figures_of(summary, read_rows(folder / "moves.csv"))
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    elements = {}
    for name, figure in figures.items():
        elements[name] = svg_text(figure, name)
        write_whole(plots / f"{name}.svg", '<?xml version="1.0" encoding="utf-8"?>\n' + elements[name])
        write_png(figure, plots / f"{name}.png")
    write_whole(folder / "table.md", markdown(summary))
    page = folder / "report.html"
    write_whole(
        page,
        render_template(
            "series.html.j2",
            s=summary,
            machines=machines_text(summary),
            headings=HEADINGS,
            rows=table_rows(summary),
            comparisons=comparison_lines(summary),
            figures={name: themed(svg, CAPTIONS[name]) for name, svg in elements.items()},
            captions=CAPTIONS,
            parts={
                name: text
                for name, text in PARTS.items()
                if (name != "checks" or summary["checks"]) and (name != "pictures" or elements)
            },
            metrics=METRICS,
            toml=(folder / "scenario.toml").read_text(encoding="utf-8"),
        ),
    )
    return page


def write_comparison(first: Path, second: Path, found: Mapping[str, Any], path: Path) -> None:
    """Draw two result folders side by side into `path`, .svg or .png."""
    rows = (read_rows(first / "moves.csv"), read_rows(second / "moves.csv"))
    figure = comparison_figure(found, *rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        write_whole(path, svg_text(figure, "compare"))
    else:
        write_png(figure, path)
