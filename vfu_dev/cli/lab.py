"""`vfu-dev lab`: moves with real QEMU, one or a series, checked."""

from __future__ import annotations

import asyncio
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from vfu_dev.cli import EXIT_FAILED, EXIT_LESS
from vfu_dev.cli.configfile import given
from vfu_dev.cli.lab_compare import compare
from vfu_dev.cli.lab_host import host
from vfu_dev.cli.lab_merge import merge
from vfu_dev.cli.lab_model import model
from vfu_dev.cli.lab_run import run, scenarios
from vfu_dev.cli.lab_summary import summary
from vfu_dev.cli.lab_watch import watch
from vfu_dev.cli.load_options import load_of, load_options
from vfu_dev.cli.output import announced, json_option, write_json
from vfu_dev.cli.own_device import own_device_of, own_device_option
from vfu_dev.cli.params import (
    ON_OFF,
    SECONDS,
    SIZE,
    NumberType,
    Quantity,
    downtime_limit_option,
    for_each_side,
    max_bandwidth_option,
    of_side,
    option,
    switchover_bandwidth_option,
    whole_milliseconds,
)
from vfu_dev.cli.profile_options import profile_options, replayed
from vfu_dev.cli.qemu_options import chosen_qemus, qemu_options, sent_away
from vfu_dev.cli.shape import Command, Group
from vfu_dev.cli.signals import interrupted_status
from vfu_dev.errors import ConfigError
from vfu_dev.vm import MAX_DEVICES
from vfu_dev.vm.network import LinkSpec
from vfu_dev.workload import Workload
from vfu_dev.workload.spec import DEFAULT_PAGE_BYTES

if TYPE_CHECKING:
    from vfu_dev.lab.options import LoadPlace, Verify

LINK = Quantity(
    "link", "a rate in bits, delay=, loss=, such as 1Gbit,delay=5ms", LinkSpec.parse, lambda link: link.text
)


@click.group(cls=Group, examples=["vfu-dev lab migrate --memory 8M --dirty-rate 2M --out out/lab"])
def command() -> None:
    """Moves with real QEMU, one or a series, checked."""


command.add_command(run)
command.add_command(scenarios)
command.add_command(merge)
command.add_command(compare)
command.add_command(model)
command.add_command(watch)
command.add_command(host)


