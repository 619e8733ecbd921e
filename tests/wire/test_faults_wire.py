"""Faults in real servers: every operation and action, and what is left of the device afterwards.

The promise (Cloud Hypervisor's): after a failed migration the source has a functional device, and the error
that came first is what is reported. Nothing hangs, and a second migration without the fault succeeds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dmakit import Driver
from serverkit import (
    PATIENCE_SECONDS,
    RunningServer,
    ServerFactory,
    readable,
    server_farm,
    short_folder,
    wait_until,
)

from vfu_dev import uapi
from vfu_dev.client import ClientCommandError, VfioUserDevice
from vfu_dev.client.frames import Call
from vfu_dev.client.migrator import ClientOptions, MigrationError, Migrator
from vfu_dev.device.reference.layout import FLAG_INTERRUPT, Op, Status
from vfu_dev.errors import VfuDevError
from vfu_dev.uapi import DeviceState as S

BAR0, BAR2 = uapi.VFIO_PCI_BAR0_REGION_INDEX, uapi.VFIO_PCI_BAR0_REGION_INDEX + 2
# A delay that outlasts the client, however long it waits here; it ends with the client or with the fault.
TOO_LONG = "3600,force=yes"
# How long a client waits for a reply that a fault holds up, at first.
IMPATIENT_SECONDS = 0.4


@pytest.fixture(scope="module")
def pair(library: Path) -> Iterator[tuple[RunningServer, RunningServer]]:
    """Return a filled source and an empty destination, for as long as they live."""
    with short_folder() as folder, server_farm(library, folder) as serve:
        yield serve("--fill", "7"), serve()


def arm(server: RunningServer, fault: str) -> int:
    with server.control() as control:
        number: int = control.command("fault", fault=fault)["id"]
        return number


def clear(server: RunningServer) -> dict[str, Any]:
    """Clear all faults; returns how the (first) one did."""
    with server.control() as control:
        armed = control.command("faults")["armed"]
        control.command("fault", clear="all")
        return dict(armed[0]) if armed else {}


def hits(server: RunningServer) -> int:
    """Return how often the (first) fault happened."""
    with server.control() as control:
        return int(control.command("faults")["armed"][0]["hits"])


def move(source: RunningServer, destination: RunningServer, patience: float = PATIENCE_SECONDS) -> None:
    """Migrate; afterwards the source runs again, for the next one."""
    with (
        source.connect(timeout_seconds=patience) as one,
        destination.connect(timeout_seconds=patience) as other,
    ):
        # 4.8 MiB fit into the downtime limit.
        options = ClientOptions(
            resume_source=True, timeout_seconds=PATIENCE_SECONDS, max_passes=10, max_bandwidth=16 << 20
        )
        Migrator(one, other, options).run()


def functional(server: RunningServer, value: int) -> None:
    """The device answers, takes a write and runs."""
    with server.connect() as device:
        device.region_write(BAR2, 4096, value.to_bytes(8, "little"))
        assert bytes(device.region_read(BAR2, 4096, 8)) == value.to_bytes(8, "little")
        assert bytes(device.region_read(BAR0, 0, 4)) == b"VFUD"
        assert device.migration.get_state() is S.RUNNING


# What a failed migration reports: the errno asked for, where the fault is an error.
ERROR, REFUSED, LOST = os.strerror(errno.ENOSPC), "Invalid argument", "clos|gone|reset|no reply"
OK = None
# Fault; the server that has it (s: source, d: destination); what the error says, OK for none.
TABLE = [
    ("op=transition,error=ENOSPC,to=PRE_COPY", "s", ERROR),
    ("op=transition,error=ENOSPC,to=STOP_COPY", "s", ERROR),
    ("op=transition,error=ENOSPC,arc=STOP_COPY->STOP", "s", ERROR),
    ("op=transition,error=ENOSPC,to=RESUMING", "d", ERROR),
    ("op=transition,error=ENOSPC,arc=RESUMING->STOP", "d", ERROR),
    ("op=transition,error=ENOSPC,arc=STOP->RUNNING_P2P", "d", ERROR),
    ("op=transition,broken,to=STOP_COPY", "s", "Input/output"),
    ("op=transition,broken,arc=RESUMING->STOP", "d", "Input/output"),
    ("op=transition,delay=0.1,to=STOP_COPY", "s", OK),
    (f"op=transition,delay={TOO_LONG},to=STOP_COPY", "s", LOST),
    ("op=transition,stall,to=STOP_COPY", "s", LOST),
    ("op=transition,disconnect,to=STOP_COPY", "s", LOST),
    ("op=mig-read,error=ENOSPC,state=PRE_COPY", "s", ERROR),
    ("op=mig-read,error=ENOSPC,state=STOP_COPY", "s", ERROR),
    ("op=mig-read,error=ENOSPC,after-bytes=100K", "s", ERROR),
    ("op=mig-read,delay=0.1,count=2", "s", OK),
    (f"op=mig-read,delay={TOO_LONG},count=1", "s", LOST),
    ("op=mig-read,stall,state=STOP_COPY", "s", LOST),
    ("op=mig-read,corrupt=300000", "s", REFUSED),
    ("op=mig-read,corrupt", "s", REFUSED),
    ("op=mig-read,corrupt,state=STOP_COPY", "s", REFUSED),
    ("op=mig-read,truncate=500K", "s", "converge|Invalid argument"),
    ("op=mig-read,truncate,state=STOP_COPY", "s", REFUSED),
    ("op=mig-read,short=1000,state=STOP_COPY", "s", OK),
    ("op=mig-read,disconnect,after=1", "s", LOST),
    ("op=mig-write,error=ENOSPC", "d", ERROR),
    ("op=mig-write,error=ENOSPC,when=initial-received", "d", ERROR),
    ("op=mig-write,delay=0.1,when=initial-received", "d", OK),
    (f"op=mig-write,delay={TOO_LONG},count=1", "d", LOST),
    ("op=mig-write,stall,when=initial-received", "d", LOST),
    ("op=mig-write,corrupt=300000", "d", REFUSED),
    ("op=mig-write,corrupt", "d", REFUSED),
    ("op=mig-write,truncate=500K", "d", REFUSED),
    ("op=mig-write,short=1000", "d", REFUSED),
    ("op=mig-write,disconnect", "d", LOST),
    ("op=precopy-info,error=ENOSPC", "s", ERROR),
    ("op=precopy-info,delay=0.1,count=1", "s", OK),
    (f"op=precopy-info,delay={TOO_LONG}", "s", LOST),
    ("op=precopy-info,lie=zero", "s", OK),
    ("op=precopy-info,lie=huge", "s", "did not converge"),
    ("op=precopy-info,lie=grow", "s", "did not converge"),
    ("op=precopy-info,lie=2G", "s", "did not converge"),
    ("op=precopy-info,disconnect", "s", LOST),
    ("op=data-size,error=ENOSPC", "s", OK),  # a server may have no such thing
    ("op=data-size,delay=0.1", "s", OK),
    (f"op=data-size,delay={TOO_LONG}", "s", LOST),
    ("op=data-size,lie=zero", "s", OK),
    ("op=data-size,lie=huge", "s", "did not converge"),
    ("op=data-size,lie=grow", "s", "did not converge"),
    ("op=data-size,disconnect", "s", LOST),
]


@pytest.mark.parametrize(("fault", "side", "says"), TABLE, ids=[f"{case[1]}:{case[0]}" for case in TABLE])
def test_a_migration_with_a_fault_leaves_working_devices(
    pair: tuple[RunningServer, RunningServer], fault: str, side: str, says: str | None
) -> None:
    """Fails in the words of the fault, or succeeds; both servers live; without it, states arrive equal."""
    source, destination = pair
    struck = source if side == "s" else destination
    arm(struck, fault)
    try:
        if says is OK:
            move(source, destination)
        else:
            # Where the fault is silence the client waits a moment for a reply, and longer when a busy machine
            # kept it waiting before it came to the fault.
            silent = "stall" in fault or TOO_LONG in fault
            patience, happened = IMPATIENT_SECONDS if silent else PATIENCE_SECONDS, False
            while not happened:
                assert patience <= PATIENCE_SECONDS, "the fault never happened"
                with pytest.raises(VfuDevError) as caught:
                    move(source, destination, patience)
                patience, happened = 2 * patience, hits(struck) > 0
            assert re.search(says, str(caught.value))
            assert isinstance(caught.value, MigrationError)
    finally:
        done = clear(struck)
    assert done["hits"] > 0, done
    functional(source, time.monotonic_ns())
    assert not {source.status()["state"], destination.status()["state"]} & {"ERROR", "RESUMING"}
    move(source, destination)
    saved, resumed = source.status()["save"], destination.status()["resume"]
    # The source goes on running afterwards, and a migration after which it does is none that was completed.
    assert (saved["status"], resumed["status"]) == ("aborted", "completed")
    assert saved["digest"] == resumed["digest"]


def test_a_save_that_a_fault_ended_says_so(pair: tuple[RunningServer, RunningServer]) -> None:
    """The source's own record names the fault, not what followed from it."""
    source, destination = pair
    arm(source, "op=mig-read,error=ENOSPC,after=1")
    with pytest.raises(MigrationError):
        move(source, destination)
    clear(source)
    saved = source.status()["save"]
    assert saved["status"] == "failed"
    assert "op=mig-read,error=ENOSPC" in saved["error"]
    arm(destination, "op=mig-write,error=ENOSPC")
    with pytest.raises(MigrationError):
        move(source, destination)
    clear(destination)
    resumed = destination.status()["resume"]
    assert resumed["status"] == "failed"
    assert "op=mig-write,error=ENOSPC" in resumed["error"]


