"""The result of one migration, as dataclasses and as the JSON of `lab migrate`."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vfu_dev import JSON_VERSION
from vfu_dev.convergence import DOWNTIME_LIMIT_SECONDS
from vfu_dev.errors import LabError
from vfu_dev.figures import Sample, Snapshot
from vfu_dev.vm.guest import GuestResult
from vfu_dev.vm.monitor import Monitor
from vfu_dev.vm.trace import states_set
from vfu_dev.whole import write_whole

FINAL_STATES = ("completed", "failed", "cancelled")


@dataclass
class DeviceResult:
    """One device: the figures of both servers. Byte counts are stream bytes, framing included."""

    name: str
    size_bytes: int = 0
    digest_source: str | None = None
    digest_destination: str | None = None
    initial_bytes: int = 0
    precopy_bytes: int = 0
    stop_copy_bytes: int = 0
    received_bytes: int = 0
    passes: int = 0
    pages_sent: int = 0
    pages_resent: int = 0
    zero_pages: int = 0
    predicted_downtime_seconds: float | None = None  # by the source's server, when the device stopped
    downtime_seconds: float | None = None  # as that server measured it
    stop_copy_seconds: float | None = None
    # The most memory that each server had resident since it was started, the device's included; 0: unknown.
    resident_source_bytes: int = 0
    resident_destination_bytes: int = 0
    state_source: str | None = None
    state_destination: str | None = None
    error_source: str | None = None
    error_destination: str | None = None
    # Faults that happened since the servers were started, by operation; those that did not are left out.
    faults_source: dict[str, int] = field(default_factory=dict)
    faults_destination: dict[str, int] = field(default_factory=dict)
    transitions_source: list[dict[str, Any]] = field(default_factory=list)
    transitions_destination: list[dict[str, Any]] = field(default_factory=list)
    # What `status` says of the replay of a profile; None without one.
    replay_source: dict[str, Any] | None = None
    replay_destination: dict[str, Any] | None = None
    save: dict[str, Any] | None = None
    resume: dict[str, Any] | None = None
    # What the source's server sampled, ten times a second: names of the fields, and rows of values.
    samples_source: dict[str, list[Any]] = field(default_factory=lambda: {"fields": [], "rows": []})

    @property
    def digest_match(self) -> bool:
        """Whether both digests are known and equal."""
        return self.digest_source is not None and self.digest_source == self.digest_destination

    def read_source(self, status: dict[str, Any]) -> None:
        """Take the source server's status, `faults` included."""
        self.faults_source = status.get("faults", {})
        self.replay_source = status.get("replay")
        self.size_bytes = sum(memory["size_bytes"] for memory in status.get("memories", []))
        self.state_source = status.get("state")
        self.resident_source_bytes = status.get("peak_resident_bytes") or 0
        self.transitions_source = status.get("transitions", [])
        save = self.save = status.get("save")
        if save:
            self.digest_source = save.get("digest")
            self.error_source = save.get("error")
            for key in (
                "initial_bytes", "precopy_bytes", "stop_copy_bytes", "passes",
                "pages_sent", "pages_resent", "zero_pages",
            ):  # fmt: skip
                setattr(self, key, save.get(key) or 0)

    def read_figures(self, snapshot: Snapshot | None, samples: list[Sample]) -> None:
        """Take what the source's server measured."""
        self.samples_source = {"fields": list(Sample._fields), "rows": [list(sample) for sample in samples]}
        if snapshot is not None:
            self.predicted_downtime_seconds = snapshot.last_predicted_downtime_seconds
            self.downtime_seconds = snapshot.last_downtime_seconds
            self.stop_copy_seconds = snapshot.last_stop_copy_seconds

    def read_destination(self, status: dict[str, Any]) -> None:
        """Take the destination server's status, `faults` included."""
        self.faults_destination = status.get("faults", {})
        self.replay_destination = status.get("replay")
        self.state_destination = status.get("state")
        self.resident_destination_bytes = status.get("peak_resident_bytes") or 0
        self.transitions_destination = status.get("transitions", [])
        resume = self.resume = status.get("resume")
        if resume:
            self.digest_destination = resume.get("digest")
            self.error_destination = resume.get("error")
            self.received_bytes = resume.get("received_bytes") or 0

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {**asdict(self), "digest_match": self.digest_match}


@dataclass
class QemuSide:
    """The QEMU of one host, and how it got the devices; `iommu` with vfio-pci."""

    version: str | None = None
    front_end: str | None = None
    iommu: str | None = None


