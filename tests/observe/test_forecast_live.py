"""Verdict and prediction against what then happens, with real servers and a steady load."""

from __future__ import annotations

from moves import CONVERGES, DOES_NOT_CONVERGE, move, moving
from observekit import Pair
from serverkit import wait_until


def test_predicted_downtime_is_within_a_fifth_of_the_measured(pair: Pair) -> None:
    """Steady load, steady link: what was predicted when the device stopped is what it took."""
    progress = move(pair.source, pair.destination, CONVERGES)
    snapshot = pair.web.status()["snapshot"]
    predicted = snapshot["last_predicted_downtime_seconds"]
    measured = snapshot["last_downtime_seconds"]
    assert abs(predicted - measured) <= 0.2 * measured, (predicted, measured)
    # And ours is the client's: the same downtime, seen from the other end of the socket.
    assert abs(measured - progress.downtime_seconds) <= 0.2 * measured, (measured, progress.downtime_seconds)


def test_rates_are_those_of_load_and_link(pair: Pair) -> None:
    """In the middle of a converging pre-copy both rates are within a quarter of what was set."""
    move(pair.source, pair.destination, CONVERGES)
    samples = pair.web.status()["samples"]
    rows = [dict(zip(samples["fields"], row, strict=True)) for row in samples["rows"]]
    running = [row for row in rows if row["state"] == "PRE_COPY"]
    later = running[len(running) // 2]
    assert abs(later["transfer_rate_bytes_per_second"] / CONVERGES.bandwidth - 1) < 0.25, later
    assert abs(later["dirty_rate_bytes_per_second"] / CONVERGES.bytes_per_second - 1) < 0.25, later


def test_a_migration_that_cannot_converge_is_called_that(pair: Pair) -> None:
    """Within ten seconds: the verdict, and the ratio that decides it."""
    with moving(pair.source, pair.destination, DOES_NOT_CONVERGE):
        status = wait_until(
            lambda: next(
                (s for s in [pair.web.status()] if s["snapshot"]["forecast"]["converging"] is False), None
            ),
            "the verdict",
        )
        assert status["verdict"].startswith("DOES NOT CONVERGE")
        metrics = pair.web.get("/metrics")[2].decode()
        line = next(
            line for line in metrics.splitlines() if line.startswith("vfu_migration_convergence_ratio{")
        )
        assert 0 < float(line.split()[-1]) < 1
