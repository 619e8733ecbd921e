"""The pictures of `top`: one panel per device, or one line or column per device in a small terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich.console import Console, ConsoleRenderable, Group
from rich.measure import Measurement
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vfu_dev.convergence import DOWNTIME_LIMIT_SECONDS
from vfu_dev.figures import Sample, Snapshot, verdict
from vfu_dev.sizes import format_size
from vfu_dev.top.watched import Watched

_BLOCKS = " ▁▂▃▄▅▆▇█"
_PLAIN_BLOCKS = " .:-=+*#@"
PANEL_LINES = 9
PANEL_COLUMNS = 50
# Columns of a terminal that has room for totals beside the bars.
NOTES_FROM = 90
_STYLES = {
    "PRE_COPY": "bold blue",
    "PRE_COPY_P2P": "bold blue",
    "STOP_COPY": "bold red",
    "RESUMING": "bold magenta",
    "ERROR": "bold white on red",
    "RUNNING": "green",
}


def sparkline(values: Sequence[float | None], width: int, unicode: bool = True) -> str:
    """Return `values` as `width` characters, each the maximum of its share; unknown counts as none."""
    blocks = _BLOCKS if unicode else _PLAIN_BLOCKS
    known = [value or 0.0 for value in values]
    top = max(known, default=0.0)
    if not known or top <= 0:
        return " " * width
    columns = min(width, len(known))
    line = ""
    for column in range(columns):
        share = known[column * len(known) // columns : max(1, (column + 1) * len(known) // columns)]
        level = max(share) / top * (len(blocks) - 1)
        line += blocks[max(1, round(level)) if max(share) > 0 else 0]
    return line.ljust(width)


def render(
    watched: Sequence[Watched],
    console: Console,
    *,
    alone: bool = True,
    limit_seconds: float = DOWNTIME_LIMIT_SECONDS,
) -> ConsoleRenderable:
    """Return the picture of all devices.

    Args:
        alone: it has the screen to itself; a table that scrolls by is kept to a line a device otherwise.
        limit_seconds: the client's downtime limit, which the device does not know.
    """
    if alone and len(watched) * PANEL_LINES + 1 <= console.height and console.width >= PANEL_COLUMNS:
        keys = Text.assemble(("q quits; bars: ", "dim"), *_legend())
        return Group(*(_panel(one, console, limit_seconds) for one in watched), keys)
    return _table(watched, console, limit_seconds)


def _legend() -> list[tuple[str, str]]:
    return [
        ("initial ", "blue"),
        ("dirty ", "yellow"),
        ("transfer rate, received ", "green"),
        ("downtime", "red"),
    ]


def _unicode(console: Console) -> bool:
    return console.encoding.startswith("utf") and not console.is_dumb_terminal


def _panel(one: Watched, console: Console, limit_seconds: float) -> Panel:
    snapshot = one.snapshot
    if snapshot is None or one.error is not None:
        return Panel(Text(one.error or "no answer yet", style="red"), title=str(one.path), height=PANEL_LINES)
    with_notes = console.width >= NOTES_FROM
    width = max(10, min(60, console.width - (54 if with_notes else 40)))
    samples = one.latest()
    unicode = _unicode(console)
    rows = Table.grid(padding=(0, 1))
    rows.add_column(style="dim", min_width=18, no_wrap=True)
    rows.add_column(no_wrap=True)
    rows.add_column(justify="right", min_width=12, no_wrap=True)
    if with_notes:
        rows.add_column(no_wrap=True, overflow="ellipsis")
    if not samples:
        text = "no migration yet: vfu-dev migrate SOCKET OTHER, or QEMU's migrate"
        rows.add_row(text, "", "")
    elif any(sample.state == "RESUMING" for sample in samples):
        _received(rows, snapshot, samples, width, unicode)
    else:
        _sent(rows, snapshot, samples, width, unicode, limit_seconds, with_notes)
    running = snapshot.state.startswith("PRE_COPY") or snapshot.state in ("STOP_COPY", "RESUMING")
    title = Text.assemble(
        (snapshot.device, "bold"),
        "  ",
        (snapshot.state, _STYLES.get(snapshot.state, "yellow")),
        ("" if running or not samples else "  (bars: the last migration)", "dim"),
    )
    return Panel(Group(_verdict(snapshot), rows), title=title, title_align="left", height=PANEL_LINES)


def _sent(
    rows: Table,
    snapshot: Snapshot,
    samples: Sequence[Sample],
    width: int,
    unicode: bool,
    limit_seconds: float,
    with_notes: bool,
) -> None:
    """Add what a source has left to send, and how fast it goes."""
    forecast = snapshot.forecast
    predicted = forecast["predicted_downtime_seconds"]
    above = predicted is not None and predicted > limit_seconds
    curves: tuple[tuple[str, list[float | None], str, str], ...] = (
        ("initial", [s.initial_bytes for s in samples], _bytes(forecast["initial_bytes"]), "blue"),
        ("dirty", [s.dirty_bytes for s in samples], _bytes(forecast["dirty_bytes"]), "yellow"),
        (
            "transfer rate",
            [s.transfer_rate_bytes_per_second for s in samples],
            _bytes(forecast["transfer_rate_bytes_per_second"], "/s"),
            "green",
        ),
        (
            "dirty rate",
            [s.dirty_rate_bytes_per_second for s in samples],
            _bytes(forecast["dirty_rate_bytes_per_second"], "/s"),
            "yellow",
        ),
        (
            "predicted downtime",
            [s.predicted_downtime_seconds for s in samples],
            _seconds(predicted),
            "red",
        ),
    )
    notes = _notes(snapshot, limit_seconds)
    for (name, values, now, style), note in zip(curves, notes, strict=True):
        cells: list[str | Text] = [name, Text(sparkline(values, width, unicode), style=style)]
        is_late = above and name == "predicted downtime"
        cells.append(Text(now, style="bold red" if is_late else ""))
        if with_notes:
            cells.append(Text(note, style="dim"))
        rows.add_row(*cells)


def _received(rows: Table, snapshot: Snapshot, samples: Sequence[Sample], width: int, unicode: bool) -> None:
    """Add what a destination received, and what became of it."""
    arrived = [sample for sample in samples if sample.state == "RESUMING"]
    sizes: list[float | None] = [sample.transferred_bytes for sample in arrived]
    rates: list[float | None] = [None]
    for before, after in pairwise(arrived):
        seconds = after.time - before.time
        count = after.transferred_bytes - before.transferred_bytes
        rates.append(count / seconds if seconds > 0 else None)
    whole = arrived[-1].time - arrived[0].time
    mean = arrived[-1].transferred_bytes / whole if whole > 0 else None
    rows.add_row("received", Text(sparkline(sizes, width, unicode), "green"), _bytes(snapshot.received_bytes))
    rows.add_row("mean transfer rate", Text(sparkline(rates, width, unicode), "green"), _bytes(mean, "/s"))
    ended = ", ".join(f"{count} {how}" for how, count in snapshot.totals.resumes.items() if count) or "none"
    rows.add_row("incoming, in total", ended, _bytes(snapshot.totals.received_bytes))
    counters = snapshot.counters
    rows.add_row("MMIO", f"{counters['region_reads']} reads, {counters['region_writes']} writes", "")


def _notes(snapshot: Snapshot, limit_seconds: float) -> tuple[str, ...]:
    totals = snapshot.totals
    completed, sent = totals.saves["completed"], totals.saves["sent"]
    lost = sum(totals.saves.values()) - completed - sent
    return (
        f"sent {_bytes(sum(totals.sent_bytes.values()))}",
        f"passes {totals.passes}",
        f"saves {completed} ok, {sent} sent, {lost} lost",
        f"MMIO {snapshot.counters['region_reads']} r, {snapshot.counters['region_writes']} w",
        f"limit {_seconds(limit_seconds)}, measured {_seconds(snapshot.last_downtime_seconds)}",
    )


def _verdict(snapshot: Snapshot) -> Text:
    converging = snapshot.forecast["converging"]
    style = "bold red" if converging is False or snapshot.state == "ERROR" else "green" if converging else ""
    return Text(verdict(snapshot), style=style, no_wrap=True, overflow="ellipsis")


def _table(watched: Sequence[Watched], console: Console, limit_seconds: float) -> ConsoleRenderable:
    """Return a line per device, or if that is too wide a column per device, as many as fit."""
    received = any(one.snapshot is not None and one.snapshot.received_bytes for one in watched)
    names = ["device", "state", "converges", "initial", "dirty", "transfer rate", "dirty rate", "predicted"]
    names += ["received", "left"] if received else ["left"]
    for bar in (8 if received else 16, 4):
        rows = [_cells(one, bar, received, console, limit_seconds) for one in watched]
        # An error is as long as it is: it takes the lines that it needs, in the last column.
        if _fits(_lines(names, [[*row[:-1], str(row[-1])[:bar]] for row in rows]), console):
            return _lines(names, rows)
    parts = []
    while rows:
        count = len(rows)
        while count > 1 and not _fits(_columns(names, rows[:count]), console):
            count -= 1
        parts.append(_columns(names, rows[:count]))
        rows = rows[count:]
    return Group(*parts)


def _lines(names: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> Table:
    table = Table(box=None, pad_edge=False, expand=False)
    for name in names[:-1]:
        is_text = name in ("device", "state", "converges")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    table.add_column(names[-1])
    for row in rows:
        table.add_row(*row)
    return table


def _columns(names: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    for _ in rows:
        table.add_column(overflow="fold")
    for name, *cells in zip(names, *rows, strict=True):
        table.add_row(name, *cells)
    return table


def _fits(table: Table, console: Console) -> bool:
    return Measurement.get(console, console.options.update(max_width=1000), table).maximum <= console.width


def _cells(
    one: Watched, bar: int, received: bool, console: Console, limit_seconds: float
) -> list[str | Text]:
    """Return what the table shows of a device."""
    snapshot = one.snapshot
    if snapshot is None or one.error is not None:
        dashes = ["-"] * (6 + received)
        return [one.path.name, Text("gone", style="red"), *dashes, one.error or "no answer yet"]
    forecast = snapshot.forecast
    left = [(s.initial_bytes or 0) + (s.dirty_bytes or 0) for s in one.latest()]
    return [
        snapshot.device,
        Text(snapshot.state, style=_STYLES.get(snapshot.state, "yellow")),
        _converges(snapshot),
        _bytes(forecast["initial_bytes"]),
        _bytes(forecast["dirty_bytes"]),
        _bytes(forecast["transfer_rate_bytes_per_second"], "/s"),
        _bytes(forecast["dirty_rate_bytes_per_second"], "/s"),
        _limited(forecast["predicted_downtime_seconds"], limit_seconds),
        *([_bytes(snapshot.received_bytes)] if received else []),
        sparkline(left, bar, _unicode(console)).rstrip(),
    ]


def _limited(predicted: float | None, limit_seconds: float) -> Text:
    """Return a predicted downtime; one above the client's limit stands out."""
    above = predicted is not None and predicted > limit_seconds
    return Text(_seconds(predicted), style="bold red" if above else "")


def _converges(snapshot: Snapshot) -> Text:
    if not snapshot.state.startswith("PRE_COPY"):
        return Text("-")
    converging = snapshot.forecast["converging"]
    if converging is None:
        return Text("?")
    return Text("yes", style="green") if converging else Text("NO", style="bold red")


def _bytes(count: float | None, suffix: str = "") -> str:
    return "-" if count is None else format_size(count) + suffix


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 10 else f"{value:.1f} s"
