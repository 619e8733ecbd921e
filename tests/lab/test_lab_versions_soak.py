"""The long run of the table of versions, `make soak`: one Linux guest moved fifty times over all there is.

Each move goes to another version and another IOMMU path; by turns RAM is shared, private, or has no file.
Twelve moves are by multifd with switchover-ack, twelve through a file, the rest without either, and again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from itinerary import BOTH, Leg, Place, Vm, as_parameters, vm_in
from versionkit import OURS, PATHS, Evidence

from vfu_dev.vm.qemu import RamKind

pytestmark = pytest.mark.soak

MOVES = 50
# Four and three have no common factor: twelve moves in a row visit every pair.
VERSIONS = ("10.0", "10.2", "11.1", OURS)
RAM: tuple[RamKind, ...] = ("shared", "anonymous", "private")
# What the moves of each round of twelve are; the two that are left are as the first.
ROUNDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (BOTH, ("multifd", "ack")),
    ((), ("file",)),
    ((), ()),
    (BOTH, ("multifd", "ack")),
)
PLACES = len(VERSIONS) * len(PATHS)


def place(number: int) -> Place:
    """Return where the VM is before move `number`."""
    version, path = VERSIONS[number % len(VERSIONS)], PATHS[number % len(PATHS)]
    ram = RAM[(number // 2 + number // PLACES) % len(RAM)]  # of the first two the same
    if ram == "private" and version.startswith("10.2") and path != "type1":
        ram = "anonymous"  # there QEMU 10.2 loses what devices write: docs/qemu-developers.md
    return Place(version, path, ram)


LEGS = [
    Leg(place(number), place(number + 1), *ROUNDS[number // PLACES % len(ROUNDS)]) for number in range(MOVES)
]


@pytest.fixture(scope="module")
def vm(library: Path, guest_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vm]:
    """The VM."""
    with vm_in(tmp_path_factory.mktemp("soak"), LEGS[0], library, guest_image) as found:
        yield found


def test_every_move_changes_version_and_path() -> None:
    assert {(leg.source.qemu, leg.source.iommu) for leg in LEGS} == {(v, p) for v in VERSIONS for p in PATHS}
    for leg in LEGS:
        assert leg.source.qemu != leg.destination.qemu
        assert leg.source.iommu != leg.destination.iommu


@pytest.mark.parametrize("leg", as_parameters(LEGS))
def test_fifty_moves_without_a_mismatch(leg: Leg, vm: Vm, evidence: Evidence, tmp_path: Path) -> None:
    """Devices, their registers and guest memory; the guest compares all of it after each move."""

    async def scenario() -> None:
        if "file" in leg.features:
            await vm.face(leg.source, leg.destination)
            vm.configure()
            await vm.through_file(tmp_path / "vm.state", evidence)
            (tmp_path / "vm.state").unlink()
        else:
            await vm.travel(leg, evidence)
        found = await vm.guest.command("verify")
        assert found["verified"], found

    vm.run(scenario())


def test_in_the_end_the_guest_reads_back_all_that_it_wrote(vm: Vm) -> None:
    vm.run(vm.read_back())
