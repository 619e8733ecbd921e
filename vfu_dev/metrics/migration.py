"""The state machine, and what migrations moved."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric as Family

from vfu_dev.figures.snapshot import Snapshot
from vfu_dev.figures.totals import RESUME_RESULTS, SAVE_RESULTS, SENT_PHASES
from vfu_dev.metrics.families import Metric

STATE = Metric(
    "vfu_migration_state",
    "gauge",
    "1 for the migration state the device is in, 0 for all others; names as in <linux/vfio.h>. "
    "ERROR: only a reset leads out.",
    ("state",),
)
STATE_ENTERED = Metric(
    "vfu_migration_state_entered_timestamp_seconds",
    "gauge",
    "Unix time at which the current state was entered. A time long past in PRE_COPY "
    "means a migration that does not end.",
)
TRANSITIONS = Metric(
    "vfu_migration_transitions_total",
    "counter",
    "Changes of state by arc. Arcs from PRE_COPY back to RUNNING are cancelled migrations.",
    ("from", "to"),
)
SAVES_STARTED = Metric(
    "vfu_migration_saves_started_total",
    "counter",
    "Outgoing migrations begun; one more than ended while one runs.",
)
SAVES = Metric(
    "vfu_migration_saves_total",
    "counter",
    "Outgoing migrations ended, by result. completed: the client read everything and "
    "went to STOP for good. sent: it read everything but left without STOP; look at the "
    "destination. cancelled: it went back to RUNNING. reset, disconnected: a reset or a "
    "disconnect ended it. failed: an error in the device.",
    ("result",),
)
AUDIT_FAILURES = Metric(
    "vfu_migration_audit_failures_total",
    "counter",
    "Outgoing migrations after which memory was not what had been sent. Any rise is a write that dirty "
    "tracking missed: the destination runs on a wrong state.",
)
RESUMES_STARTED = Metric(
    "vfu_migration_resumes_started_total",
    "counter",
    "Incoming migrations begun; one more than ended while one runs.",
)
RESUMES = Metric(
    "vfu_migration_resumes_total",
    "counter",
    "Incoming migrations ended, by result. refused: the stream was damaged, cut off or of another device. "
    "A rise of any result but completed is a lost migration.",
    ("result",),
)
SENT_BYTES = Metric(
    "vfu_migration_sent_bytes_total",
    "counter",
    "Stream bytes read by the client, framing included. pre_copy_dirty was sent because "
    "the guest kept writing: far more than pre_copy_initial means a load that dirties "
    "what was already sent. stop_copy adds to the downtime.",
    ("phase",),
)
RECEIVED_BYTES = Metric(
    "vfu_migration_received_bytes_total",
    "counter",
    "Stream bytes taken in RESUMING. It rises on a destination.",
)
PASSES = Metric(
    "vfu_migration_passes_total",
    "counter",
    "Passes over dirty pages. A rise at constant dirty bytes is a migration that makes no progress.",
)
PAGES_SENT = Metric("vfu_migration_pages_sent_total", "counter", "Pages sent with their content.")
PAGES_RESENT = Metric(
    "vfu_migration_pages_resent_total",
    "counter",
    "Pages sent before and again in the same migration. A steep rise means a working set that is rewritten.",
)
ZERO_PAGES = Metric(
    "vfu_migration_zero_pages_total",
    "counter",
    "Pages of zeros, sent as an index. A rise is bandwidth saved.",
)
SCANS = Metric("vfu_migration_scans_total", "counter", "Scans for pages written since the previous scan.")
SCANNED_PAGES = Metric(
    "vfu_migration_scanned_pages_total", "counter", "Pages scanned. It rises with the dirty rate."
)
SCAN_SECONDS = Metric(
    "vfu_migration_scan_seconds_total",
    "counter",
    "Time spent on scans, during which no MMIO is served. A steep rise means guests that wait for scans.",
)
READ_SECONDS = Metric(
    "vfu_migration_read_duration_seconds",
    "histogram",
    "Time to serve one MIG_DATA_READ. MMIO that arrives meanwhile waits that long: a rise is latency for "
    "the guest.",
)
STOP_COPY_SECONDS = Metric(
    "vfu_migration_stop_copy_seconds",
    "histogram",
    "From entering STOP_COPY to the last byte read, by outgoing migration that went on to STOP. A rise is "
    "downtime.",
)
DOWNTIME_SECONDS = Metric(
    "vfu_migration_downtime_seconds",
    "histogram",
    "From the stop of the device (leaving PRE_COPY or RUNNING) to the end of the "
    "outgoing migration (leaving STOP_COPY), when the destination has taken over. Above "
    "the client's downtime limit, the prediction that the client relied on was wrong.",
)

METRICS = (
    STATE,
    STATE_ENTERED,
    TRANSITIONS,
    SAVES_STARTED,
    SAVES,
    AUDIT_FAILURES,
    RESUMES_STARTED,
    RESUMES,
    SENT_BYTES,
    RECEIVED_BYTES,
    PASSES,
    PAGES_SENT,
    PAGES_RESENT,
    ZERO_PAGES,
    SCANS,
    SCANNED_PAGES,
    SCAN_SECONDS,
    READ_SECONDS,
    STOP_COPY_SECONDS,
    DOWNTIME_SECONDS,
)


def collect(snapshot: Snapshot) -> Iterator[Family]:
    """Yield the families of this file."""
    device, totals, histograms = snapshot.device, snapshot.totals, snapshot.histograms
    yield STATE.many(device, [((state,), int(state == snapshot.state)) for state in snapshot.states])
    yield STATE_ENTERED.one(device, snapshot.state_entered)
    yield TRANSITIONS.many(device, [((origin, to), count) for origin, to, count in snapshot.transitions])
    yield SAVES_STARTED.one(device, totals.saves_started)
    yield SAVES.many(device, [((result,), totals.saves[result]) for result in SAVE_RESULTS])
    yield AUDIT_FAILURES.one(device, totals.audit_failures)
    yield RESUMES_STARTED.one(device, totals.resumes_started)
    yield RESUMES.many(device, [((result,), totals.resumes[result]) for result in RESUME_RESULTS])
    yield SENT_BYTES.many(device, [((phase,), totals.sent_bytes[phase]) for phase in SENT_PHASES])
    yield RECEIVED_BYTES.one(device, totals.received_bytes)
    yield PASSES.one(device, totals.passes)
    yield PAGES_SENT.one(device, totals.pages_sent)
    yield PAGES_RESENT.one(device, totals.pages_resent)
    yield ZERO_PAGES.one(device, totals.zero_pages)
    yield SCANS.one(device, snapshot.scans["count"])
    yield SCANNED_PAGES.one(device, snapshot.scans["pages"])
    yield SCAN_SECONDS.one(device, snapshot.scans["seconds"])
    yield READ_SECONDS.one(device, histograms["migration_read"])
    yield STOP_COPY_SECONDS.one(device, histograms["stop_copy"])
    yield DOWNTIME_SECONDS.one(device, histograms["downtime"])
