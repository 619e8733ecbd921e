"""The counters of a device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Plain integers that the hot path adds to and everybody else reads."""

    region_reads: int = 0
    region_writes: int = 0
    region_read_bytes: int = 0
    region_written_bytes: int = 0
    irqs: int = 0
    irq_errors: int = 0  # raised, but there is no such vector or the guest has not set it up
    refused_accesses: int = 0
    refused_by_state: int = 0  # of these, writes that the migration state forbids; the rest is out of bounds
    dma_read_bytes: int = 0
    dma_written_bytes: int = 0
    dma_errors: int = 0
    protocol_errors: int = 0
    connections: int = 0
    resets: int = 0
