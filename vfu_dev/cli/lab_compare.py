"""`vfu-dev lab compare`: two results against each other."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from vfu_dev.cli import EXIT_FAILED
from vfu_dev.cli.output import json_option, write_json
from vfu_dev.cli.params import DecimalType
from vfu_dev.cli.shape import TO_STDOUT, Command


@click.command(
    cls=Command, examples=["vfu-dev lab compare out/before/steady out/after/steady --max-regression 20"]
)
@click.argument("first", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("second", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--metric", "metrics", multiple=True, help="Compare this column of moves.csv; repeatable.")
@click.option(
    "--max-regression",
    type=DecimalType(0),
    metavar="PERCENT",
    help="Exit status 1 when a median of SECOND is worse by more than this, significantly, or is missing.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw both into this file (.png or .svg).",
)
@click.option(
    "--across-machines",
    is_flag=True,
    help="Compare points that different machines made; a difference may be the machines'.",
)
@json_option("Also write the comparison as JSON", any_word=False)
def compare(
    first: Path,
    second: Path,
    metrics: tuple[str, ...],
    max_regression: float | None,
    plot: Path | None,
    across_machines: bool,
    json_path: str | None,
) -> None:
    """Compare two result folders of `vfu-dev lab run`: ratios of percentiles, and whether they differ.

    Ratios are SECOND over FIRST, with a 95 % interval of the medians' ratio (bootstrap). The sets differ
    where the Mann-Whitney U test gives p < 0.05. Points are matched by name. Points that were made on
    different machines are refused, unless --across-machines says otherwise.
    """
    from vfu_dev.series.compare import compare as compare_folders

    found = compare_folders(first, second, metrics, across_machines)
    table = Table(box=None, header_style="bold")
    for heading in (
        "point",
        "metric",
        "first 25/50/95",
        "second 25/50/95",
        "ratio 25/50/95",
        "95 % of median",
    ):
        table.add_column(heading, justify="left" if heading in ("point", "metric") else "right")
    table.add_column("statement")
    for entry in found["entries"]:
        interval = "-" if entry["low"] is None else f"{entry['low']:.2f}..{entry['high']:.2f}"
        ratios = " / ".join("-" if one is None else f"{one:.2f}" for one in entry["ratios"].values())
        sides = (_percentiles(entry[side]) for side in ("first", "second"))
        table.add_row(entry["point"], entry["metric"], *sides, ratios, interval, entry["text"])
    Console(stderr=json_path == TO_STDOUT, width=None if sys.stdout.isatty() else 200).print(table)
    for point, changed in found["settings"].items():
        for key, values in changed.items():
            click.echo(
                f"note: {point}: {key} is {values[0]} in the first, {values[1]} in the second", err=True
            )
    for point, both in found["machines"].items():
        click.echo(f"note: {point}: made by {both[0]}, and by {both[1]}", err=True)
    for side, names in zip((first, second), found["only"], strict=True):
        if names:
            click.echo(f"only in {side}: {', '.join(names)}", err=True)
    if plot is not None:
        from vfu_dev.report.series import write_comparison

        write_comparison(first, second, found, plot)
    write_json(found, json_path)
    if max_regression is not None:
        worse = [e for e in found["entries"] if (e["regression"] or 0) > max_regression]
        for entry in worse:
            where = f"{entry['point']}: {entry['metric']}"
            text = f"{where} is {entry['regression']:.0f} % worse, {max_regression:g} % allowed"
            click.echo(f"REGRESSION: {text}", err=True)
        for text in found["missing"]:
            click.echo(f"MISSING: {text}", err=True)
        if worse or found["missing"]:
            sys.exit(EXIT_FAILED)


def _percentiles(figures: Mapping[str, Any]) -> str:
    return " / ".join(f"{figures[name]:.4g}" for name in ("p25", "p50", "p95"))
