"""When writes are due: exact over any slicing of time, and what happens to a generator that is late."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfu_dev.workload import Burst, Pacer, Phase, Program, Workload
from vfu_dev.workload.pacer import CATCH_UP_NS
from vfu_dev.workload.schedule import NS, schedule_of

MEMORY = 1 << 20
rates = st.fractions(Fraction(1, 10), 10**7).map(float)
bursts = st.none() | st.builds(Burst, duty=st.floats(0.01, 1), period_seconds=st.floats(0.001, 2))
loads = st.builds(Workload, st.just("uniform"), rate_bytes=rates, write_bytes=st.just(1), burst=bursts)
phased = st.builds(
    lambda phases: Workload("phases", phases=tuple(phases)),
    st.lists(
        st.builds(Phase, st.floats(0.001, 0.5), loads | st.just(Workload("idle"))), min_size=1, max_size=4
    ),
)
slices = st.lists(st.integers(0, CATCH_UP_NS), min_size=1, max_size=30)
START = 12345678901


@given(st.fractions(Fraction(1, 1000), 10**9), st.integers(0, 10**15))
def test_a_steady_rate_is_exact(rate: Fraction, time_ns: int) -> None:
    """floor(rate * time) writes, in integers."""
    timeline = schedule_of(Workload(rate_bytes=float(rate), write_bytes=1))
    assert timeline.count(time_ns) == Fraction(float(rate)) * time_ns // NS


@given(loads, st.integers(0, 10**13))
def test_a_burst_keeps_the_average(spec: Workload, time_ns: int) -> None:
    """Whole periods have what the rate says, and nothing is written in the pause."""
    timeline = schedule_of(spec)
    rate = Fraction(spec.rate_bytes or 0)
    if spec.burst is None:
        return
    period = round(spec.burst.period_seconds * NS)
    whole = time_ns // period * period
    assert timeline.count(whole) == rate * whole // NS
    on = min(period, round(spec.burst.duty * period) + 1)
    assert timeline.count(whole + on) == timeline.count(whole + period - 1) or on == period
    assert timeline.count(whole + period - 1) <= timeline.count(whole + period)


@given(loads, st.integers(1, 10**9))
def test_when_is_the_first_moment(spec: Workload, writes: int) -> None:
    """`when` and `count` are each other's inverse."""
    timeline = schedule_of(spec)
    moment = timeline.when(writes)
    assert moment is not None
    assert timeline.count(moment) >= writes > timeline.count(moment - 1)


@given(loads | phased, slices)
def test_slices_do_not_matter(spec: Workload, times: list[int]) -> None:
    """However time is cut, as many writes come out as in one piece, in order and without gaps."""
    program = Program(spec, MEMORY)
    pacer = program.pacer(START)
    now, made = START, [0] * len(program.writes)
    for passed in times:
        now += passed
        for run in pacer.take(now, 1 << 62):
            assert run.first == made[run.phase]
            assert run.count > 0
            made[run.phase] += run.count
    assert pacer.missed == 0
    assert pacer.taken == sum(made)
    assert made == expected(spec, now - START)


def expected(spec: Workload, elapsed_ns: int) -> list[int]:
    """Writes of each phase after `elapsed_ns`, by walking through the phases one after the other."""
    if not spec.phases:
        return [schedule_of(spec).count(elapsed_ns)]
    active = [0] * len(spec.phases)
    while elapsed_ns > 0:
        for number, phase in enumerate(spec.phases):
            part = min(elapsed_ns, round(phase.seconds * NS))
            active[number] += part
            elapsed_ns -= part
    return [
        schedule_of(phase.load).count(time) if not phase.load.is_idle else 0
        for phase, time in zip(spec.phases, active, strict=True)
    ]


@given(loads | phased, slices, st.integers(1, 5000))
def test_a_limit_loses_nothing(spec: Workload, times: list[int], limit: int) -> None:
    """What a limit held back comes first next time; once there is time for all of it, all was made."""
    program = Program(spec, MEMORY)
    pacer = program.pacer(START)
    now, made = START, [0] * len(program.writes)
    budget = sum(expected(spec, sum(times))) // limit
    if budget > 300:
        return
    for passed in times:
        now += passed
        # Served before it is late, in portions.
        while runs := pacer.take(now, limit):
            assert sum(run.count for run in runs) <= limit
            for run in runs:
                assert run.first == made[run.phase]
                made[run.phase] += run.count
            assert pacer.owed == sum(expected(spec, now - START)) - sum(made)
    assert made == expected(spec, now - START)
    assert pacer.missed == 0


