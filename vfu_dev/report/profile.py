"""Pictures of a profile: sizes over time, how long calls take, how long changes of state take."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vfu_dev.profile.model import Profile
from vfu_dev.profile.session import PHASES
from vfu_dev.profile.show import sentence
from vfu_dev.profile.values import Curve, Distribution, Mark, Value
from vfu_dev.report.drawing import BLUE, GREEN, GREY, MIB, ORANGE, RED, WIDTH_INCHES, legend, title, write_png

_PHASE_COLOURS = dict(zip(PHASES, (BLUE, ORANGE, RED), strict=True))
# How long a rate or a constant is drawn where nothing says how long PRE_COPY was.
_SECONDS = 1.0


def profile_figure(profile: Profile) -> Figure:
    """Return three pictures, one below the other."""
    figure = Figure(figsize=(WIDTH_INCHES, 8.0), layout="constrained")
    sizes, calls, arcs = figure.subplots(3, 1)
    figure.suptitle(sentence(profile), fontsize=8.5, wrap=True, x=0.01, ha="left")
    _sizes(sizes, profile)
    _calls(calls, profile)
    _arcs(arcs, profile)
    return figure


def draw_profile(profile: Profile, path: Path) -> None:
    """Draw a profile into a .png or .svg."""
    figure = profile_figure(profile)
    if path.suffix == ".svg":
        figure.savefig(path, format="svg", metadata={"Date": None})
    else:
        write_png(figure, path)


def _sizes(axes: Axes, profile: Profile) -> None:
    dirty, stop_copy = profile.dirty, profile.stop_copy
    seconds = profile.recorded.precopy_seconds or _SECONDS
    for value in (dirty.curve, dirty.steps, stop_copy.steps):
        seconds = max(seconds, value.value[-1][0] if value is not None else 0.0)
    if dirty.curve is not None:
        _line(axes, dirty.curve.value, "became dirty", ORANGE)
    elif dirty.bytes_per_second is not None:
        points = ((0.0, 0.0), (seconds, dirty.bytes_per_second.value * seconds))
        _line(axes, points, "becomes dirty", ORANGE)
    elif dirty.steps is not None:
        _line(axes, _summed(dirty.steps.value, seconds), "becomes dirty", ORANGE)
    if stop_copy.steps is not None:
        ends = (*stop_copy.steps.value, (seconds, stop_copy.steps.value[-1][1]))
        times, lengths = [at for at, _ in ends], [size / MIB for _, size in ends]
        axes.step(times, lengths, where="post", color=RED, lw=1.2, label="stop_copy_length")
    elif stop_copy.bytes is not None:
        grows = stop_copy.bytes_per_second.value if stop_copy.bytes_per_second is not None else 0.0
        begin = stop_copy.bytes.value
        _line(axes, ((0.0, begin), (seconds, begin + grows * seconds)), "stop_copy_length", RED)
    if profile.initial.bytes is not None:
        axes.axhline(profile.initial.bytes.value / MIB, color=BLUE, ls="--", lw=1.0, label="initial_bytes")
    axes.set_xlabel("seconds in PRE_COPY", fontsize=8)
    title(axes, "Sizes", "MiB")
    legend(axes)


def _line(axes: Axes, points: Curve, label: str, colour: str) -> None:
    times, sizes = [at for at, _ in points], [size / MIB for _, size in points]
    axes.plot(times, sizes, color=colour, lw=1.2, label=label)


def _summed(steps: Curve, seconds: float) -> Curve:
    """Return what rates add up to."""
    points, total = [(steps[0][0], 0.0)], 0.0
    for (at, rate), end in zip(steps, [*(at for at, _ in steps[1:]), seconds], strict=True):
        total += rate * max(0.0, end - at)
        points.append((end, total))
    return tuple(points)


def _calls(axes: Axes, profile: Profile) -> None:
    for side, calls, style in (("reads", profile.reads, "-"), ("writes", profile.writes, "--")):
        for phase in PHASES:
            seconds = getattr(calls, phase).seconds
            if seconds is not None:
                most = " at most" if seconds.mark is Mark.BOUNDED else ""
                _quantiles(axes, seconds.value, f"{side}, {phase}{most}", _PHASE_COLOURS[phase], style)
    axes.set_xlabel("part of the calls, %", fontsize=8)
    axes.set_yscale("log")
    title(axes, "How long calls take", "ms")
    legend(axes)


def _quantiles(axes: Axes, spread: Distribution, label: str, colour: str, style: str) -> None:
    parts = [number / 100 for number in range(101)]
    times = [max(spread.quantile(part), 1e-7) * 1000 for part in parts]
    axes.plot([100 * part for part in parts], times, style, color=colour, lw=1.2, label=label)


def _arcs(axes: Axes, profile: Profile) -> None:
    found: list[tuple[str, Value[Distribution], str]] = [
        (arc, value, colour)
        for arcs, colour in ((profile.source_arcs, BLUE), (profile.destination_arcs, GREEN))
        for arc, value in arcs.items()
    ]
    found.reverse()  # the first one on top
    for number, (_, value, colour) in enumerate(found):
        bound = value.mark is Mark.BOUNDED
        axes.barh(number, value.value.mean * 1000, color=colour, alpha=0.4 if bound else 1.0, height=0.6)
        axes.plot(value.value.highest * 1000, number, "|", color=GREY, ms=9)
    axes.set_yticks(range(len(found)), [arc.replace("->", " to ") for arc, _, _ in found], fontsize=7.5)
    for label, colour in (("source", BLUE), ("destination", GREEN)):
        axes.plot([], [], "s", color=colour, label=label)
    axes.plot([], [], "|", color=GREY, label="longest")
    title(axes, "How long changes of state take, ms")
    legend(axes)