@command.command(
    cls=Command,
    examples=[
        "vfu-dev lab migrate --memory 8M --dirty-rate 2M --avail-switchover-bandwidth 4M",
        "vfu-dev lab migrate --memory 1M --guest none --json out.json",
        "vfu-dev lab migrate --qemu-source bookworm-backports --qemu-destination trixie-backports",
        "vfu-dev lab migrate --device docs/examples/kvstore.py:KeyValueStore --guest none",
        "vfu-dev lab migrate --destination ssh://b.example --memory 64M --max-bandwidth 1Gbit",
        "vfu-dev lab migrate --link 1Gbit,delay=5ms --json link.json",
        "vfu-dev lab migrate --server './my-server --socket {socket}' --guest none",
        "vfu-dev lab migrate --fault-destination op=mig-write,delay=1.5,when=initial-received",
        "vfu-dev lab migrate --profile igb-4k --guest none --memory 64K",
        "vfu-dev lab migrate --downtime-limit 150 --policy passes=3,seconds=10,downtime-limit=300",
    ],
)
@own_device_option(
    "Migrate this device class of yours; the device writes by itself, and digests compare its state"
)
@option(
    "--server",
    "server_command",
    metavar="COMMAND",
    help="Start this vfio-user server on each side instead of `vfu-dev serve`. {socket} in it is where it "
    "listens, {side} is source or destination. Nothing writes to its device. The report lacks the figures of "
    "the control socket.",
)
@option("--memory", type=SIZE, default="8M", show_default=True, help="Size of the device memory (BAR2).")
@option(
    "--devices",
    type=NumberType(1, MAX_DEVICES),
    default=1,
    show_default=True,
    help="Number of devices in the VM.",
)
@load_options(dirty_rate="2M")
@option(
    "--load-place",
    type=click.Choice(["guest", "device"]),
    help="Who writes: the guest, which reads everything back at the end, or the device's own engine.  "
    "[default: guest; with --device, device]",
)
@option(
    "--access",
    type=click.Choice(["trap", "mmap"]),
    default="trap",
    show_default=True,
    help="How the guest reaches the memory, as in `vfu-dev serve`.",
)
@profile_options
@qemu_options
@for_each_side(
    "fault",
    multiple=True,
    metavar="FAULT",
    help="Arm a fault in the servers of both sides, as `vfu-dev serve --fault` does; repeatable.",
)
@option(
    "--guest",
    type=click.Choice(["linux", "none"]),
    default="linux",
    show_default=True,
    help="A Linux guest, or no CPU at all (qtest): the lab itself writes to the device.",
)
@option(
    "--pre-copy",
    type=ON_OFF,
    default="on",
    show_default=True,
    help="off: the devices do not announce PRE_COPY, and all their data moves while they are stopped. QEMU "
    "then stops only where the downtime limit, or --avail-switchover-bandwidth, allows for all of it.",
)
@option(
    "--switchover-ack",
    is_flag=True,
    help="Stop the source only once the destination has received all initial data.",
)
@option(
    "--pause-before-switchover",
    is_flag=True,
    help="Have QEMU pause between the VM's stop and STOP_COPY's data, as libvirt does; the lab answers.",
)
@downtime_limit_option(
    "How long the VM may stand still. QEMU takes whole milliseconds: fractions are rounded up."
)
@max_bandwidth_option(
    "What the migration may send while the VM runs. QEMU sends device state in whole blocks of 1 MiB "
    "each 100 ms, so it keeps to multiples of 10 MiB/s.",
)
@switchover_bandwidth_option(aliases=["--switchover-bandwidth"])
@option(
    "--policy",
    multiple=True,
    metavar="RULE",
    help="Change QEMU's parameters while it migrates, as management software does, once per rule: "
    "passes=3,seconds=10,downtime-limit=300 (vfu-dev docs policies); repeatable.",
)
@option(
    "--destination",
    metavar="ssh://[USER@]HOST[:PORT][/PATH/OF/vfu-dev]",
    help="Migrate to another machine, which has vfu-dev, a QEMU and the guest; --qemu-destination names one "
    "there. The migration is plain TCP; all else goes over ssh, with the options in $VFU_DEV_SSH.",
)
@option(
    "--link",
    "link_spec",
    type=LINK,
    metavar="RATE[,delay=TIME][,loss=PERCENT]",
    help="Migrate over TCP, between network namespaces of this machine that a link of this kind joins: "
    "1Gbit,delay=5ms. Bits are decimal, the delay is each way. Needs root.",
)
@option(
    "--accel",
    type=click.Choice(["tcg", "kvm"]),
    default="tcg",
    show_default=True,
    help="Accelerator for the guest; tcg works everywhere.",
)
@option(
    "--timeout",
    type=SECONDS,
    default=180.0,
    show_default=True,
    metavar="SECONDS",
    help="Cancel the migration after this time; the VM goes on at the source.",
)
@option(
    "--verify",
    type=click.Choice(["auto", "dma", "mmio", "digests", "none"]),
    default="auto",
    show_default=True,
    help="How content is compared after the move, beside the digests of both servers. dma: the device copies "
    "its memory to the guest's, and some words are read by MMIO. mmio: the guest reads all of it; with "
    "--guest none each MiB takes 12 s. digests: nothing is read back. none: no digests either. "
    "auto: dma; mmio in a Linux guest with --access mmap; digests with --load-place device or --device.",
)
@option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out/lab"),
    show_default=True,
    help="Folder for report.json, report.html, metrics.prom and logs.",
)
@json_option("Also write the figures as JSON")
@option("--keep", is_flag=True, help="Keep the logs of a successful run too.")
@option("--quiet", is_flag=True, help="Show no progress, only the summary.")
def migrate(
    device_spec: str | None,
    server_command: str | None,
    memory: int,
    devices: int,
    load_arguments: dict[str, Any],
    load_place: LoadPlace | None,
    access: str,
    profile: str | None,
    scale: int,
    guest: str,
    pre_copy: str,
    switchover_ack: bool,
    pause_before_switchover: bool,
    downtime_limit: float,
    max_bandwidth: int,
    switchover_bandwidth: int,
    policy: tuple[str, ...],
    destination: str | None,
    link_spec: LinkSpec | None,
    accel: str,
    timeout: float,
    verify: Verify,
    out: Path,
    json_path: str | None,
    keep: bool,
    quiet: bool,
    **sides: Any,
) -> None:
    """Live-migrate the device under load from one QEMU to another, and check everything.

    \b
    Exit status:
      0  every check holds
      1  a check fails
      3  the checks hold, but the load reached less than 95 % of its rate
         or a device did not keep to its --profile
    """
    # Imported here: `vfu-dev lab --help` must not pay for matplotlib and QMP.
    from vfu_dev.builds import artifact
    from vfu_dev.faults.spec import Fault
    from vfu_dev.lab.judge import load_kept_up, profile_kept
    from vfu_dev.lab.migrate import run as run_migration
    from vfu_dev.lab.options import MigrateOptions
    from vfu_dev.lab.pausing import CAPABILITY
    from vfu_dev.lab.policy import Rule
    from vfu_dev.lab.progress import Progress
    from vfu_dev.lab.remote import Destination
    from vfu_dev.report.last_downtime import write_last_downtime
    from vfu_dev.report.page import write_report

    if memory < DEFAULT_PAGE_BYTES or memory % DEFAULT_PAGE_BYTES:
        raise ConfigError(
            f"--memory {memory}: must be a multiple of {DEFAULT_PAGE_BYTES} bytes, the page size"
        )
    own_device = own_device_of(device_spec, {"memory": "memory", "access": "access"})
    server = _server_of(server_command, load_arguments)
    ours = own_device is None and not server
    load_place = load_place or ("guest" if ours else "device")
    load = None if server else load_of(load_arguments)
    if load is None or load.is_idle:
        load = Workload("idle")
    faults = {side: of_side(sides, "fault", side) for side in ("source", "destination")}
    for text in (*faults["source"], *faults["destination"]):
        Fault.parse(text)
    for text in policy:
        Rule.parse(text)
    if access == "mmap" and guest == "none" and load_place == "guest" and not load.is_idle:
        raise ConfigError("--access mmap: a load needs --guest linux or --load-place device")
    if accel == "kvm" and guest == "none":
        raise ConfigError("--accel kvm: needs --guest linux; without a guest nothing runs on a CPU")
    far = None
    if destination is not None:
        if link_spec is not None:
            raise ConfigError("--link: is between namespaces of this machine, --destination another machine")
        if server:
            raise ConfigError("--server: is started on this machine, --destination is another one")
        far = replace(Destination.parse(destination), **sent_away(sides))
    options = MigrateOptions(
        **chosen_qemus(sides),
        library=artifact("libvfio-user"),
        guest_image=artifact("guest") if guest == "linux" else None,
        memory_bytes=memory,
        own_device=own_device,
        server=server,
        devices=devices,
        load=load,
        load_place=load_place,
        access=access,
        faults_source=faults["source"],
        faults_destination=faults["destination"],
        server_extra=replayed(profile, scale),
        replays=profile is not None,
        pre_copy=pre_copy == "on",
        switchover_ack=switchover_ack,
        capabilities=((CAPABILITY, True),) if pause_before_switchover else (),
        downtime_limit_ms=whole_milliseconds(downtime_limit),
        max_bandwidth=max_bandwidth,
        switchover_bandwidth=switchover_bandwidth,
        policy=policy,
        link=link_spec,
        accel=accel,
        timeout_seconds=timeout,
        verify=verify,
    )
    if options.downtime_limit_ms != downtime_limit:
        taken = f"--downtime-limit {downtime_limit:g} is {options.downtime_limit_ms}"
        click.echo(f"note: QEMU takes whole milliseconds: {taken}", err=True)
    console = Console(stderr=True)
    logs = out / "logs"
    try:
        with Progress(console, quiet) as progress:
            result = asyncio.run(run_migration(options, logs, ["vfu-dev", *sys.argv[1:]], progress, far))
    except KeyboardInterrupt:
        click.echo(f"interrupted; logs: {logs}", err=True)
        sys.exit(interrupted_status())
    found = result.to_json()
    # First what needs no disk: it may be full.
    click.echo("\n".join(summary(found, load)), err=True)
    write_json(found, json_path)
    result.write(out / "report.json")
    write_last_downtime(found, out)
    with announced("drawing the report"):
        page = write_report(found, out)
    click.echo(f"report: {page}", err=True)
    if result.problems:
        click.echo(f"logs: {logs}  (again: {shlex.join(result.command)})", err=True)
        sys.exit(EXIT_FAILED)
    if result.interrupted:
        click.echo("interrupted after the migration, before everything was read back", err=True)
        sys.exit(interrupted_status())
    if not keep:
        for log in logs.glob("*.log"):
            log.unlink()
    if not load_kept_up(result) or not profile_kept(result):
        sys.exit(EXIT_LESS)


def _server_of(command: str | None, load_arguments: dict[str, Any]) -> tuple[str, ...]:
    """Return the words of --server. Raises: ConfigError: not a command, or with what only our server has."""
    if command is None:
        return ()
    from vfu_dev.vm.any_server import split_command

    chosen = given(click.get_current_context())
    ours = ("memory", "access", "pre_copy", "device_spec", *load_arguments)
    for name in (*ours, "fault", "fault_source", "fault_destination"):
        if name in chosen:
            raise ConfigError(f"--{name.replace('_', '-')}: is for our own server, not for that of --server")
    return tuple(split_command(command))
