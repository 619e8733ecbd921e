"""Guests that write to the device, remember what they wrote, and check it after the move.

`Guest` is the interface that a move needs. `LinuxGuest` commands native/guest/vfud-load over a serial port;
`QtestGuest` (qtest_guest.py) writes from the lab where no CPU runs.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from vfu_dev.vm.guest_line import GuestError as GuestError
from vfu_dev.vm.guest_line import GuestLine, Transport
from vfu_dev.vm.kvm_trial import KVM_SECONDS
from vfu_dev.vm.process import PATIENCE_SECONDS
from vfu_dev.vm.qemu import Qemu
from vfu_dev.workload import Program, Workload

IDLE = Workload("idle")

# How device memory is read back: by the device's DMA engine, by the CPU, or the better one for the guest.
Via = Literal["auto", "dma", "mmio"]

# Called with (bytes compared, bytes in all) while a guest verifies.
VerifyReporter = Callable[[int, int], None]

# TCG under a loaded machine needs about 10 s to reach init; thirty times that is a hang.
BOOT_TIMEOUT_SECONDS = 300.0
# A read-back by the CPU is one trapped round trip (40-60 us) for each 8 bytes; silence this long is a hang.
VERIFY_SILENCE_SECONDS = 120.0


@dataclass
class GuestResult:
    """The guest's result after the move: its journal compared with every byte of the device's memory.

    Rates are bytes written a second to each device (`Workload.asked_rate_bytes`), not pages dirtied.

    Attributes:
        verified: None where nothing was read back (`--verify digests`, or cut off).
        sampled_words: words of 8 bytes that the CPU's way was read beside a read-back by DMA.
    """

    kind: str
    verified: bool | None = None
    compared_bytes: int = 0
    mismatched_bytes: int = 0
    first_mismatch: dict[str, Any] | None = None
    sampled_words: int = 0
    sampled_wrong_words: int = 0
    scratch_errors: int = 0
    readback_checks: int = 0
    readback_errors: int = 0
    generation: int = 0
    writes: int = 0
    missed_writes: int = 0
    asked_rate_bytes: float = 0.0
    reached_rate_bytes: float = 0.0
    max_access_ms: float = 0.0
    max_gap_ms: float = 0.0
    outage_ms: float | None = None
    verify_seconds: float = 0.0
    verify_via: str | None = None  # mmio or dma: who read the memory back, the guest's CPU or the device
    error: str | None = None

    def judge(self) -> None:
        """Return whether the data read back is correct."""
        wrong = self.mismatched_bytes or self.sampled_wrong_words
        self.verified = not (wrong or self.readback_errors or self.scratch_errors)

    def problem(self) -> str:
        """Return the errors of a read-back that is not `verified`."""
        if self.error:
            return self.error
        counts = {
            "bytes differ": self.mismatched_bytes,
            "words differ when read by MMIO": self.sampled_wrong_words,
            "registers differ": self.scratch_errors,
            "writes were missing when read back at once": self.readback_errors,
        }
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


class Guest(ABC):
    """The interface of a guest for a move. Calls are in the order of the methods."""

    kind: str

    @abstractmethod
    async def ready(self, source: Qemu) -> None:
        """Wait until the guest runs on `source` and has found its devices. Raises: GuestError."""

    @abstractmethod
    async def start(self, load: Workload) -> None:
        """Begin to write to every device; device i has the seed of `load` plus i. Raises: ConfigError."""

    @abstractmethod
    async def follow(self, destination: Qemu) -> None:
        """Go on talking to the guest on `destination`, where it now runs."""

    @abstractmethod
    async def stop(self) -> None:
        """Stop writing."""

    @abstractmethod
    def figures(self) -> GuestResult:
        """Return the figures of the load that was stopped, `verified` None."""

    @abstractmethod
    async def verify(self, via: Via = "auto", reporter: VerifyReporter | None = None) -> GuestResult:
        """Compare all device memory with the journal. Raises: GuestError: the guest is gone or silent."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of connections."""