@dataclass
class QemuResult:
    """QEMU's view. Times in milliseconds, sizes in bytes.

    `version` and `front_end` are None where the sides differ.
    """

    version: str | None = None
    front_end: str | None = None
    machine: str | None = None
    source: QemuSide = field(default_factory=QemuSide)
    destination: QemuSide = field(default_factory=QemuSide)
    accel: str = ""
    status: str = "none"
    error: str | None = None
    downtime_ms: int | None = None
    downtime_limit_ms: int = round(DOWNTIME_LIMIT_SECONDS * 1000)
    total_ms: int | None = None
    setup_ms: int | None = None
    expected_downtime_ms: int | None = None  # its last figure before the end; it counts RAM only
    vfio_bytes: int | None = None
    transferred_bytes: int | None = None  # RAM, device state and the rest
    parameters: dict[str, Any] = field(default_factory=dict)
    capabilities: list[str] = field(default_factory=list)
    run_state_source: str | None = None  # of the VM, at the end
    run_state_destination: str | None = None
    states_source: list[str] = field(default_factory=list)
    states_destination: list[str] = field(default_factory=list)
    command_line_source: list[str] = field(default_factory=list)
    command_line_destination: list[str] = field(default_factory=list)
    events_source: list[dict[str, Any]] = field(default_factory=list)
    events_destination: list[dict[str, Any]] = field(default_factory=list)
    trace_source: list[dict[str, Any]] = field(default_factory=list)
    trace_destination: list[dict[str, Any]] = field(default_factory=list)

    def read_sides(self, source: QemuSide, destination: QemuSide) -> None:
        """Take which QEMU was where."""
        self.source, self.destination = source, destination
        self.version = source.version if source.version == destination.version else None
        self.front_end = source.front_end if source.front_end == destination.front_end else None

    def read_migration(self, reply: dict[str, Any], before: dict[str, Any]) -> None:
        """Take the figures of a `query-migrate` reply, and of one from `before` the migration ended.

        A migration that was cancelled or failed has no figures left in the last one.
        """
        self.expected_downtime_ms = before.get("expected-downtime")
        reply = {**{key: value for key, value in before.items() if key in ("ram", "vfio")}, **reply}
        self.status = reply.get("status", "none")
        self.error = reply.get("error-desc")
        self.downtime_ms = reply.get("downtime")
        self.total_ms = reply.get("total-time")
        self.setup_ms = reply.get("setup-time")
        self.vfio_bytes = reply.get("vfio", {}).get("transferred")
        self.transferred_bytes = reply.get("ram", {}).get("transferred")

    async def read_hosts(
        self, source: Monitor, destination: Monitor, samples: list[dict[str, Any]], since: float
    ) -> None:
        """Take the figures of both QEMUs and their traces, and `samples` from before the end.

        A source that was a destination before logged that too: its trace counts from `since` on (Unix time).
        """
        with contextlib.suppress(LabError):
            active = [row["qemu"] for row in samples if row["status"] not in FINAL_STATES]
            self.read_migration(await source.migration(), active[-1] if active else {})
            self.run_state_source = await source.run_state()
            self.capabilities = [
                entry["capability"]
                for entry in await source.execute("query-migrate-capabilities")
                if entry["state"]
            ]
        with contextlib.suppress(LabError):
            self.run_state_destination = await destination.run_state()
        self.command_line_source = source.command_line
        self.command_line_destination = destination.command_line
        self.events_source, self.events_destination = source.events, destination.events
        source_trace = [event for event in source.trace() if event.time is None or event.time >= since]
        destination_trace = destination.trace()
        self.trace_source = [event.to_json() for event in source_trace]
        self.trace_destination = [event.to_json() for event in destination_trace]
        self.states_source = states_set(source_trace)
        self.states_destination = states_set(destination_trace)


@dataclass
class MigrationResult:
    """Everything about one move; empty `problems` means that everything is correct."""

    status: str = "failed"
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    devices: list[DeviceResult] = field(default_factory=list)
    qemu: QemuResult = field(default_factory=QemuResult)
    moved: bool = False  # the migration completed and the VM runs on the destination
    interrupted: bool = False  # after that, before everything was read back
    guest: GuestResult | None = None
    clocks: dict[str, Any] | None = None  # `Clocks`, where the hosts' may differ
    link: dict[str, Any] | None = None  # `LinkRoute.describe`; None: a UNIX socket
    policy: list[dict[str, Any]] = field(default_factory=list)  # `Policy.steps`
    # Where the devices' own engines wrote: `load-status` of each of the source's servers (docs/control.md).
    load_status: list[dict[str, Any]] = field(default_factory=list)
    # `Convergence` as it stood when PRE_COPY ended or was given up.
    convergence: dict[str, Any] | None = None
    started: float = 0.0
    ended: float = 0.0
    command: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    logs: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object (vfu_dev/schemas/lab-migrate.json), with the series that plots need."""
        out = asdict(self)
        out["devices"] = [device.to_json() for device in self.devices]
        return {"version": JSON_VERSION, "kind": "lab-migrate", **out}

    def write(self, path: Path) -> None:
        """Write the JSON file at once or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(self.to_json(), indent=1) + "\n")
