"""Streams as earlier versions of this program wrote them, made from one of today.

Version 1 had the checksum at the end of a record's header of 32 bytes. It covered the body as it is.
"""

from __future__ import annotations

import struct

import xxhash

from vfu_dev.migration import stream

_RECORD_V1 = struct.Struct("<HHIIIQQ")


def version_1(data: bytes) -> bytes:
    """Return the stream of version 1 that carries what `data` does, record by record."""
    magic, version, length, _ = stream.PRELUDE.unpack_from(data)
    assert version == stream.STREAM_VERSION
    signed = struct.pack("<8sII", magic, 1, length)
    schema = data[stream.PRELUDE.size : stream.PRELUDE.size + length]
    chain = xxhash.xxh3_64_intdigest(signed + schema)
    parts = [signed, chain.to_bytes(8, "little"), schema]
    position = stream.PRELUDE.size + length
    while position < len(data):
        head = data[position : position + stream.RECORD.size]
        body_bytes = stream.RECORD.unpack(head)[5]
        begin = position + stream.RECORD.size
        body = data[begin : begin + body_bytes]
        chain = xxhash.xxh3_64_intdigest(head + body, seed=chain)
        parts += [head, chain.to_bytes(8, "little"), body]
        position = begin + body_bytes + stream.CHECKSUM_BYTES
    return b"".join(parts)


def pieces(data: bytes) -> list[bytes]:
    """Cut a valid stream of either version into its prelude (with schema) and its records."""
    length = stream.PRELUDE.size + stream.PRELUDE.unpack_from(data)[2]
    found, position = [data[:length]], length
    while position < len(data):
        size = stream.FRAME_BYTES + stream.RECORD.unpack_from(data, position)[5]
        found.append(data[position : position + size])
        position += size
    assert _RECORD_V1.size == stream.FRAME_BYTES
    return found
