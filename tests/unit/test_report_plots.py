"""Traces and results as data and as curves: no QEMU needed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vfu_dev.lab.result import DeviceResult, MigrationResult
from vfu_dev.report.plots import migration_figure
from vfu_dev.report.scale import memory_lines, scale_figure
from vfu_dev.report.timeline import Timeline
from vfu_dev.vm.trace import parse_trace, states_set

MIB = 1 << 20

# Lines as QEMU 10.2.2 writes them (log backend, -msg timestamp=on), one line of another kind between them.
TRACE = """\
2026-11-22T23:47:25.395373Z vfio_migration_set_state  (dev0) new state PRE_COPY, recover state RUNNING
qemu-system-x86_64: warning: something else
2026-11-22T23:47:25.444163Z vfio_save_iterate  (dev0) precopy initial size 2100869 precopy dirty size 7
2026-11-22T23:47:25.501323Z vfio_state_pending_exact  (dev0) precopy 9 postcopy 0 stopcopy size 159945 \
precopy initial size 3749 precopy dirty size 164032
vfio_save_complete_precopy_start  (dev1)
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A trace log."""
    path = tmp_path / "trace.log"
    path.write_text(TRACE)
    return path


def test_trace_lines_become_events(trace: Path) -> None:
    """Times, devices, sizes and states are taken; other lines are left."""
    events = parse_trace(trace)
    assert [event.event for event in events] == [
        "vfio_migration_set_state",
        "vfio_save_iterate",
        "vfio_state_pending_exact",
        "vfio_save_complete_precopy_start",
    ]
    assert events[1].values == {"initial": 2100869, "dirty": 7}
    assert events[2].values == {"total": 9, "stop_copy": 159945, "initial": 3749, "dirty": 164032}
    assert events[1].time is not None
    assert events[0].time is not None
    assert events[1].time - events[0].time == pytest.approx(0.04879, abs=1e-6)
    assert events[3].time is None
    assert events[3].device == "dev1"
    assert states_set(events) == ["PRE_COPY"]
    assert states_set(events, "dev1") == []


def test_no_trace_is_no_event(tmp_path: Path) -> None:
    """A QEMU that never started has an empty trace."""
    assert parse_trace(tmp_path / "missing") == []


def result() -> dict[str, Any]:
    """A result with two samples, one state change on either side, and a threshold of 3 MiB."""
    made = MigrationResult(started=100.0, ended=102.0)
    device = DeviceResult(name="vfu0", size_bytes=8 * MIB)
    device.transitions_source = [{"time": 100.5, "from": "PRE_COPY", "to": "STOP_COPY"}]
    device.transitions_destination = [
        {"time": 99.0, "from": "RUNNING", "to": "RESUMING"},
        {"time": 101.5, "from": "RESUMING", "to": "RUNNING"},
    ]
    made.devices = [device]
    made.qemu.parameters = {"avail_switchover_bandwidth": 10 * MIB, "max_bandwidth": MIB}
    made.samples = [
        {"time": at, "status": "active", "qemu": {"ram": {"remaining": 5 * MIB}},
         "threshold_bytes": 3 * MIB, "destination": [{}],
         "source": [{"initial_bytes": left, "dirty_bytes": None}]}
        for at, left in ((100.0, 8 * MIB), (101.0, 4 * MIB))
    ]  # fmt: skip
    return made.to_json()


def test_spans_cover_the_axis_without_gaps() -> None:
    """States before the migration began start at zero; the last state goes on to the end."""
    timeline = Timeline(result())
    spans = timeline.spans(timeline.result["devices"][0]["transitions_destination"])
    assert [(span.state, span.start) for span in spans] == [("RESUMING", 0.0), ("RUNNING", 1.5)]
    assert spans[0].end == spans[1].start
    assert spans[-1].end == timeline.end


def test_curves_are_in_mib() -> None:
    """The axis says MiB, and so are initial_bytes and the switchover line."""
    axes = migration_figure(result()).axes[1]
    lines = {str(line.get_label()): np.asarray(line.get_ydata()) for line in axes.get_lines()}
    assert lines["initial_bytes"].tolist() == [8.0, 4.0]
    assert lines["QEMU switches over\nbelow 3 MiB"].tolist() == [3.0, 3.0]
    assert axes.get_ylabel() == "MiB"


def test_a_sweep_over_sizes_is_drawn_with_straight_lines() -> None:
    """Time, downtime and both sides' memory; not where no size is swept, or memory is not known."""
    results = Path(__file__).parents[2] / "docs" / "results"
    summary = json.loads((results / "scale-devices" / "summary.json").read_text())
    figure = scale_figure(summary)
    assert figure is not None
    lines = [len(axes.get_lines()) for axes in figure.axes]
    assert lines == [2, 2, 4]  # dots and a line, of source and destination
    dots = figure.axes[2].get_lines()[0].get_xdata()
    assert list(dots) == [1, 2, 4, 8, 16]
    assert scale_figure(json.loads((results / "steady" / "summary.json").read_text())) is None
    (line,) = (text for text in memory_lines(summary) if text.startswith("devices=16: "))
    assert re.fullmatch(r"devices=16: resident at most, source \d{3} MiB, destination \d{3} MiB", line)
    for point in summary["points"]:
        del point["metrics"]["resident_source_bytes"]
    assert scale_figure(summary) is None
