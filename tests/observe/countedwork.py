"""Devices whose server counts the pages that it hashes, compares, classifies and copies.

`vfu-dev serve --device` loads this file into the server; the environment names the file that has the counts.
Samples are taken at changes of state alone: those that the clock takes would make the counts depend on time.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vfu_dev.device import Device, Region
from vfu_dev.memory import kernels, sending
from vfu_dev.memory.pages import PageMap
from vfu_dev.migration.sampler import Sampler

COUNTS_VARIABLE = "VFU_TEST_COUNTS"
# Pages hashed where they are, classified as data or zeros, copied out and in (and hashed), compared with
# their fingerprints; scans for written pages.
WORK = ("hashed", "classified", "gathered", "scattered", "compared", "scanned")
PAGES = 64  # 256 KiB: compared in one piece, however late the thread that does it is


class Trapped(Device):
    """Every access is a message."""

    ram = Region(2, size_bytes=PAGES * 4096)


class Mapped(Device):
    """What is written is found by fingerprints."""

    ram = Region(2, size_bytes=PAGES * 4096, mapped=True)


def read_counts(path: Path) -> dict[str, int]:
    """Return what the server counted so far."""
    return dict(zip(WORK, np.fromfile(path, np.int64).tolist(), strict=True))


def make_counts(path: Path) -> None:
    """Make an empty file of counts."""
    np.zeros(len(WORK), np.int64).tofile(path)


def _count_in(path: str) -> None:
    counts = np.memmap(path, np.int64, "r+", shape=(len(WORK),))

    def counted(what: str, function: Callable[..., Any], pages: Callable[..., int]) -> Callable[..., Any]:
        number = WORK.index(what)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            result = function(*args)
            counts[number] += pages(result, *args)
            return result

        return call

    def begun(stored: int, record: sending.Record, *_: Any) -> int:
        """Return of how many pages a call handed out the first byte."""
        struct = record.struct
        end = struct.at - struct.first_size
        first, last = (min(struct.n, -(-max(0, at) // max(1, struct.size))) for at in (end - stored, end))
        return last - first

    functions = {
        kernels.hash_pages: counted("hashed", kernels.hash_pages, lambda _, rows, pages: len(pages)),
        kernels.zero_pages: counted("classified", kernels.zero_pages, lambda _, rows, pages: len(pages)),
        sending.send: counted(
            "hashed",
            counted("gathered", sending.send, lambda *call: begun(*call) if call[1].fingerprints else 0),
            lambda *call: 0 if call[1].fingerprints else begun(*call),
        ),
        kernels.changed_pages: counted("compared", kernels.changed_pages, lambda result, *_: result[1]),
    }
    for module in [module for name, module in sys.modules.items() if name.startswith("vfu_dev.")]:
        for name, value in list(vars(module).items()):
            if callable(value) and value.__hash__ is not None and value in functions:
                setattr(module, name, functions[value])
    kernels.Arriving.__init__ = counted(  # type: ignore[method-assign]
        "scattered", kernels.Arriving.__init__, lambda _, self, size, pages, *more: len(pages)
    )
    PageMap.unclassified = counted("scanned", PageMap.unclassified, lambda *_: 1)  # type: ignore[method-assign]
    Sampler.__init__.__defaults__ = (1e6,)


if COUNTS_VARIABLE in os.environ:
    _count_in(os.environ[COUNTS_VARIABLE])
