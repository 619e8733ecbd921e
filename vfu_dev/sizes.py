"""Sizes and rates as people type and read them: `64K`, `16M`, `1G` are binary multiples."""

from __future__ import annotations

import re
from fractions import Fraction

from vfu_dev.errors import shown

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# 32 digits on either side are more than any size has, and few enough for exact arithmetic.
_PATTERN = re.compile(r"([0-9]{1,32}(?:\.[0-9]{1,32})?)\s*([KMGT]?)(?:i?B)?(?:/s)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the number of bytes (or bytes a second) that `text` names, exactly.

    Args:    text: `4096`, `64K`, `1.5G`, `16MiB`, `10M/s`; all multiples are binary.
    Raises:  ValueError: anything else, with the text and an example.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a size: {shown(text)} (examples: 4096, 64K, 16M, 1G)")
    number, unit = match.groups()
    value = Fraction(number) * _UNITS[unit.upper()]
    if value.denominator != 1:
        raise ValueError(f"not a whole number of bytes: {shown(text)}")
    return value.numerator


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
