"""`vfu-dev ctl PATH COMMAND`: command a running server over its control socket (docs/control.md)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click

from vfu_dev.cli.load_options import load_of, load_options
from vfu_dev.client.control import ControlClient, ControlError
from vfu_dev.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

# A digest of a large memory on a busy machine takes its time.
DEFAULT_TIMEOUT_SECONDS = 60.0
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@click.group(
    epilog="\b\nExamples:\n"
    "  vfu-dev ctl a.ctl status\n"
    "  vfu-dev ctl a.ctl load --rate 100M --write 4K --seconds 30\n"
    "  vfu-dev ctl a.ctl fault op=mig-read,error=EIO,count=1\n"
    "  vfu-dev ctl a.ctl snapshot --json | jq .memories"
)
@click.argument("path", type=click.Path())
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=DEFAULT_TIMEOUT_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="For the answer.",
)
@click.pass_context
def command(ctx: click.Context, path: str, timeout: float) -> None:
    """Command the server whose control socket is PATH (vfu-dev serve --control PATH).

    Each command prints what the server answers, as text or as JSON; an error is one line and exit status 1.
    """
    ctx.obj = path, timeout


def _subcommand(name: str, **settings: Any) -> Callable[[F], click.Command]:
    """Make a function that returns name and arguments of a control command a subcommand that sends it."""

    def make(function: F) -> click.Command:
        @functools.wraps(function)
        def run(as_json: bool, **arguments: Any) -> None:
            asked, values = function(**arguments)
            path, timeout = click.get_current_context().obj
            result = ask(path, timeout, asked, values)
            if as_json:
                click.echo(json.dumps(result, indent=2))
            elif result is not None:
                for line in as_text(result):
                    click.echo(line)

        with_json = click.option("--json", "as_json", is_flag=True, help="The answer as JSON.")(run)
        made: click.Command = command.command(name, **settings)(with_json)
        return made

    return make


def ask(path: str, timeout: float, name: str, arguments: dict[str, Any]) -> Any:
    """Send one command and return its result.

    Raises:  ControlError: nobody is there, or the server says no.
    """
    try:
        client = ControlClient(path, timeout_seconds=timeout)
    except ControlError as error:
        raise ControlError(f"{error}; is `vfu-dev serve --control {path}` running?") from error
    with client:
        return client.command(name, **arguments)


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
    """Who is served, in which migration state, and what became of migrations and of the load."""
    return "status", {}


@_subcommand("load", epilog="Example: vfu-dev ctl a.ctl load --pattern zipf --rate 5000p --seconds 60")
@load_options
@click.option("--memory", metavar="NAME", help="Which memory.  [default: the first]")
@click.option("--seconds", type=float, help="End it after so long.  [default: never]")
@click.option("--off", is_flag=True, help="End the load.")
def load(
    load_arguments: dict[str, Any], memory: str | None, seconds: float | None, off: bool
) -> tuple[str, dict[str, Any]]:
    """Have the device write to its memory by itself, in place of what it wrote before (docs/load.md).

    `vfu-dev load --control PATH` does the same, watches it and ends it.
    """
    spec = load_of(load_arguments)
    if off == (spec is not None):
        raise ConfigError("load: expected a load (--rate, --pattern, --trace, --spec), or --off")
    if spec is None:
        return "load", {"load": None}
    given = {"memory": memory, "seconds": seconds}
    return "load", {"load": spec.to_dict()} | {key: one for key, one in given.items() if one is not None}


@_subcommand("load-status")
def load_status() -> tuple[str, dict[str, Any]]:
    """What the device's own load was asked for and reaches."""
    return "load-status", {}


@_subcommand("digest")
def digest() -> tuple[str, dict[str, Any]]:
    """One checksum of all state. `stable` says whether it changed meanwhile."""
    return "digest", {}


@_subcommand("snapshot")
def snapshot() -> tuple[str, dict[str, Any]]:
    """A checksum for each memory and each block of state, and what the registers hold."""
    return "snapshot", {}


@_subcommand("fault", epilog="Example: vfu-dev ctl a.ctl fault op=mig-write,delay=1.5,when=initial-loaded")
@click.argument("fault", required=False)
@click.option("--clear", metavar="ID|all", help="Take a fault away.")
def fault(fault: str | None, clear: str | None) -> tuple[str, dict[str, Any]]:
    """Arm a fault, or take one away; docs/faults.md says what there is."""
    if (fault is None) == (clear is None):
        raise ConfigError("fault: expected a fault, or --clear with its number or `all`")
    if fault is not None:
        return "fault", {"fault": fault}
    return "fault", {"clear": int(clear) if clear and clear.isdigit() else clear}


@_subcommand("faults")
def faults() -> tuple[str, dict[str, Any]]:
    """The faults that are armed, and how often each struck."""
    return "faults", {}


@_subcommand("reinit")
@click.option("--pages", type=int, help="How many, from the start.  [default: all]")
@click.option("--memory", metavar="NAME", help="Which memory.  [default: the first]")
def reinit(pages: int | None, memory: str | None) -> tuple[str, dict[str, Any]]:
    """Make pages initial data once more (VFIO_PRECOPY_INFO_REINIT), as if the device was set up anew."""
    given = {"pages": pages, "memory": memory}
    return "reinit", {key: value for key, value in given.items() if value is not None}


@_subcommand("log-level")
@click.argument("level", type=click.Choice(LOG_LEVELS, case_sensitive=False))
def log_level(level: str) -> tuple[str, dict[str, Any]]:
    """How much the server logs."""
    return "log-level", {"level": level.upper()}


@_subcommand("dma-log")
@click.argument("enabled", type=click.Choice(["on", "off"]))
def dma_log(enabled: str) -> tuple[str, dict[str, Any]]:
    """off: DMA escapes its dirty logging, to see that a test of the logging fails."""
    return "dma-log", {"enabled": enabled == "on"}


@_subcommand("figures")
@click.option("--after", type=int, default=0, help="The number of the last sample known.")
def figures(after: int) -> tuple[str, dict[str, Any]]:
    """Everything the metrics show, and the samples of a migration."""
    return "figures", {"after": after}


@_subcommand("quit")
def quit_server() -> tuple[str, dict[str, Any]]:
    """End the server as SIGTERM does: sockets removed, exit status 0."""
    return "quit", {}


@_subcommand("send")
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
