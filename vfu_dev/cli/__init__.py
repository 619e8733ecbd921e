"""The `vfu-dev` command: one module a command, imported when it is asked for."""

from __future__ import annotations

import errno
import gc
import importlib
import os
import sys
from typing import cast

import click

from vfu_dev.cli.extras import missing_text
from vfu_dev.cli.shape import Group
from vfu_dev.cli.signals import end_on_sigterm, interrupted_status
from vfu_dev.errors import ConfigError, VfuDevError

# name -> (module, line in --help). Modules are imported on use: `serve` must not pay for matplotlib.
_COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("vfu_dev.cli.serve", "Serve the device on a vfio-user socket."),
    "info": ("vfu_dev.cli.info", "Show what a vfio-user server offers."),
    "check": ("vfu_dev.cli.check", "Check any vfio-user server against the specification."),
    "hostile": ("vfu_dev.cli.hostile", "Serve a device that breaks the protocol, to try a client against."),
    "attach": ("vfu_dev.cli.attach", "Start an unmodified QEMU with the device behind its own vfio-pci."),
    "migrate": ("vfu_dev.cli.migrate", "Move a device's state from one server to another, without QEMU."),
    "load": ("vfu_dev.cli.load", "Write to a device at a rate: inside it, from a guest, as a client."),
    "check-device": ("vfu_dev.cli.check_device", "Check a device class of your own, without a VM."),
    "new-device": ("vfu_dev.cli.new_device", "Write a small device class, and its test, to begin with."),
    "ctl": ("vfu_dev.cli.ctl", "Command a running server: status, load, faults, digests."),
    "top": ("vfu_dev.cli.top", "Watch servers in the terminal: state, rates, predicted downtime."),
    "lab": ("vfu_dev.cli.lab", "Moves with real QEMU, one or a series, checked."),
    "profile": ("vfu_dev.cli.profile", "A device's behaviour in migration: from a trace, shown, compared."),
    "report": ("vfu_dev.cli.report", "Rebuild the page of a lab run from its JSON."),
    "bench": ("vfu_dev.cli.bench", "Measure the device against one in C, and check the limits."),
    "build": ("vfu_dev.cli.build", "Fetch, check, patch and build libvfio-user, QEMU and the guest."),
    "doctor": ("vfu_dev.cli.doctor", "Say what is installed here and what it can do."),
    "docs": ("vfu_dev.cli.docs", "Show a page of the documentation."),
}

# name -> what its environment has, unless it is set, before its module imports numpy. A thread that waits for
# matrices to multiply, of which a server has none, makes each of its system calls slower: 0.2 to 0.4 us of an
# MMIO, because what the threads of a process share has to be counted.
_ENVIRONMENT = {"serve": {"OPENBLAS_NUM_THREADS": "1"}}

# Commands that run without the garbage collector until they call gc.enable(), when they serve. What they load
# stays, and the collector would go through it 70 times before that, for 6 ms.
_COLLECT_LATER = {"serve"}

# What a command ends with; docs/commands.md has the table.
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_LESS = 3


class _LazyGroup(Group):
    """Lists every command without importing one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of use."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module behind `cmd_name`; its `command` is a click command or group."""
        if cmd_name not in _COMMANDS:
            return None
        for name, value in _ENVIRONMENT.get(cmd_name, {}).items():
            os.environ.setdefault(name, value)
        module = importlib.import_module(_COMMANDS[cmd_name][0])
        return cast(click.Command, module.command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is to run, as every group does."""
        if args[0] in _COLLECT_LATER:
            gc.disable()  # here: who only looks at the commands may never close `ctx`
            ctx.call_on_close(gc.enable)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command list from the table above."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    examples=["vfu-dev lab migrate --memory 8M --dirty-rate 4M --json out.json"],
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda ctx, _option, asked: _show_version(ctx) if asked and not ctx.resilient_parsing else None,
    help="Show versions, and what this installation carries, and exit.",
)
def cli() -> None:
    """A software PCI device with VFIO PRE_COPY migration, attachable to QEMU through vfio-user."""


def serve() -> None:
    """Run `vfu-dev serve`: a program of its own, as the vfio-user backend program conventions want one."""
    main(["serve", *sys.argv[1:]])


def _show_version(ctx: click.Context) -> None:
    from vfu_dev.cli.inside import version_lines

    click.echo("\n".join(version_lines()))
    ctx.exit()


_DESCRIPTORS = "see ulimit -n"


def main(argv: list[str] | None = None) -> None:
    """Run the command line and end with its exit status (docs/commands.md); an error is one line on stderr.

    A file that cannot be written, a full disk and a missing package are errors of that kind.
    """
    end_on_sigterm()
    try:
        # Not click's standalone mode: there an interrupt is status 1.
        status = cli.main(args=argv, prog_name="vfu-dev", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("vfu-dev: interrupted", err=True)
        sys.exit(interrupted_status())
    except ConfigError as error:
        text, status = str(error), EXIT_USAGE
    except VfuDevError as error:
        text, status = str(error), EXIT_FAILED
    except OSError as error:
        text, status = error.strerror or str(error), EXIT_FAILED
        text = f"{error.filename}: {text}" if error.filename else text
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == __name__.partition(".")[0]:
            raise
        text, status = missing_text(error.name), EXIT_FAILED
    # Most say what could not be done and why; none knows that this cause has a remedy.
    if os.strerror(errno.EMFILE) in text and _DESCRIPTORS not in text:
        text += f" ({_DESCRIPTORS})"
    click.echo(f"vfu-dev: {text}", err=True)
    sys.exit(status)
