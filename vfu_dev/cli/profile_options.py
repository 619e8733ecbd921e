"""--profile and --scale: the device behaves in migration as a profile says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from vfu_dev.cli.completing import offer, shipped_profiles
from vfu_dev.cli.params import NumberType
from vfu_dev.errors import ConfigError


def profile_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `profile` and `scale`."""
    command = click.option(
        "--scale",
        default=1,
        show_default=True,
        type=NumberType(low=1),
        help="Divide the profile's sizes and rates by this number; times stay.",
    )(command)
    return click.option(
        "--profile",
        default=None,
        metavar="NAME|FILE",
        shell_complete=offer(shipped_profiles),
        help="Behave in migration as this profile says: sizes, times, features (vfu-dev docs replay).",
    )(command)


def checked(profile: str | None, scale: int) -> str | None:
    """Return the path of the profile. Raises: ConfigError: it is missing or wrong, or a scale is alone."""
    if profile is None:
        if scale != 1:
            raise ConfigError("--scale divides what a --profile says: give one")
        return None
    # Imported here: a server without a profile does not wait for it.
    from vfu_dev.profile import read_profile
    from vfu_dev.profile.shipped import profile_path

    path = profile_path(profile)
    read_profile(path)
    return str(path)


def replayed(profile: str | None, scale: int) -> tuple[str, ...]:
    """Return the arguments of `serve` for them. Raises: ConfigError: as `checked`."""
    path = checked(profile, scale)
    if path is None:
        return ()
    from vfu_dev.profile.shipped import serve_arguments

    return serve_arguments(path, scale)
