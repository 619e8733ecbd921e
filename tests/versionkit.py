"""Which QEMU migrates the device how, and which tests show it: the table of docs/qemu-versions.md.

    @shows(place("10.0", "vfio-pci", "type1"), "PRE_COPY", "P2P")
    def test_moves(evidence: Evidence, ...):
        ...
        evidence.of_move(lab, result)

A test claims cells of the table by `shows`. While it runs, `Evidence` collects what QEMU and the servers say
of its moves, and a claim that nothing supports is an error of that test. As a plugin of pytest this module
lists the claims without running anything: tests/unit/test_versions_document.py compares them with the page.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vfu_dev.qemu_events import Kind

if TYPE_CHECKING:
    from vfu_dev.lab.host import Host
    from vfu_dev.lab.lab import Lab
    from vfu_dev.lab.result import MigrationResult

# Where the plugin writes the claims: `{cell: [[test, is it of the long run], ...]}`.
CLAIMS_FILE = "VFU_DEV_VERSION_CLAIMS"
SHOWS, SOAK = "shows", "soak"
# QEMU's trace of an acknowledgement that came back, migration/trace-events.
ACKED = "source_return_path_thread_switchover_acked"

OURS = "10.2 ours"
FEATURES = {
    "PRE_COPY": "QEMU iterates over device state, initial data first; digests and bytes agree",
    "ack": "switchover-ack: the VM stops after the destination has acknowledged each device's initial data",
    "multifd": "device state of STOP_COPY goes through multifd channels",
    "P2P": "two devices or more, through PRE_COPY_P2P and RUNNING_P2P",
    "file": "to `file:`, and from there",
    "REINIT": "initial data that appears in PRE_COPY is announced, and QEMU sends it before the VM stops",
    "to another": "the destination is another version of QEMU",
    "from another": "the source is another version of QEMU",
    "other front end": "the destination has the other front end",
}


@dataclass(frozen=True, order=True)
class Row:
    """A QEMU and how it gets the device: a row of the table, as source."""

    qemu: str
    front_end: str
    iommu: str = ""

    @property
    def release(self) -> str:
        """The version, whoever built it."""
        return self.qemu.partition(" ")[0]

    def absent(self, feature: str) -> str:
        """Return why there cannot be a test of that feature; empty if there has to be one."""
        if self.front_end == "vfio-user-pci":
            if self.qemu != OURS:
                return "attaches the device and migrates none of its state"
            if feature == "multifd":
                return "refuses it: migration data shares the device's socket"
            if feature.endswith("another"):
                return "no other version migrates through it"
        elif feature == "REINIT" and self.qemu != "11.1":
            return "does not ask for PRECOPY_INFOv2"
        if feature == "other front end" and self.qemu != OURS:
            return "has one front end that migrates"
        return ""


PATHS = ("iommufd-cdev", "iommufd-fd", "type1")
ROWS = (
    *(Row("10.0", "vfio-pci", path) for path in PATHS),
    *(Row("10.2", "vfio-pci", path) for path in PATHS),
    Row("10.2", "vfio-user-pci"),
    *(Row(OURS, "vfio-pci", path) for path in PATHS),
    Row(OURS, "vfio-user-pci"),
    *(Row("11.1", "vfio-pci", path) for path in PATHS),
    Row("11.1", "vfio-user-pci"),
)
Cell = tuple[Row, str]


def shows(row: Row, *features: str) -> pytest.MarkDecorator:
    """Claim that a test shows `features` in that row."""
    for feature in features:
        assert row in ROWS, row
        assert feature in FEATURES, feature
        assert not row.absent(feature), f"{row}, {feature}: {row.absent(feature)}"
    return pytest.mark.shows(row, *features)


def claims_of(item: pytest.Item) -> set[Cell]:
    """Return the cells that a test claims."""
    return {(mark.args[0], feature) for mark in item.iter_markers(SHOWS) for feature in mark.args[1:]}


@dataclass
class Evidence:
    """What was seen of the moves of one test."""

    cells: set[Cell] = field(default_factory=set)

    def of_move(self, lab: Lab, result: MigrationResult, file: Path | None = None) -> None:
        """Take what a completed move shows, before the lab turns around.

        Args: result: collected. file: that the migration was written to.
        """
        source, destination = _row(lab.source), _row(lab.destination)
        seen = set(_features(lab, result))
        if file is not None and file.stat().st_size > lab.options.memory_bytes * lab.options.devices:
            assert file.read_bytes()[:4] == b"QEVM"
            seen.add("file")
        if source.release != destination.release:
            seen.add("to another")
            self.cells.add((destination, "from another"))
        if source.front_end != destination.front_end:
            seen.add("other front end")
        self.cells |= {(source, feature) for feature in seen}


def _row(host: Host) -> Row:
    """Return the row of a host, by what its QEMU is and does."""
    qemu = host.qemu
    release = "{}.{}".format(*qemu.binary.release)
    return Row(OURS if qemu.binary.migration else release, qemu.front_end.name, qemu.front_end.iommu or "")


def _features(lab: Lab, result: MigrationResult) -> Iterator[str]:
    """Yield what the move shows, by QEMU's own trace and the servers' words."""
    devices, qemu = result.devices, result.qemu
    assert [device.digest_match for device in devices] == [True] * lab.options.devices

    def traced(events: list[dict[str, Any]], kind: Kind) -> list[dict[str, Any]]:
        return [event for event in events if event.get("kind") == kind]

    def each_device(events: Iterable[dict[str, Any]]) -> bool:
        return len({event["device"] for event in events}) == len(devices)

    iterated = each_device(traced(qemu.trace_source, Kind.ITERATE))
    if iterated and all(device.initial_bytes and device.precopy_bytes for device in devices):
        yield "PRE_COPY"
    acknowledged = len(re.findall(rf"\b{ACKED}\b", lab.source.qemu.trace_log.read_text(errors="replace")))
    if "switchover-ack" in qemu.capabilities and acknowledged:
        yield "ack"
    sent, came = (
        traced(qemu.trace_source, Kind.SAVE_THREAD_END),
        traced(qemu.trace_destination, Kind.BUFFER_INCOMING),
    )
    if "multifd" in qemu.capabilities and each_device(sent) and each_device(came):
        yield "multifd"
    at_source = qemu.states_source.count("PRE_COPY_P2P") == len(devices)
    if len(devices) > 1 and at_source and qemu.states_destination.count("RUNNING_P2P") >= len(devices):
        yield "P2P"
    asked = traced(qemu.trace_source, Kind.REINIT) or [
        event for event in traced(qemu.trace_source, Kind.PRECOPY_INFO) if event["values"]["reinit"]
    ]
    if asked and any((device.save or {}).get("reinits") for device in devices):
        yield "REINIT"


@pytest.hookimpl
def pytest_collection_finish(session: pytest.Session) -> None:
    """Write who claims what, where the environment says so."""
    if not (where := os.environ.get(CLAIMS_FILE)):
        return
    found: dict[str, list[tuple[str, bool]]] = {}
    for item in session.items:
        test = item.nodeid.partition("[")[0]
        for row, feature in sorted(claims_of(item)):
            cell = json.dumps([row.qemu, row.front_end, row.iommu, feature])
            claim = (test, item.get_closest_marker(SOAK) is not None)
            if claim not in (claims := found.setdefault(cell, [])):
                claims.append(claim)
    Path(where).write_text(json.dumps(found))
