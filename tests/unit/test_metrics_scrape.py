"""The whole scrape against a golden file, and the rules that names and help texts follow."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from promkit import program

from vfu_dev.builds import BuildError
from vfu_dev.figures import DOWNTIME_EDGES_SECONDS, MMIO_EDGES_SECONDS, Figures, Sample, Snapshot, Totals
from vfu_dev.metrics import ALL_METRICS, DEVICE_LABEL, PREFIX, DeviceCollector, Metric

GOLDEN = Path(__file__).parent / "golden" / "metrics.txt"


def histogram(*counts: int, edges: tuple[float, ...], total: float) -> dict[str, object]:
    """Return a histogram with the first buckets filled."""
    return {
        "edges": list(edges),
        "counts": [*counts, *[0] * (len(edges) + 1 - len(counts))],
        "sum": total,
    }


def example() -> Snapshot:
    """Return a source in the middle of its second migration."""
    totals = Totals(
        saves_started=3,
        resumes_started=1,
        received_bytes=4_202_000,
        passes=14,
        pages_sent=41_000,
        pages_resent=8_200,
        zero_pages=512,
    )
    totals.saves.update(completed=1, cancelled=1)
    totals.resumes.update(refused=1)
    totals.sent_bytes.update(pre_copy_initial=134_000_000, pre_copy_dirty=30_000_000, stop_copy=2_500_000)
    mmio = histogram(700, 900, 50, 3, edges=MMIO_EDGES_SECONDS, total=0.0025)
    return Snapshot(
        device="gpu0",
        build={"version": "0.1.0", "python": "3.11.2"},
        library={"api": "ours", "path": "/usr/lib/libvfio-user.so.0"},
        identity={
            "type": "vfu-dev reference 1",
            "pci_id": "4656:4455",
            "profile": "",
            "migration": "stop_copy,p2p,pre_copy",
        },
        states=[
            "ERROR",
            "STOP",
            "RUNNING",
            "STOP_COPY",
            "RESUMING",
            "RUNNING_P2P",
            "PRE_COPY",
            "PRE_COPY_P2P",
        ],
        state="PRE_COPY",
        state_entered=1_800_000_000.25,
        connected=True,
        counters={
            "region_reads": 1653,
            "region_writes": 90_210,
            "region_read_bytes": 6612,
            "region_written_bytes": 721_680,
            "irqs": 12,
            "irq_errors": 1,
            "protocol_errors": 2,
            "connections": 3,
            "resets": 2,
            "dma_read_bytes": 65_536,
            "dma_written_bytes": 8192,
            "dma_errors": 0,
        },
        refused={"bounds": 1, "state": 4},
        memories=[
            {"name": "memory", "size_bytes": 67_108_864, "page_size_bytes": 4096, "written_bytes": 67_108_864}
        ],
        load={"asked_rate_bytes": 2e6, "reached_rate_bytes": 1.75e6, "missed_writes": 25},
        transitions=[("PRE_COPY", "RUNNING", 1), ("RUNNING", "PRE_COPY", 3)],
        totals=totals,
        scans={"count": 321, "pages": 50_000, "seconds": 0.0625},
        histograms={
            "region_read": mmio,
            "region_write": mmio,
            "migration_read": histogram(0, 0, 0, 1, 2, 90, 40, edges=MMIO_EDGES_SECONDS, total=0.0107),
            "stop_copy": histogram(0, 0, 1, edges=DOWNTIME_EDGES_SECONDS, total=0.0125),
            "downtime": histogram(0, 0, 0, 1, edges=DOWNTIME_EDGES_SECONDS, total=0.03125),
        },
        forecast={
            "initial_bytes": 0,
            "dirty_bytes": 5_250_000,
            "stop_copy_length_bytes": 5_250_432,
            "dirty_rate_bytes_per_second": 50e6,
            "transfer_rate_bytes_per_second": 125e6,
            "estimated_stop_copy_seconds": 0.042,
            "predicted_downtime_seconds": 0.06,
            "converging": True,
        },
        faults={"mig-read": 3, "irq": 0},
        last_stop_copy_seconds=0.0125,
        last_downtime_seconds=0.03125,
        last_predicted_downtime_seconds=0.03,
        snapshot_seconds=0.000125,
    )


def scrape(snapshot: Snapshot) -> str:
    """Return the text of one scrape; the scrape's own parts take a second each."""
    ticks = itertools.count()
    registry = CollectorRegistry()
    registry.register(DeviceCollector(lambda: snapshot, clock=lambda: float(next(ticks))))
    return generate_latest(registry).decode()