def test_late_writes_are_missed_not_piled_up() -> None:
    """After a pause of a second a quarter of a second is made up for; the rest is counted."""
    pacer = Program(Workload(rate_bytes=1000, write_bytes=1), MEMORY).pacer(0)
    assert pacer.take(NS, 10**9)[0].count == 250
    assert pacer.missed == 750
    assert [(run.first, run.count) for run in pacer.take(NS + NS // 10, 10**9)] == [(250, 100)]
    assert pacer.missed == 750


def test_what_was_missed_before_the_end_is_counted_there() -> None:
    """A generator that had no time in its last second missed three quarters of it, and is owed the rest."""
    pacer = Program(Workload(rate_bytes=1000, write_bytes=1), MEMORY).pacer(0)
    pacer.take(NS, 10**9)
    made, missed = pacer.taken, pacer.missed
    pacer.settle(NS + NS // 5)
    assert (pacer.taken, pacer.missed) == (made, missed)
    pacer.settle(2 * NS)
    assert (pacer.taken, pacer.missed) == (made, missed + 750)
    assert pacer.take(2 * NS, 10**9)[0].count == 250


def test_a_generator_that_is_too_slow_says_so() -> None:
    """Asked for 1000 a second and served 400: the rest is missed, apart from the quarter that is owed."""
    pacer = Program(Workload(rate_bytes=1000, write_bytes=1), MEMORY).pacer(0)
    for step in range(1, 101):
        pacer.take(step * NS // 10, 40)
    assert pacer.taken == 4000
    assert pacer.owed == 250 - 40
    assert 10_000 - pacer.taken - 250 <= pacer.missed <= 10_000 - pacer.taken


def test_a_pause_that_was_meant() -> None:
    """Time held is nobody's fault: nothing is missed, the load goes on where it was."""
    pacer = Program(Workload(rate_bytes=1000, write_bytes=1), MEMORY).pacer(0)
    pacer.take(NS // 10, 10**9)
    pacer.hold(5 * NS)
    assert pacer.take(5 * NS + NS // 5, 10**9)[0].count == 100
    assert pacer.missed == 0


@given(loads | phased, st.integers(0, CATCH_UP_NS))
def test_next_is_when_something_comes(spec: Workload, passed: int) -> None:
    """Nothing is due before the moment it names; then there is a write, or another phase has its turn."""
    pacer = Program(spec, MEMORY).pacer(START)
    pacer.take(START + passed, 1 << 62)
    moment = pacer.next_ns()
    if moment is None:
        assert spec.is_idle
        assert not spec.phases
        return
    assert moment > START + passed
    if moment - START - passed > CATCH_UP_NS:
        return  # asking then would count as being late
    assert not pacer.take(moment - 1, 1 << 62)
    assert pacer.take(moment, 1 << 62) or spec.phases


def test_a_load_goes_on_at_a_write(tmp_path: Path) -> None:
    """A pacer that begins at write n hands out n next, one interval later."""
    for spec in (
        Workload(rate_bytes=1000, write_bytes=1),
        Workload(rate_bytes=1000, write_bytes=1, burst=Burst(0.5, 0.01)),
    ):
        pacer = Program(spec, MEMORY).pacer(START, first=77)
        moment = pacer.next_ns()
        assert moment is not None
        assert START < moment <= START + 6_000_000
        assert [(run.first, run.count) for run in pacer.take(moment, 9)] == [(77, 1)]


def test_idle_is_never_due() -> None:
    """Nothing to do, and nothing to wait for."""
    pacer = Program(Workload("idle"), MEMORY).pacer(0)
    assert pacer.next_ns() is None
    assert pacer.take(NS // 10, 5) == []


def test_a_trace_has_its_own_times(tmp_path: Path) -> None:
    """Rows come when the file says, round after round; the last row says how long a round is."""
    path = tmp_path / "a.csv"
    path.write_text("time,offset,length\n0,0,8\n0.1,8,8\n0.1,16,8\n0.2,0,0\n")
    program = Program(Workload("trace", trace=str(path)), MEMORY)
    assert program.asked_rate_bytes == pytest.approx(24 / 0.2)
    pacer = program.pacer(0)
    counts = [sum(run.count for run in pacer.take(ms * 1_000_000, 99)) for ms in (0, 50, 100, 199, 200, 300)]
    assert counts == [1, 0, 2, 0, 1, 2]
    assert pacer.next_ns() == 400_000_000
    assert isinstance(pacer, Pacer)
