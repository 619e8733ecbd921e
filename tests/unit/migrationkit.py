"""Small migratable states for tests: two memories with small pages, one register block, small records."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from vfu_dev.memory import DeviceMemory
from vfu_dev.memory.kernels import join_vectors
from vfu_dev.migration import MigratableState, Migration, RegisterBlock, decoder, plan, stream
from vfu_dev.uapi import DeviceState

PAGE = 64
REGISTERS = np.dtype([("head", "<u4"), ("tail", "<u4"), ("mode", "<u8")])


def use_small_records(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stream, "PAGES_BODY_BYTES", 4 * PAGE)
    patch.setattr(decoder, "PAGES_BODY_BYTES_V1", 4 * PAGE)
    for module in (stream, plan, decoder):
        patch.setattr(module, "ZERO_PAGES_A_RECORD", 6)


@dataclass
class Box:
    """A device reduced to what migrates."""

    pages: tuple[int, ...] = (40, 7)
    mapped: bool = False  # the first memory is written by somebody who marks nothing
    initial_limit_bytes: int | None = None
    name: str = "box"
    events: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memories = [
            DeviceMemory(f"m{i}", n * PAGE, PAGE, mapped=self.mapped and not i)
            for i, n in enumerate(self.pages)
        ]
        self.registers = np.zeros(1, dtype=REGISTERS)
        block = RegisterBlock("registers", REGISTERS, self.registers.tobytes, self.unpack)
        self.contents = MigratableState("box", self.memories, [block])
        self.migration = Migration(
            self.name,
            self.contents,
            initial_limit_bytes=self.initial_limit_bytes,
            on_resumed=lambda: self.events.append("resumed"),
            on_unverified=lambda: self.events.append("unverified"),
        )

    def put(self, memory: int, offset: int, data: bytes) -> None:
        """Write as whoever writes to that memory does."""
        target = self.memories[memory]
        if target.mapped:
            target.raw[offset : offset + len(data)] = data
        else:
            target.store(offset, data)

    def unpack(self, content: bytes) -> None:
        """Take over register contents."""
        self.registers[:] = np.frombuffer(content, dtype=REGISTERS)

    def snapshot(self) -> tuple[bytes, ...]:
        """Return all that migrates, as bytes."""
        return (*(bytes(m.raw) for m in self.memories), self.registers.tobytes())

    def read(self, count: int) -> bytes:
        """Return what one MIG_DATA_READ of `count` bytes gets."""
        buffer = bytearray(count)
        if count % 2:  # both ways, whatever the test reads
            stored = join_vectors(self.migration.read(count), memoryview(buffer))
        else:
            stored = self.migration.read_into(memoryview(buffer))
        return bytes(buffer[:stored])

    def read_all(self, step: int = 1000) -> bytes:
        """Read until nothing comes."""
        return b"".join(iter(lambda: self.read(step), b""))

    def audit(self) -> dict[str, object]:
        """Do what a server's loop does between requests until the audit is over; return the save's record."""
        self.migration.set_state(DeviceState.STOP)
        return self.finish_audit()

    def finish_audit(self) -> dict[str, object]:
        """The same in the state that the device is in."""
        while self.migration.audit_pending:
            self.migration.advance_audit(0.0)
        record = self.migration.save_status()
        assert record is not None
        return record

    def save(self) -> bytes:
        """Return the whole stream of a stopped device, which is running again afterwards."""
        self.migration.set_state(DeviceState.STOP_COPY)
        data = self.read_all()
        self.migration.set_state(DeviceState.RUNNING)
        return data

    def resume(self, data: bytes, step: int = 1 << 20) -> None:
        """Load `data` in slices; raises what the device raises, wherever it does."""
        self.migration.set_state(DeviceState.RESUMING)
        for start in range(0, len(data), step):
            self.migration.write(memoryview(data)[start : start + step])
        self.migration.set_state(DeviceState.RUNNING)


def filled(seed: int = 1, **options: object) -> Box:
    """Return a box with data, zeros and untouched pages."""
    box = Box(**options)  # type: ignore[arg-type]
    rng = np.random.default_rng(seed)
    for memory in box.memories:
        for page in range(memory.page_count - 2):
            content = bytes(PAGE) if page % 5 == 0 else rng.bytes(PAGE)
            memory.store(page * PAGE, content)
    box.registers["head"] = 7
    box.registers["mode"] = 1 << 40
    return box
