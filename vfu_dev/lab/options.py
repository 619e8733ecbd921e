"""The options of one move in the lab: devices, load, guest and QEMU's migration settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from vfu_dev.convergence import DOWNTIME_LIMIT_SECONDS, MAX_BANDWIDTH
from vfu_dev.errors import ConfigError
from vfu_dev.qemu_events import TRACE_PATTERNS
from vfu_dev.vm.guest import Via
from vfu_dev.vm.network import LinkSpec
from vfu_dev.vm.own_device import OwnDevice
from vfu_dev.vm.qemu import RamKind
from vfu_dev.workload import Workload
from vfu_dev.workload.spec import DEFAULT_PAGE_BYTES

# QEMU migrates a Linux guest's own RAM too; a qtest machine needs next to none.
LINUX_RAM_BYTES = 192 << 20
QTEST_RAM_BYTES = 32 << 20
# Added to the source's initial content, so that a destination that received nothing cannot match it.
SOURCE_FILL = 0x5646_5544

# 2 MiB of pages a second.
DEFAULT_LOAD = Workload("uniform", rate_pages=512)

LoadPlace = Literal["guest", "device"]
# How the content is compared after the move: the guest reads it back (docs/series.md); the servers' digests
# alone; or only the stream's own checks.
Verify = Literal["auto", "dma", "mmio", "digests", "none"]
VERIFY: tuple[Verify, ...] = get_args(Verify)


@dataclass(frozen=True)
class QemuChoice:
    """Which QEMU a host has, and how it gets the devices.

    Attributes:
        front_end, iommu: as in `vfu_dev.attach.front_end`; None: the best that the QEMU has.
        within: what its command line begins with (see `QemuOptions`).
    """

    binary: Path
    front_end: str | None = None
    iommu: str | None = None
    within: tuple[str, ...] = ()


@dataclass(frozen=True)
class MigrateOptions:
    """One move. Sizes in bytes, rates in bytes a second, times in milliseconds.

    Attributes:
        qemu, front_end, iommu: of both hosts; of the source alone, where `qemu_destination` is given. A host
            keeps its QEMU: after a turn-around the new destination has the one that the old source had.
        qemu_environment: added to the environment of both QEMUs.
        ram: what guest RAM is: only what is shared can be mapped by a server.
        preload_log: the preloaded library logs what it was asked and answered.
        own_device: a class of the user's own in place of the reference device. The lab does not know its
            registers: its own engine writes, and only digests compare its state.
        server: the words of a command that serves a device in the place of ours (`vfu_dev.vm.any_server`).
        load_place: who writes: the guest, whose journal is compared with the device after the move, or the
            device's own engine, where only digests show that the state is equal.
        verify: how the content is compared; `auto` reads it back where the guest wrote it.
        faults_source, faults_destination: `--fault` of the servers on that side (docs/faults.md). A side
            keeps its role: after a turn-around the new destination gets the destination's.
        policy: rules that change QEMU's parameters in the course of the move (docs/policies.md).
        parameters, capabilities: more of QEMU's migration parameters (`migrate-set-parameters`, hyphens or
            underscores) and capabilities, for both sides.
        server_extra: further arguments of `serve`, for both sides.
        replays: the devices behave as a profile says, which may have no pre-copy.
        spare_ports: root ports of a Linux guest that are free for hot-plug (`Lab.plug`).
        reboot: a guest that reboots does, instead of ending the move.
        machine: of both QEMUs; None: the newest q35 that both have.
        link: the hosts' QEMUs are in network namespaces of their own, joined by such a link.
        qemu_extra: further arguments of both QEMUs.
        traces: QEMU's trace events to log, patterns.
    """

    qemu: Path
    front_end: str | None = None
    iommu: str | None = None
    qemu_destination: Path | None = None
    front_end_destination: str | None = None
    iommu_destination: str | None = None
    qemu_environment: tuple[tuple[str, str], ...] = ()
    ram: RamKind = "shared"
    preload_log: bool = False
    guest_image: Path | None = None  # None: --guest none
    library: Path | None = None
    memory_bytes: int = 8 << 20
    page_size: int = DEFAULT_PAGE_BYTES
    access: str = "trap"
    own_device: OwnDevice | None = None
    server: tuple[str, ...] = ()
    devices: int = 1
    spare_ports: int = 0
    reboot: bool = False
    load: Workload = DEFAULT_LOAD
    load_place: LoadPlace = "guest"
    verify: Verify = "auto"
    pre_copy: bool = True
    switchover_ack: bool = False
    downtime_limit_ms: int = round(DOWNTIME_LIMIT_SECONDS * 1000)
    max_bandwidth: int = MAX_BANDWIDTH  # 0: no limit
    switchover_bandwidth: int = 0  # 0: QEMU estimates it
    policy: tuple[str, ...] = ()
    parameters: tuple[tuple[str, Any], ...] = ()
    capabilities: tuple[tuple[str, bool], ...] = ()
    machine: str | None = None
    link: LinkSpec | None = None
    qemu_extra: tuple[str, ...] = ()
    traces: tuple[str, ...] = TRACE_PATTERNS
    accel: str = "tcg"
    warmup_seconds: float = 1.0
    settle_seconds: float = 1.0
    timeout_seconds: float = 180.0
    fill: int = SOURCE_FILL
    server_extra: tuple[str, ...] = ()
    replays: bool = False
    faults_source: tuple[str, ...] = ()
    faults_destination: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.own_device is not None and self.load_place == "guest":
            raise ConfigError(
                "load place guest: a guest knows only the reference device; a class of your own writes by "
                "itself: use place device"
            )
        if self.server and (self.load_place == "guest" or not self.load.is_idle):
            raise ConfigError(
                "server: nobody writes to a device that is not known: use load place device, idle"
            )
        if self.verify in ("dma", "mmio") and self.load_place == "device":
            raise ConfigError(
                f"verify {self.verify}: there is no journal of what the device's own engine writes; "
                "use digests"
            )

    @property
    def writer(self) -> str:
        """Who writes, for people."""
        if self.load_place == "device":
            return "the device itself"
        return "the lab" if self.guest_image is None else "the guest"

    @property
    def read_back(self) -> Via | None:
        """How the guest reads device memory back after the move; None: it does not."""
        if self.load_place == "device" or self.verify in ("digests", "none"):
            return None
        return cast(Via, self.verify)

    @property
    def qemu_source(self) -> QemuChoice:
        """The QEMU of the first source."""
        return QemuChoice(self.qemu, self.front_end, self.iommu)

    @property
    def qemu_incoming(self) -> QemuChoice:
        """The QEMU of the first destination."""
        if self.qemu_destination is None:
            return self.qemu_source
        return QemuChoice(self.qemu_destination, self.front_end_destination, self.iommu_destination)

    @property
    def ram_bytes(self) -> int:
        """Guest RAM: the journals of all devices must fit beside the system."""
        if self.guest_image is None:
            return QTEST_RAM_BYTES
        journal = -(-self.memory_bytes // (1 << 20)) << 20
        return LINUX_RAM_BYTES + (self.devices + self.spare_ports) * journal

    @property
    def qemu_parameters(self) -> dict[str, Any]:
        """The migration parameters that a move sets, underscores for hyphens."""
        parameters: dict[str, Any] = {
            "downtime_limit": self.downtime_limit_ms,
            "max_bandwidth": self.max_bandwidth,
        }
        if self.switchover_bandwidth:
            parameters["avail_switchover_bandwidth"] = self.switchover_bandwidth
        return parameters | {key.replace("-", "_"): value for key, value in self.parameters}

    def qemu_capabilities(self, *, return_path: bool) -> list[dict[str, Any]]:
        """Return the migration capabilities that a move sets, as `migrate-set-capabilities` takes them."""
        states = {"events": True, "return-path": return_path}
        if self.switchover_ack:
            states["switchover-ack"] = True
        states |= dict(self.capabilities)
        return [{"capability": name, "state": state} for name, state in states.items()]
