"""Sets up a device to be served: its configuration space, regions, callbacks and bus, in a new context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vfu_dev.device import Bar, Device, Region, Registers
from vfu_dev.libvfio_user import Context, Library, RegionMemory, RegionSetup
from vfu_dev.memory.pages import CODE_DIRTY
from vfu_dev.server import pci
from vfu_dev.server.bus import ServedBus
from vfu_dev.server.callbacks import ServedCallbacks
from vfu_dev.server.register_trace import RegisterTrace

# The largest page of a client's kernel: arm64 and ppc64 have 64 KiB.
_LARGEST_PAGE_BYTES = 64 << 10
# The most memory that a client can have mapped here for its migration data (native/spec).
MAX_WINDOW_BYTES = 16 << 20


def set_up(
    device: Device,
    library: Library,
    context: Context,
    trace: RegisterTrace | None,
    request_waits: Callable[[], bool],
    *,
    data_window: bool = True,
) -> tuple[ServedCallbacks, ServedBus]:
    """Set `device` up in `context`, as far as there is anything to do before `realize`, and attach it.

    Args:
        request_waits: see `Bus`.
        data_window: a client may have migration data in memory that it shares.

    Returns: what `context` calls, and what the device does.
    """
    pci.set_up(context, device)
    for bar in device.bars:
        context.setup_region(_region(device, bar, trace))
    callbacks = ServedCallbacks(device, context, library)
    context.setup_callbacks(callbacks)
    context.setup_dma()
    flags = device.flags & library.flags
    if flags != device.flags:
        # The machine has to be the one that the library announces, or the arcs would not be the same.
        device.restrict_flags(flags)
    context.setup_migration(flags, MAX_WINDOW_BYTES if data_window else 0)
    bus = ServedBus(context, device, request_waits)
    device.attach(bus)
    return callbacks, bus


def _memory(device: Device, region: Region) -> RegionMemory:
    memory, counters = region.memory, device.counters
    return RegionMemory(
        data=memory.data,
        codes=memory.pages.codes,
        page_size_bytes=memory.page_size_bytes,
        written=CODE_DIRTY,
        window=region.window,
        running=device.serves_writes,
        edges_ns=counters.reads.seconds.edges_ns,
        reads=counters.reads.shared,
        writes=counters.writes.shared,
    )


def _region(device: Device, bar: Bar, trace: RegisterTrace | None) -> RegionSetup:
    handler = device.region_handler(bar)
    if trace is not None and isinstance(bar, Registers):
        handler = trace.wrap(bar, handler)
    region = RegionSetup(
        bar.index, bar.bar_bytes, handler, bar.name, has_work=lambda: device.work_due() is not None
    )
    if isinstance(bar, Region) and bar.is_plain:
        region = replace(region, memory=_memory(device, bar))
    if isinstance(bar, Region) and bar.mapped:
        # What is left of the last 64 KiB is trapped: a client with pages of that size cannot map it.
        whole = bar.memory.size_bytes // _LARGEST_PAGE_BYTES * _LARGEST_PAGE_BYTES
        if whole:
            region = replace(region, fd=bar.memory.fd, mapped_bytes=whole)
    return region
