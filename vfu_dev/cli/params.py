"""The types and options that commands share: sizes, rates, numbers, levels, both sides of a migration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vfu_dev.cli.shape import Option
from vfu_dev.convergence import DOWNTIME_LIMIT_SECONDS, MAX_BANDWIDTH
from vfu_dev.logs import LOG_LEVELS
from vfu_dev.sizes import parse_bandwidth, parse_size
from vfu_dev.workload.spec import parse_dirty_rate

_Command = TypeVar("_Command", bound=Callable[..., Any])

# click's types are generic in newer releases only.
if TYPE_CHECKING:
    _AnyType = click.ParamType[Any]
else:
    _AnyType = click.ParamType


class Quantity(_AnyType):
    """What people write with a unit.

    Args: name: of the type in --help. allowed: what it takes, in words.
          parse: text to value; raises ValueError with the text and examples.
          shown: value to text that `parse` takes.
    """

    def __init__(
        self, name: str, allowed: str, parse: Callable[[str], Any], shown: Callable[[Any], str]
    ) -> None:
        self.name, self.allowed, self._parse, self.shown = name, allowed, parse, shown

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value; what is no text is one already."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def exact_size(count: int) -> str:
    """Return the shortest text that names exactly `count` bytes."""
    for shift, unit in ((40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if count and count % (1 << shift) == 0:
            return f"{count >> shift}{unit}"
    return str(count)


def _dirty_rate_text(rate: dict[str, float]) -> str:
    ((field, value),) = rate.items()
    return f"{value:g}p" if field == "rate_pages" else exact_size(int(value))


class NumberType(click.IntRange):
    """A whole number, decimal or 0x hexadecimal; `base` is how it is shown."""

    name = "number"

    def __init__(self, low: int | None = None, high: int | None = None, base: int = 10) -> None:
        super().__init__(low, high)
        self.base = base
        if low is None and high is None:
            self.allowed = "a number, decimal or 0x hexadecimal"

    def _describe_range(self) -> str:
        """Say nothing in --help where there are no bounds; click would say `x<=None`."""
        return "" if self.min is None and self.max is None else super()._describe_range()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number; fail with the text."""
        if isinstance(value, str):
            try:
                value = int(value, 0)
            except ValueError:
                self.fail(f"{value!r} is not a number, decimal or 0x hexadecimal", param, ctx)
        return super().convert(value, param, ctx)


class DecimalType(click.FloatRange):
    """A number that may have a fraction."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number; fail with the unit that the metavar says."""
        try:
            float(value)
        except ValueError:
            unit = _UNITS.get(str(getattr(param, "metavar", "")), "")
            self.fail(f"{value!r} is not a number{unit}, such as 5 or 0.5", param, ctx)
        return super().convert(value, param, ctx)


_UNITS = {"MS": " of milliseconds", "SECONDS": " of seconds"}
# Bytes, in binary multiples.
SIZE = Quantity("size", "a size such as 4096, 64K, 16M, 1G", parse_size, exact_size)
# Bytes a second.
BANDWIDTH = Quantity(
    "rate", "bytes a second such as 64K, 128M, or bits such as 1Gbit", parse_bandwidth, exact_size
)
# A field of Workload and its value: the bytes of pages, or pages, a second.
DIRTY_RATE = Quantity(
    "rate",
    "bytes of pages a second such as 8M, or pages such as 2000p",
    parse_dirty_rate,
    _dirty_rate_text,
)
LEVEL = click.Choice([name.lower() for name in LOG_LEVELS], case_sensitive=False)
ON_OFF = click.Choice(["on", "off"])
NUMBER = NumberType()
# A time above 0, and one that may be 0; milliseconds where the metavar is MS.
SECONDS = DecimalType(min=0, min_open=True)
SECONDS_OR_ZERO = DecimalType(min=0)


def option(*names: str, **settings: Any) -> Callable[[_Command], _Command]:
    """Return `click.option` with `aliases`: earlier spellings, which are taken and not shown."""
    return click.option(*names, cls=Option, **settings)


def for_each_side(name: str, **settings: Any) -> Callable[[_Command], _Command]:
    """Return the options `--NAME`, for both sides, `--NAME-source` and `--NAME-destination`, each for one.

    The command gets `NAME`, `NAME_source` and `NAME_destination`; `of_side` says what holds for a side.
    """
    text = settings.pop("help")

    def add(command: _Command) -> _Command:
        for side in ("destination", "source"):
            command = option(f"--{name}-{side}", **settings, help=f"The same, for the {side} alone.")(command)
        return option(f"--{name}", **settings, help=text)(command)

    return add


def of_side(values: dict[str, Any], name: str, side: str) -> Any:
    """Return what the options of `for_each_side` say for one side: its own value, else that for both."""
    name = name.replace("-", "_")
    own = values[f"{name}_{side}"]
    both = values[name]
    if isinstance(both, tuple):  # repeatable: what is for both, then what is for this one
        return (*both, *own)
    return both if own is None else own


def max_bandwidth_option(text: str, aliases: Sequence[str] = ()) -> Callable[[_Command], _Command]:
    """Return `--max-bandwidth`, with QEMU's name and default."""
    return option(
        "--max-bandwidth",
        aliases=aliases,
        type=BANDWIDTH,
        default=exact_size(MAX_BANDWIDTH),
        show_default=True,
        help=f"{text} Bytes a second (128M) or bits (1Gbit); 0 is no limit.",
    )


def switchover_bandwidth_option(aliases: Sequence[str] = ()) -> Callable[[_Command], _Command]:
    """Return `--avail-switchover-bandwidth`, QEMU's name and default; argument `switchover_bandwidth`."""
    return option(
        "--avail-switchover-bandwidth",
        "switchover_bandwidth",
        aliases=aliases,
        type=BANDWIDTH,
        default="0",
        show_default=True,
        help="The bandwidth with which QEMU decides when to stop: it stops once this "
        "times the downtime limit covers all that is left. With 0, QEMU uses the "
        "bandwidth it measures.",
    )


def downtime_limit_option(text: str) -> Callable[[_Command], _Command]:
    """Return `--downtime-limit`, milliseconds, with QEMU's name and default."""
    return option(
        "--downtime-limit",
        type=SECONDS,
        default=DOWNTIME_LIMIT_SECONDS * 1000,
        show_default=True,
        metavar="MS",
        help=text,
    )


def whole_milliseconds(limit: float) -> int:
    """Return `limit` (ms) as QEMU takes it: whole milliseconds, never less than asked for."""
    return math.ceil(limit)
