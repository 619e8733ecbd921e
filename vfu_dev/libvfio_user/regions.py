"""Regions as they are set up, and the way into each while it is served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from vfu_dev.libvfio_user import _ffi

RegionHandler = _ffi.RegionHandler


class Gate(NamedTuple):
    """The way into one region: its handler, and what puts another in its place while it is served."""

    region: int  # its VFIO_PCI_*_REGION_INDEX
    handler: RegionHandler
    exchange: Callable[[RegionHandler], None]


@dataclass(frozen=True)
class RegionSetup:
    """A region to set up.

    Attributes:
        handler: called with (data, offset, is_write); fills or takes `data`, which is dead afterwards.
        fd: file that a client may map, or -1 for a region that is only reached through `handler`. Its size
            has to be the region's.
        mapped_bytes: how much of the region, from its start, the file is mapped for; whole pages.
    """

    index: int
    size_bytes: int
    handler: RegionHandler
    name: str
    fd: int = -1
    mapped_bytes: int = 0
