"""Device memory as numpy arrays, and what is known about each of its pages.

`DeviceMemory` owns the bytes, its `PageMap` knows which pages were written and which are dirty, and `scan`
holds the vectorised work on many pages at once: find zero pages, gather, scatter, hash. `Shadow` finds what
changed in a memory that a client has mapped.
"""

from vfu_dev.memory.device_memory import DeviceMemory
from vfu_dev.memory.pages import PageMap
from vfu_dev.memory.scan import fold_hashes, gather, hash_pages, scatter, zero_pages
from vfu_dev.memory.shadow import Shadow, look_rates

__all__ = [
    "DeviceMemory",
    "PageMap",
    "Shadow",
    "fold_hashes",
    "gather",
    "hash_pages",
    "look_rates",
    "scatter",
    "zero_pages",
]
