"""Sizes as people type them are exact."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfu_dev.sizes import format_duration, format_left, parse_size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4096", 4096),
        ("64K", 65536),
        ("1.5G", 3 << 29),
        ("16MiB", 16 << 20),
        ("10M/s", 10 << 20),
        ("9007199254740993", 9007199254740993),  # 2**53 + 1, which no float has
        ("9007199254740993K", 9007199254740993 << 10),
        ("0.0009765625K", 1),
        ("1.0", 1),
        ("0", 0),
    ],
)
def test_a_size_is_what_it_says(text: str, count: int) -> None:
    assert parse_size(text) == count


@given(st.integers(0, 1 << 90), st.sampled_from(["", "K", "M", "G", "T"]))
def test_whole_numbers_lose_nothing(count: int, unit: str) -> None:
    assert parse_size(f"{count}{unit}") == count << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[unit]


@pytest.mark.parametrize(
    "text", ["", "K", "-1", "1e3", "0x10", "1..5", ".5", "1P", "٣", "9" * 5000, "1 1", "nan"]
)
def test_what_is_no_size_is_refused_in_short(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a size: .* \(examples: 4096") as caught:
        parse_size(text)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("text", ["1.5", "0.1K", "0.00000000000000000000000001T"])
def test_a_part_of_a_byte_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a whole number of bytes"):
        parse_size(text)


def test_what_is_left_is_said_in_percent_and_time() -> None:
    """At the pace so far; without a pace only how far it is, without a total nothing."""
    assert format_left(25, 100, 5) == "25 %, about 15 s left"
    assert format_left(25, 100_000, 5) == "0 %, about 333 min left"
    assert format_left(25, 100, 0) == "25 %"
    assert format_left(0, 0, 5) == ""
    assert (format_duration(40), format_duration(150)) == ("40 s", "2 min")
