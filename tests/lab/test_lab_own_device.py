"""A device class of the user's own in the lab: one move, a series, and what cannot be."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labkit import dirtying
from serverkit import PATIENCE_SECONDS, run_vfu_dev

from vfu_dev.errors import ConfigError
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.migrate import run
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.vm.own_device import OwnDevice, ask_own_device
from vfu_dev.vm.qtest import QtestClient
from vfu_dev.vm.qtest_guest import QtestGuest
from vfu_dev.workload import Workload

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
KVSTORE = f"{EXAMPLES / 'kvstore.py'}:KeyValueStore"
# Of the ring: its descriptors as docs/examples/ring.py has them, and where they and the packets are.
DESCRIPTOR = np.dtype(
    [("address", "<u8"), ("length", "<u4"), ("reserved", "<u4"), ("crc", "<u4"), ("status", "<u4")]
)
RING, PACKETS = 1 << 20, 2 << 20
Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]

# Registers alone, and a memory whose size is the user's to say.
CLASSES = """
from vfu_dev.device import Device, Field, Region, Registers

class Plain(Device):
    registers = Registers(0, [Field("mode", 0x0, "<u4", "rw", "the guest's choice", migrates=True)])

class Sized(Device):
    def __init__(self, name=None, *, memory_bytes=4096, fill_seed=0):
        self.ram = Region(2, size_bytes=memory_bytes)
        super().__init__(name)
"""


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Return a file with device classes."""
    path = tmp_path / "classes.py"
    path.write_text(CLASSES)
    return path


def test_a_class_says_what_it_takes(classes: Path) -> None:
    """What `serve` would refuse is not passed on; what the user gave and it does not take is refused."""
    assert ask_own_device(KVSTORE) == OwnDevice(KVSTORE, ())
    assert ask_own_device(f"{classes}:Sized").takes == ("memory", "fill")
    with pytest.raises(ConfigError, match="--memory: KeyValueStore decides this itself"):
        ask_own_device(KVSTORE, ("--memory=4M",))
    with pytest.raises(ConfigError, match="devices there: Plain, Sized"):
        ask_own_device(f"{classes}:Missing")
    classes.write_text("raise SystemExit(3)")
    with pytest.raises(ConfigError, match=r"classes\.py:1: SystemExit: 3"):
        ask_own_device(f"{classes}:Other")


@pytest.mark.parametrize("linux", [False, True])
def test_a_class_of_ones_own_moves_under_load(
    options: Options, guest_image: Path, tmp_path: Path, linux: bool
) -> None:
    """It writes by itself, on both sides; digests say that its state is the same."""
    chosen = options(
        own_device=ask_own_device(KVSTORE),
        load_place="device",
        load=dirtying(1 << 20),
        guest_image=guest_image if linux else None,
        max_bandwidth=1 << 30 if linux else 16 << 20,
    )
    result = asyncio.run(run(chosen, tmp_path, ["vfu-dev"]))
    assert result.problems == []
    (device,) = result.devices
    assert device.digest_match
    assert device.size_bytes == 1 << 20
    assert result.load_status[0]["writes"] > 0
    assert result.guest is not None
    assert result.guest.verified is None


def test_a_ring_goes_on_with_its_dma_on_the_other_side(options: Options, in_lab: InLab) -> None:
    """docs/examples/ring.py in a real QEMU: packets before and after the move, read and answered by DMA."""
    own = ask_own_device(f"{EXAMPLES / 'ring.py'}:Ring")
    packets = [bytes([index]) * (100 * index) for index in range(1, 7)]

    async def scenario(lab: Lab) -> None:
        assert isinstance(lab.guest, QtestGuest)
        (device,) = lab.guest.devices

        def client() -> QtestClient:
            assert isinstance(lab.guest, QtestGuest)
            assert lab.guest.client is not None
            return lab.guest.client

        async def until_done(count: int) -> None:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while await client().read(8, device.bar0 + 0x18) != count:
                    await asyncio.sleep(0.005)

        ring = np.zeros(8, DESCRIPTOR)
        for index, packet in enumerate(packets):
            at = PACKETS + 4096 * index
            await client().write_block(at, packet)
            ring[index] = (at, len(packet), 0, 0, 0)
        await client().write_block(RING, ring.tobytes())
        await client().write(8, device.bar0 + 0x00, RING)
        await client().write(4, device.bar0 + 0x08, len(ring))
        await client().write(4, device.bar0 + 0x0C, 3)
        await until_done(3)
        assert (await lab.migrate())["status"] == "completed"
        await lab.wait_running(lab.destination.qemu)
        await lab.follow()
        await client().write(4, device.bar0 + 0x0C, 6)
        await until_done(6)
        found = np.frombuffer(await client().read_block(RING, ring.nbytes), DESCRIPTOR)
        assert list(found["crc"][:6]) == [zlib.crc32(packet) for packet in packets]
        assert list(found["status"]) == [1] * 6 + [0] * 2
        # The last packet of the source and the first of the destination, in the device's own memory.
        for index in (2, 3):
            content = await client().read_block(device.bar2 + 2048 * index, len(packets[index]))
            assert content == packets[index]

    in_lab(options(own_device=own, load_place="device", load=Workload("idle"), warmup_seconds=0.0), scenario)


