"""Histograms, the sentence that says how it goes, and the line that draws it."""

from __future__ import annotations

import numpy as np
import pytest
from test_metrics_scrape import example

from vfu_dev.figures import DOWNTIME_EDGES_SECONDS, MMIO_EDGES_SECONDS, Histogram, verdict
from vfu_dev.top.view import sparkline
from vfu_dev.top.watched import control_path


def test_an_edge_belongs_to_the_bucket_below() -> None:
    """As Prometheus' `le` says: less than or equal."""
    histogram = Histogram((0.1, 0.3, 1.0))
    for value in (0.1, 0.1001, 0.3, 1.0, 1.5):
        histogram.observe(value)
    assert histogram.counts == [1, 2, 1, 1]
    assert histogram.count == 5
    assert histogram.as_dict()["sum"] == pytest.approx(3.0001)


def test_what_c_observes_is_in_every_total() -> None:
    shared = np.zeros(1 + 3, np.uint64)
    histogram = Histogram((0.1, 0.3), shared)
    histogram.observe(0.2)
    shared[:] = [2_500_000_000, 5, 0, 1]
    assert histogram.totals() == ([5, 1, 1], 2_700_000_000)
    assert histogram.count == 7
    assert histogram.as_dict() == {"edges": [0.1, 0.3], "counts": [5, 1, 1], "sum": 2.7}


def test_the_edges_that_decisions_hang_on_are_there() -> None:
    """QEMU's downtime limit of 0.3 s up to a minute; MMIO from a microsecond on."""
    assert 0.3 in DOWNTIME_EDGES_SECONDS
    assert DOWNTIME_EDGES_SECONDS[-1] == 60
    assert MMIO_EDGES_SECONDS[0] == 1e-6
    for edges in (DOWNTIME_EDGES_SECONDS, MMIO_EDGES_SECONDS):
        assert list(edges) == sorted(set(edges))


@pytest.mark.parametrize(
    ("state", "converging", "expected"),
    [
        ("PRE_COPY", True, "converging: dirty rate 47.7 MiB/s < transfer rate 119.2 MiB/s (ratio 2.50)"),
        (
            "PRE_COPY_P2P",
            False,
            "not converging: dirty rate 47.7 MiB/s < transfer rate 119.2 MiB/s (ratio 2.50)",
        ),
        (
            "PRE_COPY",
            None,
            "too early to tell, the client has other data to send: dirty rate 47.7 MiB/s < "
            "transfer rate 119.2 MiB/s (ratio 2.50)",
        ),
        ("STOP_COPY", None, "the device is stopped, 5 MiB to go"),
        ("RESUMING", None, "receiving state"),
        ("ERROR", None, "in ERROR: only a reset helps"),
        ("RUNNING", None, "idle; measured downtime of the last migration 31 ms, predicted 30 ms"),
    ],
)
def test_verdicts(state: str, converging: bool | None, expected: str) -> None:
    snapshot = example()
    snapshot.state = state
    snapshot.forecast["converging"] = converging
    assert verdict(snapshot) == expected


def test_before_the_second_read_there_are_no_rates_to_name() -> None:
    snapshot = example()
    snapshot.state = "PRE_COPY"
    snapshot.forecast["transfer_rate_bytes_per_second"] = snapshot.forecast["converging"] = None
    assert verdict(snapshot) == "measuring rates"


def test_a_sparkline_keeps_peaks_and_shows_what_is_not_nothing() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7, 8], 9) == " ▁▂▃▄▅▆▇█"
    assert sparkline([0] * 50 + [100] + [0] * 49, 10) == "     █    "
    assert sparkline([0.001, 100], 2)[0] == "▁"
    assert sparkline([None, 5], 4) == " █  "
    assert sparkline([], 3) == sparkline([None, 0], 3) == "   "
    assert sparkline([1, 8], 2, unicode=False).isascii()


def test_a_control_socket_beside_a_socket_is_preferred(short_tmp: object) -> None:
    """A vfio-user socket has room for one client, so what lies beside it is looked for first."""
    import socket
    from pathlib import Path

    folder = Path(str(short_tmp))
    served = folder / "gpu0.sock"
    assert control_path(served) == served
    for name in ("gpu0.ctl", "gpu0.sock.ctl"):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / name))
            assert control_path(served) == folder / name
            assert control_path(folder / name) == folder / name