class LinuxGuest(Guest):
    """A Linux guest that runs vfud-load.

    Args: tick_ms: its heartbeat.
          via: how its writes reach the device.
          drives: whether it has reference devices; vfud-load knows no others.

    Attributes:
        events: all unsolicited lines, with their time of arrival.
        status: its answer when it was found ready.
    """

    kind = "linux"

    def __init__(self, tick_ms: int = 25, via: Transport = "mmio", drives: bool = True) -> None:
        self.via = via
        self.status: dict[str, Any] = {}
        self._tick_ms = tick_ms
        self._drives = drives
        self._line: GuestLine | None = None
        self._qemu: Qemu | None = None
        self._spec = IDLE
        self.events: list[dict[str, Any]] = []
        self._last_event = 0.0
        self._reporter: VerifyReporter | None = None
        self._load: dict[str, Any] = {}
        self._moved_at: int | None = None
        self._devices = 0

    def _note(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self._last_event = time.monotonic()
        if event.get("event") == "progress" and self._reporter is not None:
            self._reporter(event["compared_bytes"], event["total_bytes"])

    async def _attach(self, qemu: Qemu) -> GuestLine:
        if self._line is not None:
            await self._line.close()
        self._qemu = qemu
        self._line = GuestLine(self._note)
        await self._line.connect(qemu.line_socket)
        return self._line

    async def command(self, text: str, timeout_seconds: float = PATIENCE_SECONDS) -> dict[str, Any]:
        """Run one command of vfud-load and return its reply. Raises: GuestError."""
        if self._line is None:
            raise GuestError("the guest has not been started")
        return await self._line.command(text, timeout_seconds)

    async def ready(self, source: Qemu) -> None:
        """Wait for the guest's program: ask until it answers (its greeting may precede our connection)."""
        line = await self._attach(source)
        began = time.monotonic()
        deadline = began + BOOT_TIMEOUT_SECONDS
        while True:
            source.process.check()
            try:
                self.status = await line.command("status", 2.0)
                await line.catch_up()
                break
            except GuestError:
                if time.monotonic() > began + KVM_SECONDS and source.is_silent_under_kvm():
                    raise GuestError(
                        f"the guest printed nothing under KVM in {KVM_SECONDS:g} s: no Linux guest runs "
                        "under KVM here (vfu-dev doctor --try-kvm tests just that); use --accel tcg"
                    ) from None
                if time.monotonic() > deadline:
                    raise GuestError(
                        f"the guest is not up after {BOOT_TIMEOUT_SECONDS:g} s; console: {source.console_log}"
                    ) from None
        self._devices = int(self.status["devices"])
        if self._drives and not self._devices:
            raise GuestError(f"the guest found no device; console: {source.console_log}")

    async def start(self, load: Workload) -> None:
        """Begin to write, with a heartbeat on the serial line."""
        await self.start_on(load, None)

    async def start_on(self, load: Workload, part: tuple[int, int] | None) -> None:
        """Begin to write to `part` (offset, bytes) of each device's memory, all of it for None."""
        self._spec = load
        if load.is_idle:
            return
        if self._line is None:
            raise GuestError("the guest has not been started")
        page_bytes = self.status["page_bytes"]
        await self._line.start_load(load, page_bytes, via=self.via, tick_ms=self._tick_ms, part=part)

    async def follow(self, destination: Qemu) -> None:
        """Talk to the destination's serial port from now on."""
        self._moved_at = len(self.events)
        await self._attach(destination)

    async def stop(self) -> None:
        """Stop writing and keep the figures of the load."""
        self._load = await self.command("stop")

    def _outage_ms(self) -> float | None:
        # Seen from outside: the last heartbeat from the source to the first from the destination.
        if self._moved_at is None:
            return None
        before = [event["time"] for event in self.events[: self._moved_at] if event.get("event") == "tick"]
        after = [event["time"] for event in self.events[self._moved_at :] if event.get("event") == "tick"]
        return (after[0] - before[-1]) * 1000 if before and after else None

    def figures(self) -> GuestResult:
        """Return the figures of the load that was stopped."""
        load = self._load
        seconds = load.get("elapsed_ns", 0) / 1e9
        reached = load.get("written_bytes", 0) / max(self._devices, 1) / seconds if seconds else 0.0
        memory_bytes, page_bytes = self.status["memory_bytes"], self.status["page_bytes"]
        asked = 0.0 if self._spec.is_idle else Program(self._spec, memory_bytes, page_bytes).asked_rate_bytes
        return GuestResult(
            kind=self.kind,
            writes=load.get("writes", 0),
            missed_writes=load.get("missed_writes", 0),
            asked_rate_bytes=asked,
            reached_rate_bytes=reached,
            max_access_ms=load.get("max_access_ns", 0) / 1e6,
            max_gap_ms=load.get("max_gap_ns", 0) / 1e6,
            outage_ms=self._outage_ms(),
        )

    async def verify(self, via: Via = "auto", reporter: VerifyReporter | None = None) -> GuestResult:
        """Have the guest read everything back; it reports progress, and silence is an error.

        `auto` is the CPU where memory is mapped, else the device's DMA engine.
        """
        if self._line is None or self._qemu is None:
            raise GuestError("the guest has not been started")
        self._reporter = reporter
        self._line.send(f"verify via={via}")
        self._last_event = time.monotonic()
        waiter = asyncio.create_task(self._line.reply("verify", 3600.0))
        try:
            while not waiter.done():
                await asyncio.wait([waiter], timeout=1.0)
                self._qemu.process.check()
                if time.monotonic() - self._last_event > VERIFY_SILENCE_SECONDS:
                    raise GuestError(f"guest: verify is silent for {VERIFY_SILENCE_SECONDS:g} s")
        finally:
            waiter.cancel()
        found, result = waiter.result(), self.figures()
        result.verified = found["verified"]
        result.mismatched_bytes = found["mismatched_bytes"] + found["buffer_mismatched_bytes"]
        for name in (
            "compared_bytes", "first_mismatch", "scratch_errors",
            "readback_checks", "readback_errors", "generation",
        ):  # fmt: skip
            setattr(result, name, found[name])
        result.verify_seconds, result.verify_via = found["verify_ns"] / 1e9, found["via"]
        return result

    async def close(self) -> None:
        """Close the serial line."""
        if self._line is not None:
            await self._line.close()
