"""A device class of the user's own: what `vfu-dev serve --device` reports of it.

Only that process imports the class: whatever an author's file does, the lab's process goes on.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from vfu_dev.errors import ConfigError

# Options of `serve` that a class takes or not.
SERVE_OPTIONS = ("memory", "page-size", "access", "fill")
# Importing somebody's file; numpy alone takes a second of a busy machine.
ASK_SECONDS = 120.0


@dataclass(frozen=True)
class OwnDevice:
    """A class as `serve --device` finds it, and which of SERVE_OPTIONS it takes."""

    spec: str
    takes: tuple[str, ...]


def package_environment() -> dict[str, str]:
    """Return an environment in which Python imports this very package, wherever it is started from."""
    env = dict(os.environ)
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join([root, env["PYTHONPATH"]]) if env.get("PYTHONPATH") else root
    return env


@functools.cache
def ask_own_device(spec: str, given: tuple[str, ...] = ()) -> OwnDevice:
    """Return what `serve` says of the class.

    Args: spec: MODULE:CLASS, or FILE.py:CLASS.
          given: arguments of `serve` that the class has to take, `--memory=4M`.
    Raises: ConfigError: there is no such class, it cannot be made, or does not take what is given.
    """
    file, colon, name = spec.rpartition(":")
    if colon and file.endswith(".py"):
        spec = f"{Path(file).absolute()}:{name}"
    argv = [sys.executable, "-m", "vfu_dev", "serve", "--device", spec, *given, "--print-config"]
    try:
        asked = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ASK_SECONDS,
            check=False,
            env=package_environment(),
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"device {spec}: its import takes more than {ASK_SECONDS:g} s") from error
    if asked.returncode:
        lines = asked.stderr.strip().splitlines() or [f"its import ended with status {asked.returncode}"]
        raise ConfigError(lines[-1].removeprefix("vfu-dev: "))
    untaken = re.findall(r"^# ([\w-]+) does not apply$", asked.stdout, re.MULTILINE)
    return OwnDevice(spec, tuple(option for option in SERVE_OPTIONS if option not in untaken))
