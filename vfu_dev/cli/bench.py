"""`vfu-dev bench`: what the device costs, as ratios taken in one run, and whether they are within limits."""

from __future__ import annotations

import sys
import time

import click
from rich.console import Console
from rich.table import Table

from vfu_dev.bench.figures import FULL, QUICK, Failure, Figure
from vfu_dev.bench.limits import LIMITS
from vfu_dev.bench.run import CASES, FIGURES, possible, run
from vfu_dev.cli import EXIT_FAILED, EXIT_LESS
from vfu_dev.cli.output import json_option, write_json
from vfu_dev.cli.shape import TO_STDOUT, Command
from vfu_dev.sizes import format_count, format_left


@click.command(
    cls=Command,
    epilog="`vfu-dev docs bench` says what each figure is.",
    examples=["vfu-dev bench --check --json bench.json", "vfu-dev bench mmio scraped --quick"],
)
@click.argument("cases", nargs=-1, type=click.Choice(list(CASES)), metavar="[CASE]...")
@click.option(
    "--quick", is_flag=True, help="Do a tenth of the work, to see that it runs; the figures are rough."
)
@click.option(
    "--check",
    is_flag=True,
    help="Exit with status 1 when a ratio exceeds its limit, 3 when the machine did "
    "other work and nothing is judged.",
)
@click.option(
    "--with-busy-core",
    is_flag=True,
    help="Keep one processor busy meanwhile, as a guest's virtual CPU does, and have all else on the others; "
    "reported, not judged.",
)
@json_option("Also write the figures as JSON", any_word=False)
def command(
    cases: tuple[str, ...], quick: bool, check: bool, with_busy_core: bool, json_path: str | None
) -> None:
    """Measure CASEs (all): MMIO at rest, scraped, polled, in PRE_COPY; migration data, scans, DMA, and more.

    Nearly every figure is a ratio to a device in C, both taken in turns, so that other work on the machine
    meets both. A line gives both sides, the median of the rounds' ratios with their quartiles, and the limit;
    a median beyond it is BROKEN. If the machine did other work meanwhile, figures are reported, not judged.
    A case that fails is a line of its own; the others are measured, and the exit status is 1.

    CASEs: mmio, scraped, polled, precopy, stream-out, stream-in, window, scan, audit, dma, start, forecast,
    front-ends, qemu, qemu-downtime. The last three go through this project's QEMU (vfu-dev build qemu).

    Client and server each have a processor, which is kept from halting. Memory is touched before each case.
    """
    console = Console(stderr=json_path == TO_STDOUT, highlight=False)

    names, why_not = (list(cases), "") if cases else possible()
    if why_not:
        click.echo(why_not, err=True)
    began, came = time.monotonic(), 0
    total = sum(FIGURES[name] for name in names)

    with console.status("measuring") as status:

        def reporter(one: Figure | Failure) -> None:
            nonlocal came, total
            if isinstance(one, Failure):
                total -= one.missing
                if not console.is_terminal:
                    console.print(_failed(one.case, one.error), markup=False, soft_wrap=True)
                return
            came += 1
            far = format_left(came, total, came / (time.monotonic() - began))
            status.update(f"measuring: {format_count(came, 'figure')}, {far}")
            if not console.is_terminal:
                console.print(f"{_line(one)}  ({far})", markup=False, soft_wrap=True)

        effort = QUICK if quick else FULL
        result = run(names, effort, reporter, with_busy_core=with_busy_core)
    failures = result["failures"]
    assert isinstance(failures, list)
    if console.is_terminal:
        console.print(_table(result))
        for one in failures:
            console.print(_failed(one["case"], one["error"]), markup=False, soft_wrap=True, style="bold red")
    console.print(
        f"each case began with {result['touched_mib']} MiB or less of memory that the host had given already",
        markup=False,
        soft_wrap=True,
    )
    write_json(result, json_path)
    if not result["judged"]:
        console.print(_not_judged(result), markup=False, soft_wrap=True)
    if failures:
        sys.exit(EXIT_FAILED)
    if check and not result["judged"]:
        sys.exit(EXIT_LESS)
    if check and not result["kept"]:
        sys.exit(EXIT_FAILED)


def _not_judged(result: dict[str, object]) -> str:
    """Say why the figures are no verdict."""
    if result["busy_core"]:
        return "reported, not judged: one processor was kept busy"
    assert isinstance(result["other_work"], float)
    figures = result["figures"]
    assert isinstance(figures, list)
    return f"reported, not judged: other work took {result['other_work']:.0%} of the processors' time" + (
        "" if all(one["kept"] for one in figures) else "; BROKEN is no verdict on such a machine"
    )


def _failed(case: str, error: str) -> str:
    return f"{case:28} FAILED: {error}"


def _line(figure: Figure) -> str:
    limit = LIMITS[figure.name]
    return (
        f"{figure.name:28} {figure.ours:9.1f} {figure.unit:5} {figure.peer_name} {figure.peer:9.1f}   "
        f"ratio {figure.ratio:.2f} ({figure.ratio_low:.2f}..{figure.ratio_high:.2f}), "
        f"limit {'<=' if limit.better == 'less' else '>='} {limit.ratio:g}"
        + ("" if figure.kept else "  BROKEN")
    )


def _table(result: dict[str, object]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("figure", "ours", "peer", "", "ratio", "quartiles", "limit"):
        table.add_column(name, justify="left" if name in ("figure", "") else "right", no_wrap=True)
    figures = result["figures"]
    assert isinstance(figures, list)
    for one in figures:
        sign = "<=" if one["better"] == "less" else ">="
        table.add_row(
            one["name"],
            f"{one['ours']:.1f} {one['unit']}",
            f"{one['peer']:.1f} {one['unit']}",
            one["peer_name"],
            f"{one['ratio']:.2f}",
            f"{one['ratio_low']:.2f}..{one['ratio_high']:.2f}",
            f"{sign} {one['limit']:g}",
            style=None if one["kept"] else "bold red",
        )
    return table
