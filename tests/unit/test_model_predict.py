"""The model against closed forms, against the writes it is about, and against the real session."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vfu_dev.errors import ConfigError
from vfu_dev.memory import DeviceMemory
from vfu_dev.migration import MigratableState, SaveSession
from vfu_dev.model.link import Link, migrator_link, qemu_bandwidth, qemu_link
from vfu_dev.model.predict import border_rate, page_cost_bytes, predict
from vfu_dev.model.writing import distinct_pages
from vfu_dev.workload import Burst, Phase, Program, Workload, writes_of

MIB = 1 << 20
PAGE = 4096
LOADS = [
    Workload("uniform", rate_pages=2000),
    Workload("sequential", rate_pages=2000),
    Workload("hotset", rate_pages=2000),
    Workload("hotset", rate_pages=2000, hot_fraction=0.01, hot_share=0.5),
    Workload("zipf", rate_pages=2000),
    Workload("zipf", rate_pages=2000, zipf_exponent=0.5),
    Workload("uniform", rate_bytes=2000 * 16384, write_bytes=16384),
]


@pytest.mark.parametrize("load", LOADS, ids=Workload.describe)
@pytest.mark.parametrize("seconds", [0.1, 1.0, 20.0])
def test_distinct_pages_are_those_that_the_generator_writes(load: Workload, seconds: float) -> None:
    """The expected number of different pages, beside the pages of the generator's own writes."""
    pages = 4096
    writes = writes_of(load, pages * PAGE)
    assert writes is not None
    first = writes.offsets(0, int(load.writes_per_second * seconds)) // PAGE
    touched = (first[:, np.newaxis] + np.arange(load.pages_per_write())).reshape(-1)
    assert distinct_pages(load, pages, seconds) == pytest.approx(len(np.unique(touched)), rel=0.1)


def run_session(load: Workload, pages: int, link: Link, limit_seconds: float) -> tuple[bool, float, int, int]:
    """Migrate with the real session over a link that exists as arithmetic alone; time is what it takes there.

    Returns: whether it converged, seconds of pre-copy, stream bytes of it, passes.
    """
    memory = DeviceMemory("m", pages * PAGE, PAGE)
    memory.store(0, b"\x55" * memory.size_bytes)
    session = SaveSession(MigratableState("t", [memory], []))
    program = Program(load, memory.size_bytes, PAGE)
    pacer = program.pacer(0)
    buffer = memoryview(bytearray(64 << 10))
    seconds, sent = 0.0, 0
    while seconds < limit_seconds:
        stored = session.read_into(buffer)
        sent += stored
        seconds += len(buffer) / link.bandwidth
        for run in pacer.take(int(seconds * 1e9), 1 << 30):
            writes = program.writes[run.phase]
            assert writes is not None
            touched = writes.offsets(run.first, run.count) // PAGE
            spans = touched[:, np.newaxis] + np.arange(load.pages_per_write() if not load.phases else 1)
            memory.pages.mark_pages(spans.reshape(-1))
        info = session.info()
        if seconds >= 0.1 and info.initial_bytes + info.dirty_bytes <= link.threshold_bytes:
            return True, seconds, sent, session.counters.passes
    return False, seconds, sent, session.counters.passes


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("pattern", ["uniform", "sequential", "hotset", "zipf"])
def test_the_session_does_what_the_model_says_below_the_link(pattern: str, ratio: float) -> None:
    """Bytes and time within a tenth, a fifth for a sequential load, which falls in or out of step."""
    pages, link = 4096, Link(16 * MIB, 0.1)
    load = Workload(pattern, rate_pages=ratio * link.bandwidth / PAGE)
    said = predict(load, pages, link)
    converged, seconds, sent, _ = run_session(load, pages, link, 20.0)
    assert said.converges
    assert converged
    near = 0.4 if pattern == "sequential" else 0.1
    assert said.precopy_bytes == pytest.approx(sent, rel=near)
    assert said.total_seconds - said.downtime_seconds == pytest.approx(seconds, rel=near)


