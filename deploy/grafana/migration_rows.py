"""Rows on migrations: the present one, whether it converges, and how earlier ones ended."""

from __future__ import annotations

from panels import Layout, Steps, bars, graph, stat, state_mappings, timeline
from queries import DOWNTIME_LIMIT, D, ended, rate


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
