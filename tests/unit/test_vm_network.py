"""What `--link` says, what the kernel gets to do, and the rate that is measured."""

from __future__ import annotations

import pytest

from vfu_dev.errors import ConfigError
from vfu_dev.lab.route import busiest
from vfu_dev.report.qemus import link_text
from vfu_dev.vm.network import LinkSpec, shaping


@pytest.mark.parametrize(
    ("text", "rate", "delay", "loss"),
    [
        ("1Gbit", 125_000_000, 0.0, 0.0),
        ("100Mbit,delay=5ms", 12_500_000, 0.005, 0.0),
        ("10Gbit/s, delay=200us, loss=0.1%", 1_250_000_000, 0.0002, 0.001),
        ("delay=1.5s", 0, 1.5, 0.0),
    ],
)
def test_bits_are_decimal(text: str, rate: int, delay: float, loss: float) -> None:
    found = LinkSpec.parse(text)
    assert (found.text, found.rate_bytes, found.loss) == (text, rate, loss)
    assert found.delay_seconds == pytest.approx(delay)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("100M", "in bits"),
        ("1bit", "at least 8kbit"),
        ("fast", "in bits"),
        ("1Gbit,delay=5", "unit"),
        ("1Gbit,delay=5ms,delay=6ms", "twice"),
        ("1Gbit,loss=2", "percent"),
        ("1Gbit,loss=100%", "percent"),
        ("1Gbit,jitter=1ms", "unknown"),
        ("", "in bits"),
    ],
)
def test_what_is_no_link_is_said(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        LinkSpec.parse(text)
    assert "examples: 1Gbit" in str(refused.value)


def test_the_kernel_shapes_what_it_can() -> None:
    """tbf alone, or below netem where the kernel has it; a bucket holds at least TCP's largest packet."""
    spec = LinkSpec.parse("1Gbit,delay=5ms,loss=0.5%")
    tbf = ["tbf", "rate", "1000000000bit", "burst", "250000", "limit", "6500000"]
    assert shaping(spec, netem=False) == [["root", *tbf]]
    netem, below = shaping(spec, netem=True)
    assert netem == ["root", "handle", "1:", "netem", "limit", "1048576", "delay", "5000us", "loss", "0.5%"]
    assert below == ["parent", "1:", "handle", "2:", *tbf]
    (slow,) = shaping(LinkSpec.parse("1Mbit"), netem=True)
    assert slow == ["root", "tbf", "rate", "1000000bit", "burst", "65536", "limit", "131072"]
    assert shaping(LinkSpec.parse("delay=1ms"), netem=False) == []


def test_the_busiest_stretch_counts() -> None:
    points = [(0.0, 0), (0.3, 0), (0.6, 300), (0.9, 600), (1.5, 700)]
    assert busiest(points) == pytest.approx(1000.0)
    assert busiest([(0.0, 0), (0.1, 50)]) == pytest.approx(500.0)
    assert busiest([(0.0, 0)]) is None
    assert busiest([]) is None
    assert busiest([(1.0, 0), (1.0, 5)]) is None


def test_a_report_says_what_was_asked_and_measured() -> None:
    link = {
        "asked": "100Mbit,delay=5ms",
        "rate_bytes_per_second": 12_500_000,
        "rate_by": "tbf",
        "delay_by": "relay",
        "loss_by": None,
        "carried_bytes": 3 << 20,
        "measured_bytes_per_second": 11_000_000.0,
    }
    assert link_text(link) == (
        "link 100Mbit,delay=5ms (rate by tbf, delay by relay): carried 3 MiB, "
        "at most 10.5 MiB/s (88 Mbit/s); 11.9 MiB/s (100 Mbit/s) asked"
    )
