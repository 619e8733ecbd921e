"""What `top` draws: a panel a device, or a line each when the terminal is too small for that."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, ConsoleRenderable, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vfu_dev.figures import Snapshot, verdict
from vfu_dev.sizes import format_size
from vfu_dev.top.watched import Watched

_BLOCKS = " ▁▂▃▄▅▆▇█"
_PLAIN_BLOCKS = " .:-=+*#@"
PANEL_LINES = 9
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


def render(watched: Sequence[Watched], console: Console, *, alone: bool = True) -> ConsoleRenderable:
    """Return the picture of all devices.

    Args:    alone: it has the screen to itself; a table that scrolls by is kept to a line a device otherwise.
    """
    if alone and len(watched) * PANEL_LINES + 1 <= console.height:
        return Group(*(_panel(one, console) for one in watched), Text("q quits", style="dim"))
    return _table(watched, console)


def _unicode(console: Console) -> bool:
    return console.encoding.startswith("utf") and not console.is_dumb_terminal


def _panel(one: Watched, console: Console) -> Panel:
    snapshot = one.snapshot
    if snapshot is None or one.error is not None:
        return Panel(Text(one.error or "no answer yet", style="red"), title=str(one.path), height=PANEL_LINES)
    width = max(10, min(60, console.width - 54))
    samples = one.latest()
    unicode = _unicode(console)
    rows = Table.grid(padding=(0, 1))
    rows.add_column(style="dim", min_width=18, no_wrap=True)
    rows.add_column(no_wrap=True)
    rows.add_column(justify="right", min_width=12, no_wrap=True)
    rows.add_column(no_wrap=True, overflow="ellipsis")
    forecast = snapshot.forecast
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
            _seconds(forecast["predicted_downtime_seconds"]),
            "red",
        ),
    )
    notes = _notes(snapshot)
    for (name, values, now, style), note in zip(curves, notes, strict=True):
        rows.add_row(name, Text(sparkline(values, width, unicode), style=style), now, Text(note, style="dim"))
    title = Text.assemble(
        (snapshot.device, "bold"), "  ", (snapshot.state, _STYLES.get(snapshot.state, "yellow"))
    )
    return Panel(Group(_verdict(snapshot), rows), title=title, title_align="left", height=PANEL_LINES)


def _notes(snapshot: Snapshot) -> tuple[str, ...]:
    totals = snapshot.totals
    completed, sent = totals.saves["completed"], totals.saves["sent"]
    lost = sum(totals.saves.values()) - completed - sent
    return (
        f"sent {_bytes(sum(totals.sent_bytes.values()))}",
        f"passes {totals.passes}",
        f"saves {completed} ok, {sent} sent, {lost} lost",
        f"MMIO {snapshot.counters['region_reads']} r, {snapshot.counters['region_writes']} w",
        f"measured {_seconds(snapshot.last_downtime_seconds)}",
    )


def _verdict(snapshot: Snapshot) -> Text:
    converging = snapshot.forecast["converging"]
    style = "bold red" if converging is False or snapshot.state == "ERROR" else "green" if converging else ""
    return Text(verdict(snapshot), style=style, no_wrap=True, overflow="ellipsis")


def _table(watched: Sequence[Watched], console: Console) -> Table:
    table = Table(box=None, pad_edge=False, expand=False)
    for name in ("device", "state", "converges"):
        table.add_column(name, no_wrap=True)
    for name in ("initial", "dirty", "transfer rate", "dirty rate", "predicted"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("left")
    for one in watched:
        snapshot = one.snapshot
        if snapshot is None or one.error is not None:
            table.add_row(one.path.name, Text("gone", style="red"), *["-"] * 6, one.error or "no answer yet")
            continue
        forecast = snapshot.forecast
        left = [(s.initial_bytes or 0) + (s.dirty_bytes or 0) for s in one.latest()]
        table.add_row(
            snapshot.device,
            Text(snapshot.state, style=_STYLES.get(snapshot.state, "yellow")),
            _converges(snapshot),
            _bytes(forecast["initial_bytes"]),
            _bytes(forecast["dirty_bytes"]),
            _bytes(forecast["transfer_rate_bytes_per_second"], "/s"),
            _bytes(forecast["dirty_rate_bytes_per_second"], "/s"),
            _seconds(forecast["predicted_downtime_seconds"]),
            sparkline(left, 16, _unicode(console)).rstrip(),
        )
    return table


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
