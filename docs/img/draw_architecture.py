"""Draws states.svg and life-of-a-byte.svg, the pictures of ../architecture.md.

    python docs/img/draw_architecture.py

The arcs of states.svg are those of `vfu_dev.migration.fsm`; a test sees that both are the present ones.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from vfu_dev.migration.fsm import ARCS, Action, Arc
from vfu_dev.uapi import DeviceState as S

HERE = Path(__file__).parent

# Readable on light and on dark ground: pictures do not know on which page they are.
STYLE = """
  svg { font: 13px system-ui, sans-serif; background: #fff; color-scheme: light dark }
  text { fill: #1b2330 } .dim { fill: #5d6878; font-size: 12px }
  .name { font-weight: 600; text-anchor: middle }
  rect { fill: #f6f7f9; stroke: #5d6878; stroke-width: 1.2 }
  .saving rect { fill: #e4edfb; stroke: #2563c9 } .resuming rect { fill: #f1e6f8; stroke: #7d3fb2 }
  .error rect { fill: #fbe6e4; stroke: #b3261e }
  path { fill: none; stroke: #5d6878; stroke-width: 1.5 }
  .save path { stroke: #2563c9 } .resume path { stroke: #7d3fb2 }
  .without path { stroke-dasharray: 5 4 } marker path { stroke: none; fill: #5d6878 }
  @media (prefers-color-scheme: dark) {
    svg { background: #12161d } text { fill: #e8ecf2 } .dim { fill: #9aa6b6 }
    rect { fill: #1b212b; stroke: #9aa6b6 } .saving rect { fill: #14263f; stroke: #6ea8ff }
    .resuming rect { fill: #2b1b38; stroke: #c79bec } .error rect { fill: #3a1a18; stroke: #ff8a80 }
    path { stroke: #9aa6b6 } .save path { stroke: #6ea8ff } .resume path { stroke: #c79bec }
    marker path { fill: #9aa6b6 }
  }
"""
MARKER = (
    '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto"><path d="M0 0L8 4L0 8Z"/></marker></defs>'
)

# --- the state machine --------------------------------------------------------------------------------------

BOX_W, BOX_H = 136, 38
# Centre of each state's box; arcs join neighbours.
PLACES = {
    S.PRE_COPY: (190, 70),
    S.RUNNING: (450, 70),
    S.PRE_COPY_P2P: (190, 190),
    S.RUNNING_P2P: (450, 190),
    S.STOP_COPY: (190, 310),
    S.STOP: (450, 310),
    S.RESUMING: (710, 310),
    S.ERROR: (710, 70),
}
_GROUPS = {
    S.PRE_COPY: "saving",
    S.PRE_COPY_P2P: "saving",
    S.STOP_COPY: "saving",
    S.RESUMING: "resuming",
    S.ERROR: "error",
}
_ACTIONS = {
    Action.BEGIN_SAVE: "save",
    Action.STOP_SAVE: "save",
    Action.END_SAVE: "save",
    Action.BEGIN_RESUME: "resume",
    Action.END_RESUME: "resume",
}
APART = 9  # of the two arcs between the same states


def _svg(width: int, height: int, title: str, described: str, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-labelledby="title described">\n<title id="title">{escape(title)}</title>\n'
        f'<desc id="described">{escape(described)}</desc>\n<style>{STYLE}</style>\n{MARKER}\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "") -> str:
    more = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:g}" y="{y:g}"{f" class={kind!r}" if kind else ""}{more}>{escape(text)}</text>'


def _arc(arc: Arc) -> str:
    (x0, y0), (x1, y1) = PLACES[arc.origin], PLACES[arc.target]
    label = "" if arc.action is Action.NONE else arc.action.value
    if y0 == y1:  # to the side: upper one leftwards
        right = x1 > x0
        y = y0 + (APART if right else -APART)
        start, end = (x0 + BOX_W / 2, x1 - BOX_W / 2) if right else (x0 - BOX_W / 2, x1 + BOX_W / 2)
        path = f"M{start:g} {y}H{end:g}"
        # To the right, arcs that pass the P2P states come in on the left of the label.
        middle = (start + end) / 2 + (14 if max(x0, x1) > PLACES[S.RUNNING][0] else 0)
        text = _text(middle, y + (17 if right else -6), label, "dim", "middle") if label else ""
    elif abs(y1 - y0) < 200:  # to the row above or below
        down = y1 > y0
        x = x0 + (APART if down else -APART)
        start, end = (y0 + BOX_H / 2, y1 - BOX_H / 2) if down else (y0 - BOX_H / 2, y1 + BOX_H / 2)
        path = f"M{x} {start:g}V{end:g}"
        text = ""
        if label:
            text = _text(x + 10, (start + end) / 2 - 4, "only the rest", "dim") + _text(
                x + 10, (start + end) / 2 + 12, "is left to save", "dim"
            )
    else:  # past the P2P states, for a device that has none
        side = -1 if x0 < 300 else 1
        x, down = x0 + side * BOX_W / 2, y1 > y0
        bend = x + side * (58 if down else 38)
        path = (
            f"M{x:g} {y0 + (4 if down else -4)}C{bend:g} {y0},{bend:g} {y1},{x:g} {y1 + (-4 if down else 4)}"
        )
        text = ""
    kinds = " ".join(filter(None, [_ACTIONS.get(arc.action, ""), "" if arc.with_p2p else "without"]))
    return f'<g class="{kinds}"><path d="{path}" marker-end="url(#end)"/></g>{text}'


def states() -> str:
    """Return the picture of the state machine."""
    parts = [_arc(arc) for arc in ARCS]
    for state, (x, y) in PLACES.items():
        parts.append(
            f'<g class="{_GROUPS.get(state, "running")}"><rect x="{x - BOX_W / 2:g}" y="{y - BOX_H / 2:g}" '
            f'width="{BOX_W}" height="{BOX_H}" rx="6"/>{_text(x, y + 5, state.name, "name")}</g>'
        )
    parts += [
        _text(190, 28, "saving group", "dim", "middle"),
        _text(450, 28, "the device runs", "dim", "middle"),
        _text(710, 28, "no way back from a failed arc;", "dim", "middle"),
        _text(710, 44, "a reset leads to RUNNING", "dim", "middle"),
        _text(450, 348, "the device stands still", "dim", "middle"),
        _text(710, 348, "the destination", "dim", "middle"),
        _text(
            20,
            378,
            "Dashed: a device without P2P, which has neither state of the middle row.",
            "dim",
        ),
    ]
    described = "; ".join(f"{arc.origin.name} to {arc.target.name}: {arc.action.value}" for arc in ARCS)
    return _svg(820, 392, "The migration states and the arcs between them", described, parts)


# --- the life of a byte -------------------------------------------------------------------------------------

# (heading, two lines) of each step.
SOURCE = [
    (
        "1  The guest writes",
        "a store to BAR2: QEMU sends VFIO_USER_REGION_WRITE,",
        "libvfio-user checks region and length",
    ),
    (
        "2  The page is dirty",
        "memory/pages.py: one byte a page says: written;",
        "the page counts as dirty_bytes",
    ),
    (
        "3  A pass takes it",
        "migration/plan.py: each page of a pass once,",
        "those first that were sent least",
    ),
    (
        "4  It becomes a record",
        "migration/stream.py: indices, then pages, gathered",
        "by numpy; a checksum seeded with the one before",
    ),
    (
        "5  QEMU reads it",
        "VFIO_USER_MIG_DATA_READ, up to 1 MiB, in PRE_COPY;",
        "what is written again meanwhile goes back to 2",
    ),
    (
        "6  The device stops",
        "STOP_COPY: the pages left, the registers, a digest",
        "of each memory. From here on it is downtime",
    ),
]
DESTINATION = [
    ("12  The guest reads it", "from the destination's device, which runs"),
    (
        "11  Digests agree",
        "of what lies in memory, with the source's in the",
        "end record; else RESUMING fails, and nothing runs",
    ),
    ("10  It is stored", "scattered by numpy to its pages"),
    (
        "9  It is checked",
        "length against the schema, checksum of the record,",
        "before a byte of it is stored",
    ),
    (
        "8  The server takes it",
        "VFIO_USER_MIG_DATA_WRITE in RESUMING; slices of",
        "any size: a record need not end with a message",
    ),
    ("7  QEMU sends it", "in its own migration stream, between RAM pages,", "to the destination's QEMU"),
]
STEP_W, STEP_H, GAP = 392, 66, 22


def _steps(x: int, steps: list[tuple[str, ...]], kind: str, upwards: bool) -> list[str]:
    parts = []
    for number, (heading, *lines) in enumerate(steps):
        y = 44 + number * (STEP_H + GAP)
        parts.append(
            f'<g class="{kind}"><rect x="{x}" y="{y}" width="{STEP_W}" height="{STEP_H}" rx="6"/></g>'
        )
        parts.append(f'<text x="{x + 12}" y="{y + 20}" font-weight="600">{escape(heading)}</text>')
        parts += [_text(x + 12, y + 38 + 16 * at, line, "dim") for at, line in enumerate(lines)]
        if number + 1 < len(steps):
            here, there = y + STEP_H, y + STEP_H + GAP
            start, end = (there, here) if upwards else (here, there)
            parts.append(f'<path d="M{x + STEP_W / 2:g} {start}V{end}" marker-end="url(#end)"/>')
    return parts


def life() -> str:
    """Return the picture of what happens to a byte that the guest wrote."""
    right = 20 + STEP_W + 60
    last = 44 + 5 * (STEP_H + GAP) + STEP_H / 2
    parts = [
        _text(20, 28, "Source", "", ""),
        _text(right, 28, "Destination", "", ""),
        *_steps(20, SOURCE, "saving", False),
        *_steps(right, DESTINATION, "resuming", True),
        f'<path d="M{20 + STEP_W} {last:g}H{right}" marker-end="url(#end)"/>',
    ]
    described = ". ".join(
        ": ".join((step[0], " ".join(step[1:]))) for step in [*SOURCE, *reversed(DESTINATION)]
    )
    return _svg(
        right + STEP_W + 20, 580, "The life of a byte, from one guest's write to its read", described, parts
    )


PICTURES = {"states.svg": states, "life-of-a-byte.svg": life}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (HERE / name).write_text(draw())