def test_the_chosen_share_of_calls_fails_with_the_chosen_errno(server: RunningServer) -> None:
    """10 % of 1000 reads are 50 to 150, all with that errno; 0 % is none, 100 % is all; then all is well."""
    with server.connect() as device:
        for rate, low, high in (("10%", 50, 150), ("0%", 0, 0), ("100%", 1000, 1000), (None, 0, 0)):
            if rate is not None:
                arm(server, f"op=region-read,error=EBUSY,rate={rate},seed=3")
            errors = []
            for _ in range(1000):
                try:
                    device.region_read(BAR2, 0, 8)
                except ClientCommandError as error:
                    errors.append(error.errno)
            assert low <= len(errors) <= high
            assert set(errors) <= {errno.EBUSY}
            done = clear(server)
            if rate is not None:
                assert (done["calls"], done["hits"]) == (1000, len(errors))


@pytest.mark.parametrize("action", ["corrupt", "short=3", "corrupt=2"])
def test_region_accesses_are_changed_as_asked(server: RunningServer, action: str) -> None:
    """One bit, or the end of an access: on the way in and on the way out; then neither."""
    with server.connect() as device:
        device.region_write(BAR2, 0, bytes(8))
        arm(server, f"op=region-read,{action}")
        changed = bytes(device.region_read(BAR2, 0, 8))
        clear(server)
        assert bytes(device.region_read(BAR2, 0, 8)) == bytes(8)
        arm(server, f"op=region-write,{action}")
        device.region_write(BAR2, 8, bytes([0xAA] * 8))
        clear(server)
        written = bytes(device.region_read(BAR2, 8, 8))
    if action.startswith("short"):
        assert changed == bytes(3) + b"\xff" * 5
        expected = bytes([0xAA] * 3)
        assert written[:3] == expected
        assert written != bytes([0xAA] * 8)
    else:
        assert int.from_bytes(changed, "little").bit_count() == 1
        difference = int.from_bytes(written, "little") ^ int.from_bytes([0xAA] * 8, "little")
        assert difference.bit_count() == 1
        if action.endswith("2"):
            assert changed[2] == 1


