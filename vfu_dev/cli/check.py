"""`vfu-dev check SOCKET`: does any vfio-user server keep to the specification?"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vfu_dev.cli import EXIT_FAILED
from vfu_dev.cli.output import json_option, possible, show_or_write, write_json, write_text
from vfu_dev.cli.params import SECONDS, SIZE
from vfu_dev.cli.shape import TO_STDOUT, Command
from vfu_dev.logs import SlowWork
from vfu_dev.socket_paths import device_path

if TYPE_CHECKING:
    from vfu_dev.conformance import Check, Result


@click.command(
    cls=Command,
    examples=[
        "vfu-dev check /tmp/vfu.sock",
        "vfu-dev check /tmp/vfu.sock --only states --only stream --junit check.xml",
        "vfu-dev check /tmp/dev.sock --tap - -- ./my-server --socket /tmp/dev.sock",
    ],
)
@click.argument("socket", type=click.Path(), required=False)
@click.argument("server", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND ARG...]")
@click.option(
    "--list", "show_list", is_flag=True, help="List the checks, with their sentences; no server needed."
)
@click.option(
    "--only", multiple=True, metavar="NAME", help="Run only this check, group or pattern; repeatable."
)
@click.option("--skip", multiple=True, metavar="NAME", help="Skip this check, group or pattern; repeatable.")
@click.option(
    "--timeout",
    type=SECONDS,
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long one check may take.",
)
@click.option(
    "--max-state",
    type=SIZE,
    default="256M",
    show_default=True,
    help="Skip the checks that move the state of a device when it is larger than this.",
)
@click.option("--quiet", is_flag=True, help="Show only what failed.")
@json_option("Write the results as JSON", any_word=False)
@click.option(
    "--tap",
    metavar="FILE",
    callback=possible,
    help="Write them as TAP version 14 to this file; - is standard output.",
)
@click.option(
    "--junit",
    metavar="FILE",
    callback=possible,
    help="Write them as JUnit's XML to this file; - is standard output.",
)
def command(
    socket: str | None,
    server: tuple[str, ...],
    show_list: bool,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    timeout: float,
    max_state: int,
    quiet: bool,
    json_path: str | None,
    tap: str | None,
    junit: str | None,
) -> None:
    """Check the vfio-user server on SOCKET, this project's or anybody's, against the specification.

    Every check cites its sentence of the vfio-user specification or of <linux/vfio.h>, and
    is a must, a should or optional. Exit status 1 if a must fails. A server without DMA or without migration
    is checked for the rest. The checks use the device: they reset it, stop it, read its state and write it
    back. Detach any client first.

    For a server that ends with its client, give its COMMAND: the command starts it, and restarts it whenever
    it has ended.
    """
    from vfu_dev.conformance import choose, report, run

    chosen = choose(only, skip)
    if show_list:
        _list(chosen, json_path)
        return
    if socket is None:
        raise click.UsageError("Missing argument 'SOCKET' (or --list)")
    if [json_path, tap, junit].count(TO_STDOUT) > 1:
        raise click.UsageError("only one of --json, --tap and --junit can go to standard output")
    path = device_path(socket)
    to_people = TO_STDOUT not in (json_path, tap, junit)
    results: list[Result] = []
    work = SlowWork("checks", len(chosen), lambda text: None if quiet else click.echo(text, err=True))
    for result in run(Path(path), chosen, command=server, timeout_seconds=timeout, max_state_bytes=max_state):
        results.append(result)
        if to_people and (not quiet or result.status == "fail"):
            click.echo(report.line(result))
        elif not to_people:
            work.add(1)
    about = {"socket": str(path), "command": list(server) or None}
    write_json(report.as_json(results, about), json_path)
    write_text("--tap", report.as_tap(results), tap)
    write_text("--junit", report.as_junit(results), junit)
    click.echo(f"{path}: {report.summary(results)}", err=not to_people)
    if any(result.broken for result in results):
        sys.exit(EXIT_FAILED)


def _list(chosen: list[Check], json_path: str | None) -> None:
    """Show the checks that `--only` and `--skip` leave."""
    value = {
        "kind": "checks",
        "checks": [
            {
                "name": one.name,
                "group": one.group,
                "level": one.level.value,
                "about": one.about,
                "source": asdict(one.source),
            }
            for one in chosen
        ],
    }

    def text() -> str:
        lines = []
        for one in chosen:
            lines.append(f"{one.group:10} {one.level.value:8} {one.name}: {one.about}")
            lines.append(f"{'':20}{one.source.document}, {one.source.section}: “{one.source.quote}”")
        return "\n".join(lines)

    show_or_write(value, json_path, text)
