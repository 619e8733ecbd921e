"""The two loads whose outcome is certain."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vfu_dev.errors import ConfigError
from vfu_dev.model.presets import decide, never_converges, surely_converges
from vfu_dev.workload import Workload

bandwidths = st.floats(1e5, 1e11)
memories = st.integers(1 << 20, 1 << 42)
downtimes = st.floats(0.001, 10)
pages = st.sampled_from([4096, 65536])


def settles_at(spec: Workload, bandwidth: float, memory: int, page: int) -> float:
    """Bytes dirty after a long time, by following the balance: clean pages are written, dirty ones sent."""
    rate, dirty = float(spec.write_rate(page)) * page, float(memory)
    step = 0.02 * memory / max(rate, bandwidth)
    for _ in range(4000):
        dirty += step * (rate * (1 - dirty / memory) - bandwidth)
        dirty = min(float(memory), max(0.0, dirty))
    return dirty


@given(bandwidths, memories, downtimes, pages)
def test_never_is_never(bandwidth: float, memory: int, downtime: float, page: int) -> None:
    """What is left stays above the threshold, even when the link is 1.25 times as fast."""
    if 0.75 * memory < 1.24 * bandwidth * downtime:
        with pytest.raises(ConfigError, match="cannot be kept"):
            never_converges(bandwidth, memory, downtime, page)
        return
    assume(0.75 * memory > 1.26 * bandwidth * downtime)
    spec = never_converges(bandwidth, memory, downtime, page)
    decision = decide(spec, bandwidth, memory, downtime, page)
    assert not decision.converges
    assert decision.text.startswith("not converging: ")
    assert decision.dirty_rate_bytes == pytest.approx(4 * bandwidth)


@given(bandwidths, memories, downtimes, pages)
def test_surely_is_surely(bandwidth: float, memory: int, downtime: float, page: int) -> None:
    """Nothing is left in the end, even when the link has a quarter of what was said."""
    spec = surely_converges(bandwidth, memory, downtime, page)
    assert decide(spec, bandwidth / 4, memory, downtime, page).converges


@given(st.floats(0.05, 20), st.integers(1 << 22, 1 << 30), st.integers(0, 1 << 30))
def test_what_is_left_is_what_the_balance_says(ratio: float, memory: int, bandwidth: int) -> None:
    """The formula agrees with following pages being written and sent."""
    assume(bandwidth > 1000)
    assume(abs(ratio - 1) > 0.05)
    spec = Workload("uniform", rate_pages=ratio * bandwidth / 4096)
    left = decide(spec, bandwidth, memory).left_bytes
    assert settles_at(spec, bandwidth, memory, 4096) == pytest.approx(left, abs=0.02 * memory)


def test_what_is_not_known() -> None:
    """Only uniform loads have that formula, and only links that carry something."""
    with pytest.raises(ConfigError, match="uniform"):
        decide(Workload("zipf", rate_pages=1), 1e6, 1 << 20)
    with pytest.raises(ConfigError, match="bandwidth"):
        surely_converges(0, 1 << 20)
    assert decide(Workload("idle"), 1e6, 1 << 20).converges
