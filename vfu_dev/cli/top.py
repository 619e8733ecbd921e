"""`vfu-dev top`: watch servers in a terminal."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live

from vfu_dev.cli.output import json_option, write_json
from vfu_dev.cli.params import DecimalType, downtime_limit_option
from vfu_dev.cli.shape import Command
from vfu_dev.errors import VfuDevError
from vfu_dev.top import Keys, Watched, refresh_all, render

DUMB_WIDTH = 110  # nobody says how wide it is


@click.command(
    cls=Command,
    examples=["vfu-dev top /run/vfu-dev/*.sock", "vfu-dev top --once --json /run/vfu-dev/a.sock"],
    context_settings={"show_default": True},
)
@click.argument(
    "paths", metavar="SOCKET...", nargs=-1, required=True, type=click.Path(path_type=Path, exists=False)
)
@click.option(
    "--interval",
    default=0.5,
    type=DecimalType(0.1, 3600),
    metavar="SECONDS",
    help="Seconds between two refreshes.",
)
@click.option(
    "--once", is_flag=True, help="Show the figures once and end; fails if a server does not answer."
)
@downtime_limit_option(
    "The client's downtime limit, which a device does not know: predictions above it are highlighted."
)
@json_option("Write one JSON object per refresh instead of a picture,", any_word=False)
def command(
    paths: tuple[Path, ...], interval: float, once: bool, downtime_limit: float, json_path: str | None
) -> None:
    """Show state, rates and predicted downtime of one or more servers; q quits.

    SOCKET is a server's vfio-user socket or its control socket. For a vfio-user socket the
    control socket is looked for beside it, as SOCKET.ctl and with the suffix .ctl.
    """
    watched = [Watched(path) for path in paths]
    # Both ends are wanted ends: no traceback, and the terminal as it was.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if once:
            _once(watched, downtime_limit / 1000, json_path)
        elif json_path is not None:
            _lines(watched, interval, json_path)
        else:
            _pictures(watched, interval, downtime_limit / 1000)
    except KeyboardInterrupt:
        pass
    finally:
        for one in watched:
            one.close()


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _write_json(watched: Sequence[Watched], path: str, append: bool = False) -> None:
    write_json({"devices": [one.as_dict() for one in watched]}, path, indent=None, append=append)


def _console() -> Console:
    console = Console()
    return Console(width=DUMB_WIDTH) if console.is_dumb_terminal or not console.is_terminal else console


def _once(watched: Sequence[Watched], limit_seconds: float, json_path: str | None) -> None:
    refresh_all(watched)
    if json_path is not None:
        _write_json(watched, json_path)
    else:
        console = _console()
        console.print(render(watched, console, alone=False, limit_seconds=limit_seconds))
    silent = [one.error for one in watched if one.error is not None]
    if silent:
        raise VfuDevError("; ".join(silent))


def _lines(watched: Sequence[Watched], interval: float, json_path: str) -> None:
    append = False
    with Keys() as keys:
        while True:
            refresh_all(watched)
            _write_json(watched, json_path, append)
            append = True
            if "q" in keys.wait(interval):
                return


def _pictures(watched: Sequence[Watched], interval: float, limit_seconds: float) -> None:
    console = _console()
    if console.is_dumb_terminal or not console.is_terminal:
        with Keys() as keys:
            while True:
                refresh_all(watched)
                console.print(render(watched, console, alone=False, limit_seconds=limit_seconds))
                if "q" in keys.wait(interval):
                    return
    with Keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            refresh_all(watched)
            live.update(render(watched, console, limit_seconds=limit_seconds), refresh=True)
            if "q" in keys.wait(interval):
                return
