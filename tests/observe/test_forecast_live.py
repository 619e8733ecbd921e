"""Verdict and prediction against what then happens, with real servers and a steady load.

How close predictions come is a matter of recorded moves (test_recorded_moves.py) and of `vfu-dev bench`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from movekit import feed
from moves import CONVERGES, DOES_NOT_CONVERGE, move, moving
from observekit import Pair
from prometheus_client.parser import text_string_to_metric_families
from recorded_device import FILE_VARIABLE
from serverkit import ServerFactory, wait_until

from vfu_dev.migration.forecast import Forecaster
from vfu_dev.uapi import DeviceState

# 8 reads of 1 MiB are enough to tell a link from pauses. After fewer, a busy machine may show a prediction
# and withdraw it at the first pause.
SETTLED_BYTES = 8 << 20

RECORDED = ("--device", f"{Path(__file__).parent / 'recorded_device.py'}:RecordedDevice")


def test_what_was_predicted_at_the_stop_is_kept_beside_what_was_measured(pair: Pair) -> None:
    """Record, figures and metrics have both, and mean the same; the client's downtime spans the device's."""
    progress = move(pair.source, pair.destination, CONVERGES)
    snapshot = pair.web.status()["snapshot"]
    predicted, measured = snapshot["last_predicted_downtime_seconds"], snapshot["last_downtime_seconds"]
    assert math.isfinite(predicted)
    assert predicted > 0
    assert pair.source.status()["save"]["predicted_downtime_seconds"] == predicted
    families = text_string_to_metric_families(pair.web.get("/metrics")[2].decode())
    scraped = {one.name: one.value for family in families for one in family.samples}
    assert scraped["vfu_migration_last_predicted_downtime_seconds"] == predicted
    assert scraped["vfu_migration_last_downtime_seconds"] == measured
    # From before it asks for the stop to after the destination runs, against the arcs in between.
    assert snapshot["last_stop_copy_seconds"] < measured < progress.downtime_seconds


def test_a_prediction_is_told_only_when_it_means_something(pair: Pair) -> None:
    """Not before there were reads to tell a slow link from pauses, and then until the end."""

    def running() -> list[dict[str, Any]]:
        samples = pair.web.status()["samples"]
        rows = [dict(zip(samples["fields"], row, strict=True)) for row in samples["rows"]]
        return [row for row in rows if row["state"] == "PRE_COPY"]

    with pair.source.connect() as device:
        device.migration.set_state(DeviceState.PRE_COPY)
        unread = wait_until(running, "a sample in PRE_COPY")
        assert [row["predicted_downtime_seconds"] for row in unread] == [None] * len(unread)
        device.migration.set_state(DeviceState.RUNNING)
    move(pair.source, pair.destination, CONVERGES)
    rows = running()
    told = [row["predicted_downtime_seconds"] is not None for row in rows]
    read = [row["transferred_bytes"] for row in rows]
    assert not any(one for one, count in zip(told, read, strict=True) if count == 0)
    assert read[-1] >= SETTLED_BYTES
    assert told[-1]


def test_a_recorded_move_replayed_says_what_the_server_said(
    serve: ServerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prediction and downtime of a replay are those of the live server, to the last digit."""
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "{}.events"))
    source = serve(*RECORDED, "--fill", "1", memory="16M", name="source")
    destination = serve(*RECORDED, memory="16M", name="destination")
    move(source, destination, CONVERGES)
    (line,) = (tmp_path / "source.events").read_text().splitlines()
    predicted, measured = feed(Forecaster(), json.loads(line))
    with source.control() as control:
        snapshot = control.command("figures")["snapshot"]
    assert predicted == snapshot["last_predicted_downtime_seconds"]
    assert measured == snapshot["last_downtime_seconds"]
    assert not (tmp_path / "destination.events").exists()


def test_rates_are_known_in_the_course_of_a_pre_copy(pair: Pair) -> None:
    """Both are there once enough was read, and the guest's writes are seen."""
    move(pair.source, pair.destination, CONVERGES)
    samples = pair.web.status()["samples"]
    rows = [dict(zip(samples["fields"], row, strict=True)) for row in samples["rows"]]
    running = [row for row in rows if row["state"] == "PRE_COPY"]
    later = [row for row in running if row["transferred_bytes"] >= SETTLED_BYTES]
    assert later
    assert all(row["transfer_rate_bytes_per_second"] > 0 for row in later)
    # A load that gets no processor for a second writes nothing in it: that is 0, and not unknown.
    assert all(row["dirty_rate_bytes_per_second"] >= 0 for row in later)
    assert any(row["dirty_rate_bytes_per_second"] > 0 for row in later)
    assert [row["transferred_bytes"] for row in running] == sorted(
        row["transferred_bytes"] for row in running
    )


def convergence_ratio(pair: Pair) -> float:
    """Return the source's transfer rate over its dirty rate, as a scrape has it; infinite without either."""
    families = text_string_to_metric_families(pair.web.get("/metrics")[2].decode())
    scraped = {one.name: one.value for family in families for one in family.samples}
    return float(scraped.get("vfu_migration_convergence_ratio", math.inf))


def test_a_migration_that_cannot_converge_is_called_that(pair: Pair) -> None:
    """The verdict comes, and the ratio that decides it.

    They are waited for one by one: whenever the load gets no processor for a second, both are others.
    """
    with moving(pair.source, pair.destination, DOES_NOT_CONVERGE):
        status = wait_until(
            lambda: next(
                (s for s in [pair.web.status()] if s["snapshot"]["forecast"]["converging"] is False), None
            ),
            "the verdict",
        )
        assert status["verdict"].startswith("not converging")
        wait_until(lambda: 0 < convergence_ratio(pair) < 1, "the ratio")
