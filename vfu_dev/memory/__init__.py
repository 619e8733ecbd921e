"""Device memory as numpy arrays, and what is known about each of its pages.

`DeviceMemory` owns the bytes, its `PageMap` knows which pages were written and which are dirty, and `scan`
holds the vectorised work on many pages at once: find zero pages, gather, scatter, hash.
"""

from vfu_dev.memory.device_memory import DeviceMemory
from vfu_dev.memory.pages import PageMap
from vfu_dev.memory.scan import fold_hashes, gather, hash_pages, scatter, zero_pages

__all__ = [
    "DeviceMemory",
    "PageMap",
    "fold_hashes",
    "gather",
    "hash_pages",
    "scatter",
    "zero_pages",
]
