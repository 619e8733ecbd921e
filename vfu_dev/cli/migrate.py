"""`vfu-dev migrate SRC_SOCKET DST_SOCKET`: move a device's state between two servers, without QEMU."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

from vfu_dev.cli import EXIT_FAILED
from vfu_dev.cli.output import json_option, write_json
from vfu_dev.cli.params import (
    ON_OFF,
    SECONDS,
    NumberType,
    downtime_limit_option,
    max_bandwidth_option,
    option,
)
from vfu_dev.cli.shape import TO_STDOUT, Command
from vfu_dev.client import digest
from vfu_dev.client.control import ControlClient
from vfu_dev.client.device import VfioUserDevice
from vfu_dev.client.migrator import ClientOptions, ClientProgress, MigrationError, Migrator
from vfu_dev.errors import VfuDevError
from vfu_dev.logs import SlowWork
from vfu_dev.sizes import format_count, format_left, format_size
from vfu_dev.socket_paths import device_path

PLAIN_SECONDS = 1.0  # between lines where there is no terminal


class Verifier:
    """Compares both ends' digests while both stand still.

    With both control sockets known, the servers' own digests (all memories and registers; nothing is read
    again); else xxh3_64 over the memory BAR, read on both sides through the vfio-user connections. The
    stream's own digests are checked by the destination in any case: RESUMING -> STOP fails otherwise.
    """

    def __init__(
        self,
        method: str,
        source: VfioUserDevice,
        destination: VfioUserDevice,
        controls: tuple[ControlClient | None, ControlClient | None],
        say: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.method = method
        self._say = say
        self.source_digest: str | None = None
        self.destination_digest: str | None = None
        self._devices = source, destination
        self._controls = controls

    @property
    def match(self) -> bool | None:
        """Whether both digests are known and equal; None if nothing was compared."""
        if self.source_digest is None or self.destination_digest is None:
            return None
        return self.source_digest == self.destination_digest

    def __call__(self) -> None:
        """Compare; raises VfuDevError on a difference, so that the destination never runs."""
        source_control, destination_control = self._controls
        if self.method in ("auto", "control") and source_control and destination_control:
            self.source_digest = digest.saved_digest(digest.audited_status(source_control))
            self.destination_digest = digest.resumed_digest(destination_control.status())
        if self.match is None and self.method == "control":
            raise VfuDevError("the control sockets do not report both digests")
        if self.match is None:
            self.method = "memory"
            index = digest.memory_region(self._devices[0])
            total = sum(device.region_info(index).size_bytes for device in self._devices)
            work = SlowWork("reading both memories back", total, self._say)
            self.source_digest, self.destination_digest = (
                digest.memory_digest(device, index, work.add) for device in self._devices
            )
        else:
            self.method = "control"
        if not self.match:
            raise VfuDevError(f"digests differ: {self.source_digest} and {self.destination_digest}")


@contextmanager
def _display(quiet: bool) -> Iterator[Callable[[ClientProgress], None]]:
    """Yield a progress callback: a bar on a terminal, a line a second elsewhere. All of it on stderr."""
    console = Console(stderr=True)
    if quiet:
        yield lambda _: None
        return
    if not console.is_terminal:
        yield _plain_lines()
        return
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("setup", total=None)

        def update(state: ClientProgress) -> None:
            total = state.transferred_bytes + state.remaining_bytes or None
            bar.update(task, description=state.phase, completed=state.transferred_bytes, total=total)

        yield update


def _plain_lines() -> Callable[[ClientProgress], None]:
    phase, last = "", 0.0

    def update(state: ClientProgress) -> None:
        nonlocal phase, last
        now = time.monotonic()
        if state.phase == phase and now - last < PLAIN_SECONDS:
            return
        phase, last = state.phase, now
        sent, left = state.transferred_bytes, state.remaining_bytes
        far = format_left(sent, sent + left, state.transfer_rate) if left else ""
        if state.passes:  # what is left is written meanwhile, so no time is known
            far = f"pass {state.passes + 1}" if left else ""
        click.echo(
            f"{state.total_seconds:7.1f} s  {state.phase:12} "
            f"{format_size(sent):>10} sent, {format_size(left):>10} left, "
            f"transfer rate {format_size(state.transfer_rate)}/s" + (f"; {far}" if far else ""),
            err=True,
        )

    return update


def result_of(
    name: str,
    state: ClientProgress,
    verifier: Verifier | None,
    options: ClientOptions,
    error: MigrationError | None,
) -> dict[str, Any]:
    """Return the JSON that `lab migrate` writes too: one device, plus this command's own times."""
    device = {
        "name": name,
        "digest_source": verifier.source_digest if verifier else None,
        "digest_destination": verifier.destination_digest if verifier else None,
        "digest_match": verifier.match if verifier else None,
        "digest_method": verifier.method if verifier and verifier.match is not None else None,
        "initial_bytes": state.initial_bytes,
        "precopy_bytes": state.precopy_bytes,
        "stop_copy_bytes": state.stop_copy_bytes,
        "passes": state.passes,
    }
    return {
        "status": "failed" if error else "completed",
        "error": error.reason if error else None,
        "phase": state.phase if not error else error.phase,
        "devices": [device],
        "total_ms": round(state.total_seconds * 1000, 3),
        "downtime_ms": round(state.downtime_seconds * 1000, 3),
        "downtime_limit_ms": options.downtime_limit_seconds * 1000,
        "verify_ms": round(state.verify_seconds * 1000, 3),
        "transfer_rate_bytes_per_second": round(state.transfer_rate),
    }


def _name_of(control: ControlClient | None) -> str | None:
    name = control.status().get("name") if control is not None else None
    return name if isinstance(name, str) and name else None


