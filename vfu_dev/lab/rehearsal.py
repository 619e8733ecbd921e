"""A migration whose outcome is certain, with two servers of its own: the presets of `vfu-dev load`."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from vfu_dev.client.control import ControlClient
from vfu_dev.client.device import VfioUserDevice
from vfu_dev.client.migrator import ClientOptions, ClientProgress, MigrationError, Migrator
from vfu_dev.client.stop import Stop
from vfu_dev.convergence import DOWNTIME_LIMIT_SECONDS, rates_text, remaining_text
from vfu_dev.errors import ConfigError
from vfu_dev.model.presets import PRESETS, Decision, decide
from vfu_dev.vm.own_device import OwnDevice
from vfu_dev.vm.process import POLL_SECONDS
from vfu_dev.vm.servers import ServerOptions, served
from vfu_dev.workload import Workload
from vfu_dev.workload.spec import DEFAULT_PAGE_BYTES, MAX_WRITE_BYTES

LINE_SECONDS = 1.0
# More than any machine reaches: as fast as possible.
FILL_PAGES_A_SECOND = 10_000_000


@dataclass(frozen=True)
class Rehearsal:
    """What to rehearse.

    Attributes:
        preset: a name in `PRESETS`.
        seconds: give up after this time: that ends a migration that does not converge.
        own_device: a class of the user's own in place of the reference device.
    """

    preset: str
    bandwidth_bytes: int
    memory_bytes: int = 256 << 20
    downtime_seconds: float = DOWNTIME_LIMIT_SECONDS
    seconds: float = 10.0
    seed: int = 1
    own_device: OwnDevice | None = None

    def load(self) -> tuple[Workload, Decision]:
        """Return the load and the figures that decide convergence.

        Raises: ConfigError: the memory is too small for a load that never converges.
        """
        numbers = (self.bandwidth_bytes, self.memory_bytes, self.downtime_seconds)
        spec = PRESETS[self.preset](*numbers, DEFAULT_PAGE_BYTES, self.seed)
        return spec, decide(spec, *numbers)


def rehearse(plan: Rehearsal, stop: Stop, reporter: Callable[[str], None]) -> dict[str, Any]:
    """Migrate under the preset's load and return how it went, as JSON knows it.

    Args: reporter: gets the figures that decide convergence: the predicted ones at once, the measured ones
              each second.
    Raises: ConfigError, LabError, ControlError, ProtocolError: it cannot be carried out.
            KeyboardInterrupt: asked to stop before it began.
    """
    if plan.own_device is None:
        plan.load()  # fail on a bad plan before servers start
    options = ClientOptions(
        downtime_limit_seconds=plan.downtime_seconds,
        max_bandwidth=plan.bandwidth_bytes,
        max_passes=None,
        timeout_seconds=plan.seconds,
    )

    def pause(seconds: float) -> None:
        if stop.wait(seconds):
            raise KeyboardInterrupt

    with ExitStack() as stack:
        device = ServerOptions(memory_bytes=plan.memory_bytes, fill=1, own=plan.own_device)
        servers = stack.enter_context(served([("source", device), ("destination", device)], pause))
        control = stack.enter_context(servers[0].open_control())
        memories = control.status()["memories"]
        if not memories:
            raise ConfigError("this device has no memory that migrates, so nothing can be written to it")
        if plan.own_device is not None and "fill" not in plan.own_device.takes:
            _write_all(control, memories[0], pause)
        spec, decision = replace(plan, memory_bytes=memories[0]["size_bytes"]).load()
        reporter(f"expected: {decision.text}")
        control.command("load", load=spec.to_dict())
        devices = [stack.enter_context(VfioUserDevice.connect(server.socket)) for server in servers]
        reporter(f"to watch: vfu-dev top {servers[0].socket} {servers[1].socket}")
        measurements = _Measurements(control, stop, reporter)
        migrator = Migrator(devices[0], devices[1], options, reporter=measurements)
        outcome, error = "completed", None
        deadline = time.monotonic() + plan.seconds
        try:
            migrator.run()
        except MigrationError as failed:
            out_of_time = time.monotonic() >= deadline and failed.phase == "pre-copy"
            outcome, error = "did not converge" if out_of_time else "failed", failed.reason
        except KeyboardInterrupt:
            outcome = "interrupted"
        progress = migrator.progress
    return {
        "preset": plan.preset,
        "load": spec.to_dict(),
        "expected": "completed" if decision.converges else "did not converge",
        "outcome": outcome,
        "as_expected": outcome == ("completed" if decision.converges else "did not converge"),
        "error": error,
        "decision": asdict(decision),
        "measured": measurements.series[-1] if measurements.series else {},
        "series": measurements.series,
        "passes": progress.passes,
        "total_ms": round(progress.total_seconds * 1000, 3),
        "downtime_ms": round(progress.downtime_seconds * 1000, 3) if outcome == "completed" else None,
    }


def _write_all(control: ControlClient, memory: dict[str, Any], pause: Callable[[float], None]) -> None:
    """Have the device write to every page: what was never written is not sent, and the plan counts all."""
    page, pages = memory["page_size_bytes"], memory["size_bytes"] // memory["page_size_bytes"]
    spec = Workload("sequential", rate_pages=FILL_PAGES_A_SECOND, write_bytes=min(page, MAX_WRITE_BYTES))
    control.command("load", load=spec.to_dict())
    while control.command("load-status")["writes"] < pages:
        pause(POLL_SECONDS)


class _Measurements:
    """Measures the figures that decide convergence, once a second."""

    def __init__(self, control: ControlClient, stop: Stop, reporter: Callable[[str], None]) -> None:
        self._control, self._stop, self._reporter = control, stop, reporter
        self._last = 0.0
        self._phase = ""
        self.series: list[dict[str, float]] = []

    def __call__(self, progress: ClientProgress) -> None:
        """Follow the migration."""
        if self._stop.asked and progress.phase in ("setup", "pre-copy"):
            raise KeyboardInterrupt
        before, self._phase = self._phase, progress.phase
        # The last one is of the moment in which PRE_COPY ended, however short it was.
        ended = before == "pre-copy" != progress.phase
        due = progress.phase == "pre-copy" and progress.total_seconds - self._last >= LINE_SECONDS
        if not (ended or due):
            return
        self._last = progress.total_seconds
        load = self._control.command("load-status")
        dirty = load["recent_rate_bytes"] / load["load"]["write_bytes"] * DEFAULT_PAGE_BYTES
        found = Decision(dirty, progress.transfer_rate, progress.remaining_bytes, progress.threshold_bytes)
        self.series.append(asdict(found) | {"seconds": progress.total_seconds})
        carried = "" if load["keeps_up"] else "; the machine does NOT keep up with the load"
        self._reporter(
            f"{progress.total_seconds:5.1f} s: {rates_text(found.dirty_rate_bytes, found.bandwidth_bytes)}, "
            f"{remaining_text(found.left_bytes, found.threshold_bytes)} (pass {progress.passes + 1}){carried}"
        )
