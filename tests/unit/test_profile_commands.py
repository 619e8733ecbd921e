"""`vfu-dev profile`: what is imported, shown, compared and fitted, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from schemakit import conforms
from tracekit import lines, move

from vfu_dev.cli.profile import command, migration_of
from vfu_dev.errors import ConfigError
from vfu_dev.profile import Distribution, Profile, Value, profile_text, read_profile
from vfu_dev.profile.compare import Tolerance, differences, value_at
from vfu_dev.profile.fit import MAX_SPREAD, fit, grouped
from vfu_dev.profile.model import Calls, Dirty, Initial, MigrationSettings, Reads, StopCopy
from vfu_dev.profile.show import drawn, sentence
from vfu_dev.profile.tally import CURVE_POINTS, EXACT_VALUES, CurveKeeper, Tally

NIC = Path(__file__).parent / "data" / "nic.toml"
MADE_UP = NIC.read_text()


@pytest.fixture
def nic() -> Path:
    """A profile in a file."""
    return NIC


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command, [str(one) for one in arguments], standalone_mode=False)


def written(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# --- import -------------------------------------------------------------------------------------------------


def test_import_writes_a_profile_and_says_what_is_not_known(tmp_path: Path) -> None:
    trace, made, told = tmp_path / "a.log", tmp_path / "made" / "nic.toml", tmp_path / "told.json"
    trace.write_text(lines(move(), form="none"))
    settings = ["--with", "qemu=10.0.2", "--with", "max-bandwidth=10Gbit", "--with", "switchover-ack=on"]
    done = run("import", trace, "-o", made, "--about", "a try", *settings, f"--json={told}")
    assert done.exit_code == 0, done.output
    profile = read_profile(made)
    assert (profile.name, profile.about, profile.origin) == ("nic", "a try", "recorded")
    assert profile.migration == MigrationSettings("10.0.2", 1_250_000_000, switchover_ack=True)
    conforms("profile-import", written(told))
    assert any("no timestamps" in note for note in written(told)["notes"])


@pytest.mark.parametrize(
    "setting", ["speed=5", "qemu", "max-bandwidth=fast", "downtime-limit=-1", "switchover-ack=maybe"]
)
def test_a_setting_that_cannot_be_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"--with {setting}: expected "):
        migration_of((setting,))


# --- show ---------------------------------------------------------------------------------------------------


def test_show_is_a_sentence_a_table_and_a_plot(nic: Path, tmp_path: Path) -> None:
    told, plot = tmp_path / "told.json", tmp_path / "nic.svg"
    done = run("show", nic, f"--json={told}", "--plot", plot)
    assert done.exit_code == 0, done.output
    assert done.output.startswith("nic: 16 MiB of initial data; 3.8 MiB a second become dirty; ")
    assert "initial.bytes" in done.output
    assert "measured" in done.output
    conforms("profile-show", written(told))
    assert written(told)["profile"]["stop_copy"]["bytes"] == {"measured": 21038628864}
    assert plot.read_text().startswith("<?xml")
    refused = run("show", nic, "--plot", tmp_path / "x.pdf")
    assert isinstance(refused.exception, ConfigError)
    assert ".png or .svg" in str(refused.exception)


def test_the_sentence_says_what_is_not_known() -> None:
    assert sentence(Profile(name="x")) == "x: how it becomes dirty is not known."
    curve = Value.measured(((0.0, 0), (2.0, 8 << 20)))
    text = sentence(Profile(name="x", dirty=Dirty(kind="curve", curve=curve)))
    assert text == "x: 8 MiB became dirty in 2 s."


def test_the_sentence_says_what_is_a_limit() -> None:
    bounded = Profile(
        name="x",
        stop_copy=StopCopy(kind="following", extra_bytes=Value.bounded(at_most=4096)),
        source_arcs={"RUNNING->PRE_COPY": Value.bounded(at_most=Distribution.always(0.5))},
    )
    assert "what is left and at most 4 KiB" in sentence(bounded)
    assert "at the source: at most 500 ms" in sentence(bounded)
    least = StopCopy(kind="following", extra_bytes=Value.bounded(at_least=4096))
    assert "what is left and at least 4 KiB" in sentence(Profile(name="x", stop_copy=least))
    sizes = StopCopy(kind="constant", bytes=Value.bounded(at_least=4096, at_most=8192))
    assert "stop_copy_length is at most 8 KiB" in sentence(Profile(name="x", stop_copy=sizes))


def test_how_the_migration_was_set_up_has_its_units(tmp_path: Path) -> None:
    made = tmp_path / "nic.toml"
    made.write_text(MADE_UP + "\n[migration]\nmax_bandwidth = 1048576\ndowntime_limit_ms = 2000\n")
    shown = " ".join(run("show", made).output.split())
    assert "migration.max_bandwidth 1 MiB/s (1048576)" in shown
    assert "migration.downtime_limit_ms 2 s" in shown


def test_the_time_before_the_first_rate_is_drawn(tmp_path: Path) -> None:
    made = tmp_path / "later.toml"
    made.write_text('version = 1\n[dirty]\nkind = "steps"\nsteps = { assumed = [[1.0, 5.0], [2.0, 5.0]] }\n')
    assert f"\n{' ' * 30}{'█' * 30}\n" in run("show", made).output


def test_a_curve_is_drawn_from_begin_to_end() -> None:
    assert drawn(((0.0, 0), (1.0, 8)), steps=False, columns=4) == "▁▃▆█"
    assert drawn(((0.0, 0), (0.5, 8), (1.0, 8)), steps=True, columns=4) == "  ██"
    assert drawn(((0.0, 0), (1.0, 0)), steps=False, columns=3) == "   "


# --- diff ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("was", "now", "options", "status", "key"),
    [
        ("nic", "other", [], 0, None),
        ('"16M"', "16777217", [], 1, "initial.bytes"),
        ('"16M"', "16777217", ["--sizes", "1"], 0, None),
        ("1.5", "1.6", [], 0, None),
        ("1.5", "1.8", [], 1, "arcs.destination.RESUMING->RUNNING"),
        ("1.5", "1.8", ["--times", "20"], 0, None),
        ("1.5", "1.8", ["--times", "0", "--least", "400"], 0, None),
        ("measured = 1.5", "assumed = 9.5", ["--measured"], 0, None),
        ("measured = 1.5", "assumed = 9.5", [], 1, "arcs.destination.RESUMING->RUNNING"),
        ('"constant"\nbytes', '"following"\nextra_bytes', [], 1, "stop_copy.kind"),
    ],
)
def test_diff_is_status_1_where_they_differ(
    nic: Path, tmp_path: Path, was: str, now: str, options: list[str], status: int, key: str | None
) -> None:
    assert was in MADE_UP
    other, told = tmp_path / "other.toml", tmp_path / "told.json"
    other.write_text(MADE_UP.replace(was, now))
    done = run("diff", nic, other, *options, f"--json={told}")
    assert done.return_value == status, done.output
    conforms("profile-diff", written(told))
    keys = [one["key"] for one in written(told)["differences"]]
    assert (key in keys) if key else keys == []
    assert written(told)["same"] == (status == 0)


def test_distributions_are_compared_by_mean_and_quantiles() -> None:
    """A few calls that take long are a difference, though most take as long as ever; their number is none."""

    def reads(*points: tuple[float, int]) -> Profile:
        return Profile(reads=Reads(dirty=Calls(seconds=Value.measured(Distribution(points)))))

    usual = reads((0.010, 90), (0.020, 10))
    assert differences(usual, reads((0.010, 900), (0.020, 100)), Tolerance()) == []
    (found,) = differences(usual, reads((0.010, 90), (0.5, 10)), Tolerance())
    assert "mean" in found.text
    assert "90% quantile" not in found.text
    (found,) = differences(usual, reads((0.010, 50), (0.020, 50)), Tolerance())
    assert "90% quantile" in found.text


def test_curves_are_compared_where_they_are_apart() -> None:
    def dirty(*points: tuple[float, float]) -> Profile:
        return Profile(dirty=Dirty(kind="curve", curve=Value.measured(points)))

    line = dirty((0.0, 0), (1.0, 1000))
    assert differences(line, dirty((0.0, 0), (0.5, 500), (1.0, 1000)), Tolerance()) == []
    (found,) = differences(line, dirty((0.0, 0), (0.5, 900), (1.0, 1000)), Tolerance(size_part=0.05))
    assert found.key == "dirty.curve"
    assert found.text.startswith("400 apart at 0.500 s")
    (found,) = differences(line, dirty((0.0, 0), (1.0, 1000), (2.0, 2000)), Tolerance())
    assert "end at" in found.text
    assert value_at(((0.0, 0.0), (1.0, 10.0), (1.0, 20.0)), 1.0, steps=False) == 20.0


FLAT = ((0.0, 5), (60.0, 5))


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (((0.0, 5),), True),
        (((0.0, 5), (1.0, 5000), (2.0, 5)), False),
        (((0.0, 5), (31.001, 900_000), (31.011, 5), (60.0, 5)), False),  # between any hundred times
        (((0.0, 5), (61.0, 5000)), False),
        (((0.0, 5), (31.0, 900_000), (31.0, 5)), True),
    ],
)
def test_every_step_is_compared(other: Any, same: bool) -> None:
    a, b = (Profile(stop_copy=StopCopy(kind="steps", steps=Value.measured(steps))) for steps in (FLAT, other))
    assert differences(a, a, Tolerance()) == []
    for found in (differences(a, b, Tolerance()), differences(b, a, Tolerance())):
        assert [one.key for one in found] == ([] if same else ["stop_copy.steps"])


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (((0.0, 5), (10.0, 7), (20.0, 5)), ((0.0, 5), (10.5, 7), (20.0, 5)), False),
        (((0.0, 5), (10.0, 7), (20.0, 5)), ((0.0, 5), (10.0, 7), (10.001, 5)), False),
        (FLAT, ((1.0, 5), (60.0, 5)), True),
        (((0.0, 100),), ((0.0, 109),), True),
        (((0.0, 100),), ((0.0, 120),), False),
    ],
)
def test_steps_are_compared_where_they_begin_and_within_and_by_size(a: Any, b: Any, same: bool) -> None:
    one, other = (Profile(stop_copy=StopCopy(kind="steps", steps=Value.measured(steps))) for steps in (a, b))
    assert (differences(one, other, Tolerance(size_part=0.1)) == []) is same
    assert (differences(other, one, Tolerance(size_part=0.1)) == []) is same


@pytest.mark.parametrize(("last", "same"), [(8, True), (9, False)])
def test_a_curve_that_ends_later_is_the_same_if_nothing_more_came(last: float, same: bool) -> None:
    short, long = ((0.0, 0), (1.0, 8)), ((0.0, 0), (1.0, 8), (2.0, last))
    a, b = (Profile(dirty=Dirty(kind="curve", curve=Value.measured(one))) for one in (short, long))
    assert (differences(a, b, Tolerance()) == []) is same


def test_a_step_may_come_a_moment_later() -> None:
    a, b = (
        Profile(stop_copy=StopCopy(kind="steps", steps=Value.measured(((0.0, 5), (at, 7), (at + 0.001, 9)))))
        for at in (1.0, 1.0015)
    )
    assert differences(a, b, Tolerance(time_least=0.002)) == []
    assert differences(a, b, Tolerance(time_least=0.0002)) != []


def test_before_the_first_rate_nothing_becomes_dirty() -> None:
    first, later = (
        Profile(dirty=Dirty(kind="steps", steps=Value.measured(((at, 5.0),)))) for at in (0.0, 1.0)
    )
    assert [one.key for one in differences(first, later, Tolerance())] == ["dirty.steps"]


# --- fit ----------------------------------------------------------------------------------------------------


def test_fit_finds_a_rate_steps_and_refills() -> None:
    def fitted(*points: tuple[float, float]) -> Dirty:
        return fit(Profile(dirty=Dirty(kind="curve", curve=Value.measured(points))))[0].dirty

    rate = fitted(*((at / 10, at * 100 + at % 2) for at in range(21)))
    assert rate.kind == "rate"
    assert rate.bytes_per_second == Value.assumed(1000.0)
    steps = fitted(*((at / 10, max(0, at - 10) * 1000) for at in range(21)))
    assert steps.kind == "steps"
    assert steps.steps == Value.assumed(((0.0, 0.0), (1.0, 10000.0)))
    jumps = [point for at in range(5) for point in ((at, at * 500.0), (at + 0.9, at * 500.0))]
    refill = fitted(*jumps)
    assert (refill.kind, refill.refill_bytes) == ("refill", Value.assumed(500))
    assert refill.refill_seconds == Value.assumed(1.0)
    nothing = fitted(*((at / 100, (at * 7919) % 1000) for at in range(200)))
    assert nothing.kind == "curve"


def test_fit_finds_a_constant_and_what_grows() -> None:
    def fitted(*points: tuple[float, float]) -> StopCopy:
        return fit(Profile(stop_copy=StopCopy(kind="steps", steps=Value.measured(points))))[0].stop_copy

    assert fitted((0.0, 1000), (1.0, 1010), (2.0, 1005)).bytes == Value.assumed(1005)
    growing = fitted((1.0, 2000), (2.0, 3000), (3.0, 4000))
    assert (growing.kind, growing.bytes) == ("growing", Value.assumed(1000))
    assert growing.bytes_per_second == Value.assumed(1000.0)
    assert fitted((0.0, 1000), (1.0, 9000), (2.0, 10)).kind == "steps"


def test_fit_keeps_the_sum_of_a_spread() -> None:
    spread = Distribution(tuple((number, 1 + number % 3) for number in range(1, 100)))
    few = grouped(spread, whole=False)
    assert len(few.points) == MAX_SPREAD
    assert few.count == spread.count
    assert few.total == pytest.approx(spread.total, rel=1e-6)
    assert few.quantile(0.5) == pytest.approx(spread.quantile(0.5), rel=0.15)


def test_fit_writes_what_it_made(tmp_path: Path) -> None:
    recorded, made, told = (tmp_path / name for name in ("recorded.toml", "made.toml", "told.json"))
    curve = Value.measured(((0.0, 0), (1.0, 1000), (2.0, 2000)))
    profile = Profile(initial=Initial(Value.measured(5)), dirty=Dirty(kind="curve", curve=curve))
    recorded.write_text(profile_text(profile))
    done = run("fit", recorded, "-o", made, f"--json={told}")
    assert done.exit_code == 0, done.output
    conforms("profile-fit", written(told))
    assert "dirty: curve of 3 points -> 1000 bytes a second" in done.output
    assert read_profile(made).dirty.bytes_per_second == Value.assumed(1000.0)
    assert read_profile(made).initial == profile.initial
    assert run("fit", made, "-o", tmp_path / "again.toml").output.startswith("nothing to fit")


# --- what is summed up --------------------------------------------------------------------------------------


def test_a_tally_is_exact_until_it_has_too_many_values() -> None:
    few, many = Tally(whole=True), Tally(whole=False)
    for number in range(EXACT_VALUES):
        few.add(number, 2)
    found = few.distribution()
    assert found is not None
    assert found.points == tuple((number, 2) for number in range(EXACT_VALUES))
    values = [0.001 * (1 + number / 1000) ** 3 for number in range(5000)]
    for value in values:
        many.add(value)
    found = many.distribution()
    assert found is not None
    assert found.count == 5000
    assert found.total == pytest.approx(sum(values), rel=1e-4)
    assert len(found.points) < 100
    for part in (0.1, 0.5, 0.9):
        assert found.quantile(part) == pytest.approx(sorted(values)[int(5000 * part)], rel=0.2)


def test_the_sum_of_a_grouped_spread_of_bytes_is_exact() -> None:
    """More different sizes than are kept apart: found by a loop whose reads were a byte short in all."""
    tally = Tally(whole=True)
    sizes = [1000 + 7 * number for number in range(10 * EXACT_VALUES)]
    for size in sizes:
        tally.add(size)
    found = tally.distribution()
    assert found is not None
    assert (found.count, found.total) == (len(sizes), sum(sizes))
    assert len(found.points) <= EXACT_VALUES
    assert all(value == int(value) for value, _ in found.points)


def test_a_curve_keeps_its_ends_and_its_shape() -> None:
    keeper = CurveKeeper()
    for number in range(100_000):
        keeper.add(number / 1000, number * 10)
    curve = keeper.curve()
    assert len(curve) <= 2 * CURVE_POINTS + 1
    assert (curve[0], curve[-1]) == ((0.0, 0), (99.999, 999_990))
    assert all(
        value_at(curve, at, steps=False) == pytest.approx(at * 10_000, abs=1e-6) for at in (3.3, 47.11, 88.8)
    )
