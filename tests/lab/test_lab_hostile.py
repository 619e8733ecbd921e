"""QEMU against servers that lie: it stays up or ends with a message, never by a signal, never by a sanitizer.

`vfu-dev hostile` tells one named lie a run. `VFU_DEV_HOSTILE=all` tries every one of them (about ten
minutes); by default a fixed selection. With the ASan build of QEMU (artifact `qemu-asan`) that one is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import tempfile
import time
from pathlib import Path

import pytest
from labkit import wait_moved
from liarkit import HOSTILE, lies_of
from serverkit import PATIENCE_SECONDS

from vfu_dev.builds import BuildError, artifact
from vfu_dev.errors import LabError
from vfu_dev.vm.process import Child, wait_for_socket
from vfu_dev.vm.qemu import FIRST_SLOT, Qemu, QemuOptions
from vfu_dev.vm.qtest_device import PCI_BASE_ADDRESS_0, PCI_COMMAND
from vfu_dev.vm.qtest_guest import QtestGuest

# A lie that leaves QEMU waiting costs its reply timeout, 5 s by default; the tests shorten it.
REPLY_TIMEOUT_MS = 300
# Whatever happens, a QEMU that neither answers nor ends within this time hangs.
HANG_SECONDS = PATIENCE_SECONDS
PARALLEL = 3
# Where the hostile device has its MSI-X capability; enable is bit 31 of its first word.
MSIX_CAPABILITY = 0x40
# One lie in this number is tried by default.
DEFAULT_SHARE = 6
# What covers 100 GiB within the downtime limit.
ALL_OF_IT = {"avail_switchover_bandwidth": 1 << 40}
SANITIZER_WORDS = ("AddressSanitizer", "runtime error:", "LeakSanitizer", "Assertion", "ERROR:../")


@pytest.fixture(scope="module")
def hardened() -> Path:
    """QEMU with AddressSanitizer if it was built, else the plain patched one."""
    for name in ("qemu-asan", "qemu"):
        with contextlib.suppress(BuildError):
            return artifact(name)
    pytest.skip("no patched QEMU; run: vfu-dev build qemu-asan")


class Encounter:
    """One QEMU, one lying server."""

    def __init__(
        self, binary: Path, lie: str | None, folder: Path, sockets: Path, incoming: bool = False
    ) -> None:
        self.name = lie or "honest"
        self.socket = sockets / f"{self.name}.sock"
        self.trigger = sockets / f"{self.name}.arm"
        told = ["--lie", lie, "--arm-file", str(self.trigger)] if lie else ["--honest"]
        argv = [*HOSTILE, "--socket", str(self.socket), *told]
        self.server = Child(f"hostile {self.name}", argv, folder / f"{self.name}-server.log")
        options = QemuOptions(
            binary=binary,
            ram_bytes=16 << 20,
            incoming=incoming,
            device_properties=(("x-msg-timeout", REPLY_TIMEOUT_MS if lie else round(HANG_SECONDS * 1000)),),
        )
        self.qemu = Qemu(self.name, sockets, folder, options, [self.socket])

    def arm(self) -> None:
        """Let the server lie from now on."""
        self.trigger.touch()

    async def __aenter__(self) -> Encounter:
        self.server.start()
        await wait_for_socket(self.socket, self.server)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.qemu.stop()
        await self.server.stop()

    async def verdict(self) -> str | None:
        """Return what is wrong with how QEMU took it, or None."""
        if self.qemu.process.running:
            try:
                await self.qemu.run_state()
            except LabError as error:
                if self.qemu.process.running:
                    return f"hangs: {error}"
        if self.qemu.process.running:
            await self.qemu.stop()
            ended_by_us = True
        else:
            ended_by_us = False
        log = self.qemu.process.log.read_text(errors="replace")
        for word in SANITIZER_WORDS:
            if word in log:
                return f"{word}: {log[-1500:]}"
        status = self.qemu.process.status
        if status is not None and status < 0:
            return f"ended by signal {-status}: {log[-500:]}"
        if not ended_by_us and status != 0 and not log.strip():
            return f"ended with status {status} and no message"
        return None


async def attach(meeting: Encounter, state: Path) -> None:
    """Lie while the device is attached."""
    meeting.arm()
    await meeting.qemu.start()


async def use(meeting: Encounter, state: Path) -> None:
    """Lie while BARs are mapped, MSI-X is enabled, the machine is reset and the device unplugged."""
    await meeting.qemu.start()
    guest = QtestGuest()
    try:
        await guest.attach(meeting.qemu)
        meeting.arm()
        assert guest.client is not None
        await guest.client.config_write(FIRST_SLOT, PCI_BASE_ADDRESS_0, 0xE000_0000)
        await guest.client.config_write(FIRST_SLOT, PCI_COMMAND, 0x6)
        await guest.client.config_write(FIRST_SLOT, MSIX_CAPABILITY, 0x8000_0011)
        await guest.client.read(4, 0xE000_0000)
        await guest.client.write(4, 0xE000_0000, 0)
        await meeting.qemu.execute("system_reset")
        await meeting.qemu.wait_event("RESET", 5.0)
    finally:
        await guest.close()


async def save(meeting: Encounter, state: Path) -> None:
    """Lie while the device is saved."""
    await meeting.qemu.start()
    meeting.arm()
    await meeting.qemu.execute("migrate-set-parameters", downtime_limit=300)
    await meeting.qemu.execute("migrate", uri=f"file:{state.with_name(meeting.name)}")
    await finished(meeting.qemu)


async def resume(meeting: Encounter, state: Path) -> None:
    """Lie while the device resumes."""
    await meeting.qemu.start()
    meeting.arm()
    await meeting.qemu.execute("migrate-incoming", uri=f"file:{state}")
    await finished(meeting.qemu)


async def finished(qemu: Qemu, seconds: float = 4.0) -> None:
    """Wait until migration or QEMU ended, or cancel what a lie keeps going for ever (sizes never end)."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if not qemu.process.running:
            return
        if (await qemu.migration()).get("status") in ("completed", "failed", "cancelled"):
            return
        await asyncio.sleep(0.05)
    await qemu.execute("migrate_cancel")


