"""Sizes and rates as people type and read them: `64K`, `16M`, `1G` are binary multiples."""

from __future__ import annotations

import re
from fractions import Fraction

from vfu_dev.errors import shown

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# 32 digits on either side are more than any size has, and few enough for exact arithmetic.
_PATTERN = re.compile(r"([0-9]{1,32}(?:\.[0-9]{1,32})?)\s*([KMGT]?)(?:i?B)?(?:/s)?", re.IGNORECASE)

# A network's units are decimal: a gigabit Ethernet carries 10^9 bits a second.
_BITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BIT_PATTERN = re.compile(r"([0-9]{1,32}(?:\.[0-9]{1,32})?)\s*([KMGT]?)bit(?:/s)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the number of bytes (or bytes a second) that `text` names, exactly.

    Args: text: `4096`, `64K`, `1.5G`, `16MiB`, `10M/s`; all multiples are binary.
    Raises: ValueError: anything else, with the text and an example.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a size: {shown(text)} (examples: 4096, 64K, 16M, 1G)")
    number, unit = match.groups()
    value = Fraction(number) * _UNITS[unit.upper()]
    if value.denominator != 1:
        raise ValueError(f"not a whole number of bytes: {shown(text)}")
    return value.numerator


def parse_bandwidth(text: str) -> int:
    """Return the bytes a second that `text` names.

    Args: text: as for `parse_size`, or bits with decimal multiples, as networks count: `100Mbit`,
          `1Gbit/s`. Rounded down to whole bytes.
    Raises: ValueError: anything else, with the text and examples.
    """
    match = _BIT_PATTERN.fullmatch(text.strip())
    if match is not None:
        number, unit = match.groups()
        return int(Fraction(number) * _BITS[unit.upper()] / 8)
    if _PATTERN.fullmatch(text.strip()) is None:
        raise ValueError(f"not a bandwidth: {shown(text)} (bytes a second: 64K, 128M; bits: 1Gbit)")
    return parse_size(text)


def format_count(count: int, noun: str) -> str:
    """Return `count` with the noun in its number: `1 pass`, `2 passes`."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count} {noun}{ending}"


def format_size(count: float) -> str:
    """Return `count` bytes for people: three significant digits at most, binary unit (`16 MiB`)."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            break
        count /= 1024
    text = f"{count:.1f}".removesuffix(".0")
    return f"{text} {unit}"


def format_duration(seconds: float) -> str:
    """Return `seconds` for people who wait: whole seconds, from 100 s on whole minutes (`40 s`, `3 min`)."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def format_left(done: float, total: float, per_second: float) -> str:
    """Return how far something is, and how long it will take at this pace: `40 %, about 12 s left`.

    Returns: the percentage alone where nothing moves; nothing where there is no total.
    """
    if total <= 0:
        return ""
    text = f"{100 * min(done, total) / total:.0f} %"
    return f"{text}, about {format_duration((total - done) / per_second)} left" if per_second > 0 else text
