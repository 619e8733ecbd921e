"""A load as arguments of vfud-load's command `program`."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from vfu_dev.errors import ConfigError
from vfu_dev.workload import Trace, Workload

_NS = 1_000_000_000
# The guest's arithmetic has 64 bits; a rate keeps 62 of them above and below the line.
_LIMIT = 1 << 62
# A line that the guest takes is below 4 KiB.
_ROWS_A_LINE = 100
# Each takes 24 bytes of guest memory, and its way there over the serial port some 10 us.
MAX_ROWS = 100_000


def program_lines(spec: Workload, page_bytes: int) -> Iterator[str]:
    """Yield the commands, without `program`, that make vfud-load carry out `spec`.

    Args: page_bytes: of the device.
    Raises: ConfigError: more than the guest can do.
    """
    yield "clear"
    for phase in spec.phases:
        yield from _phase(phase.load, page_bytes, round(phase.seconds * _NS))
    if not spec.phases:
        yield from _phase(spec, page_bytes, 0)


def _phase(spec: Workload, page_bytes: int, duration_ns: int) -> Iterator[str]:
    words = {"pattern": "idle" if spec.is_idle else spec.pattern, "duration_ns": duration_ns}
    if spec.trace is not None:
        trace = Trace.read(spec.trace)
        if len(trace) > MAX_ROWS:
            raise ConfigError(f"{spec.trace}: {len(trace)} rows; a guest takes {MAX_ROWS}")
        yield _line(words | {"seed": spec.seed, "round_ns": trace.round_ns})
        rows = zip(trace.times.tolist(), trace.offsets.tolist(), trace.lengths.tolist(), strict=True)
        texts = [f"{time},{offset},{length}" for time, offset, length in rows]
        for first in range(0, len(texts), _ROWS_A_LINE):
            yield f"rows {' '.join(texts[first : first + _ROWS_A_LINE])}"
        return
    if not spec.is_idle:
        words |= {"seed": spec.seed, "write_bytes": spec.write_bytes, **_rate(spec, page_bytes)}
        # repr: the shortest text that gives the same double again.
        words |= {
            name: repr(float(getattr(spec, name))) for name in ("hot_fraction", "hot_share", "zipf_exponent")
        }
    yield _line(words)


def _rate(spec: Workload, page_bytes: int) -> dict[str, int]:
    """Return writes a nanosecond as up / down, and the part of a period in which they are made."""
    period_ns = on_ns = 1
    if spec.burst is not None:
        period_ns = round(spec.burst.period_seconds * _NS)
        on_ns = max(1, min(period_ns, round(spec.burst.duty * period_ns)))
    rate = spec.write_rate(page_bytes) * Fraction(period_ns, on_ns * _NS)
    rate = rate.limit_denominator(_LIMIT)
    if not 0 < rate.numerator < _LIMIT:
        raise ConfigError(f"{spec.describe()}: a rate out of the range of the guest program")
    return {"up": rate.numerator, "down": rate.denominator, "period_ns": period_ns, "on_ns": on_ns}


def _line(words: dict[str, object]) -> str:
    return "phase " + " ".join(f"{key}={value}" for key, value in words.items())
