"""The metrics port: what it answers, to whom, and what becomes of it when one of the two processes ends."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from moves import CONVERGES, move
from observekit import Pair
from prometheus_client.parser import text_string_to_metric_families
from serverkit import RunningServer, run_vfu_dev, runs, wait_until

from vfu_dev.metrics import ALL_METRICS
from vfu_dev.uapi import DeviceState


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Return values by name and label values, the device's left out."""
    return {
        (one.name, *(value for label, value in sorted(one.labels.items()) if label != "device")): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def scrape(pair: Pair) -> dict[tuple[str, ...], float]:
    return samples(pair.web.get("/metrics")[2].decode())


def exporter_of(server: RunningServer) -> int:
    """Return the process id of the server's only child."""
    pid = server.process.pid
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


def test_a_scrape_after_a_migration_tells_what_status_tells(pair: Pair) -> None:
    """Every metric is there, and bytes, passes and results are those of the session itself."""
    progress = move(pair.source, pair.destination, CONVERGES)
    found = scrape(pair)
    save = pair.source.status()["save"]
    assert found["vfu_migration_saves_total", "completed"] == 1
    assert found["vfu_migration_stop_copy_seconds_count",] == 1
    sent = {
        phase: found["vfu_migration_sent_bytes_total", phase] for phase in ("stop_copy", "pre_copy_initial")
    }
    assert sent["stop_copy"] == save["stop_copy_bytes"] == progress.stop_copy_bytes
    # Pages that are rewritten while they wait fill other records than was foreseen: some headers of 32 bytes.
    assert abs(sent["pre_copy_initial"] - save["initial_bytes"]) < 1024
    in_precopy = sent["pre_copy_initial"] + found["vfu_migration_sent_bytes_total", "pre_copy_dirty"]
    assert in_precopy == save["precopy_bytes"]
    assert found["vfu_migration_passes_total",] == save["passes"]
    assert found["vfu_migration_pages_resent_total",] == save["pages_resent"] > 0
    assert found["vfu_region_writes_total",] == found["vfu_region_write_duration_seconds_count",] > 100
    assert found["vfu_migration_scan_seconds_total",] > 0
    assert found["vfu_migration_transitions_total", "PRE_COPY_P2P", "STOP_COPY"] == 1
    assert 0 < found["vfu_migration_last_stop_copy_seconds",] <= found["vfu_migration_last_downtime_seconds",]
    names = {name for name, *_ in found}
    # Rates have no value when nothing is migrated, all others have.
    silent = {m.name for m in ALL_METRICS if m.kind != "histogram" and m.name not in names}
    assert silent == {
        "vfu_migration_convergence_ratio",
        "vfu_migration_converging",
        "vfu_migration_estimated_stop_copy_seconds",
        "vfu_migration_predicted_downtime_seconds",
    }
    # Of the server, which holds the device's memory, not of the exporter.
    assert found["process_resident_memory_bytes",] > 32 << 20


def test_the_destination_counts_what_it_received(pair: Pair) -> None:
    move(pair.source, pair.destination, CONVERGES)
    with pair.destination.control() as control:
        totals = control.command("figures")["snapshot"]["totals"]
    assert totals["resumes"]["completed"] == totals["resumes_started"] == 1
    assert totals["received_bytes"] == pair.destination.status()["resume"]["received_bytes"]


def ends_in_running(status: dict[str, Any]) -> bool:
    """Say whether the last sample is one of a device that runs again."""
    samples = status["samples"]
    return str(samples["rows"][-1][samples["fields"].index("state")]) == "RUNNING"


def test_samples_come_once_each(pair: Pair) -> None:
    """Whoever asks for what comes after the last answer gets every sample once, in order."""
    with pair.source.connect() as device:
        device.migration.set_state(DeviceState.PRE_COPY)
        wait_until(lambda: pair.web.status()["sequence"] > 10, "more than ten samples")
        device.migration.set_state(DeviceState.RUNNING)
    # The change of state is sampled, and nothing after it.
    everything = wait_until(
        lambda: ends_in_running(found := pair.web.status()) and found, "the sample after the change of state"
    )
    rows = everything["samples"]["rows"]
    assert everything["sequence"] == len(rows) > 10
    times = [row[everything["samples"]["fields"].index("time")] for row in rows]
    assert times == sorted(set(times))
    later = pair.web.status(after=len(rows) - 3)
    assert later["samples"]["rows"] == rows[-3:]
    assert pair.web.status(after=len(rows))["samples"]["rows"] == []
    # The number of a server that is no more: from the start.
    assert pair.web.status(after=10**9)["samples"]["rows"] == rows


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/healthz", 200), ("/nothing", 404), ("/api/status?after=x", 400), ("/api/status?after=-1", 400)],
)
def test_answers_by_path(pair: Pair, path: str, expected: int) -> None:
    assert pair.web.get(path)[0] == expected


