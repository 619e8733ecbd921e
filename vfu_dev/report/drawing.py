"""Common parts of the pictures: colours, axes, legends, and how they become SVG or PNG."""

from __future__ import annotations

import html
import io
import itertools
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vfu_dev.report.timeline import Series

# Okabe and Ito's palette: distinct for colour-blind readers too.
BLUE, SKY, ORANGE, RED, GREEN, PINK = "#0072b2", "#56b4e9", "#e69f00", "#d55e00", "#009e73", "#cc79a7"
GREY, BLACK = "#8a8a8a", "#000000"
# Text on a light bar: not black, which a page turns into the colour of its text.
INK = "#111111"
# Their names in a page, whose style sheet sets each for a light and a dark background.
NAMES = {
    BLUE: "blue",
    SKY: "sky",
    ORANGE: "orange",
    RED: "red",
    GREEN: "green",
    PINK: "pink",
    GREY: "grey",
}

MIB = 1 << 20
WIDTH_INCHES = 9.5
PNG_DPI = 110


def in_mib(series: Series) -> Series:
    """Return byte counts in MiB, so that the axis has round numbers."""
    return Series(series.times, [value / MIB for value in series.values])


def draw(axes: Axes, series: Series, label: str | None, colour: str, style: str = "-", **more: Any) -> None:
    """Draw a curve, unless it has no points; `style` is matplotlib's, of a line or of marks."""
    thinned = series.thin()
    if thinned.times:
        settings: dict[str, Any] = {"lw": 1.2, "ms": 4.0, "color": colour, "label": label, **more}
        axes.plot(thinned.times, thinned.values, style, **settings)


def legend(axes: Axes) -> None:
    """Put the legend beside the axes, where it hides nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            fontsize=7.5, loc="upper left", bbox_to_anchor=(1.01, 1.03), borderaxespad=0, frameon=False
        )


def title(axes: Axes, text: str, unit: str = "") -> None:
    """Say what the axes show, and in which unit."""
    axes.set_title(text, loc="left", fontsize=9.5, fontweight="bold")
    axes.set_ylabel(unit, fontsize=8.5)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def svg_text(figure: Figure, name: str) -> str:
    """Return a figure as an `<svg>` element for a page; `name` makes its ids unique."""
    buffer = io.StringIO()
    # A fixed salt: the same result gives the same page.
    with matplotlib.rc_context({"svg.hashsalt": f"vfu-dev-{name}", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    element = text[text.index("<svg") :]
    # matplotlib numbers its groups from 1 in each figure, and a page may have an id only once.
    for kind in ("figure", "axes", "patch", "line2d", "text", "matplotlib.axis", "xtick", "ytick", "legend"):
        element = element.replace(f'<g id="{kind}_', f'<g id="{name}-{kind}_')
    return element


def themed(svg: str, label: str) -> str:
    """Return an `<svg>` of `svg_text` for a page that is light or dark: `label` is what a screen reader says.

    Black becomes the page's text colour, white becomes transparent, and the palette's colours become names.
    """
    svg = re.sub(r"(<path[^>]*style=\"fill: )#ffffff", r"\1none", svg)
    svg = re.sub(r"(<text[^>]*fill: )#ffffff", r"\1var(--on-bar)", svg)
    svg = re.sub(r"(fill|stroke): #000000", r"\1: currentColor", svg)
    for colour, name in NAMES.items():
        svg = re.sub(rf"(fill|stroke): {colour}", rf"\1: var(--{name})", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=PNG_DPI)


def label_once(text: str, count: int) -> itertools.chain[str | None]:
    """Return labels for the same curve of `count` devices: only the first device's curve has one."""
    return itertools.chain([text if count == 1 else f"{text}, each device"], itertools.repeat(None))
