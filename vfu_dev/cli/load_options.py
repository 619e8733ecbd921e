"""Options that describe a load, the same for every command that takes one."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from vfu_dev.cli.params import DIRTY_RATE, NUMBER, SIZE, DecimalType, option
from vfu_dev.errors import ConfigError
from vfu_dev.workload import PAGE_PATTERNS, Workload
from vfu_dev.workload.spec import RATE_KEYS

F = TypeVar("F", bound=Callable[..., Any])

_RATES = ("dirty_rate", "write_rate", "rate")

# Argument of `load_of` -> its option. An option that is not given is None: the defaults are Workload's.
_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "dirty_rate": option(
        "--dirty-rate",
        type=DIRTY_RATE,
        help="Dirty rate: bytes of pages a second (8M), or pages a second (2000p). A "
        "migration has to send these again.",
    ),
    "write_rate": option(
        "--write-rate",
        type=SIZE,
        metavar="RATE",
        help="Bytes to write a second (8M), instead of --dirty-rate.",
    ),
    # What both were called; pages with a p, else bytes written.
    "rate": option("--rate", hidden=True),
    "write_size": option(
        "--write-size", aliases=["--write"], type=SIZE, help="Bytes of one write, 1 to 1M.  [default: 8]"
    ),
    "pattern": option(
        "--pattern",
        type=click.Choice(["idle", *PAGE_PATTERNS]),
        help="Which pages are written (vfu-dev docs load).  [default: uniform]",
    ),
    "seed": option("--seed", type=NUMBER, help="Random seed of the load.  [default: 1]"),
    "hot_fraction": option(
        "--hot-fraction",
        type=DecimalType(0, 1),
        help="Fraction of the pages that is hot, with --pattern hotset.  [default: 0.1]",
    ),
    "hot_share": option(
        "--hot-share",
        type=DecimalType(0, 1),
        help="Fraction of the writes that goes to the hot pages, with --pattern hotset.  [default: 0.9]",
    ),
    "zipf_exponent": option(
        "--zipf-exponent",
        type=DecimalType(0, 10),
        help="How uneven --pattern zipf is; 0 is uniform.  [default: 1.0]",
    ),
    "burst": option(
        "--burst",
        metavar="DUTY:SECONDS",
        help="Make all writes in the first part (DUTY) of each period: 0.2:1 for 200 ms of each second.",
    ),
    "trace": option(
        "--trace", type=click.Path(), metavar="FILE", help="Repeat a recording: CSV time,offset,length."
    ),
    "spec": option(
        "--spec",
        type=click.Path(),
        metavar="FILE",
        help="Take the load from this TOML or JSON file, phases and all; the other options change it.",
    ),
}


# What a message of Workload's names -> the option that says it here.
_NAMED = {
    "write_bytes": "--write-size",
    "rate_bytes": "--write-rate",
    "rate_pages": "--dirty-rate",
    "dirty_rate_bytes": "--dirty-rate",
    **{
        name: f"--{name.replace('_', '-')}" for name in ("seed", "hot_fraction", "hot_share", "zipf_exponent")
    },
}


def load_options(dirty_rate: str | None = None) -> Callable[[F], F]:
    """Return a decorator that adds the options of a load; the function gets one dict, `load_arguments`.

    Args: dirty_rate: default of `--dirty-rate` when no option describes a load; None: no load.
    """

    def add(function: F) -> F:
        @functools.wraps(function)  # click keeps the options so far in the function's dict
        def gather(**arguments: Any) -> Any:
            given = {name: arguments.pop(name) for name in _OPTIONS}
            says = [given[name] for name in (*_RATES, "trace", "spec")]
            if dirty_rate is not None and given["pattern"] != "idle" and says == [None] * len(says):
                given["dirty_rate"] = DIRTY_RATE.convert(dirty_rate, None, None)
            return function(**arguments, load_arguments=given)

        wrapped: Any = gather
        for option_of in reversed(_OPTIONS.values()):
            wrapped = option_of(wrapped)
        if dirty_rate is not None:
            wrapped.__click_params__[-1].help += f"  [default: {dirty_rate}]"
        return wrapped  # type: ignore[no-any-return]

    return add


def load_of(arguments: dict[str, Any]) -> Workload | None:
    """Return the load that the options describe; None when there are none of them.

    Raises: ConfigError: what cannot be, naming the option.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    if not given:
        return None
    rates = [f"--{name.replace('_', '-')}" for name in _RATES if name in given]
    if len(rates) > 1:
        raise ConfigError(f"{' and '.join(rates)}: expected one of them")
    path = given.pop("spec", None)
    values: dict[str, Any] = {} if path is None else read_spec(Path(path))
    if rates:
        values = {name: value for name, value in values.items() if name not in RATE_KEYS}
    if "write_size" in given:
        values.pop("write_bytes", None)
    given |= given.pop("dirty_rate", {})
    if "burst" in given:
        given["burst"] = _burst(given.pop("burst"))
    try:
        spec = Workload.from_dict(values | given)
    except ConfigError as error:
        field, space, rest = str(error).partition(" ")
        raise ConfigError(f"{_NAMED.get(field, field)}{space}{rest}") from error
    # The process that reads the file may have another working directory.
    return spec if spec.trace is None else replace(spec, trace=str(Path(spec.trace).absolute()))


def read_spec(path: Path) -> dict[str, Any]:
    """Return what a TOML or JSON file says.

    Raises: ConfigError: it cannot be read, or is not an object.
    """
    import tomllib  # as in toml_source

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
