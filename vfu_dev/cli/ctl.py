"""`vfu-dev ctl PATH COMMAND`: command a running server over its control socket (docs/control.md)."""

from __future__ import annotations

import copy
import functools
import json
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, TypeVar

import click

from vfu_dev.cli.load_options import load_of, load_options
from vfu_dev.cli.output import json_option, show_or_write
from vfu_dev.cli.params import LEVEL, NUMBER, ON_OFF, SECONDS, NumberType, option
from vfu_dev.cli.shape import Command, Group
from vfu_dev.client.control import ControlClient, ControlError
from vfu_dev.errors import ConfigError
from vfu_dev.socket_paths import control_path

F = TypeVar("F", bound=Callable[..., Any])

# A digest of a large memory on a busy machine takes its time.
DEFAULT_TIMEOUT_SECONDS = 60.0


# Seconds until a command that the server has not read causes a hint about possible reasons.
UNREAD_SECONDS = 1.0
# Seconds between two lines that say that the answer is still awaited.
SILENT_SECONDS = 5.0


@click.group(
    cls=Group,
    examples=[
        "vfu-dev ctl a.sock status",
        "vfu-dev ctl a.sock load --dirty-rate 100M --write-size 4K --duration 30",
        "vfu-dev ctl a.sock fault op=mig-read,error=EIO,count=1",
        "vfu-dev ctl a.sock checksums --json | jq .memories",
    ],
)
@click.argument("path", metavar="SOCKET", type=click.Path())
@click.option(
    "--timeout",
    type=SECONDS,
    default=DEFAULT_TIMEOUT_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the answer.",
)
@click.pass_context
def command(ctx: click.Context, path: str, timeout: float) -> None:
    """Command the server of SOCKET: its control socket, or its vfio-user socket with SOCKET.ctl beside it.

    Each command prints the server's answer, as text or as JSON; an error is one line and exit status 1.
    """
    ctx.obj = path, timeout


def _subcommand(
    name: str, example: str = "", text: Callable[[Any], Iterator[str]] | None = None
) -> Callable[[F], click.Command]:
    """Make a function that returns name and arguments of a control command a subcommand that sends it.

    Args: example: what its example has after the command's name.
          text: the lines that show an answer to people; None: a key a line.
    """

    def make(function: F) -> click.Command:
        @functools.wraps(function)
        def run(json_path: str | None, **arguments: Any) -> None:
            asked, values = function(**arguments)
            path, timeout = click.get_current_context().obj
            result = ask(path, timeout, asked, values)
            lines = as_text if text is None else text
            show_or_write(result, json_path, lambda: "" if result is None else "\n".join(lines(result)))

        with_json = json_option("Write the answer as JSON", any_word=False)(run)
        examples = [f"vfu-dev ctl a.sock {name} {example}".rstrip()]
        made: click.Command = command.command(name, cls=Command, examples=examples)(with_json)
        return made

    return make


def ask(path: str, timeout: float, name: str, arguments: dict[str, Any]) -> Any:
    """Send one command and return its result.

    Raises: ControlError: no server is there, or it refused.
    """
    path = str(control_path(path))
    try:
        client = ControlClient(path, timeout_seconds=timeout)
    except ControlError as error:
        raise ControlError(f"{error}; is `vfu-dev serve` running, and not with --control none?") from error
    with client:
        over = threading.Event()
        threading.Thread(target=_explain, args=[client, name, timeout, over], daemon=True).start()
        try:
            return client.command(name, **arguments)
        finally:
            over.set()


def _explain(client: ControlClient, name: str, timeout: float, over: threading.Event) -> None:
    """Say why there is no answer yet, and how long this command waits for it."""
    if over.wait(UNREAD_SECONDS):
        return
    if client.is_unread():
        click.echo(f"{client.path}: the server has not read the command yet; {client.advice}", err=True)
    waited = UNREAD_SECONDS
    while not over.wait(SILENT_SECONDS):
        waited += SILENT_SECONDS
        click.echo(f"{name}: no answer for {waited:.0f} s (--timeout {timeout:g})", err=True)


def as_text(value: Any, indent: str = "") -> Iterator[str]:
    """Yield lines that show a result to people: a key a line, deeper ones indented."""
    items = value.items() if isinstance(value, dict) else (("-", one) for one in value)
    if not isinstance(value, dict | list):
        yield f"{indent}{_plain(value)}"
        return
    for key, one in items:
        label = key if key == "-" else f"{key}:"
        if isinstance(one, dict | list) and one:
            yield f"{indent}{label}"
            yield from as_text(one, indent + "  ")
        else:
            yield f"{indent}{label} {_plain(one)}"


def _plain(value: Any) -> str:
    if value is None or value in ({}, []):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        # Rates are whole enough from a thousand on; exponents are for nobody.
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.6g}"
    return str(value)


@_subcommand("status")
def status() -> tuple[str, dict[str, Any]]:
    """Show who is served, in which migration state, and what became of migrations and of the load."""
    return "status", {}