def test_two_sized_devices_have_other_content_on_either_side(
    options: Options, classes: Path, tmp_path: Path
) -> None:
    """The lab passes the memory's size on, and the fill to the source alone."""
    own = ask_own_device(f"{classes}:Sized")
    chosen = options(own_device=own, load_place="device", memory_bytes=64 << 10, devices=2)
    result = asyncio.run(run(chosen, tmp_path, ["vfu-dev"]))
    assert result.problems == []
    assert [device.size_bytes for device in result.devices] == [64 << 10] * 2


def test_the_command_moves_a_device_of_registers(
    qemu: Path, library: Path, classes: Path, tmp_path: Path
) -> None:
    """Nothing can be written to it: that is said, and is no failure."""
    out = tmp_path / "out"
    argv = ["lab", "migrate", "--device", f"{classes}:Plain", "--guest", "none", "--out", str(out)]
    done = run_vfu_dev(*argv, "--json", str(tmp_path / "result.json"))
    assert done.returncode == 0, done.stderr
    assert "no memory that migrates: nothing is written" in done.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["devices"][0]["digest_match"]
    assert found["settings"]["own_device"] == {"spec": f"{classes}:Plain", "takes": []}


def test_what_cannot_be_is_said_before_anything_starts(qemu: Path, library: Path, tmp_path: Path) -> None:
    """Usage errors, with what to do; no folder is made."""
    for more, said in {
        ("--memory", "4M"): "--memory: KeyValueStore decides this itself",
        ("--load-place", "guest"): "place device",
        ("--verify", "dma"): "use digests",
    }.items():
        done = run_vfu_dev("lab", "migrate", "--device", KVSTORE, "--out", str(tmp_path / "out"), *more)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert not (tmp_path / "out").exists()


def test_a_series_and_a_preset_take_a_class(qemu: Path, library: Path, tmp_path: Path) -> None:
    """`device.class` in a scenario, and `load --preset --device`."""
    scenario = tmp_path / "own.toml"
    scenario.write_text(f'[device]\nclass = "{KVSTORE}"\n[load]\ndirty-rate = "100p"\n[run]\nmoves = 2\n')
    done = run_vfu_dev("lab", "run", str(scenario), "--out", str(tmp_path / "series"))
    assert done.returncode in (0, 3), done.stderr  # 3: the machine did not carry the load
    summary = json.loads((tmp_path / "series" / "own" / "summary.json").read_text())
    (point,) = summary["points"]
    assert point["statuses"] == {"completed": 2}
    assert point["digests_equal"] == 2
    assert point["settings"]["load.place"] == "device"
    scenario.write_text(f'[device]\nmemory = "4M"\nclass = "{KVSTORE}"\n')
    refused = run_vfu_dev("lab", "run", str(scenario), "--out", str(tmp_path / "other"))
    assert refused.returncode == 2
    assert "own.toml:3: device.class: --memory: KeyValueStore decides this itself" in refused.stderr
    # All of its memory is written first: the plan counts with it.
    preset = run_vfu_dev(
        "load", "--preset", "never", "--device", KVSTORE, "--max-bandwidth", "1M", "--duration", "3"
    )
    assert preset.returncode == 0, preset.stdout + preset.stderr
    assert "did not converge" in preset.stdout
