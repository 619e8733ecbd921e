"""Rates and predictions, from reads and looks at times that the test chooses."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Literal

import pytest

from vfu_dev.figures import Sample
from vfu_dev.migration.forecast import OVERHEAD_SECONDS, PATH_FACTOR, Forecaster
from vfu_dev.migration.meters import DirtyMeter, ReadMeter
from vfu_dev.migration.observer import SAMPLES_KEPT, Observer
from vfu_dev.migration.save import SaveCounters
from vfu_dev.uapi import DeviceState

MIB = 1 << 20
MS = 1_000_000


STALL_MS = 2500  # what once held up a STOP_COPY, and then ruled the next prediction
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
    assert meter.rate is meter.pace is None
    end = steady(meter, 1, 22, start_ms=end)
    assert meter.rate == pytest.approx(4 * MIB / 0.025)
    end = steady(meter, 2, 22, start_ms=end)
    assert meter.pace is None
    end = steady(meter, 1, 22, start_ms=end)
    assert meter.pace == pytest.approx(22 * MS / MIB)
    assert meter.link_cost is None
    steady(meter, 2, 22, start_ms=end)
    assert meter.link_cost == pytest.approx(22 * MS / MIB)


def test_one_read_after_much_ram_is_a_rate() -> None:
    """The second read came after 700 ms: that is what the client reads at present."""
    meter = ReadMeter()
    steady(meter, 2, 700)
    assert meter.rate == pytest.approx(MIB / 0.7)


def test_the_first_callback_of_all_is_not_like_the_others() -> None:
    meter = ReadMeter()
    read(meter, 10, service_ms=5)
    assert meter.service_cost == pytest.approx(5 * MS / MIB)  # better than nothing
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
    ("bursts", "pause_ms", "between_ms"),
    [
        pytest.param([1] * 20, 100, None, id="a read each 100 ms, a limit below 10 MiB/s"),
        pytest.param([1] * 20, 300, None, id="a read each third time, RAM in between"),
        pytest.param([1] * 40 + [4] * 4, 50, 2, id="RAM between most reads"),
        pytest.param([1] * 5, 750, None, id="RAM leaves time for a few reads only"),
        pytest.param([2] * 20, 95, 2, id="two reads each 100 ms, a limit of 16 MiB/s"),
        pytest.param([9] * 8, 50, 2, id="bursts"),
        pytest.param([9] * 8, 50, 8, id="bursts, slower than the path by the guest's own work"),
    ],
)
def test_pauses_of_the_client_do_not_move_the_prediction(
    bursts: list[int], pause_ms: float, between_ms: float | None
) -> None:
    """Limits and RAM end with the stop: what counts is the pace in between, if any, and our own work."""
    forecaster = Forecaster()
    end = 0.0
    for reads in bursts:
        end = steady(forecaster.reads, 1, pause_ms, start_ms=end)
        end = steady(forecaster.reads, reads - 1, between_ms or 4, start_ms=end)
    path = PATH_FACTOR * SERVICE_MS
    assert cost_ms(forecaster) == pytest.approx(min(path, 2 * between_ms) if between_ms else path)


def test_a_link_less_than_twice_as_slow_as_the_path_is_seen() -> None:
    """Callbacks take 0.9 ms, so the path should take 5.4: a link of 10 ms for each MiB was not believed."""
    forecaster = Forecaster()
    for number in range(1, 21):
        read(forecaster.reads, number * 10, service_ms=0.9)
    assert cost_ms(forecaster) == pytest.approx(10, rel=0.1)


def test_work_of_the_guest_ends_with_the_stop() -> None:
    """On one core it made a steady pace 1.6 times as slow as the path: 72 ms were predicted for 50."""
    forecaster = Forecaster()
    steady(forecaster.reads, 20, 1.6 * PATH_FACTOR * SERVICE_MS)
    assert cost_ms(forecaster) == pytest.approx(PATH_FACTOR * SERVICE_MS)


def test_a_busy_machine_is_part_of_the_pace() -> None:
    """Reads wait for a processor, once or twice their own time; in STOP_COPY they will, too."""
    busy, idle = Forecaster(), Forecaster()
    end = 0.0
    for _ in range(20):
        for interval_ms in (4, 8, 12):
            end = steady(busy.reads, 1, interval_ms, start_ms=end)
    steady(idle.reads, 60, 4)
    assert cost_ms(idle) == pytest.approx(PATH_FACTOR * SERVICE_MS)
    assert cost_ms(busy) == pytest.approx(8, rel=0.02)


def test_a_client_that_asks_for_less_than_qemu_does_has_no_clock() -> None:
    """`vfu-dev migrate` at 8 MiB/s reads 0.8 MiB each 100 ms, and goes on so when the device is stopped."""
    forecaster = Forecaster()
    for number in range(1, 21):
        count = 8 * MIB // 10
        forecaster.reads.note(count, count, number * 100 * MS - MS, number * 100 * MS)
    assert cost_ms(forecaster) == pytest.approx(125)


def test_a_link_on_a_crowded_machine_is_a_link() -> None:
    """No two reads take the same, and none is as quick as the path: 478 ms came where 75 were predicted."""
    forecaster = Forecaster()
    end = 0.0
    for _ in range(5):
        for interval_ms in (15, 24, 40, 27):
            end = steady(forecaster.reads, 1, interval_ms, start_ms=end)
    assert forecaster.reads.link_cost is None
    assert 15 <= cost_ms(forecaster) <= 27


@pytest.mark.parametrize("interval_ms", [20, 62.5, 125])
def test_a_slow_link_is_told_from_pauses_by_its_steadiness(interval_ms: float) -> None:
    """Most reads take the same time, which is not the 100 ms of QEMU's clock."""
    forecaster = Forecaster()
    steady(forecaster.reads, 20, interval_ms)
    assert cost_ms(forecaster) == pytest.approx(interval_ms)
    end = steady(forecaster.reads, 20, interval_ms, start_ms=5000)
    for _ in range(3):  # a client that is late now and then, and catches up, does not change that
        end = steady(forecaster.reads, 1, 2 * interval_ms - 2, start_ms=end)
        end = steady(forecaster.reads, 1, 2, start_ms=end)
        end = steady(forecaster.reads, 4, interval_ms, start_ms=end)
    assert cost_ms(forecaster) == pytest.approx(interval_ms)