def test_a_fault_may_be_about_one_bar(server: RunningServer) -> None:
    """The other BARs go on; one that the device does not have is refused."""
    with server.connect() as device:
        arm(server, "op=region-read,error=EBUSY,bar=2")
        assert bytes(device.region_read(BAR0, 0, 4)) == b"VFUD"
        with pytest.raises(ClientCommandError):
            device.region_read(BAR2, 0, 8)
        assert clear(server)["calls"] == 1
        device.region_read(BAR2, 0, 8)
    with pytest.raises(VfuDevError, match="BAR5"):
        arm(server, "op=region-read,error,bar=5")


def test_a_reset_can_fail(server: RunningServer) -> None:
    with server.connect() as device:
        arm(server, "op=reset,error=EBUSY,count=1")
        with pytest.raises(ClientCommandError) as caught:
            device.reset()
        assert caught.value.errno == errno.EBUSY
        device.reset()


def submit_read(device: VfioUserDevice) -> Call:
    """Ask for 8 bytes of BAR2 without waiting for them."""
    request = (0).to_bytes(8, "little") + BAR2.to_bytes(4, "little") + (8).to_bytes(4, "little")
    return device.connection.submit(uapi.VFIO_USER_REGION_READ, request, reply_bytes=64)


def test_the_control_socket_answers_while_the_client_waits(server: RunningServer) -> None:
    """A stalled request lasts until its fault is cleared, and goes on then; others are served meanwhile."""
    with server.connect() as device:
        number = arm(server, "op=region-read,stall")
        request = submit_read(device)
        with server.control() as control:
            wait_until(lambda: hits(server) == 1, "the read is held up")
            assert control.status()["connected"]
            digest = control.command("digest")
            assert digest["digest"]
            control.command("fault", clear=number)
        assert len(device.connection.wait(request).payload) >= 24
        assert server.status()["counters"]["region_reads"] == 1


