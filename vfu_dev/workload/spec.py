"""A load as data: pattern, rate, size of a write, bursts, phases. docs/load.md defines them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from vfu_dev.errors import ConfigError, shown
from vfu_dev.sizes import format_size, parse_size

PATTERNS = ("idle", "sequential", "uniform", "hotset", "zipf", "trace", "phases")
# The patterns that choose pages at a rate; the others have none of their own.
PAGE_PATTERNS = ("sequential", "uniform", "hotset", "zipf")

DEFAULT_PAGE_BYTES = 4096
DEFAULT_WRITE_BYTES = 8
MAX_WRITE_BYTES = 1 << 20
MAX_RATE = 1 << 50
MAX_SEED = (1 << 64) - 1
MAX_ZIPF_EXPONENT = 10.0
# A shorter period or phase would be over before a generator reads its clock.
MIN_PERIOD_SECONDS = 0.001
MAX_PERIOD_SECONDS = 86400.0
MAX_PHASES = 1000


@dataclass(frozen=True)
class Burst:
    """All writes of each period are made in its first part; the rate stays what it is on average.

    Attributes:
        duty: that part, above 0 and at most 1.
        period_seconds: of one burst and the pause after it.
    """

    duty: float
    period_seconds: float

    def __post_init__(self) -> None:
        _number("burst.duty", self.duty, 0.0, 1.0, above=True)
        _number("burst.period_seconds", self.period_seconds, MIN_PERIOD_SECONDS, MAX_PERIOD_SECONDS)


@dataclass(frozen=True)
class Phase:
    """A part of a load that changes over time: `load` for `seconds`, then the next phase."""

    seconds: float
    load: Workload

    def __post_init__(self) -> None:
        _number("phase.seconds", self.seconds, MIN_PERIOD_SECONDS, MAX_PERIOD_SECONDS)
        if not isinstance(self.load, Workload) or self.load.phases:
            raise ConfigError("phases: each has seconds and a load, and that load may not have phases")


@dataclass(frozen=True)
class Workload:
    """A load on one memory. The same for every generator: in the device, in the guest, in a client.

    Attributes:
        pattern: one of `PATTERNS`. `hotset`: the first `hot_fraction` of the places get `hot_share` of the
            writes. `zipf`: place r (from 0) gets a share proportional to 1 / (r + 1) ** `zipf_exponent`.
            `trace`: what the file says, when it says so. `phases`: one load after the other, repeated.
        rate_bytes: bytes written a second.
        rate_pages: pages written a second, instead of `rate_bytes`.
        dirty_rate_bytes: the bytes of those pages, whole ones of the memory's page size, instead of either.
            Exactly one of the three; none for `idle`, `trace` and `phases`. 0 writes nothing.
        write_bytes: size of one write, 1 to 1 MiB. A write smaller than a page stays within one.
        seed: of everything that is random, 64 bits.
        burst: None for a steady rate.
        trace: path of a CSV file with the columns time (seconds), offset and length (bytes).
        phases: repeated from the start after the last.

    Raises: ConfigError: naming the field and what it may be.
    """

    pattern: str = "uniform"
    rate_bytes: float | None = None
    rate_pages: float | None = None
    dirty_rate_bytes: float | None = None
    write_bytes: int = DEFAULT_WRITE_BYTES
    seed: int = 1
    hot_fraction: float = 0.1
    hot_share: float = 0.9
    zipf_exponent: float = 1.0
    burst: Burst | None = None
    trace: str | None = None
    phases: tuple[Phase, ...] = ()

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise ConfigError(f"pattern {shown(self.pattern)}: expected one of {', '.join(PATTERNS)}")
        rates = {name: getattr(self, name) for name in _RATE_FIELDS if getattr(self, name) is not None}
        if self.pattern in PAGE_PATTERNS and len(rates) != 1:
            raise ConfigError(f"{self.pattern}: expected one rate: dirty (2000p, 8M) or write (8M)")
        if self.pattern not in PAGE_PATTERNS and any(rates.values()):
            raise ConfigError(
                f"{self.pattern}: has no rate of its own, neither a dirty rate nor a write rate"
            )
        for name, rate in rates.items():
            _number(name, rate, 0, MAX_RATE)
        _integer("write_bytes", self.write_bytes, 1, MAX_WRITE_BYTES)
        _integer("seed", self.seed, 0, MAX_SEED)
        _number("hot_fraction", self.hot_fraction, 0.0, 1.0)
        _number("hot_share", self.hot_share, 0.0, 1.0)
        _number("zipf_exponent", self.zipf_exponent, 0.0, MAX_ZIPF_EXPONENT)
        if self.burst is not None and self.pattern not in PAGE_PATTERNS:
            raise ConfigError(f"{self.pattern}: has no bursts")
        if (self.pattern == "trace") != (self.trace is not None):
            raise ConfigError("trace: the path of a file, for the pattern trace and for no other")
        if (self.pattern == "phases") != bool(self.phases):
            raise ConfigError("phases: at least one, for the pattern phases and for no other")
        if len(self.phases) > MAX_PHASES:
            raise ConfigError(f"phases: {len(self.phases)} of them, at most {MAX_PHASES}")

    # --- what follows from it -----------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether nothing is ever written."""
        if self.pattern == "phases":
            return all(phase.load.is_idle for phase in self.phases)
        return self.pattern != "trace" and not (self.rate_bytes or self.rate_pages or self.dirty_rate_bytes)

    def pages_per_write(self, page_bytes: int = DEFAULT_PAGE_BYTES) -> int:
        """Return how many pages one write touches; the pages a write may begin at are that far apart."""
        return -(-self.write_bytes // page_bytes)

    def write_rate(self, page_bytes: int = DEFAULT_PAGE_BYTES) -> Fraction:
        """Return writes a second, exactly; the average over the phases, 0 for a trace (its file says)."""
        if self.phases:
            seconds = [Fraction(phase.seconds) for phase in self.phases]
            rates = [phase.load.write_rate(page_bytes) for phase in self.phases]
            return sum((time * rate for time, rate in zip(seconds, rates, strict=True)), Fraction(0)) / sum(
                seconds
            )
        if self.rate_bytes is not None:
            return Fraction(self.rate_bytes) / self.write_bytes
        pages = Fraction(self.rate_pages or 0)
        if self.dirty_rate_bytes is not None:
            pages = Fraction(self.dirty_rate_bytes) / page_bytes
        return pages / self.pages_per_write(page_bytes)

    @property
    def writes_per_second(self) -> float:
        """Writes a second to a memory with 4 KiB pages; see `write_rate`."""
        return float(self.write_rate())

    @property
    def page_rate(self) -> float:
        """Pages of 4 KiB written a second: an upper bound of pages dirtied, which may be the same ones."""
        if self.phases:
            total = sum(phase.seconds for phase in self.phases)
            return sum(phase.seconds * phase.load.page_rate for phase in self.phases) / total
        return float(self.write_rate() * self.pages_per_write())

    @property
    def asked_rate_bytes(self) -> float:
        """Bytes written a second to a memory with 4 KiB pages: what a reached rate is compared with."""
        if self.phases:
            total = sum(phase.seconds for phase in self.phases)
            return sum(phase.seconds * phase.load.asked_rate_bytes for phase in self.phases) / total
        return float(self.write_rate() * self.write_bytes)

    def describe(self) -> str:
        """Return one line for people: `uniform, 2000 pages/s, writes of 8 B, seed 1`."""
        if self.pattern == "phases":
            parts = "; then ".join(f"{phase.seconds:g} s {phase.load.describe()}" for phase in self.phases)
            return f"phases: {parts}; repeated"
        if self.pattern == "trace":
            return f"trace {self.trace}"
        if self.is_idle:
            return "idle"
        extra = {
            "hotset": f" ({self.hot_share:.0%} of the writes to {self.hot_fraction:.0%} of the pages)",
            "zipf": f" (exponent {self.zipf_exponent:g})",
        }.get(self.pattern, "")
        size = format_size(self.write_bytes)
        text = f"{self.pattern}{extra}, {self.rate_text()}, writes of {size}, seed {self.seed}"
        if self.burst is not None:
            text += f", in bursts of {self.burst.duty:.0%} of {self.burst.period_seconds:g} s"
        return text

    def rate_text(self, part: float = 1.0) -> str:
        """Return `part` of the rate in the unit in which it was asked for: pages, or bytes."""
        if self.rate_pages is not None:
            rate = self.rate_pages * part
            return f"{rate:g} pages/s" if rate == self.rate_pages else f"{rate:.1f} pages/s"
        if self.dirty_rate_bytes is not None:
            return f"{format_size(self.dirty_rate_bytes * part)}/s of pages"
        return f"{format_size(self.asked_rate_bytes * part)}/s"

    def reached_text(self, figures: Mapping[str, Any]) -> str:
        """Return the rate reached beside the rate asked for, both in the unit of the latter.

        Args: figures: `asked_rate_bytes` and `reached_rate_bytes` of the load that was carried out.
        """
        asked, reached = figures["asked_rate_bytes"], figures["reached_rate_bytes"]
        if not asked:
            return "nothing was asked for"
        if self.pattern not in PAGE_PATTERNS:  # a trace's rate is in its file, that of phases in each
            return f"{format_size(reached)}/s, {format_size(asked)}/s were asked for"
        return f"{self.rate_text(reached / asked)}, {self.rate_text()} were asked for"

    # --- as JSON and TOML know it -------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` makes the same load of: the fields that say something for this pattern."""
        values: dict[str, Any] = {"pattern": self.pattern}
        if self.pattern == "trace":
            values["trace"] = self.trace
        if self.pattern in ("trace", *PAGE_PATTERNS):
            values["seed"] = self.seed
        if self.pattern in PAGE_PATTERNS:
            values |= {name: rate for name in _RATE_FIELDS if (rate := getattr(self, name)) is not None}
            values["write_bytes"] = self.write_bytes
        if self.pattern == "hotset":
            values |= {"hot_fraction": self.hot_fraction, "hot_share": self.hot_share}
        if self.pattern == "zipf":
            values["zipf_exponent"] = self.zipf_exponent
        if self.burst is not None:
            burst = self.burst
            values["burst"] = {"duty": burst.duty, "period_seconds": burst.period_seconds}
        if self.phases:
            values["phases"] = [
                {"seconds": phase.seconds, "load": phase.load.to_dict()} for phase in self.phases
            ]
        return values

    @classmethod
    def from_dict(cls, values: object) -> Workload:
        """Return the load that JSON or TOML describes.

        Args: values: the fields by name. The rate may be given as people write it instead: `dirty_rate`
              (see `parse_dirty_rate`) or `write_rate` (bytes written a second), and the size of a write as
              `write_size`. `rate` is an earlier name of both rates. `pattern` may be left out where
              `phases` or `trace` say it.
        Raises: ConfigError: something else, naming the key and what it may be.
        """
        known = {field.name for field in fields(cls)} | {*RATE_KEYS, *WRITE_SIZE_KEYS}
        given = dict(_mapping("load", values, known, {"rate"}))
        rates = [name for name in RATE_KEYS if given.get(name) is not None]
        if len(rates) > 1:
            raise ConfigError(f"{rates[0]}: beside it no {' or '.join(rates[1:])}: expected one rate")
        for name, parse in _RATE_TEXTS.items():
            if name in given:
                given |= parse(given.pop(name))
        if "write_size" in given:
            if "write_bytes" in given:
                raise ConfigError("write_size: beside it no write_bytes, which says the same")
            given["write_bytes"] = given.pop("write_size")
        if isinstance(given.get("write_bytes"), str):
            given["write_bytes"] = _size("write_size", given["write_bytes"])
        if "pattern" not in given:
            implied = [name for name in ("phases", "trace") if given.get(name)]
            if not implied and not any(given.get(name) for name in _RATE_FIELDS):
                implied = ["idle"]
            given["pattern"] = implied[0] if implied else "uniform"
        if given.get("burst") is not None:
            burst = _mapping("burst", given["burst"], {"duty", "period_seconds"})
            given["burst"] = Burst(_need("burst", burst, "duty"), _need("burst", burst, "period_seconds"))
        if given.get("trace") is not None and not isinstance(given["trace"], str):
            raise ConfigError(f"trace {given['trace']!r}: expected the path of a file")
        given["phases"] = _phases(given.get("phases") or ())
        return cls(**given)


def parse_dirty_rate(text: object) -> dict[str, float]:
    """Return the pages to dirty a second that `text` names, as an argument of `Workload`.

    Args: text: bytes of whole pages a second (`8M`, `512K/s`, `4096`) or pages a second (`2000p`, `0.5p`);
          a number is bytes of pages a second.
    Raises: ConfigError: anything else.
    """
    return _parse_rate(text, "dirty rate", "bytes of pages a second (8M) or pages a second (2000p)", True)


def parse_write_rate(text: object) -> dict[str, float]:
    """Return the bytes to write a second that `text` names, as an argument of `Workload`.

    Raises: ConfigError: `text` is no size, nor a number.
    """
    return _parse_rate(text, "write rate", "bytes written a second (8M)", False)


def _earlier_rate(text: object) -> dict[str, float]:
    """Return what `rate` meant, the name of both rates: pages (`2000p`), else bytes written a second."""
    by_pages = isinstance(text, str) and text.strip().removesuffix("/s").endswith("p")
    return parse_dirty_rate(text) if by_pages else parse_write_rate(text)


def _parse_rate(text: object, name: str, expected: str, of_pages: bool) -> dict[str, float]:
    field = "dirty_rate_bytes" if of_pages else "rate_bytes"
    if isinstance(text, int | float) and not isinstance(text, bool):
        return {field: text}
    try:
        if not isinstance(text, str):
            raise ValueError
        stripped = text.strip().removesuffix("/s")
        if of_pages and stripped.endswith("p"):
            rate = float(stripped[:-1])
            return {"rate_pages": int(rate) if rate.is_integer() else rate}
        return {field: parse_size(stripped)}
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{name} {shown(text)}: expected {expected}") from error


_RATE_FIELDS = ("rate_bytes", "rate_pages", "dirty_rate_bytes")
# As people write them -> what they mean.
_RATE_TEXTS = {"dirty_rate": parse_dirty_rate, "write_rate": parse_write_rate, "rate": _earlier_rate}
# Every key that says a rate; a load has one of them.
RATE_KEYS = (*_RATE_TEXTS, *_RATE_FIELDS)
WRITE_SIZE_KEYS = ("write_size", "write_bytes")


def _phases(values: object) -> tuple[Phase, ...]:
    if not isinstance(values, list | tuple):
        raise ConfigError('phases: expected a list of {"seconds": ..., "load": {...}}')
    if len(values) > MAX_PHASES:
        raise ConfigError(f"phases: {len(values)} of them, at most {MAX_PHASES}")
    phases = []
    for number, value in enumerate(values):
        phase = _mapping(f"phases[{number}]", value, {"seconds", "load"})
        load = _need(f"phases[{number}]", phase, "load")
        if isinstance(load, Mapping) and load.get("phases"):
            raise ConfigError(f"phases[{number}].load: may not have phases itself")
        try:
            phases.append(Phase(_need("phase", phase, "seconds"), Workload.from_dict(load)))
        except ConfigError as error:
            raise ConfigError(f"phases[{number}]: {error}") from error
    return tuple(phases)


def _mapping(name: str, value: object, known: set[str], hidden: Set[str] = frozenset()) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}: expected an object with some of {', '.join(sorted(known))}")
    unknown = [key for key in value if key not in known and key not in hidden]
    if unknown:
        raise ConfigError(f"{name}: no key {unknown[0]!r}; there are {', '.join(sorted(known))}")
    return value


def _need(name: str, values: Mapping[str, Any], key: str) -> Any:
    if key not in values:
        raise ConfigError(f"{name}: {key} is missing")
    return values[key]


def _size(name: str, text: str) -> int:
    try:
        return parse_size(text)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{name}: {error}") from error


def _integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name} {shown(value)}: expected a whole number from {low} to {high}")


def _number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or (above and value == low) or not math.isfinite(value):  # type: ignore[arg-type]
        words = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        raise ConfigError(f"{name} {shown(value)}: expected a number {words}")