def test_the_whole_scrape_is_the_golden_file() -> None:
    """A renamed metric is a visible diff; VFU_DEV_UPDATE_GOLDEN=1 writes the file anew."""
    text = scrape(example())
    if os.environ.get("VFU_DEV_UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_figures_survive_json() -> None:
    sample = Sample(1.5, "PRE_COPY", 0, 4100, 4500, 10_000, 50e6, None, None, 2)
    figures = Figures(example(), 7, False, [sample])
    assert Figures.from_dict(json.loads(figures.to_json())) == figures


def test_describe_names_what_collect_yields() -> None:
    """describe() lists exactly the families of a scrape, so that registering never asks the device."""
    collector = DeviceCollector(example)
    described = [family.name for family in collector.describe()]
    assert described == [family.name for family in collector.collect()]
    assert len(set(described)) == len(described)


def test_a_collector_that_fails_does_not_hide_the_others() -> None:
    snapshot = example()
    snapshot.memories = [{}]
    text = scrape(snapshot)
    assert 'vfu_scrape_collector_success{collector="memory",device="gpu0"} 0.0' in text
    assert "vfu_memory_size_bytes{" not in text
    assert 'vfu_region_reads_total{device="gpu0"} 1653.0' in text


def test_what_is_not_known_is_absent_and_nothing_written_is_infinite() -> None:
    snapshot = example()
    snapshot.forecast = dict.fromkeys(snapshot.forecast)
    text = scrape(snapshot)
    assert "vfu_migration_convergence_ratio{" not in text
    assert "vfu_migration_converging{" not in text
    assert "vfu_migration_predicted_downtime_seconds{" not in text
    assert 'vfu_migration_dirty_bytes{device="gpu0"} 0.0' in text
    snapshot.forecast |= {"dirty_rate_bytes_per_second": 0.0, "transfer_rate_bytes_per_second": 1e6}
    assert 'vfu_migration_convergence_ratio{device="gpu0"} +Inf' in scrape(snapshot)


UNITS = ("bytes", "seconds", "ratio", "bytes_per_second", "info", "total", "timestamp_seconds")
# Counts of one thing, and states: what has no unit.
UNITLESS = {
    "vfu_client_connected",
    "vfu_migration_converging",
    "vfu_migration_state",
    "vfu_scrape_collector_success",
}


@pytest.mark.parametrize("metric", ALL_METRICS, ids=lambda metric: metric.name)
def test_names_follow_the_conventions(metric: Metric) -> None:
    """prometheus.io/docs/practices/naming: prefix, base units, `_total` on counters alone."""
    assert re.fullmatch(r"vfu(_[a-z0-9]+)+", metric.name)
    assert metric.name.startswith(PREFIX)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.name.endswith("_info") == (metric.kind == "info")
    assert metric.name.endswith(UNITS) or metric.name in UNITLESS
    assert not re.search(r"_(ms|us|ns|millis\w*|kb|mb|kib|mib|percent)(_|$)", metric.name)
    if metric.kind == "histogram":
        assert metric.name.endswith("_seconds")
    for label in metric.labels:
        assert re.fullmatch(r"[a-z][a-z_]*", label)
        assert label not in {DEVICE_LABEL, "le", "quantile", "job", "instance"}
    assert metric.help.endswith(".")
    assert 20 < len(metric.help) < 300


def test_the_text_parses_and_every_sample_has_the_device() -> None:
    families = list(text_string_to_metric_families(scrape(example())))
    assert {family.type for family in families} == {"counter", "gauge", "histogram"}
    for family in families:
        assert family.samples, family.name
        assert all(sample.labels["device"] == "gpu0" for sample in family.samples)


def test_promtool_finds_nothing_to_complain_about() -> None:
    try:
        promtool = program("promtool")
    except BuildError as error:
        pytest.skip(str(error))
    result = subprocess.run(
        [promtool, "check", "metrics"], input=scrape(example()), capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
