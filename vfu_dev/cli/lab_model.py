"""`vfu-dev lab model`: what a migration will do, without one; and how right that was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vfu_dev.cli.load_options import load_of, load_options
from vfu_dev.errors import ConfigError
from vfu_dev.sizes import format_size, parse_size

if TYPE_CHECKING:
    from vfu_dev.lab.model import Link
    from vfu_dev.lab.model_check import Compared


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error


@click.command()
@click.option("--memory", default="64M", show_default=True, callback=_size, help="Device memory.")
@click.option("--page-size", default="4K", show_default=True, callback=_size, help="Unit of dirty tracking.")
@click.option("--initial", callback=_size, metavar="SIZE", help="Written before it begins.  [default: all]")
@load_options
@click.option(
    "--bandwidth",
    default="128M",
    show_default=True,
    callback=_size,
    help="Of the link, a second: QEMU's max-bandwidth, or that of `vfu-dev migrate`.",
)
@click.option(
    "--client",
    default="qemu",
    type=click.Choice(["qemu", "migrate"]),
    show_default=True,
    help="Who moves the device: QEMU, which sends whole blocks of 1 MiB each 0.1 s, or `vfu-dev migrate`.",
)
@click.option("--downtime-limit", default=300.0, show_default=True, help="Milliseconds.")
@click.option(
    "--switchover-bandwidth",
    callback=_size,
    help="What QEMU assumes for the switchover.  [default: measured]",
)
@click.option("--switchover-ack", is_flag=True, help="Stop only once initial data is loaded.")
@click.option(
    "--stop-bandwidth",
    callback=_size,
    help="Once the device stands still, when QEMU lifts its limit.  [default: --bandwidth]",
)
@click.option("--pass-cost", default=0.0, show_default=True, help="Of the start of a pass, milliseconds.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds that a migration is followed.")
@click.option(
    "--against",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Instead: predict every point of a result of `vfu-dev lab run`, and compare.",
)
@click.option(
    "--map",
    "map_file",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="With --against, draw the convergence map.",
)
@click.option("--json", "as_json", is_flag=True, help="Figures as JSON on standard output.")
def model(
    memory: int,
    page_size: int,
    initial: int | None,
    bandwidth: int,
    client: str,
    downtime_limit: float,
    switchover_bandwidth: int | None,
    switchover_ack: bool,
    stop_bandwidth: int | None,
    pass_cost: float,
    timeout: float,
    against: Path | None,
    map_file: Path | None,
    as_json: bool,
    load_arguments: dict[str, Any],
) -> None:
    """Predict a migration: whether it converges, passes, bytes, time, downtime (docs/model.md).

    Examples:

        vfu-dev lab model --memory 1G --rate 8000p --bandwidth 64M

        vfu-dev lab run convergence-map && vfu-dev lab model --against out/experiments/convergence-map
    """
    from vfu_dev.lab.model import border_rate, migrator_link, predict, qemu_link
    from vfu_dev.patterns import LoadSpec

    if against is not None:
        _compare(against, map_file, as_json)
        return
    if map_file is not None:
        raise ConfigError("--map: needs --against")
    if memory < page_size or page_size < 1 or memory % page_size:
        raise ConfigError(f"--memory {memory}: expected whole pages of {page_size} bytes")
    spec = load_of(load_arguments) or LoadSpec("idle")
    make = qemu_link if client == "qemu" else migrator_link
    settings: dict[str, Any] = {
        "downtime_limit_seconds": downtime_limit / 1000,
        "switchover_bandwidth": switchover_bandwidth or 0,
        "stop_bandwidth": stop_bandwidth or 0,
        "pass_seconds": pass_cost / 1000,
    }
    if client == "qemu":
        settings["initial_first"] = switchover_ack
    link: Link = make(bandwidth, **settings)
    found = predict(
        spec,
        memory // page_size,
        link,
        initial_pages=None if initial is None else -(-initial // page_size),
        page_bytes=page_size,
        limit_seconds=timeout,
    )
    border = border_rate(memory, link, page_size)
    if as_json:
        told = {"load": spec.to_dict(), **found.as_dict()}
        click.echo(json.dumps({**told, "border_rate_bytes": None if math.isinf(border) else border}))
        return
    click.echo(f"{format_size(memory)}, {spec.describe()}; {client}, {format_size(link.bandwidth)}/s")
    click.echo(found.text)
    rate = "any rate" if math.isinf(border) else f"up to {format_size(border)}/s"
    click.echo(f"a uniform load converges at {rate} of pages written")


def _compare(folder: Path, map_file: Path | None, as_json: bool) -> None:
    from vfu_dev.lab.model_check import compare

    found = compare(folder)
    if map_file is not None:
        from vfu_dev.report.drawing import write_png
        from vfu_dev.report.model import map_figure

        write_png(map_figure(found), map_file)
    if as_json:
        click.echo(json.dumps([_row(one) for one in found]))
        return
    for one in found:
        said = "converges" if one.prediction.converges else "does not"
        was = f"{one.converged:.0%} converged"
        text = f"{one.name}: model {said}, {was}{'' if one.agrees else '  <-- differs'}"
        if one.measured and one.prediction.converges:
            total, down = one.prediction.total_seconds * 1000, one.prediction.downtime_seconds * 1000
            text += f"; total {total:.0f} / {one.measured['total_ms']:.0f} ms"
            text += f", downtime {down:.0f} / {one.measured['downtime_ms']:.0f} ms"
        click.echo(text)
    agreed = sum(one.agrees for one in found)
    click.echo(f"{agreed} of {len(found)} points as the model says (figures: predicted / measured median)")


def _row(one: Compared) -> dict[str, Any]:
    return {
        "point": one.name,
        "load": one.load.to_dict(),
        "bandwidth": one.link.bandwidth,
        "predicted": one.prediction.as_dict(),
        "converged": one.converged,
        "measured": dict(one.measured),
    }
