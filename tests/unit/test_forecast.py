"""Rates and predictions, from reads and looks at times that the test chooses."""

from __future__ import annotations

import pytest

from vfu_dev.figures import Sample
from vfu_dev.migration.forecast import OVERHEAD_SECONDS, DirtyMeter, Forecaster, ReadMeter
from vfu_dev.migration.watch import SAMPLES_KEPT, Watch
from vfu_dev.uapi import DeviceState

MIB = 1 << 20
MS = 1_000_000


def steady(meter: ReadMeter, reads: int, interval_ms: int, *, start_ms: int = 0) -> int:
    """Read 1 MiB each `interval_ms`, with more left each time; returns when the last read ended."""
    for number in range(1, reads + 1):
        meter.note(MIB, MIB, (start_ms + number * interval_ms) * MS)
    return start_ms + reads * interval_ms


def test_one_read_says_nothing_two_say_a_rate() -> None:
    """What counts is the time between two reads, in which the bytes of the first went over the link."""
    meter = ReadMeter()
    meter.note(MIB, MIB, 5 * MS)
    assert meter.rate is None
    assert meter.burst_rate is None
    meter.note(MIB, MIB, 15 * MS)
    assert meter.rate == meter.burst_rate == pytest.approx(100 * MIB)


def test_time_without_anything_to_read_does_not_count() -> None:
    """A short read opens a pause; however long that is, the rate is that of the link."""
    meter = ReadMeter()
    end = steady(meter, 10, 10)
    meter.note(MIB, 100, (end + 10) * MS)  # that was all
    end = steady(meter, 10, 10, start_ms=end + 5000)
    assert meter.rate == pytest.approx(100 * MIB)


def test_the_rate_is_that_of_the_last_ten_intervals() -> None:
    meter = ReadMeter()
    end = 0
    for interval_ms in [100] + [10] * 10:
        end = steady(meter, 10, interval_ms, start_ms=end)
        meter.tick()
    assert meter.rate == pytest.approx(100 * MIB, rel=0.01)
    for _ in range(50):
        meter.tick()  # nothing to read: nothing new about the link
    assert meter.rate == pytest.approx(100 * MIB, rel=0.01)


def test_pauses_of_a_bandwidth_limit_do_not_move_the_burst_rate() -> None:
    """Nine reads at full speed, then a pause: on average the link carried a quarter of what it can."""
    meter = ReadMeter()
    end = 0
    for _ in range(20):
        end = steady(meter, 9, 1, start_ms=end)
        end = steady(meter, 1, 31, start_ms=end)
    assert meter.rate == pytest.approx(250 * MIB, rel=0.05)
    assert meter.burst_rate == pytest.approx(1000 * MIB)


def test_the_dirty_rate_is_an_average_over_a_second() -> None:
    meter = DirtyMeter()
    assert meter.rate is None
    meter.note(0.1, 100_000_000)
    for _ in range(10):
        meter.note(0.1, 1_000_000)
    assert meter.rate == pytest.approx(10e6)


def test_prediction_is_what_is_left_over_the_burst_rate() -> None:
    forecaster = Forecaster()
    assert forecaster.estimate() == (None, None)
    steady(forecaster.reads, 20, 10)
    forecaster.length_bytes = 25 * MIB
    assert forecaster.estimate() == pytest.approx((0.25, 0.25 + OVERHEAD_SECONDS))


def test_what_came_on_top_is_learnt() -> None:
    """Each migration counts half; one faster than estimated counts as nothing on top."""
    forecaster = Forecaster()
    forecaster.learn(estimated_seconds=0.1, downtime_seconds=0.13)
    assert forecaster.overhead_seconds == pytest.approx(0.02)
    forecaster.begin()
    assert forecaster.overhead_seconds == pytest.approx(0.02)
    assert forecaster.estimate() == (None, None)
    forecaster.learn(estimated_seconds=0.1, downtime_seconds=0.05)
    assert forecaster.overhead_seconds == pytest.approx(0.01)


@pytest.mark.parametrize(("page_bytes", "converging"), [(9 * MIB, True), (11 * MIB, False)])
def test_the_verdict_compares_the_rates(page_bytes: int, converging: bool) -> None:
    forecaster = Forecaster()
    assert forecaster.forecast(1, 2).converging is None
    steady(forecaster.reads, 20, 10)
    forecaster.dirty.note(0.1, page_bytes)
    assert forecaster.forecast(1, 2).converging is converging


def sample(number: int) -> Sample:
    return Sample(float(number), "PRE_COPY", 0, 0, 0, 0, None, None, None, 1)


def test_samples_are_handed_out_once_each_in_pieces() -> None:
    watch = Watch()
    for number in range(250):
        watch.add_sample(sample(number))
    sequence, found = 0, []
    while sequence < watch.sampled:
        sequence, piece = watch.samples_after(sequence, 100)
        assert 0 < len(piece) <= 100
        found += piece
    assert [one.time for one in found] == list(map(float, range(250)))
    assert watch.samples_after(sequence, 100) == (250, [])


def test_samples_that_are_kept_no_longer_are_passed_over() -> None:
    watch = Watch()
    for number in range(SAMPLES_KEPT + 50):
        watch.add_sample(sample(number))
    sequence, found = watch.samples_after(10, 5)
    assert [one.time for one in found] == [50.0, 51.0, 52.0, 53.0, 54.0]
    assert sequence == 55


def test_a_number_of_another_server_starts_from_the_first() -> None:
    watch = Watch()
    watch.add_sample(sample(7))
    assert watch.samples_after(1000, 5) == (1, [sample(7)])


def test_a_migration_that_is_cancelled_has_no_downtime() -> None:
    watch = Watch()
    watch.save_began()
    watch.state_changed(DeviceState.RUNNING, DeviceState.PRE_COPY)
    watch.save_ended("cancelled")
    assert watch.totals.saves["cancelled"] == watch.totals.saves_started == 1
    assert watch.downtime_seconds.count == 0
    assert watch.last_downtime_seconds is None
