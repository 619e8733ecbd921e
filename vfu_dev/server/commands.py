"""The commands of the control socket: docs/control.md lists arguments and results."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vfu_dev import JSON_VERSION, __version__
from vfu_dev.device import Registers
from vfu_dev.errors import ConfigError, StateError, shown
from vfu_dev.faults import Fault
from vfu_dev.logs import LOG_LEVELS
from vfu_dev.machine import peak_resident_bytes
from vfu_dev.memory import fold_hashes
from vfu_dev.migration import StateHasher
from vfu_dev.migration.fsm import RUNNING_GROUP
from vfu_dev.migration.schema import blocks_digest
from vfu_dev.server.control import Command
from vfu_dev.server.served import Served
from vfu_dev.workload import Program, Workload

# Earlier names, which no list shows.
HIDDEN = ("dma-log",)

# Seconds that the loop waits for a thread before it polls its sockets again.
THREAD_STEP_SECONDS = 0.0005
# One step of work while no request waits on the vfio-user socket.
STEP_SECONDS = 0.005


MAX_LOAD_SECONDS = 1e6


class _Hashed(NamedTuple):
    """The hashes of all memories, whether nothing changed meanwhile, and how long it took."""

    hasher: StateHasher
    stable: bool
    seconds: float


def _takes(function: Command, *keys: str) -> Command:
    """Return `function` for requests that have no other keys: a misspelt one must not be overlooked."""

    def serve(request: dict[str, Any]) -> Any:
        unknown = sorted(set(request) - {"command", *keys})
        if unknown:
            known = f"there are {', '.join(keys)}" if keys else "it takes nothing"
            raise ConfigError(f"{request['command']}: no key {shown(unknown[0])}; {known}")
        return function(request)

    return serve


T = TypeVar("T")


def in_thread(function: Callable[[], T]) -> Generator[None, None, T]:
    """Call `function` in a thread of its own, and yield until it has returned; it must not touch the device.

    If the generator is dropped, the thread runs to its end by itself.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="vfu-command", daemon=True).start()
    while True:
        try:
            return future.result(THREAD_STEP_SECONDS)
        except FutureTimeoutError:
            if future.done():
                raise  # by the function itself
        yield