PHASES = {"attach": attach, "run": use, "save": save, "resume": resume}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.timeout(3600 if os.environ.get("VFU_DEV_HOSTILE") == "all" else 900)
def test_qemu_survives_lies(
    hardened: Path, phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever length, flag or silence the server sends, QEMU stays in command of itself."""
    # When a load fails QEMU exits in the middle of whatever it does. A command of QMP may be under way, of
    # which only the stack of a coroutine knows; nobody scans that, and it is taken for a leak of some KiB.
    monkeypatch.setenv("ASAN_OPTIONS", f"detect_leaks={int(phase != 'resume')}")

    async def one(lie: str, sockets: Path, state: Path, slots: asyncio.Semaphore) -> str | None:
        async with slots, Encounter(hardened, lie, tmp_path, sockets, phase == "resume") as meeting:
            try:
                async with asyncio.timeout(HANG_SECONDS):
                    with contextlib.suppress(LabError):
                        await PHASES[phase](meeting, state)
                    problem = await meeting.verdict()
            except TimeoutError:
                problem = f"hangs for {HANG_SECONDS:g} s"
            return f"{lie}: {problem}" if problem else None

    async def everything() -> list[str]:
        slots = asyncio.Semaphore(PARALLEL)
        state = tmp_path / "honest.state"
        with tempfile.TemporaryDirectory(prefix="vfud-") as folder:
            sockets = Path(folder)
            if phase == "resume":
                async with Encounter(hardened, None, tmp_path, sockets) as honest:
                    await honest.qemu.start()
                    await honest.qemu.execute("migrate", uri=f"file:{state}")
                    await finished(honest.qemu, HANG_SECONDS)
                    assert (await honest.qemu.migration())["status"] == "completed"
            found = await asyncio.gather(
                *(one(lie, sockets, state, slots) for lie in lies_of(phase, DEFAULT_SHARE))
            )
        return [problem for problem in found if problem]

    problems = asyncio.run(everything())
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("lie", "asked"),
    [
        ("version-precopy-absent", r"precopy-info 1\b"),
        ("version-precopy-false", r"precopy-info ([2-9]|\d\d)"),
    ],
)
def test_sizes_are_asked_for_without_the_capability(qemu: Path, lie: str, asked: str, tmp_path: Path) -> None:
    """Once of a server that answers EINVAL; in both of two migrations of one that has them after all."""

    async def save_it() -> str:
        with tempfile.TemporaryDirectory(prefix="vfud-") as folder:
            socket = Path(folder) / "s"
            argv = [*HOSTILE, "--socket", str(socket), "--lie", lie]
            server = Child("hostile", argv, tmp_path / "server.log")
            timeout = ("x-msg-timeout", round(HANG_SECONDS * 1000))
            options = QemuOptions(binary=qemu, ram_bytes=16 << 20, device_properties=(timeout,))
            machine = Qemu("source", Path(folder), tmp_path, options, [socket])
            server.start()
            try:
                await wait_for_socket(socket, server)
                await machine.start()
                # Without sizes QEMU takes the device for 100 GiB, and would never stop the VM.
                await machine.execute("migrate-set-parameters", downtime_limit=2000, **ALL_OF_IT)
                for number in range(2):
                    await machine.execute("migrate", uri=f"file:{tmp_path / f'state{number}'}")
                    await finished(machine, HANG_SECONDS)
                    assert (await machine.migration())["status"] == "completed"
                    await wait_moved(machine)
                    await machine.execute("cont")
            finally:
                await machine.stop()
                await server.stop()
            return server.log.read_text()

    assert re.search(asked, asyncio.run(save_it()))
