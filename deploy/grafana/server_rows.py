"""Rows on what the guest feels, and on the servers."""

from __future__ import annotations

from panels import Layout, graph, table, timeline
from queries import D, during_pre_copy, rate


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
            "Share of the time spent on scans for dirty pages instead of serving the guest.",
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
