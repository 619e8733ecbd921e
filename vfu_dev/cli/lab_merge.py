"""`vfu-dev lab merge`: shards of a run into one result."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from vfu_dev.cli.lab_run import end_with, force_option, out_option, show_result
from vfu_dev.cli.output import json_option
from vfu_dev.cli.shape import Command
from vfu_dev.errors import ConfigError, LabError


@click.command(
    cls=Command,
    examples=[
        "vfu-dev lab merge out/shard-1 out/shard-2 --out out/series",
        "vfu-dev lab merge shards/* --out out/series --json out.json",
    ],
)
@click.argument(
    "parts", metavar="PART...", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@out_option
@force_option
@json_option("Also write the summaries as JSON", any_word=False)
def merge(parts: tuple[Path, ...], out: Path, force: bool, json_path: str | None) -> None:
    """Join the results of `vfu-dev lab run --shard I/N`, made on one machine or many, into one.

    PART is the --out of a shard, or a scenario's folder in it. The result is what one `lab run` would have
    left; each move says which machine made it. Parts of other settings, of other versions of vfu-dev, QEMU or
    Python, and a point that was made twice are refused.

    While points are missing the exit status is 1; what is there is kept. A further merge into the same folder
    adds the missing parts. With all points, the status is that of `lab run`.
    """
    # Imported here: `--help` must not pay for numpy.
    from vfu_dev.series.merge import find_parts
    from vfu_dev.series.merge import merge as merge_parts

    if not parts:
        raise ConfigError("which parts? The folders that `lab run --shard I/N --out FOLDER` wrote")
    found = find_parts(parts)
    summaries, failed = [], False
    for name, folders in found.items():
        try:
            command = ["vfu-dev", *sys.argv[1:]]
            summaries.append(merge_parts(folders, out / name, force=force, command=command))
        except LabError as error:
            if len(found) == 1:
                raise
            click.echo(f"PROBLEM: {name}: {error}", err=True)
            failed = True
            continue
        show_result(summaries[-1], out / name)
    end_with(summaries, failed, json_path)
