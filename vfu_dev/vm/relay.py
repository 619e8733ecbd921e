"""A relay with a delay: every byte arrives that much later than it was sent, each way.

For kernels without netem. It runs in the network namespace of the connecting client:

    python -m vfu_dev.vm.relay 127.0.0.1 4444 192.0.2.2 4444 0.005 625000

The arguments are the address to listen at, the address to connect to, the delay in seconds and the maximum of
bytes in flight each way: what a link of that rate holds. It prints a line when it listens, and ends with its
input.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
from collections import deque

CHUNK_BYTES = 256 << 10
MIN_BUFFER_BYTES = 64 << 10


class _Direction:
    """One way of one connection: bytes, and when each of them is due."""

    def __init__(self, delay_seconds: float, room_bytes: int) -> None:
        self._delay, self._room = delay_seconds, room_bytes
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def take(self, reader: asyncio.StreamReader) -> None:
        """Take bytes in until the sender has ended, and no more than there is room for."""
        data = b"-"
        while data:
            try:
                data = await reader.read(CHUNK_BYTES)
            except OSError:
                data = b""  # the sender is gone: what it sent before arrives, then the end
            self._waiting.append((time.monotonic() + self._delay, data))
            self._bytes += len(data)
            self._changed.set()
            while self._bytes >= self._room:
                await self._wait()

    async def give(self, writer: asyncio.StreamWriter) -> None:
        """Hand each byte on when it is due, then the end."""
        while True:
            while not self._waiting:
                await self._wait()
            due, data = self._waiting.popleft()
            if (left := due - time.monotonic()) > 0:
                await asyncio.sleep(left)
            if not data:
                with contextlib.suppress(OSError):
                    writer.write_eof()
                return
            writer.write(data)
            await writer.drain()
            self._bytes -= len(data)
            self._changed.set()


async def _carry(
    near: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    far: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    delay_seconds: float,
    room_bytes: int,
) -> None:
    ways = [(near[0], far[1]), (far[0], near[1])]
    try:
        async with asyncio.TaskGroup() as group:
            for reader, writer in ways:
                direction = _Direction(delay_seconds, room_bytes)
                group.create_task(direction.take(reader))
                group.create_task(direction.give(writer))
    except* OSError:
        pass  # one end is gone, and so is the connection
    finally:
        near[1].close()
        far[1].close()


async def relay(address: str, port: int, target: str, target_port: int, delay: float, room: int) -> None:
    """Carry every connection until standard input ends."""
    tasks: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            far = await asyncio.open_connection(target, target_port)
        except OSError:
            writer.transport.abort()  # refused there is refused here
        else:
            await _carry((reader, writer), far, delay, room)
        finally:
            tasks.discard(task)

    listener = socket.create_server((address, port))
    # What waits here is under way for its sender: no more of it than the link holds.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, max(room, MIN_BUFFER_BYTES))
    async with await asyncio.start_server(carry, sock=listener):
        print("listening", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        for task in tasks:
            task.cancel()


if __name__ == "__main__":
    asyncio.run(
        relay(
            sys.argv[1],
            int(sys.argv[2]),
            sys.argv[3],
            int(sys.argv[4]),
            float(sys.argv[5]),
            int(sys.argv[6]),
        )
    )
