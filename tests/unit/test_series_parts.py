"""Parts of a run: shards, what `lab merge` joins and refuses, and which machine made what."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from vfu_dev import machine
from vfu_dev.errors import ConfigError, LabError
from vfu_dev.machine import LABEL, anonymous, machine_id, same_machine
from vfu_dev.report.series import markdown
from vfu_dev.series.compare import compare
from vfu_dev.series.folder import RunFolder
from vfu_dev.series.merge import find_parts, merge
from vfu_dev.series.parts import Shard, groups_of
from vfu_dev.series.rows import COMPLETED, Row, write_rows
from vfu_dev.series.scenario import parse
from vfu_dev.series.summary import machine as this_machine
from vfu_dev.series.summary import point_summary, write_json

SCENARIO = """
title = "T"
run.moves = 2
[sweep]
"load.dirty-rate" = ["10p", "20p", "30p"]
[variants.off]
qemu.pre-copy = false
[variants.on]
[[check]]
metric = "downtime_ms"
max = 100
"""
MADE_WITH = {"versions": {"vfu-dev": "1.0", "qemu": "10.2.2"}, "qemus": {"qemu": "qemu-1"}}


def part(
    path: Path,
    label: str,
    numbers: tuple[int, ...],
    made_with: dict[str, Any] = MADE_WITH,
    library: str = "ours",
    downtime: float = 10.0,
) -> Path:
    """Write the folder of a part that has the groups `numbers`, as `lab run` leaves it."""
    scenario = parse(SCENARIO, "t")
    folder = RunFolder(path / "t", scenario, False, made_with, Shard(1, 3))
    folder.prepare()
    here = this_machine() | {"id": label}
    for number in numbers:
        for point in folder.groups[number]:
            rows = [
                Row(point.name, move, 0.0, COMPLETED, {"downtime_ms": downtime}, True, machine=label)
                for move in (1, 2)
            ]
            write_rows(folder.rows_path(point), rows)
            entry = {**point.to_dict(), **point_summary(rows), "problems": [], "machine": here}
            entry |= {"guest": None, "load_status": None, "rate": None, "libvfio_user": library}
            write_json(folder.entry_path(point), entry | {"started": 1.0, "ended": 2.0})
    return path


# --- shards


def test_shards_deal_every_group_once() -> None:
    """Whole groups, evenly, and on from one scenario to the next."""
    groups = groups_of(parse(SCENARIO, "t").points)
    assert [[point.variant for point in group] for group in groups] == [["off", "on"]] * 3
    for count in range(1, 9):
        dealt = Counter[str]()
        sizes = []
        for number in range(1, count + 1):
            shard = Shard.parse(f"{number}/{count}")
            mine = [*shard.take(groups), *shard.take(groups, len(groups))]
            sizes.append(len(mine))
            dealt.update(point.name for group in mine for point in group)
        assert set(dealt.values()) == {2}
        assert len(dealt) == 6
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3", ""])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="I from 1 to N"):
        Shard.parse(text)


# --- merge


def test_parts_join_in_the_order_of_the_scenario(tmp_path: Path) -> None:
    """Whatever order they come in, and in steps; a check is judged of the whole."""
    one, two = part(tmp_path / "1", "left", (0, 2)), part(tmp_path / "2", "right", (1,))
    out = tmp_path / "out" / "t"
    with pytest.raises(LabError, match="4 of 6 points are missing: off_dirty-rate=10p, on_dirty"):
        merge(find_parts([two])["t"], out)
    found = find_parts([tmp_path / "1" / "t"])
    assert found == {"t": [one / "t"]}
    summary = merge(found["t"], out)
    assert [point["name"] for point in summary["points"]] == [p.name for p in parse(SCENARIO, "t").points]
    assert [one["id"] for one in summary["machines"]] == ["left", "right"]
    assert summary["shard"] is None
    assert summary["ok"]
    assert len(summary["checks"]) == 1
    assert "2 machines: left (" in markdown(summary)
    assert ": 4 points, right (" in markdown(summary)
    with pytest.raises(ConfigError, match="holds another run"):
        merge([part(tmp_path / "3", "left", (0,), {**MADE_WITH, "qemus": {"qemu": "qemu-2"}}) / "t"], out)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"made_with": {**MADE_WITH, "versions": {"vfu-dev": "1.0", "qemu": "11"}}}, r"qemu \(11 instead of"),
        ({"made_with": {**MADE_WITH, "qemus": {"qemu": "qemu-2"}}}, r"qemu \(qemu-2 instead of qemu-1\)"),
        ({"library": "another"}, "different versions of libvfio-user: ours in .* and another in"),
        ({"numbers": (0,), "downtime": 11.0}, "made twice"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    other: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """In words, and nothing of it is taken."""
    one = part(tmp_path / "1", "left", (0, 1))
    two = part(tmp_path / "2", "right", **{"numbers": (2,), **other})
    with pytest.raises(ConfigError, match=words):
        merge([one / "t", two / "t"], tmp_path / "out")
    assert not list((tmp_path / "out").glob("points/*"))


def test_a_part_of_another_scenario_and_a_cut_one_are_refused(tmp_path: Path) -> None:
    one, two = part(tmp_path / "1", "left", (0, 1)), part(tmp_path / "2", "right", (2,))
    (two / "t" / "scenario.toml").write_text(SCENARIO + "# edited")
    with pytest.raises(ConfigError, match=r"not of one run: scenario\.toml"):
        merge([one / "t", two / "t"], tmp_path / "out")
    (two / "t" / "scenario.toml").write_text(SCENARIO)
    rows = next((two / "t" / "points").glob("*.csv"))
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match="does not have all moves"):
        merge([one / "t", two / "t"], tmp_path / "out")
    with pytest.raises(ConfigError, match="no result"):
        find_parts([tmp_path / "out" / "points"])


def test_a_group_is_taken_whole_or_not(tmp_path: Path) -> None:
    """A shard that ended between the files of two variants: the group counts as missing."""
    one = part(tmp_path / "1", "left", (0, 1, 2))
    (one / "t" / "points" / "on_dirty-rate=20p.json").unlink()
    with pytest.raises(LabError, match="2 of 6 points are missing: off_dirty-rate=20p, on_dirty-rate=20p"):
        merge([one / "t"], tmp_path / "out")


# --- machines


def test_an_identity_is_stable_and_tells_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is a hash; a label replaces it; where there is no machine-id, the kernel's boot id does."""
    monkeypatch.delenv(LABEL, raising=False)
    files = (tmp_path / "machine-id", tmp_path / "boot_id")
    monkeypatch.setattr(machine, "_SOURCES", files)
    files[0].write_text("0123456789abcdef0123456789abcdef\n")
    files[1].write_text("11111111-2222\n")
    first = machine_id()
    assert first == machine_id()
    assert len(first) == 12
    assert first not in files[0].read_text()
    files[1].write_text("33333333-4444\n")
    assert machine_id() == first
    files[0].write_text("1123456789abcdef0123456789abcdef\n")
    assert machine_id() != first
    files[0].unlink()
    booted = machine_id()
    files[1].write_text("11111111-2222\n")
    assert machine_id() not in (first, booted)
    monkeypatch.setenv(LABEL, " rack 7 ")
    assert machine_id() == "rack 7"
    monkeypatch.setenv(LABEL, "a\nb")
    with pytest.raises(ConfigError, match=LABEL):
        machine_id()


