"""The closed loop with a real QEMU: profiles replayed, migrated, and imported from QEMU's own trace."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from labkit import begin_and_stay, dirtying, halting_guest, let_go, let_ram_go, small
from loopkit import Comparison, compare

from vfu_dev.attach.front_end import choose_front_end
from vfu_dev.builds.qemu_binary import probe_qemu
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.profile import Profile, read_profile
from vfu_dev.profile.importing import Wanted, import_profile
from vfu_dev.profile.model import MigrationSettings
from vfu_dev.profile.shipped import profile_path, serve_arguments
from vfu_dev.qemu_events import TRACE_PATTERNS, Kind
from vfu_dev.replay.laws import known
from vfu_dev.replay.scale import scaled
from vfu_dev.vm.servers import DeviceServer

# What docs/recording.md asks for, less the events of accesses to the device.
TRACES = (*TRACE_PATTERNS, "migration_*", "savevm_section_start")
# How often QEMU asks for the exact size at least: how it changes cannot be seen from once.
QUESTIONS = 3


@dataclass(frozen=True)
class Case:
    """A shipped profile, and what it is divided by."""

    name: str
    scale: int

    @property
    def profile(self) -> Profile:
        """As replayed."""
        return scaled(read_profile(profile_path(self.name)), self.scale)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Those of `serve`."""
        return serve_arguments(self.name, self.scale)


# So small that all of them move in seconds. What is smaller than the device's own state is not divided.
SCALED = (
    Case("connectx7-vf", 100),
    Case("exact-21gb", 10_000),
    Case("hisi-acc", 1),
    Case("igb-4k", 1),
    Case("mlx5-300mb", 300),
    Case("qat", 1),
    Case("vgpu-24gib", 1024),
    Case("virtio-refill", 16),
)


def together(cases: Sequence[Case]) -> list[list[Case]]:
    """Return the profiles that one VM can have: QEMU migrates a device without P2P only if it is alone."""
    with_p2p = [case for case in cases if known(case.profile.features.p2p)]
    return [with_p2p, *([case] for case in cases if case not in with_p2p)]


@dataclass(frozen=True)
class Looped:
    """What came back of one profile.

    Attributes:
        again: as imported. notes: of the import.
        replays: what `status` says of both servers' replay.
    """

    case: Case
    again: Profile
    notes: list[str]
    replays: list[dict[str, Any]]
    comparison: Comparison

    @property
    def profile(self) -> Profile:
        """What was replayed."""
        return self.case.profile


def _seen_enough(case: Case, row: dict[str, Any]) -> bool:
    """Return whether the source's device has shown in PRE_COPY what its profile says of it."""
    profile, initial = case.profile, int(known(case.profile.initial.bytes))
    if row.get("state") != "PRE_COPY" or row["initial_bytes"] or row["precopy_bytes"] < initial:
        return False
    more = {"refill": known(profile.dirty.refill_bytes), "rate": 1}.get(profile.dirty.kind or "none", 0)
    return bool(row["precopy_bytes"] >= initial + more)


async def _move(lab: Lab, cases: Sequence[Case]) -> None:
    for host in (lab.source, lab.destination):
        host.servers[:] = [
            DeviceServer(server.name, lab.sockets, lab.logs, replace(server.options, extra=case.arguments))
            for case, server in zip(cases, host.servers, strict=True)
            if isinstance(server, DeviceServer)
        ]
    # No guest: nothing of it is asked for, and nobody waits for one.
    await lab.source.start()
    await lab.destination.start()
    lab.require_migration()
    await begin_and_stay(lab)
    await let_ram_go(lab)

    def shown(row: dict[str, Any]) -> bool:
        if not all(map(_seen_enough, cases, row["source"])):
            return False
        if any(case.profile.dirty.kind == "rate" for case in cases):
            return True  # QEMU asks for the exact size only once little is left, which it may never be
        asked = [1 + one.repeated for one in lab.source.qemu.trace() if one.kind is Kind.PENDING_EXACT]
        return sum(asked) >= QUESTIONS * len(cases)

    await lab.wait_for(shown, "all of PRE_COPY that the profiles have")
    await let_go(lab)
    assert (await lab.wait_final())["status"] == "completed"
    await lab.wait_running(lab.destination.qemu)


def loop(options: MigrateOptions, cases: Sequence[Case], logs: Path, *, times: bool = False) -> list[Looped]:
    """Replay all profiles in one VM, migrate it, and import each from the two traces."""

    # Its memory is what keeps a migration of a few KiB of device in PRE_COPY: see `begin_and_stay`.
    options = replace(options, guest_image=halting_guest(logs.parent / f"{logs.name}-guest"))

    async def whole() -> list[list[dict[str, Any]]]:
        async with Lab(options, logs) as lab:
            await _move(lab, cases)
            status = [
                [await server.status() for server in host.servers] for host in (lab.source, lab.destination)
            ]
            return [[side[number]["replay"] for side in status] for number in range(len(cases))]

    replays = asyncio.run(whole())
    collected = choose_front_end(probe_qemu(options.qemu), None) == "vfio-pci"
    found = []
    for number, case in enumerate(cases):
        traces = [logs / f"{side}-trace.log" for side in ("source", "destination")]
        wanted = Wanted(device=str(number + 1))
        again, notes = import_profile(traces, case.name, wanted, MigrationSettings())
        overshoot = replays[number][0]["overshoot_bytes"]
        compared = compare(case.profile, again, overshoot, times=times, collected=collected)
        found.append(Looped(case, again, notes, replays[number], compared))
    return found


def looping(qemu: Path, library: Path, devices: int, **changes: Any) -> MigrateOptions:
    """Return options under which a migration stays in PRE_COPY until it is let go, and then ends at once."""
    return small(
        qemu,
        library,
        **{
            "devices": devices,
            "memory_bytes": 4096,
            "load": dirtying(0),
            "replays": True,
            "max_bandwidth": 0,
            "switchover_bandwidth": 1 << 40,
            "downtime_limit_ms": 2000,
            "warmup_seconds": 0.0,
            "traces": TRACES,
            **changes,
        },
    )