@pytest.mark.parametrize("ratio", [1.5, 3.0])
def test_the_session_stays_where_the_model_says_above_it(ratio: float) -> None:
    """A uniform load leaves P (1 - s / r), closed form and steps alike, and the real session within 3 %."""
    pages, link = 4096, Link(16 * MIB, 0.02)
    load = Workload("uniform", rate_pages=ratio * link.bandwidth / PAGE)
    said = predict(load, pages, link, limit_seconds=10.0)
    # A write finds a clean page with probability 1 - d/P, and s pages a second are sent: r (1 - d/P) = s.
    floor = pages * (page_cost_bytes() - PAGE / ratio)
    assert not said.converges
    assert said.left_bytes == pytest.approx(floor, rel=0.02)
    below, above = (Link(16 * MIB, factor * floor / (16 * MIB)) for factor in (0.97, 1.03))
    assert not run_session(load, pages, below, 10.0)[0]
    assert run_session(load, pages, above, 10.0)[0]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6])
def test_the_border_is_where_the_prediction_changes(share: float) -> None:
    """Just below the closed form a uniform load converges, just above it does not."""
    pages = 8192
    link = qemu_link(40 * MIB, downtime_limit_seconds=share * pages * PAGE / (40 * MIB))
    border = border_rate(pages * PAGE, link)
    for factor, converges in ((0.97, True), (1.03, False)):
        load = Workload("uniform", rate_pages=factor * border / PAGE)
        assert predict(load, pages, link).converges is converges


def test_what_fits_whole_always_converges() -> None:
    link = Link(128 * MIB, 0.3)
    assert math.isinf(border_rate(32 * MIB, link))
    assert predict(Workload("uniform", rate_pages=1e6), 32 * MIB // PAGE, link).converges


def test_an_idle_device_goes_in_one_pass() -> None:
    """Without writes all is sent once: the figures are the memory's size and the link's speed."""
    pages = 16 * MIB // PAGE
    said = predict(Workload("idle"), pages, Link(16 * MIB, 0.01))
    assert (said.converges, said.passes) == (True, 1)
    assert said.total_bytes == pytest.approx(pages * page_cost_bytes(), rel=0.001)
    assert said.total_seconds == pytest.approx(said.total_bytes / (16 * MIB), rel=0.05)
    half = predict(Workload("idle"), pages, Link(16 * MIB, 0.01), initial_pages=pages // 2)
    assert half.total_bytes == pytest.approx(said.total_bytes / 2, rel=0.01)


def test_bursts_and_phases_are_followed() -> None:
    """A migration converges in a pause that is long enough, at a rate that never would if it were steady."""
    pages, link = 2048, Link(16 * MIB, 0.05)
    rate = 1.5 * link.bandwidth / PAGE
    assert not predict(Workload("uniform", rate_pages=rate), pages, link).converges
    for period in (4.0, 40.0):
        burst = Workload("uniform", rate_pages=rate, burst=Burst(0.5, period))
        assert predict(burst, pages, link).converges
    busy, idle = Workload("uniform", rate_pages=2 * rate), Workload("idle")
    assert predict(Workload("phases", phases=(Phase(2.0, busy), Phase(2.0, idle))), pages, link).converges


def test_reads_under_way_need_room_and_bursts_give_some() -> None:
    """Near the border, what a client has under way decides."""
    load = Workload("uniform", rate_pages=0.9 * 16 * MIB / PAGE)
    totals = [
        predict(load, 8192, link).total_bytes
        for link in (
            Link(16 * MIB, 0.1, burst_seconds=0.1),
            Link(16 * MIB, 0.1),
            migrator_link(16 * MIB, downtime_limit_seconds=0.1),
        )
    ]
    assert totals == sorted(totals)


def test_qemus_bandwidth_has_steps() -> None:
    """As measured with QEMU 10.2.2: docs/model.md."""
    found = [qemu_bandwidth(size * MIB) / MIB for size in (2, 8, 10, 12, 16, 24, 32)]
    assert found == [10, 10, 10, 20, 20, 30, 40]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="bandwidth"):
        Link(0)
    with pytest.raises(ConfigError, match="trace"):
        predict(Workload("trace", trace="/tmp/x.csv"), 100, Link(MIB))
