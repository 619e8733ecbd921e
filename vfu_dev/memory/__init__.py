"""Device memory as numpy arrays, and what is known about each of its pages.

`DeviceMemory` owns the bytes, its `PageMap` knows which pages were written and which are dirty, and `kernels`
holds the work on many pages at once: find zero pages, hash, compare, store what arrives. `Fingerprints` find
what changed in a memory that a client has mapped. `sending` hands out records of pages.
"""

from vfu_dev.memory.device_memory import DeviceMemory
from vfu_dev.memory.fingerprints import Fingerprints
from vfu_dev.memory.kernels import fold_hashes
from vfu_dev.memory.pages import PageMap

__all__ = [
    "DeviceMemory",
    "Fingerprints",
    "PageMap",
    "fold_hashes",
]
