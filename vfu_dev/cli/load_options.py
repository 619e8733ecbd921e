"""Options that describe a load, the same for every command that takes one."""

from __future__ import annotations

import functools
import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from vfu_dev.errors import ConfigError
from vfu_dev.patterns import PAGE_PATTERNS, LoadSpec

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--pattern",
        type=click.Choice(["idle", *PAGE_PATTERNS]),
        help="Which pages.  [default: uniform]",
    ),
    click.option(
        "--rate",
        metavar="RATE",
        help="Bytes written a second (8M), or pages (2000p): a page is what a migration sends.",
    ),
    click.option("--write", metavar="SIZE", help="Bytes of one write, 1 to 1M.  [default: 8]"),
    click.option("--seed", type=int, help="Of everything random.  [default: 1]"),
    click.option(
        "--hot-fraction", type=float, metavar="F", help="hotset: part of the pages.  [default: 0.1]"
    ),
    click.option("--hot-share", type=float, metavar="F", help="hotset: part of the writes.  [default: 0.9]"),
    click.option("--zipf-exponent", type=float, metavar="S", help="zipf: 0 is uniform.  [default: 1.0]"),
    click.option(
        "--burst",
        metavar="DUTY:SECONDS",
        help="All writes of each period in its first part: 0.2:1 for 200 ms of each second.",
    ),
    click.option("--trace", type=click.Path(), metavar="FILE", help="A recording: CSV time,offset,length."),
    click.option(
        "--spec",
        type=click.Path(),
        metavar="FILE",
        help="A load as TOML or JSON, phases and all; the other options change it.",
    ),
)


def load_options(function: F) -> F:
    """Add the options of a load; the function gets them as one dict, `load_arguments`."""

    @functools.wraps(function)  # click keeps the options so far in the function's dict
    def gather(**arguments: Any) -> Any:
        names = ["pattern", "rate", "write", "seed", "hot_fraction", "hot_share", "zipf_exponent"]
        names += ["burst", "trace", "spec"]
        arguments["load_arguments"] = {name: arguments.pop(name) for name in names}
        return function(**arguments)

    wrapped: Any = gather
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


def load_of(arguments: dict[str, Any]) -> LoadSpec | None:
    """Return the load that the options describe; None when there are none of them.

    Raises:  ConfigError: what cannot be, naming it.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    if not given:
        return None
    path = given.pop("spec", None)
    values: dict[str, Any] = {} if path is None else read_spec(Path(path))
    if "write" in given:
        given["write_bytes"] = given.pop("write")
    if "burst" in given:
        given["burst"] = _burst(given.pop("burst"))
    if "rate" in given:
        values = {name: value for name, value in values.items() if not name.startswith("rate")}
    spec = LoadSpec.from_dict(values | given)
    # Whoever reads the file may be a process with another working directory.
    return spec if spec.trace is None else replace(spec, trace=str(Path(spec.trace).absolute()))


def read_spec(path: Path) -> dict[str, Any]:
    """Return what a TOML or JSON file says.

    Raises:  ConfigError: it cannot be read, or is not an object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows write a byte order mark
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--spec {path}: {reason}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--spec {path}: expected an object")
    return values


def _burst(text: str) -> dict[str, float]:
    duty, colon, seconds = text.partition(":")
    try:
        if colon:
            return {"duty": float(duty), "period_seconds": float(seconds)}
    except ValueError:
        pass
    raise ConfigError(f"--burst {text}: expected DUTY:SECONDS, 0.2:1 for 200 ms of each second")