def _is_number(value: object, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most


class Commands:
    """The commands of one server; called in its loop, between requests of its client."""

    def __init__(self, server: Served) -> None:
        self._server = server
        self._device = server.device

    def table(self) -> dict[str, Command]:
        """Return what a `ControlSocket` serves, by name."""
        faults, load = self._server.faults, self._server.load
        return {
            "status": _takes(lambda _: self.status()),
            "figures": _takes(self._figures, "after"),
            "digest": _takes(lambda _: self._digest()),
            "checksums": _takes(lambda _: self._checksums()),
            "load": _takes(self._load, "load", "memory", "seconds"),
            "load-status": _takes(lambda _: load.status()),
            "reinit": _takes(self._reinit, "pages", "memory"),
            "dma-log": _takes(self._dma_log, "enabled"),
            "fault": _takes(faults.command, "fault", "clear"),
            "faults": _takes(lambda _: {"armed": faults.listed(), "injected": faults.injected}),
            "registers": _takes(self._registers, "last", "clear"),
            "log-level": _takes(self._log_level, "level"),
            "quit": _takes(lambda _: self._server.stop()),
        }

    def status(self) -> dict[str, object]:
        """Return the result of `status`: counters, and sizes as last sampled; it reads no memory."""
        server, device = self._server, self._device
        migration = device.migration
        seen = migration.precopy_seen
        return {
            "name": device.name,
            "pid": os.getpid(),
            "version": JSON_VERSION,
            "versions": {"vfu-dev": __version__},
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
                        "count": memory.scans.count,
                        "pages": memory.scans.pages,
                        "seconds": memory.scans.ns / 1e9,
                        "longest_seconds": memory.scans.longest_ns / 1e9,
                    },
                }
                for memory in device.memories
            ],
            "peak_resident_bytes": peak_resident_bytes(),
            "initial_bytes": None if seen is None else seen.initial_bytes,
            "dirty_bytes": None if seen is None else seen.dirty_bytes,
            "load": self._server.load.status(),
            "save": migration.save_status(),
            "resume": migration.resume_status(),
            "replay": None if self._server.replay is None else self._server.replay.status(),
            "transitions": [transition.as_dict() for transition in migration.transitions],
            "interrupts": device.interrupts.as_dict(),
            "counters": device.counters.as_dict(),
        }

    def _figures(self, request: dict[str, Any]) -> dict[str, Any]:
        after = request.get("after", 0)
        if not isinstance(after, int) or isinstance(after, bool) or after < 0:
            raise ConfigError(f"after {shown(after)}: expected the number of a sample")
        return self._server.figures(after).as_dict()

    def _digest(self) -> Generator[None, None, dict[str, object]]:
        """Hash all state in steps; the result says whether the device changed meanwhile."""
        hashed = yield from self._hashed()
        return {"digest": hashed.hasher.digest(), "stable": hashed.stable, "seconds": hashed.seconds}

    def _checksums(self) -> Generator[None, None, dict[str, object]]:
        """Hash all state in steps: the digest of each memory and block, and what the registers hold."""
        hashed = yield from self._hashed()
        contents = self._device.migration.contents
        slots = [block.pack_slot() for block in contents.blocks]
        return {
            "state": self._device.migration.state.name,
            "digest": hashed.hasher.digest(slots),
            "stable": hashed.stable,
            "seconds": hashed.seconds,
            "memories": [
                {
                    "name": memory.name,
                    "size_bytes": memory.size_bytes,
                    "written_bytes": memory.written_bytes,
                    "digest": fold_hashes(hashes).hex(),
                }
                for memory, hashes in zip(contents.memories, hashed.hasher.hashes, strict=True)
            ],
            "blocks": [
                {"name": block.name, "size_bytes": len(slot), "digest": blocks_digest([slot]).hex()}
                for block, slot in zip(contents.blocks, slots, strict=True)
            ],
            "registers": {
                bar.name: {
                    field.name: f"{bar[field.name]:#x}"
                    for field in bar.fields.values()
                    if bar.dtype[field.name].kind == "u"
                }
                for bar in self._device.bars
                if isinstance(bar, Registers)
            },
        }

    def _hashed(self) -> Generator[None, None, _Hashed]:
        device, started = self._device, time.monotonic()
        writes = device.counters.region_writes
        hasher = StateHasher(device.migration.contents)
        # A device with work to do changes by itself.
        stable = device.work_due() is None
        while not hasher.advance(STEP_SECONDS):
            yield
            stable = stable and device.work_due() is None
        stable = stable and writes == device.counters.region_writes and not self._written_unseen()
        return _Hashed(hasher, stable, time.monotonic() - started)

    def _written_unseen(self) -> bool:
        """Return whether a client may be writing to mapped memory at this moment."""
        running = self._device.migration.state in RUNNING_GROUP
        return running and self._server.connected and any(memory.mapped for memory in self._device.memories)

    def _load(self, request: dict[str, Any]) -> Generator[None, None, dict[str, object]]:
        """Set the load that the device makes by itself, or end it."""
        if "load" not in request:
            raise ConfigError("load: expected a load, or null for none")
        load, memory, seconds = request["load"], request.get("memory"), request.get("seconds")
        if memory is not None and not isinstance(memory, str):
            raise ConfigError(f"memory {shown(memory)}: expected the name of one")
        if seconds is not None and not _is_number(seconds, MAX_LOAD_SECONDS):
            raise ConfigError(f"seconds {shown(seconds)}: expected more than 0, up to {MAX_LOAD_SECONDS:g}")
        engine = self._server.load
        if load is None:
            engine.stop()
            return engine.status()
        spec, target = Workload.from_dict(load), engine.memory(memory)
        # Files and tables take their time, in which the device's client is to be served.
        program = yield from in_thread(lambda: Program(spec, target.size_bytes, target.page_size_bytes))
        engine.start(spec, memory, seconds, program)
        return engine.status()

    def _reinit(self, request: dict[str, Any]) -> dict[str, object]:
        """Have the first pages of a memory be initial data once more, as after a reconfiguration."""
        memories = {memory.name: memory for memory in self._device.memories}
        if not memories:
            raise ConfigError("reinit: this device has no memory that migrates")
        name = request.get("memory", next(iter(memories)))
        if not isinstance(name, str) or name not in memories:
            raise ConfigError(f"memory {shown(name)}: expected one of {', '.join(memories)}")
        memory, pages = memories[name], request.get("pages", memories[name].page_count)
        if not isinstance(pages, int) or isinstance(pages, bool) or not 1 <= pages <= memory.page_count:
            raise ConfigError(f"pages {shown(pages)}: expected a number from 1 to {memory.page_count}")
        migration = self._device.migration
        if migration.state not in RUNNING_GROUP:
            raise StateError(f"reinit: in {migration.state.name} the device does not change")
        migration.reinit(memory, np.arange(pages, dtype=np.intp))
        return {"memory": name, "pages": pages, "state": migration.state.name}

    def _dma_log(self, request: dict[str, Any]) -> dict[str, object]:
        """Clear the fault op=dma-write,unlogged, or arm it; this is an earlier name of that."""
        enabled, faults = request.get("enabled"), self._server.faults
        if not isinstance(enabled, bool):
            raise ConfigError(f"enabled {shown(enabled)}: expected true or false")
        fault = Fault("dma-write", unlogged=True)
        armed = [ident for ident, one in faults.armed.items() if one.fault == fault]
        for ident in armed if enabled else ():
            faults.clear(ident)
        if not enabled and not armed:
            faults.arm(fault)
        return {"enabled": enabled}

    def _registers(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return what a driver did to registers, and clear the trace if asked to."""
        last, clear, trace = request.get("last"), request.get("clear", False), self._server.register_trace
        if last is not None and (not isinstance(last, int) or isinstance(last, bool) or last < 0):
            raise ConfigError(f"last {shown(last)}: expected a number of accesses")
        if not isinstance(clear, bool):
            raise ConfigError(f"clear {shown(clear)}: expected true or false")
        if trace is None:
            raise ConfigError("registers: not traced; start the server with --trace-registers")
        found = trace.as_dict(last)
        if clear:
            trace.clear()
        return found

    def _log_level(self, request: dict[str, Any]) -> dict[str, object]:
        level = request.get("level")
        if level not in LOG_LEVELS:
            raise ConfigError(f"level {shown(level)}: expected one of {', '.join(LOG_LEVELS)}")
        logging.getLogger("vfu_dev").setLevel(level)
        return {"level": level}
