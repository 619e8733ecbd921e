"""Rates and predictions, from reads and looks at times that the test chooses."""

from __future__ import annotations

import pytest

from vfu_dev.figures import Sample
from vfu_dev.migration.forecast import (
    CHECK_SECONDS_PER_BYTE,
    OVERHEAD_SECONDS,
    PATH_FACTOR,
    DirtyMeter,
    Forecaster,
    ReadMeter,
)
from vfu_dev.migration.save import SaveCounters
from vfu_dev.migration.watch import SAMPLES_KEPT, Watch
from vfu_dev.uapi import DeviceState

MIB = 1 << 20
MS = 1_000_000


SERVICE_MS = 1  # what a read of 1 MiB takes in the callback, in these tests


def read(meter: ReadMeter, ended_ms: float, *, stored: int = MIB, service_ms: float = SERVICE_MS) -> None:
    """Read `stored` of 1 MiB; that ends at `ended_ms`."""
    meter.note(MIB, stored, round((ended_ms - service_ms) * MS), round(ended_ms * MS))


def steady(meter: ReadMeter, reads: int, interval_ms: float, *, start_ms: float = 0) -> float:
    """Read 1 MiB each `interval_ms`, with more left each time; returns when the last read ended."""
    for number in range(1, reads + 1):
        read(meter, start_ms + number * interval_ms)
    return start_ms + reads * interval_ms


def cost_ms(forecaster: Forecaster) -> float:
    """Return what 1 MiB is expected to take in STOP_COPY."""
    cost = forecaster.stop_copy_cost
    assert cost is not None
    return cost * MIB / MS


def test_the_first_reads_say_nothing_of_the_link() -> None:
    """They find empty buffers, and a limit that let nothing through yet. Then the time between two counts."""
    meter = ReadMeter()
    end = steady(meter, 4, 1)
    assert meter.rate is meter.quick_cost is meter.steady_cost is None
    end = steady(meter, 1, 22, start_ms=end)
    assert meter.rate == pytest.approx(4 * MIB / 0.025)
    assert meter.quick_cost == pytest.approx(22 * MS / MIB)
    assert meter.steady_cost is None
    steady(meter, 5, 22, start_ms=end)
    assert meter.steady_cost == pytest.approx(22 * MS / MIB)


def test_one_read_after_much_ram_is_a_rate() -> None:
    """The second read came after 700 ms: that is what the client reads at present."""
    meter = ReadMeter()
    steady(meter, 2, 700)
    assert meter.rate == pytest.approx(MIB / 0.7)


def test_the_first_callback_of_all_is_not_like_the_others() -> None:
    meter = ReadMeter()
    read(meter, 10, service_ms=5)
    assert meter.service_cost is None
    read(meter, 20)
    assert meter.service_cost == pytest.approx(SERVICE_MS * MS / MIB)


def test_time_without_anything_to_read_does_not_count() -> None:
    """A short read opens a pause; however long that is, the rate is that of the link."""
    meter = ReadMeter()
    end = steady(meter, 10, 10)
    read(meter, end + 10, stored=100)  # that was all
    steady(meter, 10, 10, start_ms=end + 5000)
    assert meter.rate == pytest.approx(100 * MIB)


def test_the_rate_is_that_of_the_last_ten_intervals() -> None:
    meter = ReadMeter()
    end = 0.0
    for interval_ms in [100] + [10] * 10:
        end = steady(meter, 10, interval_ms, start_ms=end)
        meter.tick()
    assert meter.rate == pytest.approx(100 * MIB, rel=0.01)
    for _ in range(50):
        meter.tick()  # nothing to read: nothing new about the link
    assert meter.rate == pytest.approx(100 * MIB, rel=0.01)


def test_the_dirty_rate_is_an_average_over_a_second() -> None:
    meter = DirtyMeter()
    assert meter.rate is None
    meter.note(0.1, 100_000_000)
    for _ in range(10):
        meter.note(0.1, 1_000_000)
    assert meter.rate == pytest.approx(10e6)


@pytest.mark.parametrize(
    ("bursts", "pause_ms"),
    [
        pytest.param([1] * 20, 100, id="a read each 100 ms, a limit below 10 MiB/s"),
        pytest.param([1] * 20, 300, id="a read each third time, RAM in between"),
        pytest.param([2] * 20, 95, id="two reads each 100 ms, a limit of 16 MiB/s"),
        pytest.param([9] * 8, 50, id="bursts"),
        pytest.param([1] * 40 + [4] * 4, 50, id="RAM between most reads"),
        pytest.param([1] * 5, 750, id="so much RAM that there are only a few reads"),
    ],
)
def test_pauses_of_the_client_do_not_move_the_prediction(bursts: list[int], pause_ms: float) -> None:
    """Limits and RAM end with the stop; what is then left is the path, in times of our own work."""
    forecaster = Forecaster()
    end = 0.0
    for reads in bursts:
        end = steady(forecaster.reads, 1, pause_ms, start_ms=end)
        end = steady(forecaster.reads, reads - 1, 4, start_ms=end)
    assert cost_ms(forecaster) == pytest.approx(PATH_FACTOR * SERVICE_MS)


