"""Devices of a profile that share a resource, in one real QEMU that reads both at once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from labkit import KIB, PRELOAD_PATIENT, dirtying, small
from replaykit import Case

from vfu_dev.lab.migrate import run as run_migration
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.result import MigrationResult
from vfu_dev.profile import Distribution, Profile, Value, profile_text
from vfu_dev.replay.laws import known, stop_copy_length

VF = Case("connectx7-vf", 100)
# 101 reads: two seconds for each device, in which the other one's thread of QEMU begins, too.
READ_SECONDS = 0.02
MEMORY_BYTES = 64 * KIB
CHANNELS = (("multifd-channels", 4),)


def sharing(resource: str | None) -> Profile:
    """Return the scaled VF, with a resource that only this test's servers share, or with none."""
    profile = VF.profile
    assert known(profile.contention.part) > 0
    reads = replace(
        profile.reads,
        stop_copy=replace(profile.reads.stop_copy, seconds=Value.assumed(Distribution.always(READ_SECONDS))),
    )
    # Arcs are asked for by QEMU's main thread, one after the other: only reads meet.
    shared = replace(profile.contention, resource=resource, operations=("read",))
    return replace(profile, reads=reads, contention=shared)


def moving(qemu: Path, library: Path, profile: Path, **changes: object) -> MigrateOptions:
    """Return options that move two devices of a profile, as soon as QEMU may."""
    return small(
        qemu,
        library,
        **{
            "front_end": "vfio-pci",
            "devices": 2,
            "memory_bytes": MEMORY_BYTES,
            "load": dirtying(0),
            "verify": "digests",
            "qemu_environment": PRELOAD_PATIENT,
            "server_extra": ("--profile", str(profile)),
            "replays": True,
            "switchover_ack": True,
            "max_bandwidth": 0,
            "switchover_bandwidth": 1 << 30,
            "downtime_limit_ms": 2000,
            **changes,
        },
    )


def waited(result: MigrationResult) -> float:
    """Return for how many seconds reads of the sources' devices waited for another device, in all."""
    return sum(device.replay_source["waited_seconds"] for device in result.devices if device.replay_source)


def both_moved(result: MigrationResult, profile: Profile) -> None:
    """Check that both devices moved with the profile's sizes to the byte, and came whole."""
    assert result.problems == []
    assert result.moved
    assert len(result.devices) == 2
    for device in result.devices:
        assert device.replay_source is not None
        assert device.replay_source["overshoot_bytes"] == 0
        assert device.precopy_bytes == known(profile.initial.bytes)  # no dirty_bytes, whatever the guest does
        assert device.stop_copy_bytes == stop_copy_length(profile, 0.0, 0)
        assert device.received_bytes == device.precopy_bytes + device.stop_copy_bytes
        assert device.digest_match


@pytest.fixture
def vfs(qemu: Path, library: Path, preload: Path, tmp_path: Path) -> Callable[..., MigrationResult]:
    """Move two VFs, and check that both came whole."""
    del preload  # QEMU's own vfio-pci needs it

    def move(*, shared: bool = True, multifd: bool = True, **changes: object) -> MigrationResult:
        profile = sharing(f"test {os.getpid()}" if shared else None)
        file = tmp_path / "vf.toml"
        file.write_text(profile_text(profile))
        options = moving(
            qemu, library, file, parameters=CHANNELS, capabilities=(("multifd", multifd),), **changes
        )
        result = asyncio.run(run_migration(options, tmp_path / "logs", [], lambda what, data: None))
        both_moved(result, profile)
        return result

    return move


@pytest.mark.parametrize(("shared", "multifd"), [(True, True), (False, True), (True, False)])
def test_two_devices_wait_for_what_they_share(
    vfs: Callable[..., MigrationResult], shared: bool, multifd: bool
) -> None:
    """A read waits for the other device if they share a resource and QEMU reads both at once; else never."""
    assert (waited(vfs(shared=shared, multifd=multifd)) > 0) == (shared and multifd)


def test_two_devices_share_under_a_load_of_the_guest(
    vfs: Callable[..., MigrationResult], guest_image: Path
) -> None:
    """What the guest writes comes on top: the profile's sizes stay, and the destination has all of it."""
    result = vfs(guest_image=guest_image, load=dirtying(512 * KIB), verify="dma")
    assert waited(result) > 0
    assert result.guest is not None
    assert result.guest.verified
    assert result.guest.compared_bytes == 2 * MEMORY_BYTES
    assert result.guest.writes > 0
