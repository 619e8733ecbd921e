"""`vfu-dev hostile --socket S [--lie NAME]`: a server that lies, to try a client against."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vfu_dev.cli.output import json_option, show_or_write, write_json
from vfu_dev.cli.params import SECONDS, NumberType
from vfu_dev.cli.shape import TO_STDOUT, Command
from vfu_dev.errors import ConfigError, VfuDevError
from vfu_dev.server.sockets import OwnedPath, claim_socket_path

if TYPE_CHECKING:
    from vfu_dev.hostile import Encounter, Lie, Server

PHASES = ("attach", "run", "save", "resume")


@click.command(
    cls=Command,
    examples=[
        "vfu-dev hostile --list --phase attach",
        "vfu-dev hostile --socket /tmp/liar.sock --lie region-argsz-huge",
        "vfu-dev hostile --socket /tmp/liar.sock --phase attach --json encounters.json",
    ],
)
@click.option("--socket", "path", type=click.Path(), metavar="PATH", help="Where to listen.")
@click.option("--lie", "name", metavar="NAME", help="The one lie to tell, to every client.")
@click.option(
    "--honest", is_flag=True, help="Tell no lie, to see what the client does with an honest server."
)
@click.option("--phase", type=click.Choice(PHASES), help="Only the lies of this phase; see --list.")
@click.option("--list", "show_list", is_flag=True, help="List the lies: name, phase, meaning.")
@click.option("--names", is_flag=True, help="With --list: only names.")
@click.option(
    "--after",
    type=NumberType(low=0),
    default=0,
    metavar="N",
    help="Answer the first N requests that the lie applies to with the truth.",
)
@click.option("--times", type=NumberType(low=1), metavar="N", help="Lie N times at most.")
@click.option(
    "--arm-file",
    type=click.Path(),
    metavar="PATH",
    help="Lie only while this file exists, so a script can say when.",
)
@click.option(
    "--delay-seconds",
    type=SECONDS,
    default=6.0,
    show_default=True,
    help="Delay of late replies; QEMU waits 5 s for a reply.",
)
@click.option("--once", is_flag=True, help="End after the first client.")
@click.option("--verbose", is_flag=True, help="Show every message on standard error.")
@json_option("Write what each client did as JSON", any_word=False)
def command(
    path: str | None,
    name: str | None,
    honest: bool,
    phase: str | None,
    show_list: bool,
    names: bool,
    after: int,
    times: int | None,
    arm_file: str | None,
    delay_seconds: float,
    once: bool,
    verbose: bool,
    json_path: str | None,
) -> None:
    """Serve a small PCI device that breaks the protocol in one named way, and say what the client did.

    With `--lie` every client gets that lie. Without, each client gets the next lie of the list, and the
    server ends after the last. A lie changes one kind of reply; all other replies are honest, so the client
    reacts to the lie. The phase of a lie says what a client has to do to get it: attach (connect and ask for
    infos), run (use BARs and interrupts, map memory, reset), save (migrate away), resume (migrate to here).

    A good client never crashes, never hangs longer than its own limit, and says what was wrong.
    """
    from vfu_dev.hostile import LIES

    chosen = [lie for lie in LIES.values() if phase in (None, lie.phase)]
    if show_list:
        shown = [lie.name if names else f"{lie.name}\t{lie.phase}\t{lie.meaning}" for lie in chosen]
        listed = [{"name": lie.name, "phase": lie.phase, "meaning": lie.meaning} for lie in chosen]
        show_or_write({"kind": "lies", "lies": listed}, json_path, lambda: "\n".join(shown))
        return
    if path is None:
        raise click.UsageError("--socket PATH is missing (or --list)")
    if name is not None and name not in LIES:
        raise ConfigError(f"--lie {name}: there is no such lie (vfu-dev hostile --list)")
    queue: Iterator[Lie | None]
    endless = name is not None or honest
    if endless:
        queue = _forever(None if name is None else LIES[name])
    else:
        queue = iter(chosen)
    settings = {"after": after, "times": times, "arm_file": arm_file}
    met: list[Encounter] = []
    try:
        with _listening(Path(path), json_path == TO_STDOUT) as listener:
            for server in _servers(queue, settings, delay_seconds, verbose):
                met.append(server.encounter)
                client, _ = listener.accept()
                try:
                    with client:
                        server.serve(client)
                finally:
                    _tell(server.encounter, json_path, "" if endless else f" ({len(met)} of {len(chosen)})")
                if once:
                    break
    finally:
        heard = [one for one in met if one.requests]
        write_json({"kind": "hostile", "encounters": [one.as_json() for one in heard]}, json_path)
    if name is None and not honest and not once and json_path != TO_STDOUT:
        told = sum(1 for one in met if one.told)
        click.echo(f"{len(met)} lies, {told} of them told")


def _forever(lie: Lie | None) -> Iterator[Lie | None]:
    while True:
        yield lie


def _servers(
    queue: Iterable[Lie | None], settings: dict[str, Any], delay_seconds: float, verbose: bool
) -> Iterator[Server]:
    from vfu_dev.hostile import Device, Liar, Server

    for lie in queue:
        device = Device()
        device.delay_seconds = delay_seconds
        log = (lambda text: click.echo(text, err=True)) if verbose else None
        yield Server(device, Liar(device, lie, **settings), log)


def _tell(encounter: Encounter, json_path: str | None, far: str) -> None:
    if json_path != TO_STDOUT:
        click.echo(f"{encounter.lie or 'honest'}: {encounter.text()}{far}")


@contextlib.contextmanager
def _listening(path: Path, quiet: bool) -> Iterator[socket.socket]:
    """Listen on `path`, which is removed afterwards, and say so."""
    claim_socket_path(path, "--socket")
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(str(path))
        except OSError as error:
            raise VfuDevError(f"--socket {path}: {error.strerror or error}") from error
        owned = OwnedPath(path)
        listener.listen(4)
        click.echo("ready", err=quiet)
        try:
            yield listener
        finally:
            owned.remove()
