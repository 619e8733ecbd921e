"""`vfu-dev profile`: a device's behaviour in migration, from a trace of somebody's hardware."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vfu_dev.cli import EXIT_FAILED
from vfu_dev.cli.completing import offer, shipped_profiles
from vfu_dev.cli.output import json_option, possible, show_or_write, write_json
from vfu_dev.cli.params import SECONDS_OR_ZERO, DecimalType, NumberType
from vfu_dev.cli.profile_record import record
from vfu_dev.cli.shape import TO_STDOUT, Command, Group
from vfu_dev.errors import ConfigError
from vfu_dev.sizes import format_count, parse_bandwidth

if TYPE_CHECKING:
    from vfu_dev.profile.model import MigrationSettings

_Command = TypeVar("_Command", bound=Callable[..., Any])
_PARTS = DecimalType(0, 100)


@click.group(
    cls=Group,
    examples=[
        "vfu-dev profile import source.log destination.log -o nic.toml",
        "vfu-dev profile show nic.toml",
    ],
)
def command() -> None:
    """A device's behaviour in migration: from a trace into a file, shown, compared."""


command.add_command(record)


def _output_option(text: str) -> Callable[[_Command], _Command]:
    return click.option(
        "-o", "--output", required=True, metavar="FILE.toml", callback=possible, help=f"{text} to this file."
    )


@command.command(
    "import",
    cls=Command,
    examples=[
        "vfu-dev profile import source.log destination.log -o nic.toml",
        "vfu-dev profile import trace-4711 -o nic.toml --device 2 --with qemu=10.0.2",
        "vfu-dev profile import vm.log.xz -o nic.toml --with max-bandwidth=10Gbit --with downtime-limit=300",
    ],
)
@click.argument("traces", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="TRACE...")
@_output_option("Write the profile")
@click.option("--name", help="Name of the profile.  [default: that of the file, without .toml]")
@click.option("--about", help="One sentence about the profile.")
@click.option(
    "--device",
    metavar="NUMBER|NAME",
    help="Which device, where a trace has several: its number in the order of the trace, or its name.",
)
@click.option(
    "--migration",
    type=NumberType(low=1),
    metavar="NUMBER",
    help="Take this migration of each trace alone.  [default: all; sizes are of the last that completed]",
)
@click.option(
    "--with",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="How the migration was set up, which no trace says: qemu=10.0.2, max-bandwidth=10Gbit, "
    "downtime-limit=300, multifd-channels=4, switchover-ack=on, guest='fio on the NIC'; repeatable.",
)
@click.option(
    "--lenient",
    is_flag=True,
    help="Leave out events that cannot be read, and say how many; otherwise the first one is an error.",
)
@json_option("Write what was made, and what is to be noted, as JSON", any_word=False)
def import_(
    traces: tuple[Path, ...],
    output: str,
    name: str | None,
    about: str | None,
    device: str | None,
    migration: int | None,
    settings: tuple[str, ...],
    lenient: bool,
    json_path: str | None,
) -> None:
    """Make a profile of a device from traces of QEMU, or from calls that `profile record` recorded.

    TRACE is a log or a simple trace of QEMU 8.1 to 11.1, of the source or of the destination, or of both in
    any order; it may be compressed by gzip or xz. vfu-dev docs recording says how to record one.

    The profile has no name of a device or host, and nothing of what was migrated. A value that a trace does
    not show is not in it.
    """
    from vfu_dev.profile import profile_text
    from vfu_dev.profile.importing import Wanted, import_profile
    from vfu_dev.profile.show import sentence

    wanted = Wanted(device, migration, lenient)
    profile, notes = import_profile(
        traces, name or Path(output).name.removesuffix(".toml"), wanted, migration_of(settings), about
    )
    missing = [key for key in _settings() if getattr(profile.migration, _settings()[key]) is None]
    if missing:
        notes.append(f"not known: {', '.join(missing)}; say them by --with KEY=VALUE")
    text = profile_text(profile)
    Path(output).write_text(text, encoding="utf-8")
    for note in notes:
        click.echo(f"vfu-dev profile import: {note}", err=True)
    made = {"file": output, "sentence": sentence(profile), "notes": notes}
    show_or_write(made, json_path, lambda: f"{made['sentence']}\n{output}")


def migration_of(settings: tuple[str, ...]) -> MigrationSettings:
    """Return what `--with` says. Raises: ConfigError: no such key, or not such a value."""
    from vfu_dev.profile.kinds import keys_of
    from vfu_dev.profile.model import MigrationSettings

    keys = _settings()
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in keys:
            raise ConfigError(f"--with {setting}: expected KEY=VALUE, KEY one of {', '.join(keys)}")
        kind = keys_of(MigrationSettings)[keys[key]].kind
        try:
            found[keys[key]] = kind.parse(_value(key, text))
        except ValueError:
            raise ConfigError(f"--with {setting}: expected {_EXPECTED.get(key, kind.allowed)}") from None
    return MigrationSettings(**found)


def _settings() -> dict[str, str]:
    """Return KEY of `--with` -> member of `MigrationSettings`."""
    from vfu_dev.profile.kinds import keys_of
    from vfu_dev.profile.model import MigrationSettings

    return {key.removesuffix("_ms").replace("_", "-"): key for key in keys_of(MigrationSettings)}


_EXPECTED = {"switchover-ack": "on or off", "max-bandwidth": "a rate such as 128M, 10Gbit"}


def _value(key: str, text: str) -> Any:
    match key:
        case "max-bandwidth":
            return parse_bandwidth(text)
        case "downtime-limit":
            return float(text)
        case "multifd-channels":
            return int(text)
        case "switchover-ack" if text in ("on", "off"):
            return text == "on"
    return text


