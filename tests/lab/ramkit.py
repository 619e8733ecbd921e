"""A qtest machine's RAM: its content, and a guest that writes it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import numpy as np

from vfu_dev.lab.lab import Lab
from vfu_dev.vm.qtest import QtestClient
from vfu_dev.vm.qtest_guest import QtestGuest

# Of the machine's 32 MiB: what no firmware uses.
RAM_FROM, RAM_BYTES = 1 << 20, 28 << 20
RAM_BLOCK = 256 << 10
# Blocks with a content that no other has; they end below the buffer of a read-back (qtest_readback.py).
BLOCKS, BLOCK_BYTES, BLOCK_STEP = 12, 64 << 10, 1 << 20


def qtest_of(lab: Lab) -> QtestClient:
    """Return the connection on which the guest's accesses go."""
    assert isinstance(lab.guest, QtestGuest)
    assert lab.guest.client is not None
    return lab.guest.client


async def fill_ram(lab: Lab) -> None:
    """Give the RAM a content, so that QEMU has to send it."""
    await qtest_of(lab).batch([f"memset {RAM_FROM:#x} {RAM_BYTES:#x} 0x5a"])


def _block(number: int) -> tuple[int, bytes]:
    """Return where a block lies, and what it holds."""
    return RAM_FROM + number * BLOCK_STEP, np.random.default_rng(number).bytes(BLOCK_BYTES)


async def scatter_ram(lab: Lab) -> None:
    """Write blocks all over the RAM, each with a content of its own."""
    for number in range(BLOCKS):
        await qtest_of(lab).write_block(*_block(number))


async def wrong_blocks(lab: Lab) -> list[int]:
    """Return which of those blocks do not hold what was written."""
    found = []
    for number in range(BLOCKS):
        address, content = _block(number)
        if await qtest_of(lab).read_block(address, BLOCK_BYTES) != content:
            found.append(number)
    return found


@contextlib.asynccontextmanager
async def writing_ram(lab: Lab, bytes_a_second: float) -> AsyncIterator[None]:
    """Have the guest write RAM, block after block, until the end of the context."""
    client, stopping = qtest_of(lab), False

    async def write() -> None:
        began, done = time.monotonic(), 0
        while not stopping:
            while done < (time.monotonic() - began) * bytes_a_second and not stopping:
                at = RAM_FROM + done % (RAM_BYTES - RAM_BLOCK)
                await client.batch([f"memset {at:#x} {RAM_BLOCK:#x} {done // RAM_BLOCK % 255 + 1:#x}"])
                done += RAM_BLOCK
            await asyncio.sleep(0.005)

    task = asyncio.create_task(write())
    try:
        yield
    finally:
        stopping = True
        await task
