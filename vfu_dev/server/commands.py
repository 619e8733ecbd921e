"""What the control socket can be asked: docs/control.md says what each command takes and answers."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Generator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vfu_dev import __version__
from vfu_dev.errors import ConfigError
from vfu_dev.migration import StateHasher
from vfu_dev.migration.fsm import RUNNING_GROUP
from vfu_dev.server.control import Command

if TYPE_CHECKING:
    from vfu_dev.server.server import Server

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

# One step of work that has nobody waiting on the vfio-user socket.
STEP_SECONDS = 0.005


class Commands:
    """The commands of one server; called in its loop, between requests of its client."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._device = server.device

    def table(self) -> dict[str, Command]:
        """Return what a `ControlSocket` serves, by name."""
        return {
            "status": lambda _: self.status(),
            "figures": self._figures,
            "digest": lambda _: self._digest(),
            "dma-log": self._dma_log,
            "quit": lambda _: self._server.stop(),
            "log-level": self._log_level,
            "fault": self._server.faults.command,
            "faults": lambda _: {
                "armed": self._server.faults.listed(),
                "injected": self._server.faults.injected,
            },
        }

    def status(self) -> dict[str, object]:
        """Return what `status` shows."""
        server, device = self._server, self._device
        migration = device.migration
        info = migration.precopy_info() if migration.has_precopy_info else None
        return {
            "name": device.name,
            "pid": os.getpid(),
            "version": __version__,
            "library": {"path": str(server.library.path), "api": server.library.api},
            "state": migration.state.name,
            "connected": server.connected,
            "memories": [
                {
                    "name": memory.name,
                    "size_bytes": memory.size_bytes,
                    "page_size_bytes": memory.page_size_bytes,
                    "written_bytes": memory.written_bytes,
                    "access": "mmap" if memory.mapped else "trap",
                    "scans": {
                        "looks": memory.scans.looks,
                        "pages": memory.scans.pages,
                        "seconds": memory.scans.ns / 1e9,
                        "longest_seconds": memory.scans.longest_ns / 1e9,
                    },
                }
                for memory in device.memories
            ],
            "initial_bytes": None if info is None else info.initial_bytes,
            "dirty_bytes": None if info is None else info.dirty_bytes,
            "save": migration.save_status(),
            "load": migration.load_status(),
            "transitions": [transition.as_dict() for transition in migration.transitions],
            "counters": asdict(device.counters),
        }

    def _figures(self, request: dict[str, Any]) -> dict[str, Any]:
        after = request.get("after", 0)
        if not isinstance(after, int) or after < 0:
            raise ConfigError(f"after {after!r}: expected the number of a sample")
        return self._server.figures(after).as_dict()

    def _digest(self) -> Generator[None, None, dict[str, object]]:
        """Hash all state in steps; the result says whether the device was written meanwhile."""
        started = time.monotonic()
        writes = self._device.counters.region_writes
        hasher = StateHasher(self._device.migration.contents)
        while not hasher.advance(STEP_SECONDS):
            yield
        return {
            "digest": hasher.digest(),
            "stable": writes == self._device.counters.region_writes and not self._written_unseen(),
            "seconds": time.monotonic() - started,
        }

    def _written_unseen(self) -> bool:
        """Return whether a client may be writing to mapped memory at this moment."""
        running = self._device.migration.state in RUNNING_GROUP
        return running and self._server.connected and any(memory.mapped for memory in self._device.memories)

    def _dma_log(self, request: dict[str, Any]) -> dict[str, object]:
        """Have DMA escape its dirty logging, or not: shows that a test of the logging can fail."""
        enabled = request.get("enabled")
        if not isinstance(enabled, bool):
            raise ConfigError(f"enabled {enabled!r}: expected true or false")
        dma = self._server.dma
        if dma is None:
            raise ConfigError("this libvfio-user has no DMA")
        dma.log_writes = enabled
        return {"enabled": enabled}

    def _log_level(self, request: dict[str, Any]) -> dict[str, object]:
        level = request.get("level")
        if level not in LOG_LEVELS:
            raise ConfigError(f"level {level!r}: expected one of {', '.join(LOG_LEVELS)}")
        logging.getLogger("vfu_dev").setLevel(level)
        return {"level": level}
