"""The reference device as its drivers see it: ids, registers, descriptors, and what their numbers mean.

This is the one place of these facts. The device takes them from here, and so does all Python code that drives
it: clients, the lab's guest, benchmarks. docs/device.md and the headers of the guest's C repeat them; tests
compare both.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from vfu_dev.device.fields import Field

# Neither number is assigned to anybody; together they are "VFUD" in configuration space.
VENDOR_ID = 0x4656
DEVICE_ID = 0x4455
REGISTER_ID = 0x44554656  # the same four bytes, read as a little-endian word
REGISTER_VERSION = 1
MSIX_VECTORS = 4

CTRL_RESET = 1 << 0  # of ctrl
STATUS_READY = 1 << 0  # of status

# --- DMA ----------------------------------------------------------------------------------------------------

MAX_DESCRIPTORS = 4096

CTRL_START = 1 << 0  # of dma_ctrl and desc_ctrl
CTRL_ABORT = 1 << 1
FLAG_INTERRUPT = 1 << 0  # of a descriptor's flags

DESCRIPTOR = np.dtype(
    {
        "names": ["op", "flags", "address", "offset", "length", "value", "vector", "status", "result"],
        "formats": ["<u4", "<u4", "<u8", "<u8", "<u8", "<u8", "<u4", "<u4", "<u8"],
        "offsets": [0x00, 0x04, 0x08, 0x10, 0x18, 0x20, 0x28, 0x30, 0x38],
        "itemsize": 64,
    }
)
STATUS_OFFSET, RESULT_OFFSET = 0x30, 0x38


class Op(IntEnum):
    """What a descriptor asks for."""

    TO_DEVICE = 1  # guest memory to device memory
    TO_GUEST = 2  # device memory to guest memory
    FILL_GUEST = 3  # `value` repeated
    FILL_DEVICE = 4
    CHECKSUM_GUEST = 5  # CRC-32 (zlib's) in `result`
    CHECKSUM_DEVICE = 6


class Status(IntEnum):
    """Of a descriptor, and (IDLE, BUSY, and the last four) of a run."""

    IDLE = 0  # nothing was done yet; of a run: none is under way, and the last one came to its end
    BUSY = 1  # of a run only
    DONE = 2
    BAD_OP = 3  # an unknown operation or flag
    BAD_LENGTH = 4  # no bytes, or more than there are addresses
    BAD_DEVICE_RANGE = 5  # not all in device memory
    UNMAPPED = 6  # not all in guest memory
    FORBIDDEN = 7  # guest memory that may not be read or written by DMA
    OVERLAP = 8  # would write to the descriptors themselves
    BAD_VECTOR = 9  # the interrupt asked for does not exist
    FAILED = 10  # a transfer by message went wrong
    ABORTED = 11
    NO_BUS_MASTER = 12  # the command register forbids DMA, writing this into a descriptor included
    BAD_TABLE = 13  # dma_table or dma_count is invalid
    TABLE_UNREACHABLE = 14  # a descriptor could not be read or its status not be written


# --- the writer ---------------------------------------------------------------------------------------------

STAMP_PAGE_BYTES = 4096
STAMP_SEED = 0x5354414D50  # "STAMP"
MAX_RATE_BYTES = 1 << 40


class WriterStatus(IntEnum):
    """Register writer_status."""

    STOPPED = 0
    WRITING = 1
    BAD_BUFFER = 2  # the buffer, its length or the rate is invalid
    UNREACHABLE = 3  # guest memory could not be read or written
    NO_BUS_MASTER = 4


# --- the load -----------------------------------------------------------------------------------------------

MILLION = 1_000_000  # what fractions and exponents are given in

CTRL_RUN = 1 << 0  # of load_ctrl
CTRL_PAGES = 1 << 1


class LoadPattern(IntEnum):
    """Register load_pattern."""

    SEQUENTIAL = 1
    UNIFORM = 2
    HOTSET = 3
    ZIPF = 4


class LoadStatus(IntEnum):
    """Register load_status."""

    STOPPED = 0  # stopped, or never begun
    WRITING = 1
    BAD_LOAD = 2  # a register holds an invalid parameter


# --- registers ----------------------------------------------------------------------------------------------


def _added(name: str, offset: int, form: str, access: str, doc: str) -> Field:
    # A state from before there was this register has 0.
    return Field(name, offset, form, access, doc, migrates=True, default=0)


FIELDS = (
    Field("id", 0x00, "<u4", "ro", 'the bytes "VFUD"', survives_reset=True),
    Field("version", 0x04, "<u4", "ro", "version of this register layout", survives_reset=True),
    Field("memsize", 0x08, "<u8", "ro", "bytes of device memory behind BAR2", survives_reset=True),
    Field(
        "fill", 0x10, "<u8", "ro", "seed of the memory's initial content, 0 for zeros", survives_reset=True
    ),
    Field("ctrl", 0x18, "<u4", "rw", "bit 0: reset the registers, clears itself"),
    Field("status", 0x1C, "<u4", "ro", "bit 0: ready"),
    Field("irq_raise", 0x20, "<u4", "wo", "raises the interrupt written"),
    Field("irq_count", 0x24, "<u4", "ro", "interrupts raised since reset", migrates=True),
    Field(
        "generation", 0x28, "<u8", "ro", "completed migrations into here", migrates=True, survives_reset=True
    ),
    Field("page_size", 0x30, "<u4", "ro", "unit of dirty tracking, bytes", survives_reset=True),
    Field(
        "reinit", 0x34, "<u4", "wo", "makes the first n pages of the memory behind BAR2 initial data again"
    ),
    Field("reinits", 0x38, "<u4", "ro", "number of times that this was done", migrates=True),
    Field(
        "window", 0x40, "<u8", "rw", "where the windows of memories larger than a BAR begin", migrates=True
    ),
    Field("intx_causes", 0x48, "<u4", "intx", "interrupts that INTx is asserted for", migrates=True),
    Field("dma_table", 0x80, "<u8", "rw", "guest address of the descriptors, 64-byte aligned", migrates=True),
    Field("dma_count", 0x88, "<u4", "rw", f"number of descriptors, 1 to {MAX_DESCRIPTORS}", migrates=True),
    Field("dma_ctrl", 0x8C, "<u4", "wo", "bit 0: start; bit 1: abort"),
    Field("dma_status", 0x90, "<u4", "ro", "0 idle, 1 busy, 11 to 14 why the run ended early", migrates=True),
    Field("dma_done", 0x94, "<u4", "ro", "descriptors completed since reset, good or bad", migrates=True),
    Field("writer_buffer", 0x98, "<u8", "rw", "guest address of the buffer, 4 KiB aligned", migrates=True),
    Field("writer_length", 0xA0, "<u8", "rw", "bytes in it, a multiple of 4 KiB", migrates=True),
    Field("writer_rate", 0xA8, "<u8", "rw", "bytes of pages stamped each second", migrates=True),
    Field("writer_ctrl", 0xB0, "<u4", "rw", "1: begin anew at stamp 0; 0: stop", migrates=True),
    Field("writer_status", 0xB4, "<u4", "ro", "0 stopped, 1 writing, 2 to 4 why it stopped", migrates=True),
    Field("writer_count", 0xB8, "<u8", "ro", "stamps made since the writer began", migrates=True),
    _added("load_rate", 0xC0, "<u8", "rw", "bytes, or pages, written each second"),
    _added("load_seed", 0xC8, "<u8", "rw", "random seed, see vfu-dev docs load"),
    _added("load_pattern", 0xD0, "<u4", "rw", "1 sequential, 2 uniform, 3 hot set, 4 Zipf"),
    _added("load_write_bytes", 0xD4, "<u4", "rw", "size of one write, 1 to 1 MiB"),
    _added("load_hot_fraction", 0xD8, "<u4", "rw", "hot set: fraction of the pages, in millionths"),
    _added("load_hot_share", 0xDC, "<u4", "rw", "hot set: fraction of the writes, in millionths"),
    _added("load_zipf_exponent", 0xE0, "<u4", "rw", "Zipf: the exponent, in millionths"),
    _added(
        "load_ctrl", 0xE4, "<u4", "rw", "bit 0: begin anew at write 0, clear to stop; bit 1: rate in pages"
    ),
    _added("load_status", 0xE8, "<u4", "ro", "0 stopped, 1 writing, 2 invalid parameter"),
    _added("load_count", 0xF0, "<u8", "ro", "writes made since the load began"),
    _added("load_missed", 0xF8, "<u8", "ro", "due writes for which there was no time"),
    Field("scratch", 0x100, "V256", "rw", "free to use; zero after a reset", migrates=True),
    # One descriptor in registers, in the layout of those in memory, and its doorbell.
    _added("desc_op", 0x200, "<u4", "rw", "operation of the descriptor in registers"),
    _added("desc_flags", 0x204, "<u4", "rw", "as in a descriptor"),
    _added("desc_address", 0x208, "<u8", "rw", "as in a descriptor"),
    _added("desc_offset", 0x210, "<u8", "rw", "as in a descriptor"),
    _added("desc_length", 0x218, "<u8", "rw", "as in a descriptor"),
    _added("desc_value", 0x220, "<u8", "rw", "as in a descriptor"),
    _added("desc_vector", 0x228, "<u4", "rw", "as in a descriptor"),
    _added("desc_status", 0x230, "<u4", "ro", "of the last descriptor carried out"),
    _added("desc_result", 0x238, "<u8", "ro", "of the last descriptor carried out"),
    Field("desc_ctrl", 0x240, "<u4", "wo", "bit 0: carry it out; bit 1: abort"),
)

REGISTERS = {field.name: field for field in FIELDS}