@_subcommand("load", "--pattern zipf --dirty-rate 5000p --duration 60")
@load_options()
@option(
    "--memory-name",
    "memory",
    aliases=["--memory"],
    metavar="NAME",
    help="Write to the memory of this name.  [default: the first]",
)
@option(
    "--duration",
    "seconds",
    aliases=["--seconds"],
    type=SECONDS,
    metavar="SECONDS",
    help="End the load after this time.  [default: never]",
)
@option("--off", is_flag=True, help="End the load.")
def load(
    load_arguments: dict[str, Any], memory: str | None, seconds: float | None, off: bool
) -> tuple[str, dict[str, Any]]:
    """Have the device write to its own memory; this replaces a load that runs (vfu-dev docs load).

    `vfu-dev load --control SOCKET` starts the same load, watches it and ends it.
    """
    spec = load_of(load_arguments)
    if off == (spec is not None):
        raise ConfigError(
            "load: expected a load (--dirty-rate, --write-rate, --pattern, --trace, --spec), or --off"
        )
    if spec is None:
        return "load", {"load": None}
    given = {"memory": memory, "seconds": seconds}
    return "load", {"load": spec.to_dict()} | {key: one for key, one in given.items() if one is not None}


@_subcommand("load-status")
def load_status() -> tuple[str, dict[str, Any]]:
    """Show the rates asked for and reached by the device's own load."""
    return "load-status", {}


@_subcommand("digest")
def digest() -> tuple[str, dict[str, Any]]:
    """Show one checksum of all state. `stable` says whether it changed meanwhile."""
    return "digest", {}


@_subcommand("checksums")
def checksums() -> tuple[str, dict[str, Any]]:
    """Show a checksum for each memory and each block of state, and what the registers hold."""
    return "checksums", {}


# As it was called until JSON version 1.
_snapshot = copy.copy(checksums)
_snapshot.hidden = True
command.add_command(_snapshot, "snapshot")


@_subcommand("fault", "op=mig-write,delay=1.5,when=initial-received")
@click.argument("fault", required=False)
@click.option("--clear", metavar="ID|all", help="Clear this fault, or all of them.")
def fault(fault: str | None, clear: str | None) -> tuple[str, dict[str, Any]]:
    """Arm a fault, or clear one; `vfu-dev docs faults` lists them."""
    if (fault is None) == (clear is None):
        raise ConfigError("fault: expected a fault, or --clear with its number or `all`")
    if fault is not None:
        return "fault", {"fault": fault}
    return "fault", {"clear": int(clear) if clear and clear.isdigit() else clear}


@_subcommand("faults")
def faults() -> tuple[str, dict[str, Any]]:
    """List the armed faults, with the number of hits of each."""
    return "faults", {}


@_subcommand("reinit", "--pages 100")
@option("--pages", type=NUMBER, help="This number of pages, from the start.  [default: all]")
@option(
    "--memory-name",
    "memory",
    aliases=["--memory"],
    metavar="NAME",
    help="The name of the memory.  [default: the first]",
)
def reinit(pages: int | None, memory: str | None) -> tuple[str, dict[str, Any]]:
    """Make pages initial data once more (VFIO_PRECOPY_INFO_REINIT), as after a new set-up of the device."""
    given = {"pages": pages, "memory": memory}
    return "reinit", {key: value for key, value in given.items() if value is not None}


def _registers_text(trace: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each access, then what a driver should not do."""
    for access in trace["accesses"]:
        when = datetime.fromtimestamp(access["time"]).strftime("%H:%M:%S.%f")
        name = access["register"] or f"{access['offset']:#x} (no register)"
        way = "write" if access["write"] else "read "
        value = f" refused: {access['error']}" if access["error"] else f" {access['value']}"
        times = f"  ({access['count']} times in a row)" if access["count"] > 1 else ""
        yield f"{when}  {way}  BAR{access['bar']} {name}{value}{times}"
    yield f"{trace['accesses_total']} accesses in all"
    for place in trace["unknown"]:
        way = "written" if place["write"] else "read"
        yield (
            f"no register: BAR{place['bar']} {place['offset']:#x}, {place['size']} bytes, {way} "
            f"{place['count']} times"
        )
    yield from (f"the guest spins on {name}" for name in trace["spinning"])


@_subcommand("registers", "--last 20", _registers_text)
@option("--last", type=NumberType(low=0), help="Show this number of accesses.  [default: all kept]")
@option("--clear", is_flag=True, help="Forget them afterwards.")
def registers(last: int | None, clear: bool) -> tuple[str, dict[str, Any]]:
    """Show what a driver did to registers, by name; the server has to be started with --trace-registers."""
    return "registers", {"last": last, "clear": clear}


@_subcommand("log-level", "debug")
@click.argument("level", type=LEVEL)
def log_level(level: str) -> tuple[str, dict[str, Any]]:
    """Set how much the server logs."""
    return "log-level", {"level": level.upper()}


@_subcommand("dma-log", "off")
@click.argument("enabled", type=ON_OFF)
def dma_log(enabled: str) -> tuple[str, dict[str, Any]]:
    """off: arm the fault op=dma-write,unlogged; on: clear it."""
    return "dma-log", {"enabled": enabled == "on"}


dma_log.hidden = True


@_subcommand("figures")
@option("--after", type=NUMBER, default=0, help="Leave out the samples up to this number.")
def figures(after: int) -> tuple[str, dict[str, Any]]:
    """Show the figures behind the metrics, and the samples of a migration."""
    return "figures", {"after": after}


@_subcommand("quit")
def quit_server() -> tuple[str, dict[str, Any]]:
    """End the server as SIGTERM does: sockets removed, exit status 0."""
    return "quit", {}


@_subcommand("send", '\'{"command": "status"}\'')
@click.argument("request")
def send(request: str) -> tuple[str, dict[str, Any]]:
    """Send REQUEST, a JSON object with a `command`, as it is."""
    try:
        values = json.loads(request)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("command"), str):
        raise ConfigError('expected a JSON object with a "command"')
    return values.pop("command"), values
