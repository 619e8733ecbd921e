"""Options small enough to run in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vfu_dev.lab.migrate import MigrateOptions
from vfu_dev.patterns import LoadSpec

KIB, MIB = 1 << 10, 1 << 20


def dirtying(rate_bytes: int, pattern: str = "uniform") -> LoadSpec:
    """Return a load that dirties so many bytes of pages a second, by writes of 8 bytes; 0 writes nothing."""
    return LoadSpec(pattern, rate_pages=rate_bytes / 4096) if rate_bytes else LoadSpec("idle")


def small(qemu: Path, library: Path, **changes: Any) -> MigrateOptions:
    """Return options for a 1 MiB device without a CPU that moves within two seconds.

    QEMU switches over below 128 KiB (1.25 MiB/s for 100 ms), so that a 1 MiB device needs PRE_COPY passes.
    """
    values: dict[str, Any] = {
        "qemu": qemu,
        "library": library,
        "memory_bytes": MIB,
        "load": dirtying(512 * KIB),
        "max_bandwidth": 16 * MIB,
        "switchover_bandwidth": 1280 * KIB,
        "downtime_limit_ms": 100,
        "warmup_seconds": 0.2,
        "settle_seconds": 0.2,
        "timeout_seconds": 40.0,
    }
    return MigrateOptions(**{**values, **changes})
