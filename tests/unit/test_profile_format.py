"""A profile's file: what is written is read as the same, and what is wrong is named by line and key."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profilekit import profiles

from vfu_dev.errors import ConfigError
from vfu_dev.profile import Distribution, Profile, Value, parse_profile, profile_text, read_profile
from vfu_dev.profile.kinds import MAX_BYTES, keys_of
from vfu_dev.profile.model import DIRTY_KINDS, LENGTH_KINDS, Calls, Reinit
from vfu_dev.profile.reading import MAX_FILE_BYTES, PHASES, TABLES
from vfu_dev.profile.table import with_table

PAGE = Path(__file__).parents[2] / "docs" / "profiles.md"
SIZE = 'bytes = { assumed = "16M" }'
EXAMPLE = re.search(r"^```toml\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]  # type: ignore[index]


@given(profiles())
def test_what_is_written_is_read_as_the_same(profile: Profile) -> None:
    text = profile_text(profile)
    assert parse_profile(text, "written") == profile
    assert profile_text(parse_profile(text, "written")) == text


def test_every_member_of_the_classes_is_a_key_or_a_table() -> None:
    """So nothing that a class has is lost in a file."""
    names = {field.name for field in dataclasses.fields(Profile)}
    assert names == {*keys_of(Profile), *TABLES, "source_arcs", "destination_arcs", "reinits"}
    for cls in (*TABLES.values(), Calls, Reinit):
        assert {field.name for field in dataclasses.fields(cls)} - set(PHASES) == set(keys_of(cls))


# --- what is wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("version = 1", "version = 2", ":1: version: expected version = 1"),
        ("version = 1\n", "", "version: expected version = 1"),
        (SIZE, "bytes = 5", ":6: initial.bytes: expected { measured"),
        (SIZE, "bytes = { assumed = -1 }", ":6: initial.bytes.assumed: -1: expected bytes"),
        (SIZE, f"bytes = {{ assumed = 0x{'f' * 5000} }}", ":6: initial.bytes.assumed: (huge): expected"),
        (SIZE, "bytes = { assumed = nan }", ":6: initial.bytes.assumed: NaN: expected"),
        (SIZE, "bytes = { assumed = 1, measured = 1 }", ":6: initial.bytes: has"),
        (SIZE, "bytes = { at_least = 2, at_most = 1 }", "at_least is more than at_most"),
        (SIZE, "byte = { assumed = 1 }", ":6: initial.byte: no such key; did you mean bytes"),
        ("[initial]", "[inital]", ":5: inital: no such key; did you mean initial?"),
        ('kind = "rate"', 'kind = "fast"', ':9: dirty.kind: "fast": expected one of none, rate'),
        ('kind = "rate"', 'kind = "steps"', ":9: dirty.kind: steps needs dirty.steps"),
        ('kind = "rate"\n', "", ":9: dirty.bytes_per_second: needs dirty.kind, one of"),
        ("extra_bytes", "bytes", ":14: stop_copy.kind: following needs stop_copy.extra_bytes"),
        ("extra_bytes =", "bytes = { assumed = 1 }\nextra_bytes =", ":15: stop_copy.bytes: does not go with"),
        ("[[4096, 1], [1048576, 63]]", "[[4096, 1], [4096, 63]]", ":18: reads.dirty.bytes.assumed"),
        ("[[4096, 1], [1048576, 63]]", "[[4096, 0]]", ":18: reads.dirty.bytes.assumed"),
        ("[[4096, 1], [1048576, 63]]", "[]", ":18: reads.dirty.bytes.assumed"),
        ("[[4096, 1], [1048576, 63]]", "[4096]", ":18: reads.dirty.bytes.assumed"),
        ("RUNNING->PRE_COPY", "RUNING->PRE_COPY", ':22: arcs.source.RUNING->PRE_COPY: expected "FROM->TO"'),
        ("0.05", "10000001.0", "PRE_COPY.assumed: 10000001.0: expected seconds from 0 to 1e+07"),
        ("[arcs.source]", "[arcs.sauce]", ":21: arcs.sauce: no such key; did you mean source?"),
        (
            "[initial]",
            "[[reinit]]\nseconds={measured=1}\nbytes={measured=1}\n[[reinit]]\n[initial]",
            ":8: reinit[2]",
        ),
        ("[initial]", "[initial", "is not TOML"),
    ],
)
def test_an_error_names_line_and_key(was: str, now: str, said: str) -> None:
    assert was in EXAMPLE
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_profile(EXAMPLE.replace(was, now), "device.toml")


def test_hostile_files_are_refused(tmp_path: Path) -> None:
    """Deep nesting, numbers without end, a file without end, bytes that are no text."""
    for text in (
        "a = " + "[" * 100_000,
        "version = 1\nx = " + "9" * 10_000,
        "version = " + "[" * 500 + "]" * 500,
    ):
        with pytest.raises(ConfigError):
            parse_profile(text, "hostile")
    path = tmp_path / "profile.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_profile(path)
    path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="at most 8 MiB"):
        read_profile(path)
    for missing in ("/dev/zero", tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError):
            read_profile(missing)


def test_a_line_without_end_does_not_hold_up_its_error() -> None:
    """The search for a key's line looks at the beginning of each line."""
    with pytest.raises(ConfigError, match="no such key"):
        parse_profile("version = 1\nnot_a_key = 1\n# " + "a." * 4_000_000, "hostile")


