"""`vfu-dev lab`: whole experiments with real QEMU."""

from __future__ import annotations

import asyncio
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from vfu_dev.cli.lab_model import model
from vfu_dev.cli.lab_run import compare, run, scenarios
from vfu_dev.cli.output import json_option, write_json
from vfu_dev.cli.signals import end_on_sigterm, interrupted_status
from vfu_dev.errors import ConfigError
from vfu_dev.patterns import PAGE_PATTERNS
from vfu_dev.sizes import format_count, format_size, parse_size

if TYPE_CHECKING:
    from vfu_dev.lab.options import LoadPlace


class SizeParam(click.ParamType[int]):
    """A size or a rate: `8M`, `64K`, `2M/s`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes; fail with the text and an example."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE = SizeParam()
PAGE_BYTES = 4096
# Low, so that a default migration has a pre-copy to look at: with 300 ms, 1.2 MiB may be left.
SWITCHOVER_BANDWIDTH = 4 << 20


@click.group()
def command() -> None:
    """Run whole experiments with real QEMU."""
    end_on_sigterm()


command.add_command(run)
command.add_command(scenarios)
command.add_command(compare)
command.add_command(model)


@command.command()
@click.option("--memory", type=SIZE, default="8M", show_default=True, help="Device memory (BAR2).")
@click.option("--devices", type=click.IntRange(1, 8), default=1, show_default=True, help="Devices in the VM.")
@click.option(
    "--dirty-rate",
    type=SIZE,
    default="2M",
    show_default=True,
    help="Bytes of pages that are dirtied a second, in each device; 0: none.",
)
@click.option(
    "--pattern",
    type=click.Choice(list(PAGE_PATTERNS)),
    default="uniform",
    show_default=True,
    help="Which pages are written (docs/load.md).",
)
@click.option(
    "--write-size", type=SIZE, default="8", show_default=True, help="Bytes of one write, at most 1M."
)
@click.option(
    "--hot-fraction",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="hotset: the part of the pages that is hot.",
)
@click.option(
    "--hot-share",
    type=click.FloatRange(0, 1),
    default=0.9,
    show_default=True,
    help="hotset: the part of the writes that goes there.",
)
@click.option(
    "--zipf-exponent",
    type=click.FloatRange(0, 10),
    default=1.0,
    show_default=True,
    help="zipf: 0 is uniform.",
)
@click.option(
    "--load-place",
    type=click.Choice(["guest", "device"]),
    default="guest",
    show_default=True,
    help="Who writes: the guest, which reads all back in the end, or the device's own engine.",
)
@click.option(
    "--access",
    type=click.Choice(["trap", "mmap"]),
    default="trap",
    show_default=True,
    help="How the guest reaches the memory, as in `vfu-dev serve`.",
)
@click.option(
    "--fault-source",
    "faults_source",
    multiple=True,
    metavar="FAULT",
    help="Make something go wrong in the source's servers, as `vfu-dev serve --fault`; repeatable.",
)
@click.option(
    "--fault-destination",
    "faults_destination",
    multiple=True,
    metavar="FAULT",
    help="The same in the destination's. Example: op=mig-write,delay=1.5,when=initial-loaded",
)
@click.option(
    "--guest",
    type=click.Choice(["linux", "none"]),
    default="linux",
    show_default=True,
    help="A Linux guest, or no CPU at all (qtest): the lab itself writes to the device.",
)
@click.option(
    "--pre-copy",
    type=click.Choice(["on", "off"]),
    default="on",
    show_default=True,
    help="off: the devices do not announce PRE_COPY, all their data moves while they are stopped.",
)
@click.option("--switchover-ack", is_flag=True, help="Stop the source only once initial data is loaded.")
@click.option(
    "--downtime-limit", type=click.IntRange(1), default=300, show_default=True, help="Milliseconds."
)
@click.option(
    "--max-bandwidth",
    type=SIZE,
    default="32M",
    show_default=True,
    help="Migration bandwidth a second; QEMU switches over below bandwidth x downtime limit.",
)
@click.option(
    "--switchover-bandwidth",
    type=SIZE,
    help="What QEMU assumes for the switchover instead of measuring (0: measure).  "
    "[default: 4M; with --pre-copy off what lets it stop for all that the devices have]",
)
@click.option("--accel", type=click.Choice(["tcg", "kvm"]), default="tcg", show_default=True)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the load.")
@click.option("--timeout", type=float, default=180.0, show_default=True, help="Seconds for the migration.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out/lab"),
    show_default=True,
    help="Folder for report.json, report.html and logs.",
)
@json_option("Also write the JSON here")
@click.option("--keep", is_flag=True, help="Keep the logs of a successful run too.")
@click.option("--quiet", is_flag=True, help="No progress, only the summary.")
def migrate(
    memory: int,
    devices: int,
    dirty_rate: int,
    pattern: str,
    write_size: int,
    hot_fraction: float,
    hot_share: float,
    zipf_exponent: float,
    load_place: LoadPlace,
    access: str,
    faults_source: tuple[str, ...],
    faults_destination: tuple[str, ...],
    guest: str,
    pre_copy: str,
    switchover_ack: bool,
    downtime_limit: int,
    max_bandwidth: int,
    switchover_bandwidth: int | None,
    accel: str,
    seed: int,
    timeout: float,
    out: Path,
    json_path: str | None,
    keep: bool,
    quiet: bool,
) -> None:
    """Live-migrate the device under load from one QEMU to another, and check everything.

    Exit status 0 only when all of it is as it should be. Example:

        vfu-dev lab migrate --memory 1M --guest none --json out.json
    """
    # Imported here: `vfu-dev lab --help` must not pay for matplotlib and QMP.
    from vfu_dev.builds import artifact
    from vfu_dev.faults.spec import Fault
    from vfu_dev.lab.migrate import MigrateOptions
    from vfu_dev.lab.migrate import run as run_migration
    from vfu_dev.lab.progress import Progress
    from vfu_dev.patterns import LoadSpec
    from vfu_dev.report.page import write_report

    if memory < PAGE_BYTES or memory % PAGE_BYTES:
        raise ConfigError(f"--memory {memory}: must be a multiple of 4096 bytes, the page size")
    load = LoadSpec("idle")
    if dirty_rate:
        load = LoadSpec(
            pattern,
            rate_pages=dirty_rate / PAGE_BYTES,
            write_bytes=write_size,
            seed=seed,
            hot_fraction=hot_fraction,
            hot_share=hot_share,
            zipf_exponent=zipf_exponent,
        )
    for text in (*faults_source, *faults_destination):
        Fault.parse(text)
    if access == "mmap" and guest == "none" and load_place == "guest" and not load.is_idle:
        raise ConfigError("--access mmap: a load needs --guest linux or --load-place device")
    if switchover_bandwidth is None:
        switchover_bandwidth = SWITCHOVER_BANDWIDTH
        if pre_copy == "off":
            # What is left gets no smaller by waiting: QEMU has to be willing to stop for twice of it all.
            everything = memory * devices * 1000 // downtime_limit
            switchover_bandwidth = max(SWITCHOVER_BANDWIDTH, 2 * everything)
    options = MigrateOptions(
        qemu=artifact("qemu"),
        library=artifact("libvfio-user"),
        guest_image=artifact("guest") if guest == "linux" else None,
        memory_bytes=memory,
        devices=devices,
        load=load,
        load_place=load_place,
        access=access,
        faults_source=faults_source,
        faults_destination=faults_destination,
        pre_copy=pre_copy == "on",
        switchover_ack=switchover_ack,
        downtime_limit_ms=downtime_limit,
        max_bandwidth=max_bandwidth,
        switchover_bandwidth=switchover_bandwidth,
        accel=accel,
        timeout_seconds=timeout,
    )
    console = Console(stderr=True)
    logs = out / "logs"
    try:
        with Progress(console, quiet) as progress:
            result = asyncio.run(run_migration(options, logs, ["vfu-dev", *sys.argv[1:]], progress))
    except KeyboardInterrupt:
        click.echo(f"interrupted; logs: {logs}", err=True)
        sys.exit(interrupted_status())
    result.write(out / "report.json")
    page = write_report(result.to_json(), out)
    write_json(result.to_json(), json_path)
    _summary(result.to_json(), page)
    if result.problems:
        click.echo(f"logs: {logs}  (again: {shlex.join(result.command)})", err=True)
        sys.exit(1)
    if not keep:
        for log in logs.glob("*.log"):
            log.unlink()


def _summary(result: dict[str, Any], page: Path) -> None:
    qemu, guest = result["qemu"], result["guest"]
    lines = [f"migration {result['status']}, QEMU {qemu['version']} ({qemu['accel']})"]
    for device in result["devices"]:
        moved = device["precopy_bytes"] + device["stop_copy_bytes"]
        share = f" ({100 * device['precopy_bytes'] / moved:.0f} % in pre-copy)" if moved else ""
        match = "equal" if device["digest_match"] else "DIFFERENT" if device["digest_source"] else "not taken"
        sizes = ", ".join(
            f"{label} {format_size(device[key])}"
            for label, key in (
                ("initial", "initial_bytes"),
                ("pre-copy", "precopy_bytes"),
                ("stop-copy", "stop_copy_bytes"),
            )
        )
        passes = format_count(device["passes"], "pass")
        lines.append(f"{device['name']}: {sizes}{share}, {passes}, digests {match}")
        if device["downtime_seconds"] is not None:
            predicted = device["predicted_downtime_seconds"]
            told = "" if predicted is None else f", {predicted * 1000:.0f} ms predicted when it stopped"
            stood = f"stood still for {device['downtime_seconds'] * 1000:.0f} ms"
            lines.append(f"{device['name']}: {stood}{told}")
    if qemu["downtime_ms"] is not None:
        limit = qemu["downtime_limit_ms"]
        lines.append(f"downtime {qemu['downtime_ms']} ms (limit {limit} ms), total {qemu['total_ms']} ms")
    elif qemu["run_state_source"] is not None:
        lines.append(f"the VM on the source is {qemu['run_state_source']}")
    for device, load in zip(result["devices"], result["load_status"], strict=False):
        reached, asked = format_size(load["reached_rate_bytes"]), format_size(load["asked_rate_bytes"])
        lines.append(f"{device['name']}: wrote {reached}/s by itself, {asked}/s were asked")
    if guest is not None:
        lines.append(
            f"guest {guest['kind']}: {format_size(guest['compared_bytes'])} compared, "
            f"{guest['mismatched_bytes']} bytes differ, {guest['writes']} writes"
        )
    lines += [f"warning: {text}" for text in result["warnings"]]
    lines += [f"PROBLEM: {text}" for text in result["problems"]]
    lines.append(f"report: {page}")
    click.echo("\n".join(lines), err=True)
