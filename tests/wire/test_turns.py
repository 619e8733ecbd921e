"""How the server's loop shares itself between a client's requests and the device's own work."""

from __future__ import annotations

import gc
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from serverkit import PATIENCE_SECONDS

from vfu_dev.client import VfioUserDevice
from vfu_dev.client.connection import Connection
from vfu_dev.device.reference import ReferenceDevice
from vfu_dev.libvfio_user import Context, _ffi, open_library
from vfu_dev.migration.sampler import Sampler
from vfu_dev.server import Server, server
from vfu_dev.uapi import DeviceState

# The vfio-user header: id, VFIO_USER_DEVICE_RESET, size, flags, error.
RESET = struct.pack("<HHIII", 7, 13, 16, 0, 0)


class Asking:
    """A worker that a reset wakes. In each of its steps the client sends a request, and then it asks.

    Attributes: answers: of `request_waits`, of each step. ask, sent: the client is to send; has sent.
    """

    def __init__(self, device: ReferenceDevice, steps: int) -> None:
        self.answers: list[bool] = []
        self.ask, self.sent = threading.Semaphore(0), threading.Semaphore(0)
        self.steps = steps
        self.ended: Callable[[], None] = lambda: None
        self._device = device
        self._awake = False

    def due(self) -> float | None:
        """Return now, once awake."""
        return 0 if self._awake else None

    def advance(self, budget_seconds: float) -> None:
        """Ask, in the middle of a step, with a request that waits."""
        self.ask.release()
        assert self.sent.acquire(timeout=PATIENCE_SECONDS)
        self.answers.append(self._device.bus.request_waits())
        if len(self.answers) == self.steps:
            self._awake = False
            self.ended()

    def reset(self) -> None:
        """Wake up, or stay awake, until the last step."""
        self._awake = len(self.answers) < self.steps

    def block(self) -> None:
        """Nothing migrates."""


def run_beside(use: Callable[[], None], serving: Server) -> None:
    """Serve until somebody stops it, with `use` in a thread of its own; and close server and device."""
    thread = threading.Thread(target=use)
    thread.start()
    try:
        serving.run()
    finally:
        thread.join()
        serving.close()
        gc.unfreeze()  # what `run` froze
        serving.device.close()


@pytest.mark.parametrize(
    ("turn_seconds", "answers"),
    [
        # The turn is over with its requests: the next one ends the device's step.
        (3600.0, [True, True, True]),
        # The requests take all of it, and the step is not ended. The first turn slept until the client came,
        # which says nothing of the client.
        (0.0, [True, False, False]),
    ],
)
def test_a_request_ends_the_devices_step_unless_requests_took_a_whole_turn(
    turn_seconds: float, answers: list[bool], library: Path, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_TURN_SECONDS", turn_seconds)
    device = ReferenceDevice(memory_bytes=4096)
    serving = Server(device, open_library(library), short_tmp / "s")
    worker = Asking(device, len(answers))
    worker.ended = serving.stop
    device.workers.append(worker)

    def use() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(short_tmp / "s"))
            client = VfioUserDevice(Connection(sock, timeout_seconds=PATIENCE_SECONDS))
            client.reset()
            for _ in answers:
                assert worker.ask.acquire(timeout=PATIENCE_SECONDS)
                sock.sendall(RESET)
                worker.sent.release()

    run_beside(use, serving)
    assert worker.answers == answers


@pytest.mark.parametrize("long_seconds", [0.0, PATIENCE_SECONDS])
def test_migration_data_ends_the_loops_turn_if_it_takes_long(
    long_seconds: float, library: Path, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else eight such writes are served before anybody looks at the clock, or at other sockets."""
    monkeypatch.setattr(server, "_TURN_SECONDS", PATIENCE_SECONDS)
    monkeypatch.setattr(_ffi, "LONG_SECONDS", long_seconds)
    # A sample that is due ends a turn, too: ten a second, of writes that a busy machine makes slow.
    monkeypatch.setattr(Sampler.__init__, "__defaults__", (1e6,))
    turns, serve = 0, Context.serve

    def counted(context: Context, others_fd: int, turn_seconds: float, wait_seconds: float | None) -> None:
        nonlocal turns
        serve(context, others_fd, turn_seconds, wait_seconds)
        turns += 1

    monkeypatch.setattr(Context, "serve", counted)
    device = ReferenceDevice(memory_bytes=4096)
    serving = Server(device, open_library(library), short_tmp / "s")
    writes = taken = 0

    def use() -> None:
        nonlocal writes, taken
        with VfioUserDevice.connect(short_tmp / "s", timeout_seconds=PATIENCE_SECONDS) as client:
            migration = client.migration
            migration.set_state(DeviceState.STOP_COPY)
            stream = migration.read(1 << 20)
            migration.set_state(DeviceState.RUNNING)
            migration.set_state(DeviceState.RESUMING)
            before, writes = turns, len(stream)
            for at in range(writes):
                migration.write(stream[at : at + 1])
            taken = turns - before
            migration.set_state(DeviceState.RUNNING)
            serving.stop()  # the end of the connection then wakes the loop, which may sleep already

    run_beside(use, serving)
    assert writes > 100
    # A turn that ends is counted when the client has its answer already.
    assert taken >= writes - 1 if long_seconds == 0 else taken < writes / 2
