"""Rules that change QEMU's parameters: what they mean, when they act, and what a wrong one is told."""

from __future__ import annotations

from typing import Any

import pytest

from vfu_dev.lab.policy import Policy, Rule, RuleError, step_text
from vfu_dev.lab.stall import StallDetector

RAMP = (
    "passes=3,seconds=10,downtime-limit=300",
    "passes=3,seconds=20,downtime-limit=450,max-bandwidth=64M",
)


def row(seconds: float, passes: int, left: int = 0, status: str = "active") -> dict[str, Any]:
    """A sample."""
    ram = {"dirty-sync-count": passes, "remaining": left}
    return {"time": 1e9 + seconds, "qemu": {"status": status, "total-time": seconds * 1000, "ram": ram}}


def acted(policy: Policy, *rows: dict[str, Any], all_bytes: float = 0) -> list[tuple[float, str]]:
    """Feed samples; return when which rule acted."""
    steps = [step for one in rows for step in policy.due(one, all_bytes)]
    return [(step["seconds"], step["rule"]) for step in steps]


def test_a_rule_has_a_condition_and_parameters() -> None:
    """Bandwidths have units, as elsewhere."""
    rule = Rule.parse("passes=3, seconds=1.5,max-bandwidth=1Gbit,downtime-limit=300")
    assert (rule.passes, rule.seconds, rule.stall) == (3, 1.5, None)
    assert dict(rule.parameters) == {"max-bandwidth": 125_000_000, "downtime-limit": 300}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("passes=3", "sets nothing: add one of downtime-limit"),
        ("downtime-limit=300", "does not say when: add passes=, seconds= or stall="),
        ("passes=three,downtime-limit=1", "passes: 'three': expected a whole number from 1"),
        ("seconds=nan,downtime-limit=1", "seconds: 'nan': expected a number from 0 to 3600"),
        ("seconds=1,downtime-limit=0", "downtime-limit: '0': expected a whole number from 1 to 2000000"),
        ("seconds=1,max-bandwidth=fast", "max-bandwidth: not a bandwidth: 'fast'"),
        ("seconds=1,cpu-throttle-initial=100", "from 1 to 99"),
        ("seconds=1,downtime_limit=1", "'downtime_limit=1': expected KEY=VALUE, the key one of passes"),
        ("seconds=1,seconds=2,downtime-limit=1", "seconds twice"),
        ("seconds=1,margin=4,downtime-limit=1", "margin: only with stall="),
        ("stall=1,remaining=disk,downtime-limit=1", "remaining: 'disk': expected one of ram, all"),
        ("", "expected KEY=VALUE"),
    ],
)
def test_a_wrong_rule_is_told_key_and_values(text: str, said: str) -> None:
    with pytest.raises(RuleError) as refused:
        Rule.parse(text)
    assert said in str(refused.value)
    assert refused.value.rule == text


def test_seconds_count_from_the_pass() -> None:
    """KubeVirt's ramp: nothing before the third pass, then one step each ten seconds, and each once."""
    policy = Policy(RAMP)
    assert acted(policy, row(60, 2), row(75, 3), row(84.9, 9)) == []
    assert acted(policy, row(85, 10), row(85.1, 10), row(94, 20)) == [(85, RAMP[0])]
    assert acted(policy, row(96, 22), row(200, 90)) == [(96, RAMP[1])]
    assert policy.changed() == {"downtime_limit": 450, "max_bandwidth": 64 << 20}
    assert step_text(policy.steps[0]) == "downtime-limit=300 (pass 10, 85.0 s, 0 B left)"


def test_seconds_alone_count_from_the_beginning() -> None:
    """Even where the first sample is late."""
    assert acted(Policy(["seconds=10,downtime-limit=1"]), row(9, 4), row(12, 5)) == [
        (12, "seconds=10,downtime-limit=1")
    ]


def test_nothing_happens_outside_the_passes() -> None:
    """Not before the migration is active, nor after the VM has stopped, when QEMU has no figures."""
    policy = Policy(["seconds=0,downtime-limit=1"])
    for status in ("none", "setup", "pre-switchover", "device", "completed", "cancelled"):
        assert policy.due({"time": 0.0, "qemu": {"status": status}}, 0) == []
    assert len(policy.due(row(0.1, 1), 0)) == 1


def passes(*left: float, every: float = 10.0) -> list[tuple[float, float]]:
    """Seconds and remaining bytes at the beginning of passes."""
    return [(every * number, bytes_left) for number, bytes_left in enumerate(left)]


def stops_at(detector: StallDetector, *found: tuple[float, float]) -> float | None:
    """Return the seconds of the first pass at which the VM should stop."""
    return next((seconds for seconds, left in found if detector.begin_pass(seconds, left)), None)


def test_progress_is_no_stall() -> None:
    """Less at each pass than 40 s before, by more than the margin, even if it rises in between."""
    detector = StallDetector(40, 0.04)
    assert stops_at(detector, *passes(100, 90, 95, 80, 85, 70, 75, 60, 65, 50, 55, 40)) is None
    assert not detector.stalled


def test_a_stall_ends_at_a_pass_that_is_as_good_as_the_best() -> None:
    """At 40 s no less than at 0 s; the best so far is 50; the next pass near that is at 70 s."""
    detector = StallDetector(40, 0.04)
    found = passes(100, 50, 90, 80, 100, 90, 70, 52, 10)
    assert stops_at(detector, *found[:4]) is None
    assert not detector.stalled
    assert not detector.begin_pass(*found[4])
    assert detector.stalled
    assert stops_at(detector, *found[5:]) == 70


def test_a_stall_at_the_best_level_ends_at_once() -> None:
    """As RAM that nobody writes: nothing remains at any pass."""
    assert stops_at(StallDetector(40, 0.04), *passes(0, 0, 0, 0, 0, 0)) == 40


def test_what_never_comes_again_is_given_up() -> None:
    """Detected at 40 s; after 40 s more without 50 the best since then, 80, will do."""
    detector = StallDetector(40, 0.04)
    assert stops_at(detector, *passes(100, 50, 100, 100, 100, 80, 100, 100, 100, 100, 82)) == 100


def test_the_detector_sees_ram_or_all() -> None:
    """Idle RAM is a stall whatever a device still has; and only a new pass is looked at."""
    of_ram, of_all = "stall=40,downtime-limit=900", "stall=40,remaining=all,downtime-limit=900"
    policy = Policy([of_ram, of_all])
    for seconds, number in ((0.0, 1), (10.0, 2), (20.0, 3), (30.0, 4), (39.9, 4)):
        assert policy.due(row(seconds, number), 1000 - 200 * number) == []
    assert acted(policy, row(40, 4), all_bytes=100) == []
    assert acted(policy, row(41, 5), all_bytes=100) == [(41, of_ram)]
    assert acted(policy, row(81, 6), all_bytes=100) == [(81, of_all)]