def test_a_client_that_goes_away_ends_a_stall(server: RunningServer) -> None:
    """The server serves the next client, with the fault still armed."""
    arm(server, "op=region-read,stall")
    with server.connect() as device:
        submit_read(device)
        wait_until(lambda: hits(server) == 1, "the read is held up")
    with server.connect() as device:
        device.region_write(BAR2, 0, b"hello")
        clear(server)
        assert bytes(device.region_read(BAR2, 0, 5)) == b"hello"


@pytest.mark.parametrize("way", ["quit", "SIGTERM"])
def test_a_server_that_is_held_up_can_be_stopped(server: RunningServer, way: str) -> None:
    """By command or by signal, in the middle of a stalled request, with status 0."""
    with server.connect() as device, server.control() as control:
        arm(server, "op=region-read,stall")
        submit_read(device)
        wait_until(lambda: hits(server) == 1, "the read is held up")
        if way == "quit":
            control.command("quit")
            assert server.process.wait(PATIENCE_SECONDS) == 0
        else:
            assert server.stop() == 0


def test_a_trigger_file_ends_a_stall(server: RunningServer, short_tmp: Path) -> None:
    """The operation goes on when the file is gone."""
    file = short_tmp / "inject"
    file.touch()
    arm(server, f"op=region-read,stall,trigger={file}")
    with server.connect() as device:
        request = submit_read(device)
        wait_until(lambda: hits(server) == 1, "the read is held up")
        file.unlink()
        device.connection.wait(request)


def test_the_server_can_be_made_to_end(serve: ServerFactory) -> None:
    """`exit` is a crash with a status of one's choice: sockets stay behind, a client finds it gone."""
    server = serve()
    arm(server, "op=region-read,exit=9")
    with server.connect() as device, pytest.raises(VfuDevError):
        device.region_read(BAR2, 0, 8)
    assert server.process.wait(PATIENCE_SECONDS) == 9
    assert server.socket.exists()
    server.status_expected = 9


def test_a_fault_can_be_there_from_the_start(serve: ServerFactory) -> None:
    """`serve --fault`, twice; the list says what they are and what they did."""
    server = serve("--fault", "op=region-read,error=EBUSY,count=1", "--fault", "op=mig-write,delay=1")
    with server.connect() as device:
        with pytest.raises(ClientCommandError):
            device.region_read(BAR2, 0, 8)
        device.region_read(BAR2, 0, 8)
    with server.control() as control:
        found = control.command("faults")
        assert [one["fault"] for one in found["armed"]] == [
            "op=region-read,error=EBUSY,count=1",
            "op=mig-write,delay=1.0",
        ]
        assert [(one["calls"], one["hits"]) for one in found["armed"]] == [(2, 1), (0, 0)]
        assert found["injected"]["region-read"] == 1
        assert control.command("figures")["snapshot"]["faults"]["region-read"] == 1


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"fault": {"op": "nonsense"}},
        {"fault": ["op=irq"]},
        {"fault": None},
        {"clear": 99},
        {"clear": True},
        {"clear": "some"},
        {"fault": "op=irq,error", "clear": "all"},
    ],
    ids=str,
)
def test_a_malformed_command_gets_an_error(
    pair: tuple[RunningServer, RunningServer], request_: dict[str, Any]
) -> None:
    with pair[0].control() as control:
        with pytest.raises(VfuDevError, match="fault"):
            control.command("fault", **request_)
        assert control.command("faults")["armed"] == []


RAM, KIB = 0x100000, 1 << 10


@pytest.fixture
def driver(server: RunningServer) -> Iterator[Driver]:
    """Return a driver of the DMA engine, with guest memory."""
    with server.connect() as device:
        device.dma_map(0x10000, 64 * KIB)
        device.dma_map(RAM, 64 * KIB)
        yield Driver(device)


def transfer(driver: Driver) -> tuple[Status, int]:
    """Copy a page from guest memory to the device; returns its status and how many bits are wrong there."""
    data = random.Random(4).randbytes(4096)
    driver.memory(RAM, 4096)[:] = data
    driver.device.region_write(BAR2, 0, bytes(4096))
    outcome = driver.one(Op.TO_DEVICE, address=RAM, offset=0, length=4096)
    found = bytes(driver.device.region_read(BAR2, 0, 4096))
    wrong = int.from_bytes(found, "little") ^ int.from_bytes(data, "little")
    return outcome.status, wrong.bit_count()


