"""Workloads as data, and the writes that follow from them: numpy only, used by every generator.

`Workload` says what a load is; `Program` binds it to a memory: which write comes where (`Writes`) and when
(`Pacer`). docs/load.md is the definition that a generator in another language follows.
"""

from vfu_dev.workload.carry import ArrayWriter
from vfu_dev.workload.figures import WorkloadFigures
from vfu_dev.workload.pacer import Pacer, Run
from vfu_dev.workload.program import Program
from vfu_dev.workload.spec import (
    PAGE_PATTERNS,
    PATTERNS,
    Burst,
    Phase,
    Workload,
    parse_dirty_rate,
    parse_write_rate,
)
from vfu_dev.workload.trace import Trace
from vfu_dev.workload.writes import Writes, contents, writes_of

__all__ = [
    "PAGE_PATTERNS",
    "PATTERNS",
    "ArrayWriter",
    "Burst",
    "Pacer",
    "Phase",
    "Program",
    "Run",
    "Trace",
    "Workload",
    "WorkloadFigures",
    "Writes",
    "contents",
    "parse_dirty_rate",
    "parse_write_rate",
    "writes_of",
]