@command.command(
    cls=Command,
    examples=[
        "vfu-dev profile show mlx5-300mb",
        "vfu-dev profile show nic.toml --plot nic.png --json nic.json",
    ],
)
@click.argument("file", metavar="NAME|FILE", shell_complete=offer(shipped_profiles))
@click.option(
    "--plot",
    metavar="FILE.png|FILE.svg",
    callback=possible,
    help="Also draw it into this file: sizes over time, calls, changes of state.",
)
@json_option("Write sentence and profile as JSON", any_word=False)
def show(file: str, plot: str | None, json_path: str | None) -> None:
    """Show a profile: a sentence, a table of its values with their marks, its curves."""
    from vfu_dev.profile import profile_text, read_profile
    from vfu_dev.profile.shipped import profile_path
    from vfu_dev.profile.show import sentence

    profile = read_profile(profile_path(file))
    if plot is not None:
        if not plot.endswith((".png", ".svg")):
            raise ConfigError(f"--plot {plot}: expected a name that ends in .png or .svg")
        from vfu_dev.report.profile import draw_profile

        draw_profile(profile, Path(plot))
    write_json({"sentence": sentence(profile), "profile": tomllib.loads(profile_text(profile))}, json_path)
    if json_path != TO_STDOUT:
        _print(profile)


def _print(profile: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from vfu_dev.profile.compare import from_beginning
    from vfu_dev.profile.keys import entries
    from vfu_dev.profile.kinds import CurveKind
    from vfu_dev.profile.show import drawn, mark_of, sentence, shown

    console = Console(highlight=False)
    console.print(sentence(profile), markup=False, soft_wrap=True)
    for text in (profile.source, profile.about):
        if text:
            console.print(f"{profile.origin or ''}: {text}" if text is profile.source else text, markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Key", no_wrap=True)
    table.add_column("Value", overflow="fold")
    table.add_column("Mark", no_wrap=True)
    for entry in entries(profile, context=True):
        table.add_row(entry.key, shown(entry.kind, entry.value), mark_of(entry.value))
    console.print()
    console.print(table)
    for entry in entries(profile):
        if isinstance(entry.kind, CurveKind):
            end = entry.plain[-1][0]
            console.print(f"\n{entry.key}, 0 to {end:.3g} s", markup=False)
            curve = from_beginning(entry.key, entry.plain)
            console.print(drawn(curve, steps=entry.key.endswith(".steps")), markup=False)


@command.command(
    cls=Command,
    examples=["vfu-dev profile diff old.toml new.toml", "vfu-dev profile diff a.toml b.toml --sizes 5"],
)
@click.argument("first", metavar="NAME|FILE", shell_complete=offer(shipped_profiles))
@click.argument("second", metavar="NAME|FILE", shell_complete=offer(shipped_profiles))
@click.option(
    "--sizes",
    type=_PARTS,
    default=0.0,
    show_default=True,
    metavar="PERCENT",
    help="By how much sizes and rates may differ.",
)
@click.option(
    "--times",
    type=_PARTS,
    default=10.0,
    show_default=True,
    metavar="PERCENT",
    help="By how much times may differ: of a distribution its mean, and its quantiles of 50 and 90 %.",
)
@click.option(
    "--least",
    type=SECONDS_OR_ZERO,
    default=2.0,
    show_default=True,
    metavar="MS",
    help="Times may always differ by this, in milliseconds.",
)
@click.option("--measured", is_flag=True, help="Compare only what is measured in both.")
@json_option("Write the differences as JSON", any_word=False)
def diff(
    first: str,
    second: str,
    sizes: float,
    times: float,
    least: float,
    measured: bool,
    json_path: str | None,
) -> int:
    """Compare two profiles: exit status 1 where they differ by more than is allowed.

    Names, sources, marks and what was recorded are not compared.
    """
    from vfu_dev.profile import read_profile
    from vfu_dev.profile.compare import Tolerance, differences
    from vfu_dev.profile.shipped import profile_path

    tolerance = Tolerance(sizes / 100, times / 100, least / 1000)
    a, b = (read_profile(profile_path(one)) for one in (first, second))
    found = differences(a, b, tolerance, measured=measured)
    show_or_write(
        {"same": not found, "differences": [one.to_json() for one in found]},
        json_path,
        lambda: "\n".join(f"{one.key}: {one.text}" for one in found) or "the same, within what is allowed",
    )
    if found:
        click.echo(f"vfu-dev profile diff: {format_count(len(found), 'value')} not the same", err=True)
    return EXIT_FAILED if found else 0


@command.command(cls=Command, examples=["vfu-dev profile fit nic.toml -o nic-fitted.toml"])
@click.argument("file", metavar="NAME|FILE", shell_complete=offer(shipped_profiles))
@_output_option("Write the parametric profile")
@json_option("Write what was fitted as JSON", any_word=False)
def fit(file: str, output: str, json_path: str | None) -> None:
    """Make a parametric profile from a recorded one: a rate for a curve, a constant for steps, fewer groups.

    What is fitted is marked as assumed, and by how much it misses what was recorded is printed. A curve that
    no rate, no steps and no refills describe to within 5 % stays as it is.
    """
    from dataclasses import asdict

    from vfu_dev.profile import profile_text, read_profile
    from vfu_dev.profile.fit import fit as fitted_of
    from vfu_dev.profile.shipped import profile_path

    profile, fitted = fitted_of(read_profile(profile_path(file)))
    Path(output).write_text(profile_text(profile), encoding="utf-8")
    lines = [f"{one.key}: {one.was} -> {one.now}, {one.error_part:.1%} off at most" for one in fitted]
    show_or_write(
        {"file": output, "fitted": [asdict(one) for one in fitted]},
        json_path,
        lambda: "\n".join(lines or ["nothing to fit: it has parameters already"]),
    )
