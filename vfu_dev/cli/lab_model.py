"""`vfu-dev lab model`: predict a migration, and compare predictions with measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vfu_dev.cli.load_options import load_of, load_options
from vfu_dev.cli.output import json_option, show_or_write
from vfu_dev.cli.params import (
    BANDWIDTH,
    SECONDS,
    SECONDS_OR_ZERO,
    SIZE,
    downtime_limit_option,
    max_bandwidth_option,
    option,
    switchover_bandwidth_option,
)
from vfu_dev.cli.shape import Command
from vfu_dev.errors import ConfigError
from vfu_dev.sizes import format_size

if TYPE_CHECKING:
    from vfu_dev.model.link import Link
    from vfu_dev.series.prediction import Compared


@click.command(
    cls=Command,
    examples=[
        "vfu-dev lab model --memory 1G --dirty-rate 8000p --max-bandwidth 64M",
        "vfu-dev lab model --against out/series/convergence-map --map map.png",
    ],
)
@option("--memory", type=SIZE, default="64M", show_default=True, help="Size of the device memory.")
@option("--page-size", type=SIZE, default="4K", show_default=True, help="Unit of dirty tracking.")
@option("--initial", type=SIZE, help="Bytes written before the migration begins.  [default: all of it]")
@load_options()
@max_bandwidth_option(
    "What the client sends at most: QEMU, which keeps to multiples of 10 MiB/s for device state, or "
    "`vfu-dev migrate`.",
    aliases=["--bandwidth"],
)
@option(
    "--client",
    default="qemu",
    type=click.Choice(["qemu", "migrate"]),
    show_default=True,
    help="Who moves the device: QEMU, which sends whole blocks of 1 MiB each 0.1 s, or `vfu-dev migrate`.",
)
@downtime_limit_option("Downtime limit of the device.")
@switchover_bandwidth_option(aliases=["--switchover-bandwidth"])
@option(
    "--switchover-ack", is_flag=True, help="Stop only once the destination has received all initial data."
)
@option(
    "--stop-bandwidth",
    type=BANDWIDTH,
    help="Bandwidth in STOP_COPY, when QEMU lifts its limit.  [default: as --max-bandwidth]",
)
@option(
    "--pass-cost",
    type=SECONDS_OR_ZERO,
    default=0.0,
    show_default=True,
    metavar="MS",
    help="Time that the start of each pass costs, in milliseconds.",
)
@option(
    "--timeout",
    type=SECONDS,
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Simulated time after which a migration counts as not converging.",
)
@option(
    "--against",
    type=click.Path(exists=True, path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Predict every point of this result of `vfu-dev lab run` instead, and compare with the measurement.",
)
@option(
    "--map",
    "map_file",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Draw the convergence map of --against into this file.",
)
@json_option("Write the prediction as JSON", any_word=False)
def model(
    memory: int,
    page_size: int,
    initial: int | None,
    max_bandwidth: int,
    client: str,
    downtime_limit: float,
    switchover_bandwidth: int,
    switchover_ack: bool,
    stop_bandwidth: int | None,
    pass_cost: float,
    timeout: float,
    against: Path | None,
    map_file: Path | None,
    json_path: str | None,
    load_arguments: dict[str, Any],
) -> None:
    """Predict a migration: whether it converges, passes, bytes, time, downtime (vfu-dev docs model)."""
    from vfu_dev.model.link import migrator_link, qemu_link, steps_note
    from vfu_dev.model.predict import border_rate, predict
    from vfu_dev.workload import Workload

    if against is not None:
        _compare(against, map_file, json_path)
        return
    if map_file is not None:
        raise ConfigError("--map: needs --against")
    if memory < page_size or page_size < 1 or memory % page_size:
        raise ConfigError(f"--memory {memory}: expected whole pages of {page_size} bytes")
    if not max_bandwidth:
        raise ConfigError("--max-bandwidth 0: a prediction needs the bandwidth of the link")
    spec = load_of(load_arguments) or Workload("idle")
    make = qemu_link if client == "qemu" else migrator_link
    settings: dict[str, Any] = {
        "downtime_limit_seconds": downtime_limit / 1000,
        "switchover_bandwidth": switchover_bandwidth,
        "stop_bandwidth": stop_bandwidth or 0,
        "pass_seconds": pass_cost / 1000,
    }
    if client == "qemu":
        settings["initial_first"] = switchover_ack
    link: Link = make(max_bandwidth, **settings)
    found = predict(
        spec,
        memory // page_size,
        link,
        initial_pages=None if initial is None else -(-initial // page_size),
        page_bytes=page_size,
        limit_seconds=timeout,
    )
    border = border_rate(memory, link, page_size)
    whole = {"load": spec.to_dict(), **found.as_dict()}
    whole["border_rate_bytes"] = None if math.isinf(border) else border

    def text() -> str:
        steps = steps_note(max_bandwidth) if client == "qemu" else ""
        rate = "any rate" if math.isinf(border) else f"up to {format_size(border)}/s"
        return "\n".join(
            [
                f"{format_size(memory)}, {spec.describe()}; {client}, {format_size(link.bandwidth)}/s{steps}",
                found.text,
                f"a uniform load converges at {rate} of pages written",
            ]
        )

    show_or_write(whole, json_path, text)


def _compare(folder: Path, map_file: Path | None, json_path: str | None) -> None:
    from vfu_dev.series.prediction import compare

    found = compare(folder)
    if map_file is not None:
        from vfu_dev.report.convergence_map import map_figure
        from vfu_dev.report.drawing import write_png

        write_png(map_figure(found), map_file)
    show_or_write({"points": [_row(one) for one in found]}, json_path, lambda: _compared_text(found))


def _compared_text(found: Sequence[Compared]) -> str:
    lines = []
    for one in found:
        said = "converges" if one.prediction.converges else "does not"
        was = f"{one.converged:.0%} converged"
        text = f"{one.name}: model {said}, {was}{'' if one.agrees else '  <-- differs'}"
        if one.measured and one.prediction.converges:
            total, down = one.prediction.total_seconds * 1000, one.prediction.downtime_seconds * 1000
            text += f"; total {total:.0f} / {one.measured['total_ms']:.0f} ms"
            text += f", downtime {down:.0f} / {one.measured['downtime_ms']:.0f} ms"
        lines.append(text)
    agreed = sum(one.agrees for one in found)
    lines.append(f"{agreed} of {len(found)} points as the model says (figures: predicted / measured median)")
    return "\n".join(lines)


def _row(one: Compared) -> dict[str, Any]:
    return {
        "point": one.name,
        "load": one.load.to_dict(),
        "bandwidth": one.link.bandwidth,
        "predicted": one.prediction.as_dict(),
        "converged": one.converged,
        "measured": dict(one.measured),
    }
