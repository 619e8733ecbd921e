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
from vfu_dev.libvfio_user import open_library
from vfu_dev.server import Server, server

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

    thread = threading.Thread(target=use)
    thread.start()
    try:
        serving.run()
    finally:
        thread.join()
        serving.close()
        gc.unfreeze()  # what `run` froze
        device.close()
    assert worker.answers == answers
