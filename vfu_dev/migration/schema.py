"""What a device's state consists of: the shape that both ends of a migration must share."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from vfu_dev.errors import ConfigError
from vfu_dev.memory import DeviceMemory
from vfu_dev.migration.objects import StateObject

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
        defaults: field -> the value it has when the stream comes from a version without that field.
    """

    name: str
    dtype: np.dtype[Any]
    pack: Callable[[], bytes]
    unpack: Callable[[bytes], None]
    validate: Callable[[bytes], None] = lambda _: None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.defaults) - set(self.dtype.names or ()))
        if unknown:
            raise ConfigError(f"register block {self.name}: defaults for unknown fields: {unknown}")
        if not 0 < self.dtype.itemsize <= MAX_BLOCK_BYTES:
            raise ConfigError(
                f"register block {self.name}: {self.dtype.itemsize} bytes, the limit is {MAX_BLOCK_BYTES}"
            )

    @property
    def size_bytes(self) -> int:
        """Bytes that its content has."""
        return self.dtype.itemsize

    def pack_slot(self) -> bytes:
        """Return the present content."""
        return self.pack()

    def validate_slot(self, content: bytes) -> None:
        """Judge content; raises StreamError."""
        self.validate(content)

    def unpack_slot(self, content: bytes) -> None:
        """Take over content that was validated."""
        self.unpack(content)

    def default_content(self) -> bytes:
        """Return content with every field at its default, zero where there is none."""
        content = np.zeros(1, dtype=self.dtype)
        for name, value in self.defaults.items():
            content[name] = value
        return content.tobytes()

    def missing_content(self) -> bytes | None:
        """Return the content to take when the stream has none; None when it must have one."""
        every = self.dtype.names is not None and set(self.dtype.names) == set(self.defaults)
        return self.default_content() if every else None


# What travels last, in a slot of fixed size, when the device has stopped.
Block = RegisterBlock | StateObject


class MigratableState:
    """All that migrates of one device: memories first, register blocks and objects last.

    Args:
        device_type: names the kind of device; both ends must agree.
        memories: bulk state, tracked page by page.
        blocks: register blocks and objects, sent after the device stopped.
        added: memories and register blocks that streams of older versions do not have: they start as zeros,
            fields with their defaults.
        dropped: what streams of older versions have and this device does not miss: the name of a memory or
            block, or BLOCK.FIELD.
    """

    def __init__(
        self,
        device_type: str,
        memories: Sequence[DeviceMemory],
        blocks: Sequence[Block],
        *,
        added: Collection[str] = (),
        dropped: Collection[str] = (),
    ) -> None:
        self.device_type = device_type
        self.memories = tuple(memories)
        self.blocks = tuple(blocks)
        self.added = frozenset(added)
        self.dropped = frozenset(dropped)
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
                {"name": b.name, "size_bytes": b.size_bytes, "object": b.version}
                if isinstance(b, StateObject)
                else {"name": b.name, "size_bytes": b.size_bytes, "dtype": dtype_description(b.dtype)}
                for b in self.blocks
            ],
        }
        return json.dumps(shape, sort_keys=True, separators=(",", ":")).encode()

    def digest(self, memory_digests: Sequence[bytes], blocks: Sequence[bytes]) -> str:
        """Return the digest of a whole state: every memory's and every block's content, hex."""
        return state_digest(self.schema, memory_digests, blocks)


def state_digest(schema: bytes, memory_digests: Sequence[bytes], blocks: Sequence[bytes]) -> str:
    """Return the digest of a state of the shape `schema`; the function is the same on both ends, hex."""
    whole = xxhash.xxh3_128(schema)
    for digest in memory_digests:
        whole.update(digest)
    for block in blocks:
        whole.update(block)
    return whole.hexdigest()


def blocks_digest(contents: Sequence[bytes]) -> bytes:
    """Return the 16-byte digest of all register blocks, in order."""
    return xxhash.xxh3_128_digest(b"".join(contents))


def dtype_description(dtype: np.dtype[Any]) -> Any:
    """Return `dtype` in JSON terms; field order, offsets and formats are all in it."""
    if dtype.fields is None:
        return dtype.str
    return [
        [name, dtype_description(field[0]), field[1]]
        for name, field in sorted(dtype.fields.items(), key=lambda item: item[1][1])
    ]
