"""`vfu-dev load`: write to a device at a rate: inside it, from a guest, or as a vfio-user client."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vfu_dev.cli import EXIT_FAILED, EXIT_LESS
from vfu_dev.cli.load_options import load_of, load_options
from vfu_dev.cli.output import json_option, write_json
from vfu_dev.cli.own_device import own_device_of, own_device_option
from vfu_dev.cli.params import (
    SECONDS_OR_ZERO,
    SIZE,
    NumberType,
    downtime_limit_option,
    max_bandwidth_option,
    option,
)
from vfu_dev.cli.shape import TO_STDOUT, Command
from vfu_dev.client.control import ControlClient
from vfu_dev.client.device import VfioUserDevice
from vfu_dev.client.migrator import ClientOptions, MigrationError
from vfu_dev.client.moving import keep_writing, migrate
from vfu_dev.client.stop import Stop
from vfu_dev.client.workload import ClientWorkload
from vfu_dev.errors import ConfigError, VfuDevError
from vfu_dev.model.presets import PRESETS
from vfu_dev.sizes import format_count, format_size
from vfu_dev.socket_paths import control_path, device_path
from vfu_dev.workload import Workload, WorkloadFigures

if TYPE_CHECKING:
    from vfu_dev.lab.rehearsal import Rehearsal

LINE_SECONDS = 1.0


@dataclass
class _Place:
    """Where the load is made, and what belongs to it."""

    control: str | None
    socket: str | None
    guest: str | None
    memory: str | None
    bar: int | None
    access: str
    via: str
    check: bool
    migrate_to: str | None
    migrate_after: float
    options: ClientOptions

    @property
    def name(self) -> str | None:
        """`device`, `client`, `guest`, or None when it is none of them."""
        named = {"device": self.control, "client": self.socket, "guest": self.guest}
        return next((place for place, path in named.items() if path is not None), None)


class _Lines:
    """One line a second on standard error: the rates reached."""

    def __init__(self, spec: Workload, quiet: bool) -> None:
        self._spec, self._quiet = spec, quiet
        self._last = time.monotonic()

    def __call__(self, figures: WorkloadFigures) -> None:
        now = time.monotonic()
        if self._quiet or now - self._last < LINE_SECONDS:
            return
        self._last = now
        behind = "" if figures.keeps_up else f", {figures.missed_writes} writes missed"
        asked, recent = figures.asked_rate_bytes, figures.recent_rate_bytes
        rates = self._spec.reached_text({"asked_rate_bytes": asked, "reached_rate_bytes": recent})
        click.echo(
            f"{figures.seconds:7.1f} s  {rates}, "
            f"{figures.writes / max(figures.seconds, 1e-9):.0f} writes/s{behind}",
            err=True,
        )


@click.command(
    cls=Command,
    examples=[
        "vfu-dev load --control a.sock --dirty-rate 100M --write-size 4K --duration 10",
        "vfu-dev load --socket a.sock --dirty-rate 2000p --pattern hotset --migrate-to b.sock --check",
        "vfu-dev load --guest vm.line --dirty-rate 500p --via dma",
        "vfu-dev load --preset never --max-bandwidth 64M",
        "vfu-dev load --preset surely --max-bandwidth 64M",
        "vfu-dev load --preset surely --device docs/examples/kvstore.py:KeyValueStore --max-bandwidth 64M",
    ],
)
@option(
    "--control",
    type=click.Path(),
    metavar="SOCKET",
    help="Write inside the device: its control socket, or its vfio-user socket with SOCKET.ctl beside it.",
)
@option("--socket", type=click.Path(), metavar="SOCKET", help="Write as its client: its vfio-user socket.")
@option(
    "--guest",
    type=click.Path(),
    metavar="SOCKET",
    help="Write from the guest: the socket of the guest's serial port.",
)
@load_options()
@option(
    "--duration",
    type=SECONDS_OR_ZERO,
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="Stop after this time; 0 goes on until interrupted.",
)
@option(
    "--memory-name",
    "memory",
    aliases=["--memory"],
    metavar="NAME",
    help="With --control, write to the memory of this name.  [default: the first]",
)
@option("--bar", type=NumberType(0, 5), help="With --socket, write to this BAR.  [default: the largest]")
@option(
    "--access",
    type=click.Choice(["auto", "mmap", "trap"]),
    default="auto",
    show_default=True,
    help="With --socket, map the BAR if it can be mapped, or write by messages.",
)
@option(
    "--via",
    type=click.Choice(["mmio", "dma"]),
    default="mmio",
    show_default=True,
    help="With --guest, write by the guest's CPU, or have the device's DMA engine fetch the data.",
)
@option("--check", is_flag=True, help="With --socket, compare the memory with what was written, at the end.")
@option(
    "--migrate-to",
    type=click.Path(),
    metavar="SOCKET",
    help="With --socket, migrate the device to this socket during the load; give up when the load ends.",
)
@option(
    "--migrate-after",
    type=SECONDS_OR_ZERO,
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="With --migrate-to, start the migration this long after the load started.",
)
@max_bandwidth_option("What the migration may send while the device runs.")
@downtime_limit_option("Downtime limit of the migration.")
@option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    help="Start two servers and migrate between them, under a load that never, or surely, converges.",
)
@option(
    "--preset-memory",
    type=SIZE,
    default="256M",
    show_default=True,
    help="With --preset, memory of each device.",
)
@own_device_option("With --preset, serve this device class of yours")
@json_option("Also write the figures as JSON")
@option("--quiet", is_flag=True, help="Show no progress and no summary.")
def command(
    load_arguments: dict[str, Any],
    duration: float,
    max_bandwidth: int,
    downtime_limit: float,
    preset: str | None,
    preset_memory: int,
    device_spec: str | None,
    json_path: str | None,
    quiet: bool,
    **where: Any,
) -> None:
    """Write to a device's memory in a pattern, at a rate, and say which rate was reached.

    The load is made in one of three places: inside the device (--control), in its guest (--guest), or by this
    command as the device's client, without a VM (--socket), which can migrate the device meanwhile. Patterns
    and rates are defined in `vfu-dev docs load`.

    Exit status 3 when the load reached less than 95 % of the rate asked for; 1 when something failed, --check
    found a difference, or a preset did not end as expected. Interrupted, the load ends and its figures are
    shown; the status is 0 with --duration 0, else 128 and the signal's number.
    """
    options = ClientOptions(
        downtime_limit_seconds=downtime_limit / 1000,
        max_bandwidth=max_bandwidth or None,
        max_passes=None,
        # A migration that does not converge ends with the load.
        timeout_seconds=max(0.1, duration - where["migrate_after"]) if duration else None,
    )
    place = _Place(**where, options=options)
    given = [path for path in (place.control, place.socket, place.guest) if path is not None]
    if preset is not None:
        from vfu_dev.lab.rehearsal import Rehearsal

        if given or load_of(load_arguments) is not None:
            raise ConfigError("--preset: it has a load and servers of its own")
        _preset(
            Rehearsal(
                preset,
                max_bandwidth,
                preset_memory,
                downtime_limit / 1000,
                duration,
                own_device=own_device_of(device_spec, {"preset_memory": "memory"}),
            ),
            json_path,
            quiet,
        )
        return
    if device_spec is not None:
        raise ConfigError("--device: with --preset only; elsewhere the device is there already")
    if len(given) != 1:
        raise ConfigError("expected one of --control, --socket and --guest, or --preset")
    if place.socket is None and (place.migrate_to or place.check):
        raise ConfigError("--migrate-to and --check: with --socket only")
    if place.socket is not None:
        place.socket = str(device_path(place.socket))
    if place.socket is not None and place.migrate_to is not None:
        place.migrate_to = str(device_path(place.migrate_to))
        here, there = Path(place.socket), Path(place.migrate_to)
        if here.resolve() == there.resolve():
            raise ConfigError(f"--migrate-to {there}: that is the device's own socket")
    spec = load_of(load_arguments)
    if spec is None:
        raise ConfigError(
            "expected a load: --dirty-rate, --write-rate, --pattern, --trace or --spec (vfu-dev docs load)"
        )
    stop = Stop()
    with stop.on_signals():
        try:
            result = _run(place, spec, duration or None, stop, _Lines(spec, quiet))
        except VfuDevError:
            if stop.signal is not None:  # it had not begun
                sys.exit(128 + stop.signal)
            raise
    result["interrupted"] = stop.signal is not None
    write_json(result, json_path)
    if not quiet:
        click.echo(_summary(result, spec), err=json_path == TO_STDOUT)
    if result.get("mismatched_bytes"):
        sys.exit(EXIT_FAILED)
    if stop.signal is not None and duration:
        sys.exit(128 + stop.signal)  # and with it a migration that was given up for it
    if result.get("migration", {}).get("status") == "failed":
        sys.exit(EXIT_FAILED)
    if not result["keeps_up"]:
        sys.exit(EXIT_LESS)


def _run(
    place: _Place, spec: Workload, seconds: float | None, stop: Stop, reporter: _Lines
) -> dict[str, Any]:
    # The guest's side needs asyncio and the lab; the others do not pay for it.
    if place.control is not None:
        from vfu_dev.client.commanded import run_in_device

        with ControlClient(control_path(place.control)) as control:
            figures = run_in_device(control, spec, seconds, stop, reporter, place.memory)
        more: dict[str, Any] = {}
    elif place.guest is not None:
        from vfu_dev.vm.run_in_guest import run_in_guest

        via: Any = place.via
        figures = asyncio.run(run_in_guest(Path(place.guest), spec, seconds, stop, reporter, via))
        more = {}
    else:
        figures, more = _as_client(place, spec, seconds, stop, reporter)
    return {"place": place.name, "load": spec.to_dict(), **asdict(figures), **more}


def _as_client(
    place: _Place, spec: Workload, seconds: float | None, stop: Stop, reporter: _Lines
) -> tuple[WorkloadFigures, dict[str, Any]]:
    assert place.socket is not None
    more: dict[str, Any] = {}
    with ExitStack() as stack:
        source = stack.enter_context(VfioUserDevice.connect(place.socket))
        destination = None
        if place.migrate_to is not None:
            destination = stack.enter_context(VfioUserDevice.connect(place.migrate_to))
        load = stack.enter_context(
            ClientWorkload(source, spec, index=place.bar, access=place.access, journal=place.check)
        )
        began = time.monotonic()
        if destination is not None:
            keep_writing(load, place.migrate_after, stop, reporter)
            more["migration"] = _migration(place, load, source, destination, stop, reporter)
        left = None if seconds is None else max(0.0, began + seconds - time.monotonic())
        keep_writing(load, left, stop, reporter)
        load.close()
        figures = load.figures()
        if place.check:
            more["mismatched_bytes"] = load.mismatched_bytes()
    return figures, more


def _migration(
    place: _Place,
    load: ClientWorkload,
    source: VfioUserDevice,
    destination: VfioUserDevice,
    stop: Stop,
    reporter: _Lines,
) -> dict[str, Any]:
    try:
        progress = migrate(load, source, destination, place.options, stop, reporter)
    except MigrationError as error:
        return {"status": "failed", "error": str(error)}
    return {
        "status": "completed",
        "error": None,
        "passes": progress.passes,
        "initial_bytes": progress.initial_bytes,
        "precopy_bytes": progress.precopy_bytes,
        "stop_copy_bytes": progress.stop_copy_bytes,
        "transfer_rate_bytes_per_second": round(progress.transfer_rate),
        "total_ms": round(progress.total_seconds * 1000, 3),
        "downtime_ms": round(progress.downtime_seconds * 1000, 3),
    }


def _preset(plan: Rehearsal, json_path: str | None, quiet: bool) -> None:
    from vfu_dev.lab.rehearsal import rehearse

    if not plan.bandwidth_bytes:
        raise ConfigError("--max-bandwidth 0: a preset is made for a bandwidth, expected one above 0")
    if not plan.seconds:
        raise ConfigError("--duration 0: a preset that never converges has to be given up some time")
    stop = Stop()
    try:
        with stop.on_signals():
            result = rehearse(
                plan, stop, lambda text: None if quiet else click.echo(text, err=json_path == TO_STDOUT)
            )
    except KeyboardInterrupt:
        sys.exit(128 + (stop.signal or signal.SIGINT))
    write_json(result, json_path)
    if not quiet:
        after = f"after {result['total_ms'] / 1000:.1f} s and {format_count(result['passes'], 'pass')}"
        down = "" if result["downtime_ms"] is None else f", measured downtime {result['downtime_ms']:.0f} ms"
        said = (
            "as expected" if result["as_expected"] else f"NOT as expected: {result['error'] or 'too early'}"
        )
        click.echo(f"{result['outcome']} {after}{down}: {said}", err=json_path == TO_STDOUT)
    if stop.signal is not None:
        sys.exit(128 + stop.signal)
    if not result["as_expected"]:
        sys.exit(EXIT_FAILED)


def _summary(result: dict[str, Any], spec: Workload) -> str:
    lines = [
        f"{result['place']}: {spec.describe()}",
        f"reached {spec.reached_text(result)} in {result['seconds']:.1f} s: "
        f"{result['writes']} writes ({result['writes'] / max(result['seconds'], 1e-9):.0f} a second), "
        f"{result['missed_writes']} missed",
    ]
    if not result["keeps_up"]:
        lines.append(f"WARNING: the machine carried {result['carried']:.1%} of this load")
    moved = result.get("migration")
    if moved is not None and moved["status"] == "completed":
        passes = format_count(moved["passes"], "pass")
        lines.append(
            f"migrated meanwhile: {format_size(moved['precopy_bytes'])} in {passes}, "
            f"measured downtime {moved['downtime_ms']:.0f} ms, total {moved['total_ms']:.0f} ms"
        )
    elif moved is not None:
        lines.append(f"not migrated: {moved['error']}")
    if "mismatched_bytes" in result:
        count = result["mismatched_bytes"]
        lines.append("the memory holds what was written" if not count else f"{count} BYTES DIFFER")
    return "\n".join(lines)
