"""What a device's state consists of: the shape that both ends of a migration must share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from vfu_dev.errors import ConfigError, StreamError
from vfu_dev.memory import DeviceMemory

# A header larger than this is not ours: it bounds what a destination buffers before it knows anything.
MAX_SCHEMA_BYTES = 64 * 1024
MAX_MEMORIES = 256
MAX_BLOCKS = 256
MAX_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class RegisterBlock:
    """A small piece of state that travels last, when the device has stopped.

    Attributes:
        name: the name under which it migrates.
        dtype: its layout, a numpy dtype with explicit (little) byte order.
        pack: returns the present content, `dtype.itemsize` bytes.
        unpack: takes over content that was verified; it must not fail for what `validate` let pass.
        validate: raises StreamError for content that this device cannot have.
    """

    name: str
    dtype: np.dtype[Any]
    pack: Callable[[], bytes]
    unpack: Callable[[bytes], None]
    validate: Callable[[bytes], None] = lambda _: None

    def __post_init__(self) -> None:
        if not 0 < self.dtype.itemsize <= MAX_BLOCK_BYTES:
            raise ConfigError(
                f"register block {self.name}: {self.dtype.itemsize} bytes, the limit is {MAX_BLOCK_BYTES}"
            )


class MigratableState:
    """All that migrates of one device: memories first, register blocks last.

    Args:
        device_type: names the kind of device; both ends must agree.
        memories: bulk state, tracked page by page.
        blocks: register blocks, sent after the device stopped.
    """

    def __init__(
        self, device_type: str, memories: Sequence[DeviceMemory], blocks: Sequence[RegisterBlock]
    ) -> None:
        self.device_type = device_type
        self.memories = tuple(memories)
        self.blocks = tuple(blocks)
        names = [memory.name for memory in self.memories] + [block.name for block in self.blocks]
        if len(set(names)) != len(names):
            raise ConfigError(f"{device_type}: state names must be unique, found {names}")
        if len(self.memories) > MAX_MEMORIES or len(self.blocks) > MAX_BLOCKS:
            raise ConfigError(
                f"{device_type}: at most {MAX_MEMORIES} memories and {MAX_BLOCKS} register blocks"
            )
        self.schema = self._describe()
        if len(self.schema) > MAX_SCHEMA_BYTES:
            raise ConfigError(f"{device_type}: schema of {len(self.schema)} bytes, limit {MAX_SCHEMA_BYTES}")

    def _describe(self) -> bytes:
        """Return the schema as canonical JSON, the same bytes for the same shape."""
        shape = {
            "device": self.device_type,
            "memories": [
                {"name": m.name, "size_bytes": m.size_bytes, "page_size_bytes": m.page_size_bytes}
                for m in self.memories
            ],
            "registers": [
                {"name": b.name, "size_bytes": b.dtype.itemsize, "dtype": _dtype_description(b.dtype)}
                for b in self.blocks
            ],
        }
        return json.dumps(shape, sort_keys=True, separators=(",", ":")).encode()

    def digest(self, memory_digests: Sequence[bytes], blocks: Sequence[bytes]) -> str:
        """Return the digest of a whole state: every memory's and every register block's content, hex.

        The function is the same on both ends, and names and sizes are part of it.
        """
        whole = xxhash.xxh3_128(self.schema)
        for digest in memory_digests:
            whole.update(digest)
        for block in blocks:
            whole.update(block)
        return whole.hexdigest()


def blocks_digest(contents: Sequence[bytes]) -> bytes:
    """Return the 16-byte digest of all register blocks, in order."""
    return xxhash.xxh3_128_digest(b"".join(contents))


def _dtype_description(dtype: np.dtype[Any]) -> Any:
    """Return `dtype` in JSON terms; field order, offsets and formats are all in it."""
    if dtype.fields is None:
        return dtype.str
    return [
        [name, _dtype_description(field[0]), field[1]]
        for name, field in sorted(dtype.fields.items(), key=lambda item: item[1][1])
    ]


def require_same_schema(ours: bytes, theirs: bytes) -> None:
    """Compare the schema of an arriving stream with our own.

    Raises:  StreamError: they differ, or `theirs` is not a schema; the text names every difference.
    """
    if theirs == ours:
        return
    try:
        found = json.loads(theirs)
        differences = _differences(json.loads(ours), found, "")
    except (ValueError, RecursionError):
        raise StreamError("the stream's schema is not valid JSON") from None
    text = "; ".join(differences[:8]) or "same content, other spelling"
    raise StreamError(f"the stream comes from a device of another shape: {text}")


def _differences(ours: Any, theirs: Any, path: str) -> list[str]:
    """Return one line for each place where two JSON values differ (`path: here X, in the stream Y`)."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            line
            for key in sorted(set(ours) | set(theirs), key=str)
            for line in _differences(
                ours.get(key), theirs.get(key), f"{path}.{key}" if path else str(key)[:64]
            )
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        lines = []
        for index, (left, right) in enumerate(zip(ours, theirs, strict=True)):
            label = left.get("name", index) if isinstance(left, dict) else index
            lines += _differences(left, right, f"{path}[{label}]")
        return lines
    if ours == theirs:
        return []
    return [f"{path}: here {_brief(ours)}, in the stream {_brief(theirs)}"]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
