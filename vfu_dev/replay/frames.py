"""The stream of a replayed device: frames of made-up content, and among them the device's own state.

    frame  = header, payload
    header = tag 0x50, kind, version (1), 0: a byte each; length of the payload: u32; checksum: u64
    pad    = a byte 0: for what is too small for a header

All integers are little endian. The checksum is the XXH3 of the header before it and of a made-up payload.
The device's own state is the stream of docs/state-stream.md, which has checksums of its own.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from enum import IntEnum

import numpy as np
import xxhash

from vfu_dev.errors import StreamError

HEADER = struct.Struct("<BBBBIQ")
_CHECKED = struct.Struct("<BBBBI")  # of the header, before its checksum
_TAG = 0x50
_VERSION = 1
_PAGE_BYTES = 4096
_POOL_BYTES = 4 << 20


class FrameKind(IntEnum):
    """What a frame carries."""

    INITIAL = 1
    INITIAL_LAST = 2  # initial_bytes is 0 after it
    DIRTY = 3
    STOP_COPY = 4
    STATE = 5  # of the device itself
    STATE_LAST = 6  # and nothing comes after it


MADE_UP = frozenset(FrameKind) - {FrameKind.STATE, FrameKind.STATE_LAST}


# A device and what belongs to it are cycles of references, so they stay until the garbage collector comes. It
# counts objects, not bytes: hundreds of closed devices, with a pool each, were 3 GB.
@functools.lru_cache(maxsize=1)
def _pool(compressibility: float, seed: int) -> bytes:
    """Return made-up bytes twice over: a piece of up to _POOL_BYTES is contiguous wherever it begins."""
    pages = np.random.default_rng(seed).integers(0, 256, (_POOL_BYTES // _PAGE_BYTES, _PAGE_BYTES), np.uint8)
    zeros = round(_PAGE_BYTES * compressibility)
    pages[:, _PAGE_BYTES - zeros :] = 0
    return pages.tobytes() * 2


class Content:
    """Made-up content.

    Args: compressibility: the part of each 4 KiB that is zeros; the rest is random.
    """

    def __init__(self, compressibility: float, seed: int = 1) -> None:
        self._bytes = memoryview(_pool(compressibility, seed))
        self._at = 0

    def pieces(self, count: int) -> list[memoryview]:
        """Return the next `count` bytes, which stay where they are."""
        found = []
        while count:
            size = min(count, _POOL_BYTES)
            found.append(self._bytes[self._at : self._at + size])
            self._at = (self._at + size) % _POOL_BYTES
            count -= size
        return found


def header(kind: FrameKind, pieces: list[memoryview], length: int | None = None) -> bytes:
    """Return the header of a made-up payload, or of `length` bytes of state."""
    count = sum(map(len, pieces)) if length is None else length
    checked = _CHECKED.pack(_TAG, kind, _VERSION, 0, count)
    hashed = xxhash.xxh3_64(checked)
    for piece in pieces:
        hashed.update(piece)
    return HEADER.pack(_TAG, kind, _VERSION, 0, count, hashed.intdigest())


class FrameReader:
    """Takes a stream apart, however it is cut.

    Args:
        on_state: called with the device's own state.
        on_frame: called at the end of each frame.
    """

    def __init__(self, on_state: Callable[[memoryview], None], on_frame: Callable[[FrameKind], None]) -> None:
        self._on_state, self._on_frame = on_state, on_frame
        self._header = bytearray()
        self._left = 0
        self._kind = FrameKind.INITIAL
        self._checksum = 0
        self._hashed = xxhash.xxh3_64()
        self._ended = False

    @property
    def whole(self) -> bool:
        """Whether the stream is at its end."""
        return self._ended and not self._left and not self._header

    def feed(self, data: memoryview) -> None:
        """Take the next slice. Raises: StreamError."""
        while len(data):
            if self._left:
                data = self._payload(data)
            elif not self._header and data[0] == 0:
                data = data[1:]
            else:
                if self._ended:
                    raise StreamError("the replay's stream goes on after its last frame")
                need = HEADER.size - len(self._header)
                self._header += data[:need]
                data = data[need:]
                if len(self._header) == HEADER.size:
                    self._begin()

    def _begin(self) -> None:
        tag, kind, version, zero, length, checksum = HEADER.unpack(self._header)
        if tag != _TAG or zero:
            raise StreamError("no stream of a replayed device: serve the destination with --profile, too")
        if version != _VERSION:
            raise StreamError(f"a replay's stream of version {version}; this vfu-dev reads {_VERSION}")
        if kind not in iter(FrameKind):
            raise StreamError(f"the replay's stream has a frame of unknown kind {kind}")
        self._kind, self._left, self._checksum = FrameKind(kind), length, checksum
        self._hashed.reset()
        self._hashed.update(self._header[: _CHECKED.size])
        self._header.clear()
        if self._kind not in MADE_UP and self._hashed.intdigest() != checksum:
            raise StreamError("the checksum of a header does not fit: it changed on its way")
        if not length:
            self._end()

    def _payload(self, data: memoryview) -> memoryview:
        part, rest = data[: self._left], data[self._left :]
        self._left -= len(part)
        if self._kind in MADE_UP:
            self._hashed.update(part)
        else:
            self._on_state(part)
        if not self._left:
            self._end()
        return rest

    def _end(self) -> None:
        if self._kind in MADE_UP and self._hashed.intdigest() != self._checksum:
            raise StreamError("the checksum of made-up content does not fit: it changed on its way")
        self._ended = self._kind is FrameKind.STATE_LAST
        self._on_frame(self._kind)
