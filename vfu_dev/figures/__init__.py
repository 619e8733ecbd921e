"""What is counted and measured, as plain values of the standard library.

The thread that owns the device makes them; the metrics exporter, the live page and `top`, which run in
processes of their own, read them. So nothing here imports numpy, or what does.
"""

from vfu_dev.figures.histogram import DOWNTIME_EDGES_SECONDS, MMIO_EDGES_SECONDS, Histogram
from vfu_dev.figures.snapshot import Figures, Sample, Snapshot
from vfu_dev.figures.totals import RESUME_RESULTS, SAVE_RESULTS, SENT_PHASES, Interruption, Totals
from vfu_dev.figures.verdict import verdict

__all__ = [
    "DOWNTIME_EDGES_SECONDS",
    "MMIO_EDGES_SECONDS",
    "RESUME_RESULTS",
    "SAVE_RESULTS",
    "SENT_PHASES",
    "Figures",
    "Histogram",
    "Interruption",
    "Sample",
    "Snapshot",
    "Totals",
    "verdict",
]
