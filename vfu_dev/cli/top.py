"""`vfu-dev top`: watch servers in a terminal."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live

from vfu_dev.errors import VfuDevError
from vfu_dev.top import Keys, Watched, refresh_all, render

DUMB_WIDTH = 110  # nobody says how wide it is


@click.command(epilog="Example: vfu-dev top /run/vfu-dev/*.ctl", context_settings={"show_default": True})
@click.argument(
    "paths", metavar="CONTROL...", nargs=-1, required=True, type=click.Path(path_type=Path, exists=False)
)
@click.option("--interval", default=0.5, type=click.FloatRange(0.1, 3600), help="Seconds between two looks.")
@click.option(
    "--once", is_flag=True, help="Show the figures once and end; fails if a server does not answer."
)
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a picture, a line a look.")
def command(paths: tuple[Path, ...], interval: float, once: bool, as_json: bool) -> None:
    """Show state, rates and predicted downtime of one or more servers; q quits.

    CONTROL is a server's control socket; its vfio-user socket will do when the control socket lies beside
    it as SOCKET.ctl, or with the suffix .ctl.
    """
    watched = [Watched(path) for path in paths]
    # Both ends are wanted ends: no traceback, and the terminal as it was.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if once:
            _once(watched, as_json)
        elif as_json:
            _lines(watched, interval)
        else:
            _pictures(watched, interval)
    except KeyboardInterrupt:
        pass
    finally:
        for one in watched:
            one.close()


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _print_json(watched: Sequence[Watched]) -> None:
    click.echo(json.dumps({"devices": [one.as_dict() for one in watched]}))


def _console() -> Console:
    console = Console()
    return Console(width=DUMB_WIDTH) if console.is_dumb_terminal or not console.is_terminal else console


def _once(watched: Sequence[Watched], as_json: bool) -> None:
    refresh_all(watched)
    if as_json:
        _print_json(watched)
    else:
        console = _console()
        console.print(render(watched, console, alone=False))
    silent = [one.error for one in watched if one.error is not None]
    if silent:
        raise VfuDevError("; ".join(silent))


def _lines(watched: Sequence[Watched], interval: float) -> None:
    with Keys() as keys:
        while True:
            refresh_all(watched)
            _print_json(watched)
            if "q" in keys.wait(interval):
                return


def _pictures(watched: Sequence[Watched], interval: float) -> None:
    console = _console()
    if console.is_dumb_terminal or not console.is_terminal:
        with Keys() as keys:
            while True:
                refresh_all(watched)
                console.print(render(watched, console, alone=False))
                if "q" in keys.wait(interval):
                    return
    with Keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            refresh_all(watched)
            live.update(render(watched, console), refresh=True)
            if "q" in keys.wait(interval):
                return