def test_a_path_quicker_than_assumed_is_seen_in_the_reads() -> None:
    """Mapped memory, say: our callback copies it, which is no reason for the rest to take longer."""
    forecaster = Forecaster()
    steady(forecaster.reads, 20, 2)
    assert cost_ms(forecaster) == pytest.approx(4)  # twice the pace


def test_prediction_is_what_is_left_times_the_cost_and_the_rest() -> None:
    """However large the whole state is: nothing at the end of a migration takes longer for it."""
    forecaster = Forecaster()
    assert forecaster.estimate() == (None, None)
    forecaster.tell(1024 * MIB)
    steady(forecaster.reads, 20, 20)
    forecaster.tell(25 * MIB)
    assert forecaster.estimate() == pytest.approx((0.5, 0.5 + OVERHEAD_SECONDS))
    forecaster.sample(0.1, 0, scan_seconds=0.13)  # of memory that the guest maps
    assert forecaster.estimate() == pytest.approx((0.5, 0.63 + OVERHEAD_SECONDS))


def test_a_prediction_that_the_next_reads_would_change_is_not_told() -> None:
    """The first reads of a slow link look like those of a fast one that sends RAM in between."""
    forecaster = Forecaster()
    forecaster.tell(32 * MIB)
    told = []
    for number in range(1, 13):
        forecaster.read(MIB, MIB, (number * 62 - 1) * MS, number * 62 * MS)
        told.append(forecaster.estimate()[1])
    assert told[0] is None
    known = [seconds for seconds in told if seconds is not None]
    assert len(known) >= 3
    # It falls by what was read and by nothing else, from the first on.
    assert [a - b for a, b in pairwise(known)] == pytest.approx([0.062] * (len(known) - 1))
    # Whoever stops the device before that gets the best that is known.
    forecaster.begin()
    forecaster.tell(32 * MIB)
    forecaster.read(MIB, MIB, 61 * MS, 62 * MS)
    forecaster.stop(63 * MS)
    assert forecaster.predicted_seconds == pytest.approx(31 * PATH_FACTOR / 1000 + OVERHEAD_SECONDS)


def test_next_to_nothing_left_is_predicted_from_the_first_look() -> None:
    """Neither pace nor path matter then."""
    forecaster = Forecaster()
    forecaster.tell(4 << 10)
    assert forecaster.estimate()[1] == pytest.approx(OVERHEAD_SECONDS)


