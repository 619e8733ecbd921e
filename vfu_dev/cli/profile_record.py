"""`vfu-dev profile record`: start a program so that each of its calls about migration is recorded."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import click

from vfu_dev.cli.attach import COMMAND_LINE, WithCommand
from vfu_dev.cli.output import possible


@click.command(
    cls=WithCommand,
    options_metavar="[OPTIONS] -- COMMAND [ARG]...",
    examples=[
        "vfu-dev profile record -o source.calls -- qemu-system-x86_64 -device vfio-pci,host=3b:00.1",
        "vfu-dev profile record -o a.calls -- vfu-dev attach a.sock -- qemu-system-x86_64 -m 512M",
    ],
)
@click.option(
    "-o", "--output", required=True, metavar="FILE", callback=possible, help="Append the calls to this file."
)
@click.pass_context
def record(ctx: click.Context, output: str) -> None:
    """Start COMMAND, and record when each of its VFIO calls about migration begins and ends.

    COMMAND is a QEMU, or any program that uses VFIO through the C library. A preloaded library notes state
    changes, sizes, reads and writes; the kernel answers them as always. `profile import` reads the file.

    With `vfu-dev attach` as COMMAND the devices of vfio-user servers are recorded the same way.

    The exit status is COMMAND's; 127 if it is not found, 126 if it cannot be started.
    """
    # Imported here: --help needs none of it.
    from vfu_dev.attach.command import Attached
    from vfu_dev.attach.preload import AttachError, Preload
    from vfu_dev.builds import artifact
    from vfu_dev.builds.qemu_binary import preload_first, preload_problem

    argv: list[str] = ctx.meta[COMMAND_LINE]
    first = ""
    if (found := shutil.which(argv[0])) is not None:
        if problem := preload_problem(Path(found)):
            raise AttachError(f"{found} {problem}, so its calls cannot be recorded")
        first = preload_first(Path(found))
    preload = Preload(artifact("vfio-preload"), variables={"CALLS": os.path.abspath(output)}, first=first)
    Attached(tuple(argv), preload.environment([])).execute()
