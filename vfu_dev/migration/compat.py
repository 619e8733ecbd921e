"""Whether a stream from another version of a device can be resumed: compares both schemas.

Everything is matched by name. Parts that both have must be of the same kind. A part that is new here needs a
default declared by its author. A part that no longer exists here is an error that names it, unless the author
declared that it may be dropped. The stream's first record decides, while the source still runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vfu_dev.errors import StreamError, written
from vfu_dev.memory import DeviceMemory
from vfu_dev.memory.device_memory import MAX_PAGE_SIZE_BYTES, MIN_PAGE_SIZE_BYTES
from vfu_dev.migration.objects import StateObject
from vfu_dev.migration.schema import (
    MAX_BLOCK_BYTES,
    MAX_BLOCKS,
    MAX_MEMORIES,
    Block,
    MigratableState,
    RegisterBlock,
    dtype_description,
)

# A memory that is dropped on arrival still costs 8 bytes a page for its digest: 128 MiB at most.
MAX_DROPPED_PAGES = 1 << 24
_DIFFERENCES_NAMED = 8


@dataclass(frozen=True)
class IncomingMemory:
    """A memory as the stream has it; `target` is where it goes, None when it may be lost."""

    name: str
    page_count: int
    page_size_bytes: int
    target: DeviceMemory | None


@dataclass(frozen=True)
class IncomingBlock:
    """A block as the stream has it.

    Attributes:
        target: where it goes, None when it may be lost.
        convert: from the content that arrives to what `target` takes; raises StreamError.
    """

    name: str
    size_bytes: int
    target: Block | None
    convert: Callable[[bytes], bytes]


@dataclass(frozen=True)
class Incoming:
    """What a stream will bring.

    Attributes:
        schema: the source's.
        missing: blocks that it does not have, with the content they take instead.
    """

    schema: bytes
    memories: tuple[IncomingMemory, ...]
    blocks: tuple[IncomingBlock, ...]
    missing: tuple[tuple[Block, bytes], ...] = ()


def judge_schema(contents: MigratableState, theirs: bytes) -> Incoming:
    """Compare the schema of an arriving stream with our own.

    Raises: StreamError: it does not fit, or is none; the text names what does not fit.
    """
    try:
        found = json.loads(theirs)
        return _Judge(contents, theirs, found).incoming()
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as err:
        if isinstance(err, StreamError):
            raise
        raise StreamError("the stream's schema is not one: it cannot be read") from None


class _Judge:
    def __init__(self, contents: MigratableState, theirs: bytes, found: dict[str, Any]) -> None:
        self._contents = contents
        self._schema = theirs
        self._found = found
        self._wrong: list[str] = []
        self._missing: list[tuple[Block, bytes]] = []

    def incoming(self) -> Incoming:
        memories, blocks = self._found["memories"], self._found["registers"]
        if set(self._found) != {"device", "memories", "registers"}:
            self._wrong.append(f"unknown parts: {written(sorted(self._found))}")
        if len(memories) > MAX_MEMORIES or len(blocks) > MAX_BLOCKS:
            self._wrong.append(f"{len(memories)} memories and {len(blocks)} blocks")
            raise self._error()
        if self._found["device"] != self._contents.device_type:
            self._differ("device", self._contents.device_type, self._found["device"])
        names = [str(one["name"]) for one in [*memories, *blocks]]
        if len(set(names)) != len(names):
            self._wrong.append("a name twice")
        taken = tuple(self._memory(one) for one in memories)
        packed = tuple(self._block(one) for one in blocks)
        for memory in self._contents.memories:
            if memory.name not in names and memory.name not in self._contents.added:
                self._wrong.append(f"memory {memory.name}: new here, and no default was declared")
        for block in self._contents.blocks:
            if block.name not in names:
                self._new_block(block)
        if self._wrong:
            raise self._error()
        return Incoming(self._schema, taken, packed, tuple(self._missing))

    def _error(self) -> StreamError:
        text = "; ".join(self._wrong[:_DIFFERENCES_NAMED])
        more = len(self._wrong) - _DIFFERENCES_NAMED
        if more > 0:
            text += f"; and {more} more"
        return StreamError(f"the stream comes from a device of another shape: {text}")

    def _differ(self, what: str, here: Any, there: Any) -> None:
        self._wrong.append(f"{what}: here {written(here)}, in the stream {written(there)}")

    def _memory(self, one: dict[str, Any]) -> IncomingMemory:
        name, size, page = str(one["name"]), _natural(one["size_bytes"]), _natural(one["page_size_bytes"])
        if not MIN_PAGE_SIZE_BYTES <= page <= MAX_PAGE_SIZE_BYTES or page & (page - 1) or size % page:
            raise StreamError(f"the stream's schema has a memory of {size} bytes with pages of {page}")
        target = next((memory for memory in self._contents.memories if memory.name == name), None)
        if target is None:
            if name not in self._contents.dropped:
                self._wrong.append(f"memory {written(name)}: not here any more")
            elif size // page > MAX_DROPPED_PAGES:
                self._wrong.append(f"memory {written(name)}: {size} bytes are too many to be dropped")
        else:
            if target.size_bytes != size:
                self._differ(f"memory {name}: size_bytes", target.size_bytes, size)
            if target.page_size_bytes != page:
                self._differ(f"memory {name}: page_size_bytes", target.page_size_bytes, page)
        return IncomingMemory(name, size // page, page, target)

    def _block(self, one: dict[str, Any]) -> IncomingBlock:
        name, size = str(one["name"]), _natural(one["size_bytes"])
        if size > MAX_BLOCK_BYTES:
            raise StreamError(f"the stream's schema has a block of {size} bytes")
        target = next((block for block in self._contents.blocks if block.name == name), None)
        convert: Callable[[bytes], bytes] = _same
        if target is None:
            if name not in self._contents.dropped:
                self._wrong.append(f"registers {written(name)}: not here any more")
        elif isinstance(target, StateObject):
            if "object" not in one:
                self._differ(f"object {name}", "an object", "registers")
            elif _natural(one["object"]) not in target.accepts:
                self._differ(f"object {name}: version", sorted(target.accepts), one["object"])
            else:
                convert = target.converter(_natural(one["object"]), size)
        elif "dtype" not in one:
            self._differ(f"registers {name}", "registers", "an object")
        elif one["dtype"] != dtype_description(target.dtype) or size != target.size_bytes:
            convert = self._fields(target, one["dtype"], size)
        return IncomingBlock(name, size, target, convert)

    def _fields(self, target: RegisterBlock, theirs: Any, size: int) -> Callable[[bytes], bytes]:
        """Return what moves the fields that both have, and gives the others their defaults."""
        ours = dtype_description(target.dtype)
        if not isinstance(ours, list) or not isinstance(theirs, list):
            self._differ(f"registers {target.name}", ours, theirs)
            return _same
        there = {str(name): (kind, _natural(offset)) for name, kind, offset in theirs}
        moves: list[tuple[int, int, int]] = []
        parts = target.dtype.fields
        assert parts is not None
        for name, kind, offset in ours:
            where = f"registers {target.name}: field {name}"
            if name not in there:
                if name not in target.defaults:
                    self._wrong.append(f"{where}: new here, and no default was declared")
                continue
            their_kind, their_offset = there[name]
            count = parts[name][0].itemsize
            if their_kind != kind:
                self._differ(where, kind, their_kind)
            elif their_offset + count > size:
                raise StreamError(f"the stream's schema has field {name} beyond its {size} bytes")
            else:
                moves.append((offset, their_offset, count))
        known = {name for name, _, _ in ours}
        for name in there:
            if name not in known and f"{target.name}.{name}" not in self._contents.dropped:
                self._wrong.append(f"registers {target.name}: field {written(name)}: not here any more")
        base = target.default_content()

        def convert(content: bytes) -> bytes:
            out = bytearray(base)
            for here, from_there, count in moves:
                out[here : here + count] = content[from_there : from_there + count]
            return bytes(out)

        return convert

    def _new_block(self, block: Block) -> None:
        content = block.missing_content()
        if content is None and block.name in self._contents.added and isinstance(block, RegisterBlock):
            content = block.default_content()
        if content is None:
            self._wrong.append(f"registers {block.name}: new here, and no default was declared")
        else:
            self._missing.append((block, content))


def _same(content: bytes) -> bytes:
    return content


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise StreamError(f"the stream's schema has {written(value)} for a number")
    return value
