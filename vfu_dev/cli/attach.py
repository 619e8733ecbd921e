"""`vfu-dev attach`: start an unmodified QEMU, or any VFIO program, with devices of vfio-user servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vfu_dev.attach.front_end import IOMMU_PATHS
from vfu_dev.cli.shape import Command
from vfu_dev.socket_paths import device_path

# Where a context keeps the command line behind `--`.
COMMAND_LINE = "vfu_dev.attach.command"


class WithCommand(Command):
    """A command whose arguments end at `--`; what follows is a command line that click does not parse.

    Args: behind: how the arguments look, for a message.
    """

    def __init__(self, *args: Any, behind: str = "-- COMMAND [ARG]...", **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.behind = behind

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Set the command line aside, and parse what is before it."""
        at = args.index("--") if "--" in args else len(args)
        ctx.meta[COMMAND_LINE] = args[at + 1 :]
        rest = super().parse_args(ctx, args[:at])
        if not ctx.meta[COMMAND_LINE] and not ctx.resilient_parsing:
            raise click.UsageError(f"what to start is missing: {self.behind}", ctx)
        return rest


@click.command(
    cls=WithCommand,
    behind="SOCKET... -- COMMAND [ARG]...",
    options_metavar="[OPTIONS]",
    examples=[
        "vfu-dev attach /run/vfu/dev0.sock -- qemu-system-x86_64 -m 512M -display none",
        "vfu-dev attach a.sock -- qemu-system-x86_64 -device vfio-pci,sysfsdev=%sysfsdev0%,addr=0x5",
        "vfu-dev attach a.sock b.sock --iommu type1 --print -- qemu-system-x86_64",
    ],
)
@click.argument(
    "sockets",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path),
    metavar="SOCKET... -- COMMAND [ARG]...",
)
@click.option(
    "--iommu",
    type=click.Choice(IOMMU_PATHS),
    help="How vfio-pci reaches an IOMMU.  [default: the first of these that the QEMU has]",
)
@click.option("--print", "only_print", is_flag=True, help="Print the command line, ready to paste, and end.")
@click.pass_context
def command(ctx: click.Context, sockets: tuple[Path, ...], iommu: str | None, only_print: bool) -> None:
    """Start COMMAND, an unmodified QEMU from 10.0 on, with the devices on the vfio-user SOCKETs.

    QEMU's own vfio-pci drives the device: a preloaded library answers its calls to the kernel's VFIO. QEMU
    gets -object and -device at the end of its command line, unless an argument of yours contains %sysfsdev0%
    (%sysfsdev1% for the second socket): that becomes the path of a made-up folder of sysfs, SOCKET.vfio. Any
    other VFIO program gets that folder, and the library.

    VFU_DEV_PRELOAD_LOG=FILE logs the program's VFIO calls and their answers.

    The exit status is COMMAND's; 127 if it is not found, 126 if it cannot be started.
    """
    # Imported here: --help needs no QEMU.
    from vfu_dev.attach.command import attach
    from vfu_dev.attach.preload import Preload
    from vfu_dev.builds import artifact

    argv: list[Any] = ctx.meta[COMMAND_LINE]
    preload = Preload(artifact("vfio-preload"))
    attached = attach([device_path(socket) for socket in sockets], argv, preload, iommu)
    for note in attached.notes:
        click.echo(f"vfu-dev attach: {note}", err=True)
    if only_print:
        click.echo(attached.text())
        return
    attached.execute()