def test_the_page_may_talk_to_its_own_server_alone(pair: Pair) -> None:
    status, headers, body = pair.web.get("/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    text = body.decode()
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    assert pair.web.get("/", "HEAD")[2] == b""
    assert pair.web.get("/metrics", "POST")[0] == 405


def test_openmetrics_is_spoken_to_who_asks_for_it(pair: Pair) -> None:
    _, headers, body = pair.web.get("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_a_client_that_says_nothing_holds_nobody_up(pair: Pair) -> None:
    """Twenty idle connections and a half-sent request: the twenty-first is served."""
    idle = [socket.create_connection(("127.0.0.1", pair.web.port)) for _ in range(20)]
    idle[0].sendall(b"GET /metrics HTTP/1.1\r\nHos")
    assert pair.web.get("/metrics")[0] == 200
    for one in idle:
        one.close()


def test_the_exporter_ends_with_a_killed_server(pair: Pair) -> None:
    exporter = exporter_of(pair.source)
    os.kill(pair.source.process.pid, signal.SIGKILL)
    pair.source.process.wait()
    pair.source.process.returncode = 0  # a wanted death
    wait_until(lambda: not runs(exporter), "the exporter is gone")


def test_the_server_outlives_its_exporter(pair: Pair) -> None:
    """No metrics are no reason not to serve the device."""
    os.kill(exporter_of(pair.source), signal.SIGKILL)
    wait_until(lambda: not pair.web.answers(), "the metrics port is closed")
    assert pair.source.status()["state"] == "RUNNING"
    with pair.source.connect() as device:
        assert device.info().num_regions > 0


def test_an_exporter_that_is_asked_while_the_server_stands_still_says_so(pair: Pair) -> None:
    os.kill(pair.source.process.pid, signal.SIGSTOP)
    try:
        assert pair.web.get("/healthz")[0] == 503
    finally:
        os.kill(pair.source.process.pid, signal.SIGCONT)
    wait_until(pair.web.answers, "it answers again")


@pytest.mark.parametrize(
    ("address", "what"), [("127.0.0.1", "in use"), ("no.such.host.invalid", "no.such.host")]
)
def test_an_address_that_cannot_be_had_is_one_line(
    pair: Pair, short_tmp: Path, address: str, what: str
) -> None:
    arguments = ["serve", "--socket", str(short_tmp / "other.sock"), "--memory", "1M"]
    arguments += ["--metrics-port", str(pair.web.port), "--metrics-addr", address]
    result = run_vfu_dev(*arguments)
    assert result.returncode == 1
    assert what in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (short_tmp / "other.sock").exists()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:{port}", 200),
        ("127.0.0.1:{port}", 200),
        ("[::1]:{port}", 200),
        ("192.0.2.7", 200),
        ("attacker.example:{port}", 421),
        ("localhost.attacker.example", 421),
        ("[", 421),
    ],
)
def test_a_port_of_localhost_answers_to_no_other_name(pair: Pair, host: str, status: int) -> None:
    """A page whose name resolves to 127.0.0.1 (DNS rebinding) must not read it."""
    for path in ("/metrics", "/api/status", "/", "/healthz"):
        assert pair.web.get(path, Host=host.format(port=pair.web.port))[0] == status


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "NONSENSE"])
def test_other_methods_are_not_allowed(pair: Pair, method: str) -> None:
    status, headers, _ = pair.web.get("/metrics", method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")
