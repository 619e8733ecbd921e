"""`--device FILE.py:CLASS`, of commands that start servers themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from vfu_dev.cli.params import option

if TYPE_CHECKING:
    from vfu_dev.vm.own_device import OwnDevice


def own_device_option(what: str) -> Callable[[Any], Any]:
    """Return the option `--device`; `what`: what becomes of the class here."""
    return option(
        "--device",
        "device_spec",
        metavar="FILE.py:CLASS|MODULE:CLASS",
        help=f"{what} (vfu-dev docs authors).  [default: the reference device]",
    )


def own_device_of(spec: str | None, named: Mapping[str, str]) -> OwnDevice | None:
    """Return what `serve` says of the class that `--device` names; None for the reference device.

    Args: named: parameter of this command -> the option of `serve` that it is. The class has to take what
              the user gave.
    Raises: ConfigError: there is no such class, or it does not take what was given.
    """
    if spec is None:
        return None
    # Imported here: `--help` need not pay for the lab.
    from vfu_dev.vm.own_device import ask_own_device

    ctx = click.get_current_context()
    given = [
        f"--{serve_option}={ctx.params[name]}"
        for name, serve_option in named.items()
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    ]
    return ask_own_device(spec, tuple(given))
