"""`vfu-dev check-device`: does a device class keep the contract of a device?"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING

import click

from vfu_dev.cli import EXIT_FAILED
from vfu_dev.cli.output import json_option, write_json
from vfu_dev.cli.params import SIZE, option
from vfu_dev.cli.shape import TO_STDOUT, Command
from vfu_dev.errors import ConfigError

if TYPE_CHECKING:
    from vfu_dev.device import Device

# What a class that takes a size is checked with: the contract writes to all of it, several times.
DEFAULT_MEMORY = "256K"


@click.command(
    cls=Command,
    examples=[
        "vfu-dev check-device docs/examples/kvstore.py:KeyValueStore",
        "vfu-dev check-device my_package.devices:Counter --changed-by-resume generation --json check.json",
    ],
)
@click.argument("spec", metavar="FILE.py:CLASS|MODULE:CLASS")
@option(
    "--memory",
    type=SIZE,
    default=DEFAULT_MEMORY,
    show_default=True,
    help="Size of the memory, for a class that takes one.",
)
@option(
    "--changed-by-resume",
    "changed",
    multiple=True,
    metavar="REGISTER",
    help="A register that differs after a migration on purpose, such as a count of migrations; repeatable.",
)
@json_option("Also write what was found as JSON", any_word=False)
@option("--quiet", is_flag=True, help="Show only what is broken.")
def command(spec: str, memory: int, changed: tuple[str, ...], json_path: str | None, quiet: bool) -> None:
    """Put a device class through every check of the contract, without a VM, a socket or a library.

    The checks are those of `vfu_dev.testing.check_device` (vfu-dev docs authors-reference): bounds and access
    sizes, reset, a migration whose stream is cut anywhere or damaged, migration states, P2P, promised bytes.
    Exit status 1 when a check fails.
    """
    from vfu_dev.cli.loader import find_class, make_device
    from vfu_dev.testing.contract import CHECKS, ContractError, check_device

    cls = find_class(spec)

    def make() -> Device:
        return make_device(cls, cls.__name__, {"memory_bytes": memory}, {})

    broken: dict[str, str] = {}
    made = True
    try:
        make().close()
        check_device(make, changed_by_resume=changed)
    except ContractError as error:
        broken = error.broken
    except ConfigError as error:
        # The first check is about that; of the others nothing is known.
        broken, made = {CHECKS[0].__name__: str(error)}, False
    checks = [
        {
            "name": check.__name__,
            "ok": False if check.__name__ in broken else True if made else None,
            "about": (inspect.getdoc(check) or "").splitlines()[0],
            "problem": broken.get(check.__name__),
        }
        for check in CHECKS
    ]
    write_json(
        {"kind": "check-device", "device": cls.__name__, "ok": not broken, "checks": checks}, json_path
    )
    if json_path != TO_STDOUT:
        for check in checks:
            if check["problem"]:
                click.echo(f"BROKEN  {check['name']}: {check['problem']}")
            elif not quiet:
                click.echo(f"{'ok' if check['ok'] else '-':6}  {check['name']}: {check['about']}")
        good = sum(bool(check["ok"]) for check in checks)
        click.echo(f"{cls.__name__}: {good} of {len(checks)} checks passed")
    if broken:
        sys.exit(EXIT_FAILED)
