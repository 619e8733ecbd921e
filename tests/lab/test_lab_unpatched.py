"""What a released QEMU without the project's patches does with the device."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import subprocess
from pathlib import Path

from labkit import small
from serverkit import ServerFactory

from vfu_dev.builds import firmware_dirs
from vfu_dev.builds.qemu_binary import VFIO_USER_PCI, probe_qemu
from vfu_dev.lab.lab import Lab


def test_attaches_and_uses_the_device(unpatched: Path, library: Path, tmp_path: Path) -> None:
    """The device works; migration does not fail but leaves the device out, which is why doctor warns."""

    async def scenario() -> None:
        async with Lab(small(unpatched, library, front_end="vfio-user-pci"), tmp_path / "logs") as lab:
            await lab.source.start()
            await lab.guest.ready(lab.source.qemu)
            await lab.guest.start(lab.options.load)
            server = lab.source.servers[0]
            while (await server.status())["counters"]["region_writes"] < 100:
                await asyncio.sleep(0.01)
            await lab.guest.stop()
            found = await lab.guest.verify()
            assert found.verified
            assert found.writes > 0
            # Documented in docs/cookbook.md: no blocker, no device state, nothing said.
            await lab.configure(lab.source.qemu, return_path=False)
            await lab.begin(f"file:{tmp_path / 'vm.state'}")
            assert (await lab.wait_final())["status"] == "completed"
            status = await lab.source.servers[0].status()
            assert status["save"] is None
            assert [change["to"] for change in status["transitions"]] == []

    asyncio.run(scenario())


def test_a_device_can_insist_on_a_client_that_migrates_it(
    qemu: Path, unpatched: Path, serve: ServerFactory
) -> None:
    """The released QEMU does not start with it, ours does. Of `vfu-dev attach` test_lab_attach.py tells."""
    server = serve("--require-migration")
    device = {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(server.socket)}}
    arguments = ["-machine", "q35", "-display", "none", "-nodefaults", "-S", "-device", json.dumps(device)]

    def run(program: Path) -> subprocess.CompletedProcess[str]:
        firmware = [word for folder in firmware_dirs() for word in ("-L", str(folder))]
        command = [program, *firmware, *arguments, "-qmp", "stdio"]
        ask = '{"execute": "qmp_capabilities"} {"execute": "quit"}'
        return subprocess.run(command, input=ask, capture_output=True, text=True, timeout=120, check=False)

    refused, taken = run(unpatched), run(qemu)
    assert refused.returncode != 0
    assert os.strerror(errno.ENOTSUP) in refused.stderr
    assert taken.returncode == 0, taken.stderr
    log = server.log()
    assert log.count("does not propose migration_precopy_info (ENOTSUP, --require-migration)") == 1
    assert log.count("a client is connected") == 1


def test_features_tell_them_apart(qemu: Path, unpatched: Path) -> None:
    """Both attach the device, one of them migrates it."""
    assert VFIO_USER_PCI in probe_qemu(unpatched).front_ends
    assert not probe_qemu(unpatched).migration
    assert probe_qemu(qemu).migration
    assert probe_qemu(qemu).version.split(" ")[0] == probe_qemu(unpatched).version.split(" ")[0]
