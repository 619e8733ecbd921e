"""`vfu-dev lab watch`: a migration between QEMUs that somebody else started."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from vfu_dev.cli import EXIT_FAILED
from vfu_dev.cli.lab_summary import summary
from vfu_dev.cli.output import announced, json_option, write_json
from vfu_dev.cli.params import SECONDS
from vfu_dev.cli.shape import Command
from vfu_dev.workload import Workload

_Command = TypeVar("_Command", bound=Callable[..., Any])
SOCKET = click.Path(path_type=Path)


def _sides(name: str, text: str, **settings: Any) -> Callable[[_Command], _Command]:
    """Return `--NAME-source` and `--NAME-destination`; both are required, for there is no default."""
    settings |= {"required": True, "type": SOCKET, "metavar": "SOCKET"}

    def add(command: _Command) -> _Command:
        for side in ("destination", "source"):
            option = click.option(f"--{name}-{side}", help=f"{text} {side}.", **settings)
            command = option(command)
        return command

    return add


@click.command(
    cls=Command,
    examples=[
        "vfu-dev lab watch --qmp-source a.qmp --qmp-destination b.qmp --control-source a.sock.ctl "
        "--control-destination b.sock.ctl --migrate tcp:b:4444",
    ],
)
@_sides("qmp", "The monitor (-qmp unix:PATH,server=on,wait=off) of the QEMU at the")
@_sides("control", "A device's control socket; repeatable, in one order on both sides. Of the", multiple=True)
@click.option(
    "--migrate",
    "uri",
    metavar="URI",
    help="Begin the migration, to this address. The destination listens there, or was started with "
    "-incoming defer.  [default: wait until somebody begins it]",
)
@click.option(
    "--timeout",
    type=SECONDS,
    default=180.0,
    show_default=True,
    metavar="SECONDS",
    help="Time to wait for its beginning, and for its end; a migration begun here is cancelled then.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out/watch"),
    show_default=True,
    help="Folder for report.json, report.html and metrics.prom.",
)
@json_option("Also write the figures as JSON")
@click.option("--quiet", is_flag=True, help="Show no progress, only the summary.")
def watch(
    qmp_source: Path,
    qmp_destination: Path,
    control_source: tuple[Path, ...],
    control_destination: tuple[Path, ...],
    uri: str | None,
    timeout: float,
    out: Path,
    json_path: str | None,
    quiet: bool,
) -> None:
    """Watch a migration between QEMUs that somebody else started, and report on it as `lab migrate` does.

    Nothing else may use these monitors meanwhile; give a QEMU that libvirt started one more monitor. `ssh -L`
    brings sockets of another host here. The hosts' clocks are compared by events of the migration.
    """
    # Imported here: `vfu-dev lab --help` must not pay for matplotlib and QMP.
    from vfu_dev.lab.progress import Progress
    from vfu_dev.lab.watch import WatchOptions
    from vfu_dev.lab.watch import watch as run_watch
    from vfu_dev.report.last_downtime import write_last_downtime
    from vfu_dev.report.page import write_report

    options = WatchOptions(
        qmp_source, qmp_destination, control_source, control_destination, uri, timeout_seconds=timeout
    )
    with Progress(Console(stderr=True), quiet) as progress:
        result = asyncio.run(run_watch(options, ["vfu-dev", *sys.argv[1:]], progress))
    found = result.to_json()
    click.echo("\n".join(summary(found, Workload("idle"))), err=True)
    write_json(found, json_path)
    result.write(out / "report.json")
    write_last_downtime(found, out)
    with announced("drawing the report"):
        page = write_report(found, out)
    click.echo(f"report: {page}", err=True)
    if result.problems:
        sys.exit(EXIT_FAILED)