def test_the_devices_own_dma_can_fail_and_lie(server: RunningServer, driver: Driver) -> None:
    """Reading guest memory: an error is in the descriptor's status, a flipped bit in the data; then neither.

    The first read of a run fetches the descriptor, the second is the data.
    """
    assert transfer(driver) == (Status.DONE, 0)
    arm(server, "op=dma-read,error=EFAULT,after=1")
    assert transfer(driver)[0] is Status.UNMAPPED
    clear(server)
    arm(server, "op=dma-read,corrupt=100,after=1,count=1")
    assert transfer(driver) == (Status.DONE, 1)
    clear(server)
    arm(server, "op=dma-read,short=16,after=1")
    status, wrong = transfer(driver)
    assert status is Status.FAILED
    assert wrong > 8
    clear(server)
    assert transfer(driver) == (Status.DONE, 0)


def test_what_the_device_writes_to_guest_memory_can_be_lost(server: RunningServer, driver: Driver) -> None:
    """Data: the descriptor says so. Its status: the run ends without one."""
    arm(server, "op=dma-write,error,count=1")
    assert driver.one(Op.FILL_GUEST, address=RAM, length=4096, value=7).status is Status.FAILED
    assert not any(driver.memory(RAM, 4096))
    clear(server)
    arm(server, "op=dma-write,error,after=1")
    driver.put({"op": Op.FILL_GUEST, "address": RAM, "length": 4096, "value": 7})
    driver.start(1)
    assert driver.finish() is Status.TABLE_UNREACHABLE
    assert bytes(driver.memory(RAM, 8)) == (7).to_bytes(8, "little")
    clear(server)
    assert driver.one(Op.FILL_GUEST, address=RAM, length=4096, value=8).status is Status.DONE


def test_an_interrupt_can_be_lost(server: RunningServer) -> None:
    """The first one does not arrive, the second does."""
    with server.connect() as device:
        fds = device.enable_irqs(uapi.VFIO_PCI_MSIX_IRQ_INDEX, 1)
        try:
            arm(server, "op=irq,error,count=1")
            device.region_write(BAR0, 0x20, (0).to_bytes(4, "little"))
            assert not readable(fds, 0)  # the reply comes after the interrupt
            device.region_write(BAR0, 0x20, (0).to_bytes(4, "little"))
            assert readable(fds)
            assert os.eventfd_read(fds[0]) == 1
            assert server.status()["counters"]["irqs"] == 2
        finally:
            for fd in fds:
                os.close(fd)


def test_an_interrupt_of_the_devices_own_work_can_end_the_connection(
    server: RunningServer, driver: Driver
) -> None:
    """Nothing but the connection is lost: the next client finds a device that works."""
    arm(server, "op=irq,disconnect,count=1")
    driver.put({"op": Op.FILL_DEVICE, "length": 4096, "value": 7, "flags": FLAG_INTERRUPT})
    with contextlib.suppress(VfuDevError):  # its last write may find the connection gone already
        driver.start(1)
    with server.connect() as device:
        device.dma_map(0x10000, 64 * KIB)
        assert Driver(device).one(Op.FILL_DEVICE, length=4096, value=8).status is Status.DONE
    with server.control() as control:
        assert control.command("faults")["injected"]["irq"] == 1


TICKER = """
from vfu_dev.device import Device

class Tick:
    def __init__(self, device):
        self.device, self.left = device, 1

    def due(self):
        return 0.0 if self.left else None

    def advance(self, budget_seconds):
        self.left = 0
        self.device.raise_irq(0)

    def reset(self):
        pass

    def block(self):
        return None

class Ticker(Device):
    msi_vectors = 1

    def make_workers(self):
        return [Tick(self)]
"""


@pytest.mark.parametrize("action", ["disconnect", "delay=0.01", "error"])
def test_an_interrupt_without_a_client_can_be_struck(
    serve: ServerFactory, short_tmp: Path, action: str
) -> None:
    """A device may work before anybody has come."""
    (short_tmp / "ticker.py").write_text(TICKER)
    server = serve(
        "--device", f"{short_tmp / 'ticker.py'}:Ticker", "--fault", f"op=irq,{action}", memory=None
    )
    with server.connect() as device:
        assert device.info().resettable
    with server.control() as control:
        assert control.command("faults")["injected"]["irq"] == 1
