#!/usr/bin/env python3
"""Writes dashboards/precopy-convergence.json; a test sees that it was run.

Every panel is one call below: title, what it tells, the queries, the unit. States come from `vfu_dev.uapi`,
limits from Prometheus' rules/limits.yml, so that nothing is said twice.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml
from panels import DATASOURCE, Json, Layout, Steps, bars, graph, stat, state_mappings, table, timeline

HERE = Path(__file__).parent
DASHBOARD = HERE / "dashboards" / "precopy-convergence.json"
LIMITS = HERE.parent / "prometheus" / "rules" / "limits.yml"

UID = "vfu-precopy"
SCHEMA_VERSION = 38  # Grafana 10; later ones read it and convert
D = '{device=~"$device"}'  # every query is about the devices chosen at the top
IN_PRE_COPY = "and device:vfu_migration_pre_copy:bool == 1"


def limit(record: str) -> str:
    """Return the constant that limits.yml records as `record`."""
    for group in yaml.safe_load(LIMITS.read_text())["groups"]:
        for rule in group["rules"]:
            if rule["record"] == record:
                return str(rule["expr"]).removeprefix("vector(").removesuffix(")")
    raise KeyError(record)


DOWNTIME_LIMIT = limit("vfu:downtime_limit:seconds")
MAX_BANDWIDTH = limit("vfu:max_bandwidth:bytes_per_second")


def rate(metric: str) -> str:
    """Return the rate of a counter of the devices chosen."""
    return f"rate({metric}{D}[$__rate_interval])"


def during_pre_copy(record: str) -> str:
    """Return a recorded figure of the devices chosen, as long as they are in PRE_COPY."""
    return f"device:{record}{D} {IN_PRE_COPY}"


def ended(metric: str, by: str) -> str:
    """Return how far a counter rose in the time shown, by one of its labels."""
    return f"sum by ({by}) (increase({metric}{D}[$__range]))"


def now(page: Layout) -> None:
    """Add what counts at this moment."""
    page.row("Now")
    limit_seconds = float(DOWNTIME_LIMIT)
    above_limit: Steps = [("green", None), ("orange", limit_seconds)]
    page.add(
        stat(
            "State",
            "Migration state, by the kernel's names. PRE_COPY: the state is sent while the guest runs."
            " STOP_COPY: the rest is sent, the guest stands still.",
            f"device:vfu_migration_state:code{D}",
            "short",
            [("text", None)],
            mappings=state_mappings(),
        ),
        4,
        7,
    )
    page.add(
        stat(
            "Convergence",
            "Bytes that the client reads for each that the guest makes dirty. Above 1 this migration ends;"
            " below 1 it does not, once the panel beside it says so.",
            f"vfu_migration_convergence_ratio{D}",
            "short",
            [("red", None), ("orange", 1), ("green", 1.5)],
        ),
        3,
        7,
    )
    page.add(
        stat(
            "Converges",
            "NO: the client read as much as was left, asked again, and there was no less. Empty: not"
            " known, as while QEMU sends RAM first.",
            f"vfu_migration_converging{D}",
            "short",
            [("red", None), ("green", 1)],
            mappings=[
                {
                    "type": "value",
                    "options": {"0": {"text": "NO", "color": "red"}, "1": {"text": "yes", "color": "green"}},
                }
            ],
        ),
        3,
        7,
    )
    page.add(
        stat(
            "Left to send",
            "Bytes that would have to be sent if the device stopped now.",
            f"vfu_migration_stop_copy_length_bytes{D}",
            "bytes",
            [("green", None)],
        ),
        4,
        7,
    )
    page.add(
        stat(
            "Predicted downtime",
            "How long the device would stand still if it stopped now.",
            f"vfu_migration_predicted_downtime_seconds{D}",
            "s",
            above_limit,
        ),
        4,
        7,
    )
    page.add(
        stat(
            "Measured downtime",
            "Of the last migration that was completed, as the device measured it.",
            f"vfu_migration_last_downtime_seconds{D}",
            "s",
            above_limit,
        ),
        3,
        7,
    )
    page.add(
        stat(
            "Up",
            "1: answers, 0: gone.",
            'up{job="vfu-dev"}',
            "short",
            [("red", None), ("green", 1)],
            legend="{{instance}}",
        ),
        3,
        7,
    )


def convergence(page: Layout) -> None:
    """Add whether it converges, and why not."""
    page.row("Does it converge?")
    transfer = f"vfu_migration_transfer_rate_bytes_per_second{D}"
    page.add(
        graph(
            "Remaining bytes against the switchover threshold",
            "QEMU stops the guest when what is left fits under bandwidth x downtime limit. A curve that"
            " flattens out above the dashed line is a migration that does not end. Both limits are variables"
            " at the top.",
            {
                "{{device}} left": f"vfu_migration_stop_copy_length_bytes{D}",
                "{{device}} threshold at its rate": f"{transfer} * $downtime_limit",
                "threshold at max-bandwidth": "vector($max_bandwidth * $downtime_limit)",
            },
            "bytes",
            dashed=("threshold",),
        )
    )
    page.add(
        graph(
            "Dirty rate against transfer rate",
            "What the guest makes dirty, and what the link carries away. The first has to stay below the"
            " second.",
            {
                "{{device}} dirty rate": f"vfu_migration_dirty_rate_bytes_per_second{D}",
                "{{device}} transfer rate": transfer,
                "max-bandwidth": "vector($max_bandwidth)",
            },
            "binBps",
            dashed=("max-bandwidth",),
        )
    )
    page.add(
        graph(
            "Predicted against measured downtime",
            "Predicted now; and for the last migration, what was predicted at its stop and what came.",
            {
                "{{device}} predicted downtime": f"vfu_migration_predicted_downtime_seconds{D}",
                "{{device}} predicted at the stop": f"vfu_migration_last_predicted_downtime_seconds{D}",
                "{{device}} measured downtime": f"vfu_migration_last_downtime_seconds{D}",
                "{{device}} of that STOP_COPY": f"vfu_migration_last_stop_copy_seconds{D}",
                "{{device}} STOP_COPY predicted": f"vfu_migration_estimated_stop_copy_seconds{D}",
                "downtime-limit": "vector($downtime_limit)",
            },
            "s",
            dashed=("downtime-limit",),
        )
    )
    page.add(
        graph(
            "Convergence ratio",
            "Transfer rate over dirty rate: now, and over ten seconds, as the alert has it. Red: below 1.",
            {
                "{{device}}": f"vfu_migration_convergence_ratio{D} < Inf",
                "{{device}} 10 s": f"device:vfu_migration_convergence:ratio10s{D}",
            },
            "short",
            red_below=1,
            logarithmic=True,  # 0.5 and 50 are both usual, and 1 is what matters
        )
    )
    page.add(
        timeline(
            "State timeline",
            "PRE_COPY, STOP_COPY, STOP is a migration that was completed; PRE_COPY, RUNNING one that was not."
            " On the destination: RESUMING, STOP, RUNNING.",
            "{{device}}",
            f"device:vfu_migration_state:code{D}",
            state_mappings(),
        )
    )
    page.add(
        graph(
            "Initial, dirty and stop-copy bytes",
            "What PRE_COPY has to offer (initial falls, then dirty goes up and down), and what a stop would"
            " cost.",
            {
                "{{device}} initial": f"vfu_migration_initial_bytes{D}",
                "{{device}} dirty": f"vfu_migration_dirty_bytes{D}",
                "{{device}} if it stopped now": f"vfu_migration_stop_copy_length_bytes{D}",
            },
            "bytes",
            dashed=("if it stopped now",),
        )
    )
    page.add(
        graph(
            "Bytes by phase",
            "pre_copy_dirty is what had been sent before: much of it means that the guest rewrites."
            " stop_copy adds to the downtime. received: on a destination.",
            {
                "{{device}} {{phase}}": rate("vfu_migration_sent_bytes_total"),
                "{{device}} received": rate("vfu_migration_received_bytes_total"),
            },
            "binBps",
            stack=True,
        ),
        8,
    )
    page.add(
        graph(
            "Passes",
            "Passes over dirty pages since the server started. A migration that converges needs few; one"
            " that climbs on and on gets nowhere.",
            {"{{device}}": f"vfu_migration_passes_total{D}"},
            "short",
        ),
        8,
    )
    page.add(
        graph(
            "Pages",
            "Sent with content, of these again in the same migration, and zeros, which cost next to nothing.",
            {
                "{{device}} sent": rate("vfu_migration_pages_sent_total"),
                "{{device}} again": rate("vfu_migration_pages_resent_total"),
                "{{device}} zeros": rate("vfu_migration_zero_pages_total"),
            },
            "si:pages/s",
        ),
        8,
    )


def guest(page: Layout) -> None:
    """Add what the guest feels of it."""
    page.row("What the guest feels")
    page.add(
        graph(
            "MMIO latency during PRE_COPY",
            "Time in the device for half of the accesses and for 99 % of them, only while in PRE_COPY. An"
            " access that comes while a migration read is served waits for that, too.",
            {
                "{{device}} write p99": during_pre_copy("vfu_region_write_duration_seconds:p99_10s"),
                "{{device}} write p50": during_pre_copy("vfu_region_write_duration_seconds:p50_10s"),
                "{{device}} read p99": during_pre_copy("vfu_region_read_duration_seconds:p99_10s"),
                "{{device}} read p50": during_pre_copy("vfu_region_read_duration_seconds:p50_10s"),
                "{{device}} migration read p99": during_pre_copy(
                    "vfu_migration_read_duration_seconds:p99_10s"
                ),
            },
            "s",
            dashed=("migration read",),
        )
    )
    page.add(
        graph(
            "MMIO",
            "Accesses to BARs. A drop during PRE_COPY is what the migration costs the guest.",
            {
                "{{device}} reads": rate("vfu_region_reads_total"),
                "{{device}} writes": rate("vfu_region_writes_total"),
            },
            "si:accesses/s",
        ),
        6,
    )
    page.add(
        graph(
            "Scan cost",
            "Share of the time in which the device looks for dirty pages instead of serving the guest.",
            {"{{device}}": rate("vfu_migration_scan_seconds_total")},
            "percentunit",
        ),
        6,
    )
    page.add(
        graph(
            "DMA",
            "Guest memory that the device reads and writes; what it writes, the VM has to migrate.",
            {
                "{{device}} read": rate("vfu_dma_read_bytes_total"),
                "{{device}} written": rate("vfu_dma_written_bytes_total"),
            },
            "binBps",
        )
    )
    page.add(
        graph(
            "Load by the device itself",
            "What somebody has the device write by itself: asked for, and reached.",
            {
                "{{device}} asked": f"vfu_load_asked_bytes_per_second{D}",
                "{{device}} reached": f"vfu_load_reached_bytes_per_second{D}",
            },
            "binBps",
            dashed=("asked",),
        )
    )
    page.add(
        graph(
            "Faults and missed writes",
            "Faults that were injected, and writes of that load that had no time. They explain what goes"
            " wrong beside them.",
            {
                "{{device}} writes missed": rate("vfu_load_missed_writes_total"),
                "{{device}} fault {{op}}": rate("vfu_faults_injected_total") + " > 0",
            },
            "si:events/s",
        )
    )
    page.add(
        graph(
            "Trouble",
            "Any rise but that of resets at boot is a bug somewhere: refused accesses, broken messages, DMA"
            " and interrupts that got nowhere.",
            {
                "{{device}} access refused: {{reason}}": rate("vfu_region_accesses_refused_total"),
                "{{device}} protocol errors": rate("vfu_protocol_errors_total"),
                "{{device}} DMA errors": rate("vfu_dma_errors_total"),
                "{{device}} interrupt errors": rate("vfu_interrupt_errors_total"),
                "{{device}} resets": rate("vfu_device_resets_total"),
                "{{device}} audit failures": rate("vfu_migration_audit_failures_total"),
            },
            "si:events/s",
        )
    )


def outcomes(page: Layout) -> None:
    """Add how migrations ended."""
    page.row("How migrations ended, in the time shown")
    page.add(
        bars(
            "Outgoing, aborts by cause",
            "completed is good, cancelled was wished for; sent: look at the destination; reset, disconnected,"
            " failed: migrations lost.",
            "{{result}}",
            ended("vfu_migration_saves_total", "result"),
        ),
        6,
    )
    page.add(
        bars(
            "Incoming, aborts by cause",
            "refused: what arrived was damaged, cut off or of another device.",
            "{{result}}",
            ended("vfu_migration_resumes_total", "result"),
        ),
        6,
    )
    page.add(
        bars(
            "Downtime",
            "Outgoing migrations by duration: each bucket counts those that took at most its seconds.",
            "{{le}}",
            ended("vfu_migration_downtime_seconds_bucket", "le"),
            buckets=True,
        ),
        6,
    )
    page.add(
        bars(
            "State changes",
            "PRE_COPY to RUNNING is a migration that was given up.",
            "{{from}} to {{to}}",
            ended("vfu_migration_transitions_total", "from, to") + " > 0",
        ),
        6,
    )
    page.add(
        timeline(
            "Alerts",
            "`vfu-dev docs monitoring` says what to do about each.",
            "{{alertname}} {{device}} {{instance}}",
            'ALERTS{alertname=~"Vfu.*", alertstate="firing"}',
            [{"type": "value", "options": {"1": {"text": "firing", "color": "red", "index": 0}}}],
        ),
        24,
        6,
    )


def servers(page: Layout) -> None:
    """Add who serves, and what being watched costs."""
    page.row("Servers")
    page.add(
        table(
            "Devices",
            "What serves what.",
            f"vfu_device_info{D}"
            " * on (job, instance, device) group_left (version, python) vfu_build_info"
            " * on (job, instance, device) group_left (api) vfu_library_info",
            hidden=("Time", "Value", "job"),
            renamed={"api": "library"},
        )
    )
    page.add(
        graph(
            "Connections and interrupts",
            "New clients, and interrupts raised. A client that comes and goes has trouble.",
            {
                "{{device}} connections": rate("vfu_client_connections_total"),
                "{{device}} interrupts": rate("vfu_interrupts_total"),
            },
            "si:events/s",
        ),
        6,
    )
    page.add(
        graph(
            "What watching costs",
            "Time that one scrape takes from the device (MMIO waits that long), and how long it took in all.",
            {
                "{{device}}": f"vfu_scrape_snapshot_seconds{D}",
                "{{instance}} in all": 'scrape_duration_seconds{job="vfu-dev"}',
            },
            "s",
        ),
        6,
    )
    page.add(
        timeline(
            "Clients",
            "When a VM, or another client, was attached.",
            "{{device}}",
            f"vfu_client_connected{D}",
            [
                {
                    "type": "value",
                    "options": {
                        "0": {"text": "nobody", "color": "text", "index": 0},
                        "1": {"text": "attached", "color": "green", "index": 1},
                    },
                }
            ],
        )
    )
    page.add(
        graph(
            "Device memory",
            "Size, and what of it was ever written: a migration has to carry that.",
            {
                "{{device}} {{memory}} size": f"vfu_memory_size_bytes{D}",
                "{{device}} {{memory}} written": f"vfu_memory_written_bytes{D}",
            },
            "bytes",
            dashed=("size",),
        )
    )


def variables() -> list[Json]:
    """Return what can be chosen at the top."""

    def textbox(name: str, label: str, value: str, description: str) -> Json:
        chosen = {"text": value, "value": value, "selected": True}
        head = {"type": "textbox", "name": name, "label": label, "description": description}
        return head | {"query": value, "current": chosen, "options": [chosen]}

    return [
        {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus"},
        {
            "type": "query",
            "name": "device",
            "label": "Device",
            "datasource": DATASOURCE,
            "query": "label_values(vfu_migration_state, device)",
            "refresh": 2,  # whenever the time range changes: devices come and go
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"], "selected": True},
        },
        textbox("downtime_limit", "Downtime limit (s)", DOWNTIME_LIMIT, "QEMU's downtime-limit, in seconds"),
        textbox("max_bandwidth", "Max. bandwidth (B/s)", MAX_BANDWIDTH, "QEMU's max-bandwidth, bytes/second"),
    ]


def dashboard() -> Json:
    """Return the whole dashboard."""
    page = Layout()
    for part in (now, convergence, guest, outcomes, servers):
        part(page)
    return {
        "uid": UID,
        "title": "Pre-copy convergence",
        "description": "Does the migration of a device converge, why not, and how long is the downtime?",
        "tags": ["vfu-dev", "migration"],
        "editable": True,
        "graphTooltip": 1,  # one cross-hair through all panels
        "schemaVersion": SCHEMA_VERSION,
        "refresh": "5s",
        "time": {"from": "now-5m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": variables()},
        "panels": page.panels,
    }


def text() -> str:
    """Return the file's content."""
    return json.dumps(dashboard(), indent=1) + "\n"


def main() -> int:
    """Write the file, or with --check say by the exit status whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the file is old")
    if parser.parse_args().check:
        return int(DASHBOARD.read_text() != text())
    DASHBOARD.write_text(text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