# --- what contradicts itself --------------------------------------------------------------------------------


def refusal(text: str) -> str:
    """Return what is said of a file's text; empty: it is a profile."""
    try:
        parse_profile("version = 1\n" + text, "it")
    except ConfigError as error:
        return str(error)
    return ""


NO_PRE_COPY = "[features]\npre_copy = { measured = false }\n"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (NO_PRE_COPY + "[initial]\nbytes = { assumed = 1 }", "initial.bytes"),
        (NO_PRE_COPY + "[initial]\nbytes = { at_least = 1, at_most = 2 }", "initial.bytes"),
        (NO_PRE_COPY + "[initial]\nready_seconds = { assumed = 1 }", "initial.ready_seconds"),
        (NO_PRE_COPY + '[dirty]\nkind = "rate"\nbytes_per_second = { assumed = 1 }', "dirty.kind"),
        (
            NO_PRE_COPY + '[stop_copy]\nkind = "growing"\nbytes = { assumed = 1 }\n'
            "bytes_per_second = { assumed = 1 }",
            "stop_copy.kind",
        ),
        (NO_PRE_COPY + "[reads.initial]\nseconds = { assumed = 1 }", "reads.initial"),
        (NO_PRE_COPY + "[reads.dirty]\nbytes = { assumed = 1 }", "reads.dirty"),
        (NO_PRE_COPY + "[[reinit]]\nseconds = { assumed = 1 }\nbytes = { assumed = 1 }", "reinit[1]"),
        (
            NO_PRE_COPY + '[arcs.source]\n"RUNNING->PRE_COPY" = { assumed = 1 }',
            "arcs.source.RUNNING->PRE_COPY",
        ),
        (
            "[features]\np2p = { assumed = false }\n"
            '[arcs.destination]\n"RESUMING->RUNNING_P2P" = { assumed = 1 }',
            "arcs.destination.RESUMING->RUNNING_P2P",
        ),
        (
            "[features]\np2p = { assumed = false }\n"
            '[arcs.source]\n"PRE_COPY->PRE_COPY_P2P" = { assumed = 1 }',
            "arcs.source.PRE_COPY->PRE_COPY_P2P",
        ),
        (
            "[features]\nprecopy_info_v2 = { assumed = false }\n"
            "[[reinit]]\nseconds = { assumed = 1 }\nbytes = { assumed = 1 }",
            "reinit[1]",
        ),
        (
            "[features]\ndma_logging = { assumed = false }\n[dma_logging]\nmax_ranges = { assumed = 1 }",
            "dma_logging.max_ranges",
        ),
        ('[dirty]\nkind = "none"\nafter = { assumed = "stop" }', "dirty.after"),
        (
            '[dirty]\nkind = "refill"\nrefill_bytes = { at_least = 3 }\nrefill_seconds = { assumed = 1 }\n'
            "limit_bytes = { at_most = 2 }",
            "dirty.refill_bytes",
        ),
        (
            '[stop_copy]\nkind = "constant"\nbytes = { assumed = 3 }\nlimit_bytes = { assumed = 2 }',
            "stop_copy.bytes",
        ),
        (
            '[stop_copy]\nkind = "steps"\nsteps = { assumed = [[0, 1], [1, 3], [2, 1]] }\n'
            "limit_bytes = { assumed = 2 }",
            "stop_copy.steps",
        ),
        (
            "[[reinit]]\nseconds = { assumed = 2 }\nbytes = { assumed = 1 }\n"
            "[[reinit]]\nseconds = { assumed = 1 }\nbytes = { assumed = 1 }",
            "reinit[2].seconds",
        ),
    ],
)
def test_what_no_device_can_do_at_once_is_refused(text: str, key: str) -> None:
    """With line and key, and what to do about it."""
    assert re.fullmatch(rf"it:\d+: {re.escape(key)}: .*(; .*|alone)", refusal(text))


def test_a_value_of_which_limits_alone_are_known_contradicts_only_what_is_beyond_them() -> None:
    limit = "limit_bytes = { at_least = 2 }\n"
    assert not refusal('[stop_copy]\nkind = "constant"\nbytes = { assumed = 3 }\n' + limit)
    most = "bytes = { at_most = 3 }\nlimit_bytes = { assumed = 2 }\n"
    assert not refusal('[stop_copy]\nkind = "constant"\n' + most)
    assert not refusal(NO_PRE_COPY + "[initial]\nbytes = { at_most = 1 }")
    again = "[[reinit]]\nseconds = { at_most = 2 }\nbytes = { assumed = 1 }\n"
    assert not refusal(again + again.replace("at_most = 2", "assumed = 1"))


