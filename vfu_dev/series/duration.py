"""Estimates how long a scenario takes on an idle machine of two cores, by arithmetic.

The scenarios of docs/results.md took 60 minutes there; 66 were estimated. A busy machine takes two to four
times as long.
"""

from __future__ import annotations

from collections.abc import Sequence

from vfu_dev.lab.policy import Rule
from vfu_dev.series.scenario import Point
from vfu_dev.sizes import format_duration

# Typical figures: good to a factor of two.
START_SECONDS = {"linux": 9.0, "none": 3.0}
# RAM and the fixed costs of a move, and turning the VM around.
AROUND_SECONDS = {"linux": 2.0, "none": 1.2}
# QEMU sends device state in steps of 10 MiB/s, and no machine of two cores reaches more than this.
SLOWEST, FASTEST = 10 << 20, 400 << 20
# A move that is to be given up is followed by a new destination.
AGAIN_SECONDS = 3.0


def expected_seconds(points: Sequence[Point]) -> float:
    """Return about how long the moves of these points take."""
    return sum(_of_point(point) for point in points)


def _of_point(point: Point) -> float:
    get = point.__getitem__
    link = min(max(get("qemu.max-bandwidth") or FASTEST, SLOWEST), FASTEST)
    moved = AROUND_SECONDS[get("qemu.guest")] + get("device.memory") * get("device.devices") / link
    if get("run.expect") == "completed":
        rules = [Rule.parse(text) for text in get("qemu.policy")]
        move = moved + max((rule.seconds + (rule.stall or 0) for rule in rules), default=0)
    else:  # given up at the time limit, or half of them
        share = 1.0 if get("run.expect") == "not-converged" else 0.5
        move = share * (get("run.timeout") + AGAIN_SECONDS) + (1 - share) * moved
    waits = get("run.settle") + get("run.jitter") / 2
    return float(START_SECONDS[get("qemu.guest")] + get("run.warmup") + get("run.moves") * (waits + move))


def text(seconds: float) -> str:
    """Return it for people, rounded to its accuracy."""
    return format_duration(max(10, round(seconds, -1)))
