"""Target `stream`: the decoder of state streams, both versions, and the resume that it feeds.

The input: a byte whose lowest bit says whether checksums are put right first (nothing gets past a wrong one,
so a fuzzer that cannot compute them tests one comparison) and the next one whether a good stream follows; a
byte for the size of the slices; then the stream.

Whatever it is: a device refuses it with a StreamError, stays in RESUMING, and takes a good stream after a
reset; or it takes it, its memory has the digests that the stream ends with, and it sends the same state
itself.
"""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from migrationkit import PAGE, Box, filled, use_small_records

from vfu_dev.errors import StreamError
from vfu_dev.memory import fold_hashes
from vfu_dev.memory.kernels import hash_bytes, hash_pages
from vfu_dev.migration import stream
from vfu_dev.migration.resume import ResumeSession
from vfu_dev.uapi import DeviceState

SLICES = (1 << 20, 997, 64, 24, 13, 7, 1)

use_small_records(pytest.MonkeyPatch())  # whole ones fit into an input

SHAPE = (9, 3)  # pages of each memory
_GOOD = filled(3, pages=SHAPE).save()


def sign(data: bytes) -> bytes:
    """Return `data` with the checksums that its records should have, as far as it can be taken apart."""
    if len(data) < stream.PRELUDE.size:
        return data
    _, version, length, _ = stream.PRELUDE.unpack_from(data)
    end = stream.PRELUDE.size + min(length, len(data))
    schema = data[stream.PRELUDE.size : end]
    head = data[:16]
    chain = xxhash.xxh3_64_intdigest(head + schema)
    parts = [head, chain.to_bytes(8, "little"), schema]
    position = end
    old = version == 1
    while position + stream.FRAME_BYTES <= len(data):
        head = data[position : position + stream.RECORD.size]
        kind, _, _, count, _, size = stream.RECORD.unpack(head)
        body_at = position + (stream.FRAME_BYTES if old else stream.RECORD.size)
        if size > len(data) - body_at:
            break
        body = data[body_at : body_at + size]
        checksum = xxhash.xxh3_64(head, seed=chain)
        if not old and kind == stream.RecordType.PAGES and size == count * (stream.INDEX_BYTES + PAGE):
            split = count * stream.INDEX_BYTES
            pages = np.frombuffer(body[split:], dtype=np.uint8).reshape(-1, PAGE)
            checksum.update(body[:split])
            checksum.update(hash_bytes(hash_pages(pages, np.arange(len(pages)))))
        else:
            checksum.update(body)
        chain = checksum.intdigest()
        signature = chain.to_bytes(stream.CHECKSUM_BYTES, "little")
        parts += [head, signature, body] if old else [head, body, signature]
        position += stream.FRAME_BYTES + size
    return b"".join([*parts, data[position:]])


def digests_of(box: Box) -> list[bytes]:
    """Return the digest of each of the memories, as they are."""
    return [fold_hashes(hash_pages(one.rows, np.arange(one.page_count))) for one in box.memories]


def sent_digests(content: bytes) -> list[bytes]:
    """Return those that a whole stream ends with."""
    size = (len(SHAPE) + 1) * stream.DIGEST_BYTES
    end = len(content) - (0 if stream.PRELUDE.unpack_from(content)[1] == 1 else stream.CHECKSUM_BYTES)
    body = content[end - size : end]
    return [body[at : at + stream.DIGEST_BYTES] for at in range(0, size, stream.DIGEST_BYTES)][:-1]


def run_one(data: bytes) -> None:
    """Feed one input."""
    if len(data) < 2:
        return
    content = sign(data[2:]) if data[0] & 1 else data[2:]
    box = Box(SHAPE)
    try:
        box.resume(content, step=SLICES[data[1] % len(SLICES)])
    except StreamError:
        assert box.migration.state is DeviceState.RESUMING, box.migration.state
        box.migration.reset(DeviceState.RUNNING, "fuzz")
        if data[0] & 2:
            box.resume(_GOOD)
    else:
        assert digests_of(box) == sent_digests(content), "a state that is not the one that was sent"
        twin = Box(SHAPE)
        twin.resume(box.save())
        assert twin.snapshot() == box.snapshot()
    assert box.migration.state is DeviceState.RUNNING, box.migration.state


def plant() -> None:
    """Take the end of a stream on trust."""

    def take_end(self: ResumeSession, memory_digests: list[bytes], blocks_digest: bytes) -> None:
        self.digest = "0" * 32

    ResumeSession.take_end = take_end  # type: ignore[method-assign]
