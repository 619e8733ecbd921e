"""The closed loop of every shipped profile, scaled down, with each QEMU: what its trace says is the profile.

`make profile-loop` does the same at full size, one profile after the other, and judges times too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from labkit import PRELOAD_PATIENT
from loopkit import compare
from replaykit import SCALED, Looped, loop, looping, together

from vfu_dev.builds.qemu_binary import QemuBinary
from vfu_dev.profile import Distribution, Value
from vfu_dev.profile.shipped import shipped
from vfu_dev.replay.laws import known

SUITES = {"10.0": "bookworm-backports", "11.1": "trixie-backports"}


@pytest.fixture(scope="module", params=["10.2", *SUITES])
def looped(
    request: pytest.FixtureRequest,
    qemu: Path,
    stock_qemu: Callable[[str], QemuBinary],
    preload: Path,
    library: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Looped]:
    """What came back of each profile from a QEMU: ours with vfio-user-pci, Debian's with vfio-pci."""
    binary = stock_qemu(SUITES[request.param]).path if request.param in SUITES else qemu
    folder = tmp_path_factory.mktemp("loop")
    found = []
    for number, cases in enumerate(together(SCALED)):
        options = looping(binary, library, len(cases), qemu_environment=PRELOAD_PATIENT)
        found += loop(options, cases, folder / str(number))
    return found


def test_what_a_trace_says_of_a_replay_is_the_profile(looped: list[Looped]) -> None:
    """Sizes, features, laws, and that no time is shorter than it was asked for."""
    assert {one.case.name: one.comparison.different for one in looped} == {name: {} for name in shipped()}


def test_every_profile_was_moved_and_seen(looped: list[Looped]) -> None:
    """A guard against a loop in which nothing happened: both sides whole, and each kind of value compared."""
    for one in looped:
        found = one.again.recorded
        assert (found.migrations, found.completed, found.cut_off) == (1, 1, False), one.case.name
        assert (found.source, found.destination, found.timestamps) == (True, True, True)
        assert found.precopy_bytes is not None
        assert found.precopy_bytes >= known(one.profile.initial.bytes)
        assert found.stop_copy_bytes
        profile = one.profile
        arcs = {f"arcs.source.{name}" for name in profile.source_arcs}
        arcs |= {f"arcs.destination.{name}" for name in profile.destination_arcs}
        values = {"features.p2p", "initial.bytes", "dirty", "stop_copy", "reads.stop_copy.bytes"}
        assert arcs | values <= set(one.comparison.compared), one.case.name
        # Each arc took its time in the servers, too.
        assert sum(replay["calls"] for replay in one.replays) >= len(arcs)


def test_another_profile_is_not_the_same(looped: list[Looped]) -> None:
    """The comparison finds a byte more, another law, a longer time, and a feature less."""
    found = {one.case.name: one for one in looped}
    mlx5, vgpu = found["mlx5-300mb"], found["vgpu-24gib"]
    initial = int(known(mlx5.profile.initial.bytes))
    took = mlx5.again.source_arcs["PRE_COPY_P2P->STOP_COPY"].value
    slower = Value.measured(Distribution.always(10 * took.highest))
    changed = {
        "initial.bytes": replace(
            mlx5.profile, initial=replace(mlx5.profile.initial, bytes=Value.assumed(initial + 1))
        ),
        "stop_copy": replace(
            mlx5.profile, stop_copy=replace(mlx5.profile.stop_copy, bytes=Value.assumed(999_999))
        ),
        "features.p2p": replace(
            mlx5.profile, features=replace(mlx5.profile.features, p2p=Value.assumed(False))
        ),
        "arcs.source.PRE_COPY_P2P->STOP_COPY": replace(
            mlx5.profile, source_arcs={"PRE_COPY_P2P->STOP_COPY": slower}
        ),
    }
    for key, profile in changed.items():
        assert key in compare(profile, mlx5.again, 0, times=False).different
    # Far from 1: on a busy machine entering PRE_COPY may take longer than the rest of it, and blurs the law.
    for factor in (0.1, 10.0):
        rate = Value.assumed(factor * known(vgpu.profile.dirty.bytes_per_second))
        profile = replace(vgpu.profile, dirty=replace(vgpu.profile.dirty, bytes_per_second=rate))
        overshoot = vgpu.replays[0]["overshoot_bytes"]
        assert "dirty" in compare(profile, vgpu.again, overshoot, times=False).different
