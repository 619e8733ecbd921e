"""What a driver sees of the DMA engine: its registers, a descriptor, operations and statuses."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from vfu_dev.device.fields import Field

MAX_DESCRIPTORS = 4096

CTRL_START = 1 << 0
CTRL_ABORT = 1 << 1
FLAG_INTERRUPT = 1 << 0

DMA_FIELDS = (
    Field("dma_table", 0x80, "<u8", "rw", "guest address of the descriptors, 64-byte aligned", migrates=True),
    Field("dma_count", 0x88, "<u4", "rw", f"number of descriptors, 1 to {MAX_DESCRIPTORS}", migrates=True),
    Field("dma_ctrl", 0x8C, "<u4", "wo", "bit 0: start; bit 1: abort"),
    Field("dma_status", 0x90, "<u4", "ro", "of the run as a whole, see below", migrates=True),
    Field("dma_done", 0x94, "<u4", "ro", "descriptors completed since reset, good or bad", migrates=True),
)

DESCRIPTOR = np.dtype(
    {
        "names": ["op", "flags", "address", "offset", "length", "value", "vector", "status", "result"],
        "formats": ["<u4", "<u4", "<u8", "<u8", "<u8", "<u8", "<u4", "<u4", "<u8"],
        "offsets": [0x00, 0x04, 0x08, 0x10, 0x18, 0x20, 0x28, 0x30, 0x38],
        "itemsize": 64,
    }
)
STATUS_OFFSET, RESULT_OFFSET = 0x30, 0x38


def _register(name: str, offset: int, form: str, access: str, doc: str) -> Field:
    # A state from before there were these has none.
    return Field(f"desc_{name}", 0x200 + offset, form, access, doc, migrates=True, default=0)


# One descriptor in registers, in the layout of those in memory, and its doorbell.
DESCRIPTOR_FIELDS = (
    _register("op", 0x00, "<u4", "rw", "operation of the descriptor in registers"),
    _register("flags", 0x04, "<u4", "rw", "as in a descriptor"),
    _register("address", 0x08, "<u8", "rw", "as in a descriptor"),
    _register("offset", 0x10, "<u8", "rw", "as in a descriptor"),
    _register("length", 0x18, "<u8", "rw", "as in a descriptor"),
    _register("value", 0x20, "<u8", "rw", "as in a descriptor"),
    _register("vector", 0x28, "<u4", "rw", "as in a descriptor"),
    _register("status", STATUS_OFFSET, "<u4", "ro", "of the last one carried out"),
    _register("result", RESULT_OFFSET, "<u8", "ro", "of the last one carried out"),
    Field("desc_ctrl", 0x240, "<u4", "wo", "bit 0: carry it out; bit 1: abort"),
)


class Op(IntEnum):
    """What a descriptor asks for."""

    TO_DEVICE = 1  # guest memory to device memory
    TO_GUEST = 2  # device memory to guest memory
    FILL_GUEST = 3  # `value` repeated
    FILL_DEVICE = 4
    CHECKSUM_GUEST = 5  # CRC-32 (zlib's) in `result`
    CHECKSUM_DEVICE = 6


READS_GUEST = frozenset({Op.TO_DEVICE, Op.CHECKSUM_GUEST})
WRITES_GUEST = frozenset({Op.TO_GUEST, Op.FILL_GUEST})
USES_DEVICE = frozenset({Op.TO_DEVICE, Op.TO_GUEST, Op.FILL_DEVICE, Op.CHECKSUM_DEVICE})
CHECKSUMS = frozenset({Op.CHECKSUM_GUEST, Op.CHECKSUM_DEVICE})


class Status(IntEnum):
    """Of a descriptor, and (IDLE, BUSY, and the last four) of a run."""

    IDLE = 0  # nothing was done yet; of a run: none is under way, and the last one came to its end
    BUSY = 1  # of a run only
    DONE = 2
    BAD_OP = 3  # an operation or flag that there is not
    BAD_LENGTH = 4  # no bytes, or more than there are addresses
    BAD_DEVICE_RANGE = 5  # not all in device memory
    UNMAPPED = 6  # not all in guest memory
    FORBIDDEN = 7  # guest memory that may not be read or written by DMA
    OVERLAP = 8  # would write to the descriptors themselves
    BAD_VECTOR = 9  # the interrupt asked for does not exist
    FAILED = 10  # a transfer by message went wrong
    ABORTED = 11
    NO_BUS_MASTER = 12  # the command register forbids DMA, writing this into a descriptor included
    BAD_TABLE = 13  # dma_table or dma_count makes no sense
    TABLE_UNREACHABLE = 14  # a descriptor could not be read or its status not be written