@pytest.mark.parametrize("interval_ms", [20, 62.5, 125])
def test_a_slow_link_is_told_from_pauses_by_its_steadiness(interval_ms: float) -> None:
    """Most reads take the same time, which is not the 100 ms of QEMU's clock."""
    forecaster = Forecaster()
    steady(forecaster.reads, 20, interval_ms)
    assert cost_ms(forecaster) == pytest.approx(interval_ms)
    end = steady(forecaster.reads, 20, interval_ms, start_ms=5000)
    for _ in range(3):  # a client that catches up now and then does not change that
        end = steady(forecaster.reads, 2, 2, start_ms=end)
        end = steady(forecaster.reads, 4, interval_ms, start_ms=end)
    assert cost_ms(forecaster) == pytest.approx(interval_ms)


def test_a_path_quicker_than_assumed_is_seen_in_the_reads() -> None:
    """A client that reads once each 2 ms needs no more than that, whatever our callback took of it."""
    forecaster = Forecaster()
    steady(forecaster.reads, 20, 2)
    assert cost_ms(forecaster) == pytest.approx(2)


def test_prediction_is_what_is_left_times_the_cost_and_the_rest() -> None:
    forecaster = Forecaster()
    assert forecaster.estimate() == (None, None)
    forecaster.tell(100 * MIB)
    steady(forecaster.reads, 20, 10)
    forecaster.tell(25 * MIB)
    seconds = 25 * PATH_FACTOR * SERVICE_MS / 1000
    rest = OVERHEAD_SECONDS + 100 * MIB * CHECK_SECONDS_PER_BYTE
    assert forecaster.estimate() == pytest.approx((seconds, seconds + rest))


def test_path_and_overhead_are_learnt() -> None:
    """The first migration replaces what was assumed, each later one counts half."""
    forecaster = Forecaster()
    service_cost = MS / MIB
    forecaster.learn(service_cost, 10 * MIB, reading_seconds=0.1, downtime_seconds=0.13)
    assert forecaster.path_factor == pytest.approx(10)
    assert forecaster.overhead_seconds == pytest.approx(0.03)
    forecaster.begin()
    forecaster.learn(service_cost, 10 * MIB, reading_seconds=0.2, downtime_seconds=0.21)
    assert forecaster.path_factor == pytest.approx(15)
    assert forecaster.overhead_seconds == pytest.approx(0.02)


def test_a_short_stop_teaches_nothing_about_the_path() -> None:
    forecaster = Forecaster()
    forecaster.learn(MS / MIB, MIB, reading_seconds=0.1, downtime_seconds=0.12)
    assert forecaster.path_factor == PATH_FACTOR
    assert forecaster.overhead_seconds == pytest.approx(0.02)


def test_reads_between_ram_do_not_overrule_what_a_stop_has_shown() -> None:
    forecaster = Forecaster()
    forecaster.learn(MS / MIB, 10 * MIB, reading_seconds=0.05, downtime_seconds=0.06)
    forecaster.begin()
    steady(forecaster.reads, 20, 60)  # RAM for 50 ms between any two
    assert cost_ms(forecaster) == pytest.approx(5 * SERVICE_MS)


def at_rates(transfer_ms: float, dirty_bytes: int) -> Forecaster:
    """Return a forecaster whose client read 1 MiB each `transfer_ms` while `dirty_bytes` came each 0.1 s."""
    forecaster = Forecaster()
    steady(forecaster.reads, 20, transfer_ms)
    forecaster.dirty.note(0.1, dirty_bytes)
    return forecaster


def round_of(forecaster: Forecaster, read_bytes: int, left_bytes: int) -> None:
    """Have the client read so much and ask what is left."""
    forecaster.rounds.read(read_bytes)
    forecaster.rounds.ask(left_bytes)


def test_a_client_that_reads_faster_than_the_guest_writes_converges() -> None:
    assert Forecaster().converging is None
    assert at_rates(10, 9 * MIB).converging is True


def test_a_slow_client_is_not_blamed_before_it_asked_twice_and_found_no_less() -> None:
    """While QEMU sends RAM it reads little from the device and asks nothing: neither yes nor no."""
    forecaster = at_rates(10, 11 * MIB)
    forecaster.rounds.ask(64 * MIB)  # when the migration is set up
    round_of(forecaster, 200 * MIB, 20 * MIB)  # RAM is through; only now QEMU asks again
    assert forecaster.converging is None
    round_of(forecaster, 10 * MIB, 20 * MIB)  # asked in the middle of a round
    assert forecaster.converging is None
    round_of(forecaster, 10 * MIB, 20 * MIB)
    assert forecaster.converging is False


def test_a_round_that_leaves_less_takes_it_back() -> None:
    forecaster = at_rates(10, 11 * MIB)
    for left in (20 * MIB, 20 * MIB, 20 * MIB):
        round_of(forecaster, 20 * MIB, left)
    assert forecaster.converging is False
    round_of(forecaster, 20 * MIB, 10 * MIB)
    assert forecaster.converging is None
    forecaster.begin()
    assert forecaster.rounds.falling is None


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
    watch.save_began(SaveCounters())
    watch.state_changed(DeviceState.RUNNING, DeviceState.PRE_COPY)
    watch.save_ended("cancelled")
    assert watch.totals.saves["cancelled"] == watch.totals.saves_started == 1
    assert watch.downtime_seconds.count == 0
    assert watch.last_downtime_seconds is None
