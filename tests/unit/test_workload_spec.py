"""What a load may be, and what is said about one that may not."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfu_dev.errors import ConfigError
from vfu_dev.workload import PAGE_PATTERNS, Burst, Phase, Workload, parse_dirty_rate, parse_write_rate

rates = st.floats(0, 1e12) | st.integers(0, 1 << 40)
bursts = st.builds(Burst, duty=st.floats(0.001, 1), period_seconds=st.floats(0.001, 100))
paced = st.builds(
    lambda by_pages, rate, **more: Workload(**{"rate_pages" if by_pages else "rate_bytes": rate}, **more),
    st.booleans(),
    rates,
    pattern=st.sampled_from(PAGE_PATTERNS),
    write_bytes=st.integers(1, 1 << 20),
    seed=st.integers(0, (1 << 64) - 1),
    burst=st.none() | bursts,
)
phased = st.builds(
    lambda phases: Workload("phases", phases=tuple(phases)),
    st.lists(st.builds(Phase, st.floats(0.001, 1000), paced), min_size=1, max_size=4),
)
anything = paced | phased | st.just(Workload("idle")) | st.just(Workload("trace", trace="a.csv"))


def normal(spec: Workload) -> Workload:
    """The load without what says nothing for its pattern."""
    return Workload.from_dict(spec.to_dict())


@given(anything)
def test_a_load_survives_json(spec: Workload) -> None:
    """What `to_dict` says, through JSON, makes the same load."""
    again = Workload.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == normal(spec)
    assert again.to_dict() == spec.to_dict()
    assert again.describe() == spec.describe()
    assert again.page_rate == spec.page_rate


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("8M", {"dirty_rate_bytes": 8 << 20}),
        ("512K/s", {"dirty_rate_bytes": 512 << 10}),
        ("2000p", {"rate_pages": 2000}),
        ("0.5p", {"rate_pages": 0.5}),
        ("2000p/s", {"rate_pages": 2000}),
        (4096, {"dirty_rate_bytes": 4096}),
        (0.5, {"dirty_rate_bytes": 0.5}),
    ],
)
def test_dirty_rates_as_text(text: object, rate: dict[str, float]) -> None:
    """Bytes of pages with a unit, pages with a p."""
    assert parse_dirty_rate(text) == rate
    assert Workload.from_dict({"dirty_rate": text}) == Workload(**rate)


def test_a_write_rate_counts_bytes_written() -> None:
    """And nothing else: pages are not written bytes."""
    assert parse_write_rate("8M") == {"rate_bytes": 8 << 20}
    assert Workload.from_dict({"write_rate": "8M", "write_size": "4K"}) == Workload(
        rate_bytes=8 << 20, write_bytes=4096
    )
    with pytest.raises(ConfigError, match="write rate '5p': expected bytes written a second"):
        parse_write_rate("5p")


def test_rate_is_the_earlier_name_of_both() -> None:
    """With a p it counted pages, else bytes written."""
    assert Workload.from_dict({"rate": "2000p"}) == Workload(rate_pages=2000)
    assert Workload.from_dict({"rate": "8M"}) == Workload(rate_bytes=8 << 20)
    assert Workload.from_dict({"rate": 4096}) == Workload(rate_bytes=4096)


@pytest.mark.parametrize(
    ("spec", "page_bytes", "writes"),
    [
        (Workload(dirty_rate_bytes=8 << 20), 4096, 2048),
        (Workload(dirty_rate_bytes=8 << 20), 65536, 128),
        (Workload(dirty_rate_bytes=8 << 20, write_bytes=8192), 4096, 1024),
        (Workload(rate_pages=2048), 65536, 2048),
        (Workload(rate_bytes=8 << 20, write_bytes=4096), 65536, 2048),
    ],
)
def test_bytes_of_pages_are_of_the_memorys_pages(spec: Workload, page_bytes: int, writes: int) -> None:
    """8 MiB a second of pages of 64 KiB are 128 of them."""
    assert spec.write_rate(page_bytes) == writes


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (
            Workload(dirty_rate_bytes=4 << 20, write_bytes=64),
            "2 MiB/s of pages, 4 MiB/s of pages were asked for",
        ),
        (Workload(rate_pages=1000), "500.0 pages/s, 1000 pages/s were asked for"),
        (Workload(rate_bytes=65536), "32 KiB/s, 64 KiB/s were asked for"),
    ],
)
def test_what_was_reached_is_said_in_the_unit_that_was_asked_for(spec: Workload, text: str) -> None:
    """Nobody who asked for 4 MiB/s of pages reads of 64 KiB/s."""
    asked = spec.asked_rate_bytes
    assert spec.reached_text({"asked_rate_bytes": asked, "reached_rate_bytes": asked / 2}) == text


@pytest.mark.parametrize("text", ["", "p", "fast", "8X", "-1p", "nanp", "infp", None, True, [], "9" * 400])
def test_bad_rates(text: object) -> None:
    """Anything else is refused, with examples or limits."""
    with pytest.raises(ConfigError, match="rate"):
        Workload.from_dict({"pattern": "uniform", "rate": text})


def test_rates_mean_what_the_document_says() -> None:
    """Bytes written and pages written lead to writes a second, exactly."""
    assert Workload(rate_bytes=100, write_bytes=3).write_rate() == Fraction(100, 3)
    assert Workload(rate_pages=100, write_bytes=8).write_rate() == 100
    wide = Workload(rate_pages=100, write_bytes=4 * 4096)
    assert wide.write_rate() == 25
    assert wide.write_rate(65536) == 100
    assert (wide.page_rate, wide.asked_rate_bytes) == (100, 100 * 4096)
    both = Workload.from_dict(
        {"phases": [{"seconds": 1, "load": {"rate": "100p"}}, {"seconds": 3, "load": {"pattern": "idle"}}]}
    )
    assert (both.writes_per_second, both.page_rate, both.asked_rate_bytes) == (25, 25, 200)


def test_the_pattern_may_be_left_out() -> None:
    """Where phases or a trace say it, or nothing is to be written."""
    assert Workload.from_dict({}).pattern == "idle"
    assert Workload.from_dict({"rate": "1M"}).pattern == "uniform"
    assert Workload.from_dict({"trace": "a.csv"}).pattern == "trace"
    assert Workload.from_dict({"phases": [{"seconds": 1, "load": {}}]}).is_idle
    assert Workload.from_dict({"rate": "1M", "write_bytes": "4K"}).write_bytes == 4096
    assert Workload(rate_pages=0).is_idle
    assert not Workload(rate_pages=1).is_idle


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (None, "load: expected an object"),
        ([], "load: expected an object"),
        ({"patern": "idle"}, "no key 'patern'"),
        ({"pattern": "random"}, "expected one of idle, sequential"),
        ({"pattern": ["uniform"], "rate": "1M"}, "expected one of idle"),
        ({"pattern": "uniform"}, "expected one rate"),
        ({"rate_bytes": 1, "rate_pages": 1}, "expected one rate"),
        ({"dirty_rate": "1M", "write_rate": "1M"}, "dirty_rate: beside it no write_rate"),
        ({"rate": "1M", "write_size": 8, "write_bytes": 8}, "write_size: beside it"),
        ({"rate": "1M", "rate_pages": 1}, "beside it"),
        ({"pattern": "idle", "rate_bytes": 1}, "no rate of its own"),
        ({"rate_bytes": -1}, "rate_bytes -1: expected a number from 0"),
        ({"rate_bytes": math.nan}, "rate_bytes nan"),
        ({"rate_bytes": math.inf}, "rate_bytes inf"),
        ({"rate_bytes": 10**400}, "rate_bytes .huge."),
        ({"rate_bytes": True}, "rate_bytes True"),
        ({"rate_bytes": "8M"}, "rate_bytes '8M': expected a number"),
        ({"rate": "1M", "write_bytes": 0}, "write_bytes 0: expected a whole number from 1"),
        ({"rate": "1M", "write_bytes": 1.5}, "write_bytes 1.5"),
        ({"rate": "1M", "write_bytes": "2M"}, "write_bytes 2097152"),
        ({"rate": "1M", "write_bytes": "x"}, "write_size: not a size"),
        ({"rate": "1M", "seed": -1}, "seed -1"),
        ({"rate": "1M", "seed": 1 << 64}, "seed 18446744073709551616"),
        ({"rate": "1M", "hot_share": 1.01}, "hot_share 1.01: expected a number from 0 to 1"),
        ({"rate": "1M", "hot_fraction": None}, "hot_fraction None"),
        ({"rate": "1M", "zipf_exponent": 11}, "zipf_exponent 11"),
        ({"rate": "1M", "burst": 0.5}, "burst: expected an object"),
        ({"rate": "1M", "burst": {"duty": 0.5}}, "period_seconds is missing"),
        (
            {"rate": "1M", "burst": {"duty": 0, "period_seconds": 1}},
            "burst.duty 0: expected a number above 0",
        ),
        ({"rate": "1M", "burst": {"duty": 1, "period_seconds": 0}}, "burst.period_seconds 0"),
        ({"pattern": "trace"}, "trace: the path"),
        ({"pattern": "uniform", "rate": "1M", "trace": "x"}, "trace: the path"),
        ({"trace": 3}, "trace 3"),
        ({"pattern": "phases"}, "phases: at least one"),
        ({"phases": 3}, "phases: expected a list"),
        ({"phases": [3]}, "phases.0.: expected an object"),
        ({"phases": [{"seconds": 1}]}, "load is missing"),
        ({"phases": [{"load": {}}]}, "seconds is missing"),
        ({"phases": [{"seconds": 0, "load": {}}]}, "phase.seconds 0"),
        (
            {"phases": [{"seconds": 1, "load": {"phases": [{"seconds": 1, "load": {}}]}}]},
            "may not have phases itself",
        ),
        ({"phases": [{"seconds": 1, "load": {}}] * 1001}, "at most 1000"),
    ],
)
def test_what_is_wrong_is_named(values: Any, named: str) -> None:
    """A ConfigError names the key and what it may be."""
    with pytest.raises(ConfigError, match=named):
        Workload.from_dict(values)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["rate", "seed", "duty", "seconds", "load", *Workload.__dataclass_fields__])


@given(st.dictionaries(keys, json_values | st.dictionaries(keys, json_values, max_size=3), max_size=6))
def test_nothing_but_a_load_or_a_config_error(values: dict[str, Any]) -> None:
    """Whatever JSON says, there is a load or a ConfigError of moderate length."""
    try:
        spec = Workload.from_dict(values)
    except ConfigError as error:
        spec, text = Workload("idle"), str(error)
    else:
        text = ""
    assert len(text) < 1000
    assert Workload.from_dict(spec.to_dict()) == normal(spec)


def test_the_document_has_every_field() -> None:
    """docs/load.md lists the fields with their defaults, and no others."""
    text = (Path(__file__).parents[2] / "docs" / "load.md").read_text()
    table = text.partition("## The fields")[2].partition("\n- ")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    documented = {
        name.strip(" `"): default.strip(" `")
        for names, defaults in rows
        for name, default in zip(names.split(","), defaults.split(","), strict=True)
    }
    for name in ("dirty_rate", "write_rate", "write_size"):  # the same as text
        documented.pop(name)
    assert set(documented) == {field.name for field in fields(Workload)}
    for field in fields(Workload):
        if documented[field.name] not in ("", "none"):
            assert documented[field.name] == str(field.default)