@click.command(
    cls=Command,
    examples=[
        "vfu-dev migrate /tmp/a.sock /tmp/b.sock --json out.json",
        "vfu-dev migrate /tmp/a.sock /tmp/b.sock --max-bandwidth 1Gbit --downtime-limit 50",
    ],
)
@click.argument("src_socket", type=click.Path())
@click.argument("dst_socket", type=click.Path())
@json_option("Also write the result as JSON")
@downtime_limit_option("Downtime limit of the device.")
@max_bandwidth_option("What the migration may send while the device runs.")
@option(
    "--max-passes",
    type=NumberType(low=0),
    default=30,
    show_default=True,
    metavar="N",
    help="Give up when N passes did not converge; 0 never does.",
)
@option("--timeout", type=SECONDS, metavar="SECONDS", help="Give up after this time.  [default: never]")
@option(
    "--pre-copy",
    type=ON_OFF,
    default="on",
    show_default=True,
    help="off: move all data in STOP_COPY.",
)
@option(
    "--control-source",
    aliases=["--src-control"],
    type=click.Path(),
    metavar="SOCKET",
    help="The source's control socket.  [default: SRC_SOCKET.ctl, where there is one]",
)
@option(
    "--control-destination",
    aliases=["--dst-control"],
    type=click.Path(),
    metavar="SOCKET",
    help="The destination's control socket.  [default: DST_SOCKET.ctl, where there is one]",
)
@option(
    "--verify",
    type=click.Choice(["auto", "control", "memory", "none"]),
    default="auto",
    show_default=True,
    help="Where the digests that are compared come from: the servers' control sockets, or memory read back.",
)
@option(
    "--resume-source", is_flag=True, help="Let the source run on afterwards instead of leaving it in STOP."
)
@option("--quiet", is_flag=True, help="Show no progress and no summary.")
def command(
    src_socket: str,
    dst_socket: str,
    json_path: str | None,
    downtime_limit: float,
    max_bandwidth: int,
    max_passes: int,
    timeout: float | None,
    pre_copy: str,
    control_source: str | None,
    control_destination: str | None,
    verify: str,
    resume_source: bool,
    quiet: bool,
) -> None:
    """Move the state of the device on SRC_SOCKET into the device on DST_SOCKET, without QEMU.

    Both servers must be free: a vfio-user server serves one client at a time. If you name the control socket
    SOCKET.ctl, the command takes the device's socket beside it. On any failure the source goes on running.

    The digests of both ends are compared before the destination runs. If both control sockets are known, they
    are the servers' own, taken once the source has compared its memory with what it sent. Otherwise they are
    a checksum over the device memory read back from both; its time is verify_ms, not part of downtime_ms. A
    source left in STOP runs again when this command disconnects: that is its server's rule for a lost client.
    """
    options = ClientOptions(
        downtime_limit_seconds=downtime_limit / 1000,
        max_bandwidth=max_bandwidth or None,
        max_passes=max_passes or None,
        timeout_seconds=timeout,
        pre_copy=pre_copy == "on",
        resume_source=resume_source,
    )
    src_socket, dst_socket = (str(device_path(path)) for path in (src_socket, dst_socket))
    name = Path(src_socket).name
    state = ClientProgress()
    verifier: Verifier | None = None
    error: MigrationError | None = None
    try:
        with ExitStack() as stack:
            source_control, destination_control = (
                _control(stack, path, given)
                for path, given in ((src_socket, control_source), (dst_socket, control_destination))
            )
            name = _name_of(source_control) or name
            source = stack.enter_context(_connect("source", src_socket))
            destination = stack.enter_context(_connect("destination", dst_socket))
            if verify != "none":
                verifier = Verifier(
                    verify,
                    source,
                    destination,
                    (source_control, destination_control),
                    lambda text: None if quiet else click.echo(text, err=True),
                )
            progress = stack.enter_context(_display(quiet))
            migrator = Migrator(source, destination, options, reporter=progress, verify=verifier)
            state = migrator.progress
            migrator.run()
    except MigrationError as failed:
        error = failed
    result = result_of(name, state, verifier, options, error)
    if error is not None:
        with suppress(VfuDevError):  # the migration's error is the one to tell
            write_json(result, json_path)
        raise error
    write_json(result, json_path)
    if not quiet:
        click.echo(_summary(result), err=json_path == TO_STDOUT)
    if verifier is not None and not verifier.match:
        sys.exit(EXIT_FAILED)


def _control(stack: ExitStack, socket: str, given: str | None) -> ControlClient | None:
    try:
        control = digest.find_control(socket, given)
    except VfuDevError as error:
        raise MigrationError("setup", str(error)) from error
    return stack.enter_context(control) if control is not None else None


def _connect(role: str, socket: str) -> VfioUserDevice:
    try:
        return VfioUserDevice.connect(socket)
    except VfuDevError as error:
        raise MigrationError("setup", f"{role} {socket}: {error}") from error


def _summary(result: dict[str, Any]) -> str:
    device = result["devices"][0]
    compared = "not compared"
    if device["digest_match"]:
        compared = f"equal on both ends ({device['digest_source']}, by {device['digest_method']})"
    passes = format_count(device["passes"], "pre-copy pass")
    late = result["downtime_ms"] > result["downtime_limit_ms"]
    why = "; the limit covers the remaining data, and state changes come on top" if late else ""
    return (
        f"{device['name']}: {format_size(device['precopy_bytes'])} in {passes}, "
        f"{format_size(device['stop_copy_bytes'])} in stop-copy\n"
        f"total {result['total_ms']:.0f} ms, measured downtime {result['downtime_ms']:.0f} ms "
        f"(limit {result['downtime_limit_ms']:g} ms{why}), verification {result['verify_ms']:.0f} ms\n"
        f"digest {compared}"
    )
