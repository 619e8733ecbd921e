"""`vfu-dev report FILE.json`: rebuild the page and the pictures of a lab run."""

from __future__ import annotations

from pathlib import Path

import click

from vfu_dev.cli.output import announced
from vfu_dev.cli.shape import Command


@click.command(cls=Command, examples=["vfu-dev report out/lab/report.json --png pictures"])
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the page to this file.  [default: FILE with .html in place of .json]",
)
@click.option(
    "--png",
    type=click.Path(file_okay=False, path_type=Path),
    help="Also write the pictures into this folder.",
)
def command(file: Path, out: Path | None, png: Path | None) -> None:
    """Rebuild the page of a `vfu-dev lab migrate` run from its JSON."""
    # Imported here: `vfu-dev report --help` must not pay for matplotlib.
    from vfu_dev.report.page import blaming, read_report, write_page, write_pictures

    result = read_report(file)
    page = out or file.with_suffix(".html")
    with blaming(file), announced("drawing the report"):
        write_page(result, page)
        click.echo(str(page))
        if png is not None:
            for path in write_pictures(result, png):
                click.echo(str(path))