class Mover:
    """Migrations of one device by a clock of the test's own, as the engine tells them to an `Observer`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.observer = Observer()
        self.now_ms = 1000.0
        monkeypatch.setattr(time, "perf_counter_ns", lambda: round(self.now_ms * MS))

    def read(self, interval_ms: float, stored: int = MIB, service_ms: float = 0.4) -> None:
        """Read 1 MiB, `interval_ms` after the read before."""
        self.now_ms += interval_ms
        self.observer.read(MIB, stored, round((self.now_ms - service_ms) * MS), 0)

    def move(
        self, *, interval_ms: float = 2, rest_ms: float = 8, stall: Literal["", "reads", "end"] = ""
    ) -> tuple[float, float]:
        """Migrate 40 MiB, the last 20 of it while the device stands still; return predicted and measured."""
        observer = self.observer
        observer.save_began(SaveCounters())
        observer.state_changed(DeviceState.RUNNING, DeviceState.PRE_COPY)
        observer.forecaster.tell(40 * MIB)
        for _ in range(20):
            self.read(interval_ms)
        observer.state_changed(DeviceState.PRE_COPY, DeviceState.STOP_COPY)
        for number in range(20):
            self.read(interval_ms + (STALL_MS if stall == "reads" and number == 10 else 0))
        self.read(0, stored=0)
        observer.all_read()
        self.now_ms += rest_ms + (STALL_MS if stall == "end" else 0)
        observer.went_on()
        observer.state_changed(DeviceState.STOP_COPY, DeviceState.STOP)
        observer.state_changed(DeviceState.STOP, DeviceState.RUNNING)
        assert observer.last_predicted_downtime_seconds is not None
        assert observer.last_downtime_seconds is not None
        return observer.last_predicted_downtime_seconds, observer.last_downtime_seconds


@pytest.mark.parametrize("stall", ["reads", "end"])
@pytest.mark.parametrize("before", [0, 1, 2, 5])
def test_a_single_stall_does_not_rule_the_next_prediction(
    monkeypatch: pytest.MonkeyPatch, before: int, stall: Literal["reads", "end"]
) -> None:
    """STOP_COPY is held up for 2.5 s once, after other moves or as the first: the next ones are as ever."""
    mover = Mover(monkeypatch)
    for _ in range(before):
        mover.move()
    assert mover.move(stall=stall)[1] > STALL_MS / 1000
    for _ in range(3):
        predicted, measured = mover.move()
        assert predicted == pytest.approx(measured, rel=0.2)


def test_overhead_is_learnt_from_more_than_one_migration(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that needs 30 ms more each time is predicted from the third move on, and forgotten as fast."""
    mover = Mover(monkeypatch)
    moves = [mover.move(rest_ms=30) for _ in range(3)]
    assert moves[0][0] < 0.8 * moves[0][1]
    assert moves[2][0] == pytest.approx(moves[2][1], rel=0.1)
    moves = [mover.move(rest_ms=5) for _ in range(4)]
    assert moves[3][0] == pytest.approx(moves[3][1], rel=0.1)


def test_a_path_taken_for_too_slow_does_not_shorten_the_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reading is foreseen as 48 ms and takes 40: that is no part of the 9.6 ms before and after it."""
    mover = Mover(monkeypatch)
    for _ in range(2):
        mover.move()
    assert mover.observer.forecaster.overhead_seconds.value == pytest.approx(0.0096)


def test_reads_between_ram_do_not_overrule_what_stops_have_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """RAM for 50 ms between any two reads looks like a slow link, but that it is not was measured twice."""
    mover = Mover(monkeypatch)
    steady(mover.observer.forecaster.reads, 20, 60)
    assert cost_ms(mover.observer.forecaster) == pytest.approx(60)
    mover.move(interval_ms=4)
    mover.move(interval_ms=4)
    mover.observer.save_began(SaveCounters())
    for _ in range(20):
        mover.read(60)
    assert cost_ms(mover.observer.forecaster) == pytest.approx(4, rel=0.1)


def test_without_pre_copy_the_stop_comes_before_the_migration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is predicted then; the downtime counts from the stop."""
    mover = Mover(monkeypatch)
    observer = mover.observer
    observer.state_changed(DeviceState.RUNNING, DeviceState.STOP)
    mover.now_ms += 5
    observer.save_began(SaveCounters())
    observer.state_changed(DeviceState.STOP, DeviceState.STOP_COPY)
    observer.forecaster.tell(2 * MIB)
    mover.read(3)
    mover.read(3)
    mover.read(0, stored=0)
    observer.all_read()
    observer.went_on()
    assert observer.last_predicted_downtime_seconds is None
    assert observer.last_downtime_seconds == pytest.approx(0.011)


def at_rates(transfer_ms: float, dirty_bytes: int) -> Forecaster:
    """Return a forecaster whose client read 1 MiB each `transfer_ms` while `dirty_bytes` came each 0.1 s."""
    forecaster = Forecaster()
    steady(forecaster.reads, 20, transfer_ms)
    forecaster.dirty.note(0.1, dirty_bytes)
    return forecaster


def round_of(forecaster: Forecaster, read_bytes: int, left_bytes: int) -> None:
    """Have the client read `read_bytes` and ask what is left."""
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
    observer = Observer()
    for number in range(250):
        observer.add_sample(sample(number))
    sequence, found = 0, []
    while sequence < observer.sampled:
        sequence, piece = observer.samples_after(sequence, 100)
        assert 0 < len(piece) <= 100
        found += piece
    assert [one.time for one in found] == list(map(float, range(250)))
    assert observer.samples_after(sequence, 100) == (250, [])


def test_samples_that_are_kept_no_longer_are_passed_over() -> None:
    observer = Observer()
    for number in range(SAMPLES_KEPT + 50):
        observer.add_sample(sample(number))
    sequence, found = observer.samples_after(10, 5)
    assert [one.time for one in found] == [50.0, 51.0, 52.0, 53.0, 54.0]
    assert sequence == 55


def test_a_number_of_another_server_starts_from_the_first() -> None:
    observer = Observer()
    observer.add_sample(sample(7))
    assert observer.samples_after(1000, 5) == (1, [sample(7)])


def test_a_migration_that_is_cancelled_has_no_downtime() -> None:
    observer = Observer()
    observer.save_began(SaveCounters())
    observer.state_changed(DeviceState.RUNNING, DeviceState.PRE_COPY)
    observer.save_ended("cancelled")
    assert observer.totals.saves["cancelled"] == observer.totals.saves_started == 1
    assert observer.downtime_seconds.count == 0
    assert observer.last_downtime_seconds is None
