"""Scenario files: what they mean, and what a wrong one is told."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from vfu_dev.errors import ConfigError
from vfu_dev.series.artifacts import Artifacts
from vfu_dev.series.prediction import link_of, predict_point
from vfu_dev.series.scenario import METHOD_MOVES, Scenario, parse, read_scenario, shipped

GOOD = """
title = "T"
[device]
memory = "1M"
[load]
pattern = "uniform"
rate = "100p"
[qemu]
downtime-limit = 100
[run]
moves = 80
[sweep]
"load.rate" = ["50p", "1M"]
"qemu.max-bandwidth" = ["16M", "32M", "64M"]
[variants.on]
[variants.off]
qemu.pre-copy = false
[short]
"run.moves" = 2
[short.sweep]
"load.rate" = ["50p"]
[[check]]
metric = "downtime_ms"
variant = "on"
against = "off"
max-ratio = 0.1
"""


def test_points_are_all_combinations() -> None:
    """Two variants, two rates and three bandwidths are twelve points, each with all its settings."""
    scenario = parse(GOOD, "t")
    assert len(scenario.points) == 12
    assert len({point.name for point in scenario.points}) == 12
    assert [point.variant for point in scenario.points[:2]] == ["on", "off"]
    last = scenario.points[-1]
    assert last["qemu.pre-copy"] is False
    assert last["qemu.max-bandwidth"] == 64 << 20
    assert last["device.memory"] == 1 << 20
    assert last["run.moves"] == 80
    assert last.load.rate_bytes == 1 << 20
    assert last.load.rate_pages is None
    assert scenario.points[0].load.rate_pages == 50


def test_a_file_made_on_windows_is_a_scenario(tmp_path: Path) -> None:
    path = tmp_path / "windows.toml"
    path.write_bytes(codecs.BOM_UTF8 + GOOD.replace("\n", "\r\n").encode())
    assert len(read_scenario(path).points) == 12


def test_a_file_nested_without_end_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^t: is nested too deeply$"):
        parse("a = " + "[" * 100_000, "t")


def test_short_form_changes_what_it_says() -> None:
    """The short form has its own number of moves and sweep, and everything else of the full one."""
    scenario = parse(GOOD, "t")
    assert len(scenario.short_points) == 6
    assert {point["run.moves"] for point in scenario.short_points} == {2}
    assert {point["device.memory"] for point in scenario.short_points} == {1 << 20}


def test_default_is_the_method() -> None:
    """Without a number of moves a point makes as many as the method asks for; the short form a few."""
    scenario = parse('title = "t"', "t")
    assert scenario.points[0]["run.moves"] == METHOD_MOVES
    assert scenario.short_points[0]["run.moves"] < 10
    assert scenario.points[0].load.is_idle


def test_a_profile_is_replayed_as_lab_migrate_does(tmp_path: Path) -> None:
    """Both servers get profile and scale before their other arguments; the model says nothing of it."""
    text = """
        [device]
        profile = "igb-4k"
        serve = ["--initial", "1M"]
        [sweep]
        "device.scale" = [1, 4]
        [variants.replayed]
        [variants.other]
        device.profile = "qat"
    """
    found = [point.options(tmp_path, None, None) for point in parse(text, "t").points]
    replayed = [(Path(one.server_extra[1]).stem, one.server_extra[3]) for one in found]
    assert replayed == [("igb-4k", "1"), ("qat", "1"), ("igb-4k", "4"), ("qat", "4")]
    for one in found:
        assert one.server_extra[0::2] == ("--profile", "--scale", "--initial")
        assert one.replays
    assert not parse(GOOD, "t").points[0].options(tmp_path, None, None).replays
    point = parse(text, "t").points[0]
    with pytest.raises(ConfigError, match="a profile is none"):
        predict_point(point.settings, point.load, link_of(point.settings))


def test_a_profile_that_is_missing_ends_the_run_before_it_begins() -> None:
    points = parse('[device]\nprofile = "nobody\'s"', "t").points
    with pytest.raises(ConfigError, match=r"nobody's: no such file, and no shipped profile: .*igb-4k"):
        Artifacts.find(points)


def test_set_is_over_everything() -> None:
    """What --set says holds in every point, over variants and sweeps."""
    scenario = parse(GOOD, "t", changes={"run.moves": 3, "load.rate": "7p", "qemu.pre-copy": "off"})
    assert {point["run.moves"] for point in scenario.points} == {3}
    assert {point.load.rate_pages for point in scenario.points} == {7}
    assert {point["qemu.pre-copy"] for point in scenario.points} == {False}
    assert {point["run.moves"] for point in scenario.short_points} == {3}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('memory = "1M"', 'memory = "1000"'), ["t.toml:4: device.memory", "4096 at least"]),
        (('memory = "1M"', 'memroy = "1M"'), ["t.toml:4: device.memroy", "did you mean device.memory?"]),
        (("downtime-limit = 100", 'downtime-limit = "no"'), ["t.toml:9:", "milliseconds above 0"]),
        (("moves = 80", "moves = 0"), ["t.toml:11: run.moves", "from 1 to 10000"]),
        (
            ("pre-copy = false", 'pre-copy = "maybe"'),
            ["t.toml:17: variants.off.qemu.pre-copy", "or false"],
        ),
        (('"50p", "1M"', '"fast"'), ["t.toml", "load", "write rate", "8M"]),
        (('["16M", "32M", "64M"]', '"16M"'), ["t.toml:14: sweep.qemu.max-bandwidth", "a list"]),
        (('["16M", "32M", "64M"]', '["16M", "x"]'), ["t.toml:14:", "a size such as"]),
        (('pattern = "uniform"', 'pattern = "random"'), ["t.toml:5: load", "zipf"]),
        (('metric = "downtime_ms"', 'metric = "downtime"'), ["check.metric", "downtime_ms"]),
        (('against = "off"', 'against = "of"'), ["check.against", "on, off"]),
        (("max-ratio = 0.1", ""), ["check", "max-ratio"]),
        (('title = "T"', "title = 3"), ["t.toml:2: title"]),
        (("[run]", "[runs]"), ["t.toml:10: runs", "no such table"]),
        (("[device]", "[device"), ["t.toml: is not TOML"]),
        (('memory = "1M"', 'memory = "1M"\naccess = "mmap"'), ["t.toml:5: device.access", "load.place"]),
        (
            ("[short]", '[short]\n"load.place" = "device"\n"run.verify" = "mmio"'),
            ["t.toml:10: run.verify", "digests"],
        ),
        (("[run]", '[faults]\nsource = ["op=nope"]\n[run]'), ["t.toml:11: faults.source", "mig-write"]),
        (("[short]", '[short]\nvariants = ["of"]'), ["short.variants", "on, off"]),
        (("[run]", 'policy = "passes=3"\n[run]'), ["t.toml:10: qemu.policy", "a list of rules such as"]),
        (
            ("[run]", 'policy = [\n  "seconds=1,downtime-limit=9",\n  "seconds=1,downtime=9",\n]\n[run]'),
            ["t.toml:12: qemu.policy", "'downtime=9': expected KEY=VALUE", "downtime-limit"],
        ),
        (
            ("pre-copy = false", 'policy = ["passes=0,downtime-limit=9"]'),
            ["t.toml:17: variants.off.qemu.policy", "from 1 to"],
        ),
        (("[load]", f"scale = 0x{'f' * 5000}\n[load]"), ["t.toml:5: device.scale: (huge): expected a whole"]),
        (("[load]", f"scale = {'9' * 5000}\n[load]"), ["t.toml: is not TOML"]),
        (("[load]", "scale = 4\n[load]"), ["t.toml:5: device.scale", "a device.profile"]),
        (("[load]", "profile = 4\n[load]"), ["t.toml:5: device.profile", "the name of a shipped profile"]),
        (
            ("[load]", 'serve = ["--profile", "igb-4k"]\n[load]'),
            ["t.toml:5: device.serve", "keys of its own: device.profile"],
        ),
        (
            ("[load]", 'profile = "igb-4k"\nserve = ["--scale=4"]\n[load]'),
            ["t.toml:6: device.serve", "device.scale"],
        ),
    ],
)
def test_errors_name_file_line_key_and_values(change: tuple[str, str], said: list[str]) -> None:
    """A wrong file is refused with the place and what is allowed there."""
    assert change[0] in GOOD
    with pytest.raises(ConfigError) as refused:
        parse(GOOD.replace(*change, 1), "t", "t.toml")
    for text in said:
        assert text in str(refused.value)


def test_sweeps_that_never_end_are_refused() -> None:
    """A product of sweeps is counted before it is made."""
    values = str(list(range(1, 200)))
    text = f'[sweep]\n"run.moves" = {values}\n"qemu.downtime-limit" = {values}\n"device.devices" = [1, 2]\n'
    with pytest.raises(ConfigError, match="points, at most"):
        parse(text, "t")


def test_unknown_name_lists_what_there_is() -> None:
    """Neither a file nor a shipped scenario: the error lists the shipped ones."""
    with pytest.raises(ConfigError, match="switchover-ack"):
        read_scenario("nothing-like-it")


# What they show is that a migration never ends, or whether it does: not how long one takes.
POLICIES = ("auto-converge", "kubevirt-ramp", "kubevirt-stall", "libvirt", "vgpu")
NOT_OF_THE_METHOD = ("non-convergent", "rescued", "convergence-map", *POLICIES)


@pytest.mark.parametrize("name", shipped())
def test_shipped_scenarios_are_of_the_method(name: str) -> None:
    """Each parses, explains itself, and makes 70 moves a point; the short form makes a handful in all."""
    scenario: Scenario = read_scenario(name)
    assert scenario.title != name
    assert scenario.about
    assert 1 <= sum(point["run.moves"] for point in scenario.short_points) <= 6
    if name not in NOT_OF_THE_METHOD:
        assert {point["run.moves"] for point in scenario.points} == {METHOD_MOVES}


def test_shipped_scenarios_are_those_of_the_issue() -> None:
    """The list that the documentation and `lab run --all` promise."""
    promised = ["idle", "steady", "hotset", "bursty", "non-convergent", "rescued", "many-small", "one-large"]
    promised += ["precopy", "devices", "switchover-ack"]
    assert set(promised) <= set(shipped())
