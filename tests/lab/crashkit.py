"""One cell of the crash matrix: who is killed or stopped, when, and what everybody else makes of it.

A moment is caught by its cause: a fault holds an arc or a read until a file is removed, or a migration stays
in PRE_COPY. Then the blow falls, the hold is let go, and what the survivors say is compared with the table of
crashtable.py. After that they have to do what the table says: go on, move again, serve the next client.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from crashtable import FOLDER, GONE, NO_CONNECTION, WAS_RESET, Cell, Outcome
from labkit import KIB, MIB, PATIENT, begin_and_stay, dirtying, let_go, small, until
from qtestkit import Registers
from ramkit import scatter_ram, wrong_blocks
from serverkit import PATIENCE_SECONDS

from vfu_dev.client import VfioUserDevice
from vfu_dev.client.migrator import Migrator
from vfu_dev.device.reference.layout import REGISTER_ID
from vfu_dev.errors import LabError
from vfu_dev.lab.host import Host
from vfu_dev.lab.judge import judge
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.result import MigrationResult
from vfu_dev.report.page import render
from vfu_dev.vm.process import Child
from vfu_dev.vm.qemu import Qemu
from vfu_dev.vm.qtest_guest import QtestGuest
from vfu_dev.vm.servers import DeviceServer

# How long a victim is stopped: more than twice the 5 s that a client waits for an answer.
STOPPED_SECONDS = 14.0
# Whoever has said nothing new for this long will not say what is expected.
CALM_SECONDS, POLL_SECONDS = 30.0, 0.05
MEMORY_BYTES = 512 * KIB
ALL_ONES = 0xFFFF_FFFF

# The place of each moment: whose arc or read is held. What the fault holds is held while a file is there.
HOLDS = {
    ("set-up", "source"): "op=transition,stall,arc=RUNNING->PRE_COPY",
    ("set-up", "destination"): "op=transition,stall,arc=STOP->RESUMING",
    ("PRE_COPY", "source"): "op=mig-read,stall,state=PRE_COPY,count=1",
    ("STOP_COPY", "source"): "op=mig-read,stall,state=STOP_COPY,count=1",
    ("accepting", "destination"): "op=transition,stall,arc=RESUMING->STOP",
}


def crash_options(qemu: Path, library: Path, cell: Cell) -> MigrateOptions:
    """Return the options of a cell's lab.

    Who is killed is gone at once, so that no answer is late. Beside one that is stopped QEMU waits for as
    long as it does at its users', which is 5 s.
    """
    extra = PATIENT if cell.blow == "killed" else ()
    return small(
        qemu, library, memory_bytes=MEMORY_BYTES, load=dirtying(0), warmup_seconds=0.0, qemu_extra=extra
    )


@dataclass
class Seen:
    """What a run saw of a cell."""

    verdict: str = "FAILED"
    states: list[str] = field(default_factory=lambda: ["?"] * 5)
    seconds: float = 0.0


@contextlib.contextmanager
def recorded(cell: Cell) -> Iterator[Seen]:
    """Write what is seen of a cell where a run of the whole matrix collects it."""
    seen, began = Seen(), time.monotonic()
    try:
        yield seen
    finally:
        seen.seconds = round(time.monotonic() - began, 1)
        if (folder := os.environ.get(FOLDER)) is not None:
            Path(folder, f"{cell.slug}.json").write_text(json.dumps(asdict(seen)))


class Crash:
    """One cell, in a lab that has started.

    Args: folder: for the file that a hold lasts as long as.
    """

    def __init__(self, lab: Lab, cell: Cell, folder: Path) -> None:
        self.lab = lab
        self.cell = cell
        self._hold = folder / "hold"
        self._uri = ""
        self._first_destination = lab.destination
        self._resets: dict[str, int] = {}  # before the blow, by server
        self._meanwhile = 0  # what the guest read while who answers it stood still

    # --- who is who -----------------------------------------------------------------------------------------

    @property
    def victim(self) -> Child:
        """Whom the blow hits."""
        host = getattr(self.lab, self.cell.side)
        process: Child = host.qemu.process if self.cell.is_qemu else host.servers[0].process
        return process

    @property
    def guest(self) -> QtestGuest:
        """The guest without a CPU."""
        assert isinstance(self.lab.guest, QtestGuest)
        return self.lab.guest

    # --- up to the blow -------------------------------------------------------------------------------------

    async def reach(self) -> None:
        """Bring the lab to the cell's moment, and stay there."""
        lab, moment = self.lab, self.cell.moment
        for server in (lab.source.servers[0], lab.destination.servers[0]):
            self._resets[server.name] = (await server.status())["counters"]["resets"]
        await scatter_ram(lab)
        await self.guest.write_pages(32, dirtying(MIB))
        if moment == "before":
            await lab.configure()
            self._uri = await lab.listen()
        elif moment == "PRE_COPY":
            await begin_and_stay(lab)
            await until(self._is_sending, "device state arrives")
            # Some of what was sent is written again.
            await self.guest.write_pages(32, dirtying(MIB, "sequential"))
            # In a read: its failure ends the migration. QEMU overlooks that of its questions about sizes.
            await self._until_held(await self._hold_on("source"), "source")
        elif moment == "after":
            assert (await lab.migrate())["status"] == "completed"
            await lab.wait_running(lab.destination.qemu)
            await self.guest.follow(lab.destination.qemu)
        else:
            await self._begin_and_hold()

    async def _begin_and_hold(self) -> None:
        lab, moment = self.lab, self.cell.moment
        side = {"accepting": "destination", "STOP_COPY": "source"}.get(moment, self.cell.side)
        server = await self._hold_on(side)
        await lab.configure()
        await lab.begin(await lab.listen())
        await self._until_held(server, side)
        if (moment, side) == ("set-up", "destination"):
            await until(self._has_begun, "the source has begun as well")

    async def _hold_on(self, side: str) -> DeviceServer:
        """Have a side's server hold what `HOLDS` says as soon as it is asked for it."""
        self._hold.touch()
        server: DeviceServer = getattr(self.lab, side).servers[0]
        fault = f"{HOLDS[self.cell.moment, side]},trigger={self._hold}"
        await server.command("fault", fault=fault)
        return server

    async def _until_held(self, server: DeviceServer, side: str) -> None:
        async def held() -> bool:
            (armed,) = (await server.command("faults"))["armed"]
            return int(armed["hits"]) == 1

        await until(held, f"{self.cell}: {side} held")

    async def _has_begun(self) -> bool:
        """Whether the source's device is no longer RUNNING."""
        return (await self.lab.source.servers[0].status())["state"] != "RUNNING"

    async def _is_sending(self) -> bool:
        """Whether the destination has some of the device's state, and the source goes on."""
        source, destination = (host.servers[0] for host in (self.lab.source, self.lab.destination))
        resume = (await destination.status())["resume"]
        return (
            resume is not None
            and resume["received_bytes"] > 0
            and (await source.status())["state"] == "PRE_COPY"
        )

    async def _is_missed(self) -> bool:
        """Whether the victim's QEMU, or of a QEMU its server, has noticed that the connection is lost."""
        host = getattr(self.lab, self.cell.side)
        if self.cell.is_qemu:
            return not (await host.servers[0].status())["connected"]
        return NO_CONNECTION in host.qemu.process.log.read_text(errors="replace")

    async def strike(self) -> None:
        """Kill the victim, or stop it for a while; then what was held goes on."""
        cell, victim = self.cell, self.victim
        if cell.blow == "killed":
            victim.send_signal(signal.SIGKILL)
            await victim.wait()
            # Before what was held goes on: else two threads race for who finds it, and say different things.
            await until(self._is_missed, f"{cell}: the other end of its socket notices")
            await self._go_on()
            return
        victim.send_signal(signal.SIGSTOP)
        try:
            going_on = asyncio.create_task(self._go_on())
            await asyncio.sleep(STOPPED_SECONDS)
        finally:
            victim.send_signal(signal.SIGCONT)
        await going_on

    async def _go_on(self) -> None:
        """Take away what kept the migration where it was, as far as somebody is there to be told."""
        self._hold.unlink(missing_ok=True)
        if not self.lab.source.qemu.process.running:
            return
        if self.cell.moment == "before":
            await self.lab.begin(self._uri)
        elif self.cell.moment == "PRE_COPY":
            await let_go(self.lab)
        elif self.cell.moment == "after" and self.lab.destination.qemu.process.running:
            self._meanwhile = await Registers(self.lab).get("id")

    # --- what everybody says --------------------------------------------------------------------------------

    async def outcome(self) -> Outcome:
        """Return what everybody says now."""
        lab = self.lab
        migration, error, source_vm = GONE, "", GONE
        if lab.source.qemu.process.running:
            reply = await lab.source.qemu.migration()
            migration, error = reply.get("status", "none"), str(reply.get("error-desc", ""))
            source_vm = await lab.source.qemu.run_state()
        return Outcome(
            migration=migration,
            source_vm=source_vm,
            destination_vm=await _vm(lab.destination.qemu),
            source_device=await self._device(lab.source.servers[0], "save"),
            destination_device=await self._device(lab.destination.servers[0], "resume"),
            says=(error,),
        )

    async def _device(self, server: DeviceServer, session: str) -> str:
        """Return a device's state, what its server says of the migration and counted, and a reset."""
        if not server.process.running:
            return GONE
        status = await server.status()
        said = [str(status["state"])]
        if (record := status[session]) is not None:
            totals = (await server.command("figures"))["snapshot"]["totals"][f"{session}s"]
            counted = ", ".join(result for result, count in totals.items() for _ in range(count))
            said.append(f"{record['status']} ({counted or 'not counted yet'})")
        # A client that leaves is one more cause of a reset, and says so itself.
        if status["connected"] and status["counters"]["resets"] > self._resets[server.name]:
            said.append("reset")
        return ", ".join(said)

    async def settle(self) -> Outcome:
        """Wait until everybody says what the table says, or nothing new any more; return it."""
        expected, found, calm = self.cell.expected, await self.outcome(), 0.0
        assert expected is not None
        while calm < CALM_SECONDS and not expected.agrees(found):
            await asyncio.sleep(POLL_SECONDS)
            before, found = found, await self.outcome()
            calm = calm + POLL_SECONDS if before == found else 0.0
        return replace(found, says=(*found.says, *self._logged()))

    def _logged(self) -> tuple[str, ...]:
        """Return what everybody wrote into their logs."""
        lab = self.lab
        processes = [host.qemu.process for host in (lab.source, lab.destination)]
        processes += [host.servers[0].process for host in (lab.source, lab.destination)]
        return tuple(process.log.read_text(errors="replace") for process in processes if process.log.exists())

    # --- what the survivors do then -------------------------------------------------------------------------

    async def go_on(self) -> None:
        """Do what the table says that the survivors can do now."""
        assert self.cell.expected is not None
        if self.cell.expected.source_device == WAS_RESET:
            for device in self.guest.devices:
                device.scratch = 0  # registers do not survive a reset; memory does
        for step in self.cell.expected.then:
            await getattr(self, "_" + step.replace(" ", "_"))()

    async def _report(self) -> None:
        """The lab's report says that the migration failed, and who is gone."""
        result = MigrationResult(command=["vfu-dev", "lab", "migrate"])
        await self.lab.collect(result)
        judge(result, self.lab.options.pre_copy)
        assert result.status == "failed"
        assert any(text.startswith("QEMU says 'failed'") for text in result.problems), result.problems
        assert not any("digests" in text for text in result.problems), result.problems
        page = render(result.to_json())
        texts = ["<title>vfu-dev: migration failed", "The state did not move"]
        texts.append("The VM on the source is <b>running")
        if self.cell.blow == "killed" and not self.cell.is_qemu:
            assert any(f"{self.cell.side}-vfu0" in text for text in result.problems), result.problems
            texts.append("source gone" if self.cell.side == "source" else "source RUNNING, destination gone")
        assert [text for text in texts if text not in page] == []

    async def _runs_on(self) -> None:
        """The VM runs at the source; nothing of its device or its RAM is lost, and it can write."""
        await self._verified(self.lab.source)

    async def _moves_again(self) -> None:
        """To a fresh destination, whole."""
        await self.lab.replace_destination()
        reply = await self.lab.migrate()
        assert reply["status"] == "completed", reply
        result = MigrationResult()
        await self._verified(self.lab.destination)
        await self.lab.collect(result)
        judge(result, pre_copy=True, verified=False)
        assert result.problems == []

    async def _has_moved(self) -> None:
        """The VM runs at the destination; nothing of its device or its RAM is lost, and it can write."""
        await self._verified(self.lab.destination)

    async def _digests_agree(self) -> None:
        """Both servers say that the same state left and arrived."""
        source, destination = self.lab.source.servers[0], self.lab.destination.servers[0]
        saved, resumed = (await source.status())["save"], (await destination.status())["resume"]
        assert saved["digest"] == resumed["digest"] is not None

    async def _without_its_device(self) -> None:
        """The VM whose server was killed runs on; its device is as one that was pulled out."""
        moved = self.cell.side == "destination"
        host = self.lab.destination if moved else self.lab.source
        await self.lab.wait_running(host.qemu)
        await self.guest.follow(host.qemu)
        assert await Registers(self.lab).get("id") == ALL_ONES
        await Registers(self.lab).set(dma_count=1)  # which nobody takes
        assert await wrong_blocks(self.lab) == []

    async def _cannot_be_moved(self) -> None:
        """The source's VM cannot be moved without its device, and QEMU says which one that is."""
        await self.lab.replace_destination()
        reply = await self.lab.migrate()
        assert reply["status"] == "failed", reply
        names = ("vfu0", str(self.lab.source.servers[0].socket))
        assert any(name in reply["error-desc"] for name in names), reply

    async def _answers_again(self) -> None:
        """A guest's read timed out, which is all ones, and the device is there again."""
        assert self._meanwhile == ALL_ONES
        assert await Registers(self.lab).get("id") == REGISTER_ID

    async def _goes_back(self) -> None:
        """Its destination is lost after all: the VM goes on at the source, as it was when it left."""
        await self.lab.source.qemu.execute("cont")
        await self._verified(self.lab.source)

    async def _takes_another(self) -> None:
        """A destination that waits takes another source."""
        lab = self.lab
        await lab.source.servers[0].stop()
        lab.source = Host("another", lab.sockets, lab.logs, lab.options, incoming=False)
        await lab.source.start()
        lab.guest = QtestGuest()
        await lab.guest.ready(lab.source.qemu)
        await scatter_ram(lab)
        await self.guest.write_pages(32, dirtying(MIB))
        await lab.configure(lab.source.qemu)
        await lab.begin(self._uri)
        assert (await lab.wait_final())["status"] == "completed"
        await self._verified(lab.destination)

    async def _source_serves_another(self) -> None:
        """The source's server keeps the state, and serves it to the next client, which moves it."""
        journal = self.guest.devices[0].journal
        await self._serves(self.lab.source.servers[0], journal.read(0, MEMORY_BYTES).tobytes())

    async def _destination_serves_another(self) -> None:
        """The destination's server has nothing of an unverified state, and serves the next client."""
        await self._serves(self.lab.destination.servers[0], bytes(MEMORY_BYTES))

    async def _serves(self, server: DeviceServer, content: bytes) -> None:
        fresh = DeviceServer("fresh", self.lab.sockets, self.lab.logs, server.options)
        await fresh.start()
        try:
            moved = await asyncio.to_thread(_move, server.socket, fresh.socket)
            assert moved == content
            saved, resumed = (await server.status())["save"], (await fresh.status())["resume"]
            assert (saved["status"], resumed["status"]) == ("completed", "completed")
            assert saved["digest"] == resumed["digest"] is not None
        finally:
            assert await fresh.stop() == 0

    async def _verified(self, host: Host) -> None:
        """The VM on `host` has everything that the guest wrote, and writes on."""
        guest = self.guest
        await self.lab.wait_running(host.qemu)
        await guest.follow(host.qemu)
        assert await wrong_blocks(self.lab) == []
        await guest.write_pages(16, dirtying(MIB))
        before = guest.figures().compared_bytes
        found = await guest.verify()
        assert (found.mismatched_bytes, found.readback_errors, found.scratch_errors) == (0, 0, 0), found
        assert found.compared_bytes - before == MEMORY_BYTES
        assert (await host.servers[0].status())["state"] == "RUNNING"

    # --- the end --------------------------------------------------------------------------------------------

    async def leave(self) -> None:
        """Everybody ends as asked, without a traceback, and no socket is left."""
        lab = self.lab
        hosts = {id(host): host for host in (self._first_destination, lab.source, lab.destination)}
        for host in hosts.values():
            await self._ends(host.qemu.process, host.qemu.stop, (0, 1))
        servers = [server for host in hosts.values() for server in host.servers]
        for server in servers:
            await self._ends(server.process, server.stop, (0,))
        for server in servers:
            if server.socket.exists():  # of one that was killed: the next one takes its place
                await server.start()
                await server.status()  # SIGTERM that comes before its loop runs has another exit status
                assert await server.stop() == 0
        left = sorted(path.name for path in lab.sockets.glob("*.sock*"))
        assert left == [], left

    async def _ends(self, process: Child, stop: Callable[[], Any], statuses: tuple[int, ...]) -> None:
        status = await stop()
        text = process.log.read_text(errors="replace")
        killed = self.cell.blow == "killed" and status == -signal.SIGKILL
        assert killed or status in statuses, f"{process.name}: exit status {status}:\n{text}"
        assert "Traceback" not in text, text


def _move(source: Path, destination: Path) -> bytes:
    """Move a device by our own client; return what its memory holds then."""
    with (
        VfioUserDevice.connect(source, timeout_seconds=PATIENCE_SECONDS) as one,
        VfioUserDevice.connect(destination, timeout_seconds=PATIENCE_SECONDS) as other,
    ):
        Migrator(one, other).run()
        return bytes(other.region_read(2, 0, MEMORY_BYTES))


async def _vm(qemu: Qemu) -> str:
    """Return the run state of a VM; of a QEMU that ended, how."""
    status = qemu.process.status
    if status is None:
        with contextlib.suppress(LabError):
            return await qemu.run_state()
        status = qemu.process.status
    return GONE if status == -signal.SIGKILL else f"exit {status}"