def test_machines_are_told_apart_by_what_both_sides_know() -> None:
    """Results of before November 2026 have no identity."""
    old = {"processor": "P", "cores": 2}
    one = old | {"id": "a"}
    assert same_machine(one, one)
    assert same_machine(old, one)
    assert not same_machine(one, one | {"id": "b"})
    assert not same_machine(old, one | {"cores": 4})


def test_compare_refuses_other_machines(tmp_path: Path) -> None:
    """Point by point: what the same machine made is compared; results without identities by processor."""
    for name, labels in (("one", "ab"), ("two", "ac")):
        for number, label in enumerate(labels):
            part(tmp_path / name / str(number), label, ((0, 2), (1,))[number])
        merge([tmp_path / name / number / "t" for number in "01"], tmp_path / name / "t")
    one, two = tmp_path / "one" / "t", tmp_path / "two" / "t"
    with pytest.raises(ConfigError, match=r"_dirty-rate=20p was made by b .* and by c .*--across-machines"):
        compare(one, two)
    found = compare(one, two, across_machines=True)
    assert list(found["machines"]) == ["off_dirty-rate=20p", "on_dirty-rate=20p"]
    assert compare(one, one)["machines"] == {}
    old = tmp_path / "old"
    shutil.copytree(two, old)
    summary = json.loads((old / "summary.json").read_text())
    del summary["machines"], summary["machine"]["id"]
    for point in summary["points"]:
        del point["machine"]
    write_json(old / "summary.json", summary)
    assert compare(one, old)["machines"] == {}


def test_a_published_result_says_which_machines_are_the_same_and_not_which_they_are() -> None:
    """A label of the user's may be any word: what else has that word stays."""
    one = {"id": "idle", "processor": "a", "kernel": "6.1.0-21-cloud-amd64"}
    two = {"id": "4711ab", "processor": "a", "kernel": "6.18.44"}
    old = {"processor": "a", "kernel": "custom"}  # had no id
    names: dict[str, str] = {}
    found = anonymous(
        {"scenario": "idle", "machines": [one, two], "points": [{"machine": one}, {"machine": old}]}, names
    )
    assert names == {"idle": "machine-1", "4711ab": "machine-2"}
    assert found == {
        "scenario": "idle",
        "machines": [
            one | {"id": "machine-1", "kernel": "6.1.0"},
            two | {"id": "machine-2"},
        ],
        "points": [
            {"machine": one | {"id": "machine-1", "kernel": "6.1.0"}},
            {"machine": old | {"kernel": "unknown"}},
        ],
    }