def test_sizes_are_compared_to_the_byte() -> None:
    """Also where they are too large for a float."""
    text = '[stop_copy]\nkind = "constant"\nbytes = {{ assumed = {} }}\nlimit_bytes = {{ assumed = {} }}\n'
    at = 1 << 60
    assert not refusal(text.format(at, at))
    assert f"{at + 1} is more than stop_copy.limit_bytes, {at};" in refusal(text.format(at + 1, at))


def test_what_is_merely_unusual_is_a_profile() -> None:
    """Sizes that disagree, initial data of 0 bytes that takes time to load, a limit that is reached."""
    for text in (
        NO_PRE_COPY + "[initial]\nbytes = { assumed = 0 }\n[loading]\ninitial_seconds = { assumed = 1 }",
        NO_PRE_COPY + '[stop_copy]\nkind = "constant"\nbytes = { assumed = 5 }',
        '[initial]\nbytes = { assumed = 5 }\n[stop_copy]\nkind = "constant"\nbytes = { assumed = 1 }',
        '[stop_copy]\nkind = "constant"\nbytes = { assumed = 2 }\nlimit_bytes = { assumed = 2 }',
        "[features]\ndata_size = { assumed = false }\n[stop_copy]\ncarried_bytes = { assumed = 5 }",
        "[features]\npre_copy = { assumed = true }\n[initial]\nbytes = { assumed = 5 }",
        "[stop_copy]\nrunning_bytes = { assumed = 0 }\ncarried_bytes = { assumed = 5 }",
    ):
        assert not refusal(text)


@pytest.mark.parametrize(
    ("feature", "used"),
    [
        ("pre_copy", "[initial]\nbytes = { assumed = 1 }"),
        ("p2p", '[arcs.source]\n"RUNNING->RUNNING_P2P" = { assumed = 1 }'),
        ("precopy_info_v2", "[[reinit]]\nseconds = { assumed = 1 }\nbytes = { assumed = 1 }"),
        ("dma_logging", "[dma_logging]\nmax_ranges = { assumed = 1 }"),
    ],
)
def test_what_an_error_says_to_write_can_be_written(feature: str, used: str) -> None:
    """A profile's features need a mark: `true` alone is the next error."""
    text = f"[features]\n{feature} = {{ assumed = false }}\n{used}\n"
    said = re.search(rf"or say features\.({feature} = .*)$", refusal(text))
    assert said
    assert not refusal(text.replace(f"{feature} = {{ assumed = false }}", said[1]))


def test_an_error_has_all_contradictions() -> None:
    """Each with its line; of very many, the first ones and a number."""
    text = NO_PRE_COPY + "[initial]\nbytes = { assumed = 1 }\n" + '[dirty]\nafter = { assumed = "stop" }\n'
    lines = refusal(text).splitlines()
    assert lines[0] == "it: 2 contradictions:"
    assert [line.split(": ")[:2] for line in lines[1:]] == [
        ["  it:5", "initial.bytes"],
        ["  it:7", "dirty.after"],
    ]
    event = "[[reinit]]\nseconds = { assumed = 1 }\nbytes = { assumed = 1 }\n"
    lines = refusal(NO_PRE_COPY + event * 60).splitlines()
    assert (len(lines), lines[-1]) == (52, "  and 10 more")


# --- values -------------------------------------------------------------------------------------------------


def test_a_distribution_has_exact_sums_and_quantiles() -> None:
    spread = Distribution.of([0.001] * 99 + [1.5])
    assert spread.points == ((0.001, 99), (1.5, 1))
    assert spread.count == 100
    assert spread.total == pytest.approx(1.599)
    assert [spread.quantile(part) for part in (0.0, 0.5, 0.99, 0.991, 1.0)] == [0.001, 0.001, 0.001, 1.5, 1.5]
    assert Distribution.always(3).quantile(0.2) == 3


@given(st.lists(st.integers(0, 50), min_size=1), st.floats(0, 1))
def test_a_quantile_is_the_value_that_enough_do_not_exceed(values: list[int], part: float) -> None:
    found = Distribution.of(values).quantile(part)
    below = sum(1 for one in values if one < found)
    within = sum(1 for one in values if one <= found)
    assert within >= part * len(values) - 1e-6
    assert below <= part * len(values) + 1e-6


def test_sizes_may_be_text_and_the_largest_is_exact() -> None:
    assert parse_profile(EXAMPLE, "x").initial.bytes == Value.assumed(16 << 20)
    text = f'version = 1\n[stop_copy]\nkind = "constant"\nbytes = {{ measured = {MAX_BYTES} }}\n'
    found = parse_profile(text, "x")
    assert found.stop_copy.bytes == Value.measured(MAX_BYTES)
    assert parse_profile(profile_text(found), "x") == found


# --- the page -----------------------------------------------------------------------------------------------


def test_the_table_is_the_present_one() -> None:
    """`python -m vfu_dev.profile.table docs/profiles.md` makes it so."""
    text = PAGE.read_text()
    assert with_table(text) == text


def test_the_page_explains_every_kind() -> None:
    text = PAGE.read_text().partition("## What the kinds mean")[2]
    for kind in (*DIRTY_KINDS.words, *LENGTH_KINDS.words):
        assert f"| `{kind}`" in text, kind
