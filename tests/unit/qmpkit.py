"""What a QMP server is played with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

VERSION = {"qemu": {"micro": 2, "minor": 2, "major": 10}, "package": ""}
STAMP = {"seconds": 1, "microseconds": 0}


def greeting(*capabilities: str) -> dict[str, Any]:
    """Return what a QEMU says first."""
    return {"QMP": {"version": VERSION, "capabilities": list(capabilities)}}


def event_of(name: str, **data: Any) -> dict[str, Any]:
    """Return an event."""
    return {"timestamp": STAMP, "event": name, "data": data}


def line_of(message: dict[str, Any]) -> bytes:
    """Return a message as it is sent."""
    return json.dumps(message).encode() + b"\n"


async def commands(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Yield the client's commands, which no line ends, until it hangs up."""
    text = b""
    while part := await reader.read(1):
        text += part
        if part == b"}" and text.count(b"{") == text.count(b"}"):
            yield json.loads(text)
            text = b""
