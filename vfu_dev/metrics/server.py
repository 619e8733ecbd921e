"""Who serves: build, library, device, and its clients."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric as Family

from vfu_dev.figures.snapshot import Snapshot
from vfu_dev.metrics.families import Metric

BUILD = Metric(
    "vfu_build_info", "info", "The program that serves: its version and Python's.", ("version", "python")
)
LIBRARY = Metric(
    "vfu_library_info",
    "info",
    'The libvfio-user in use; api "ours" has pre-copy sizes, "v2" works in reduced form.',
    ("api", "path"),
)
DEVICE = Metric(
    "vfu_device_info",
    "info",
    "The device: its type, PCI vendor:device, the VFIO_MIGRATION_* capabilities it announces, "
    "and the profile it replays, empty if none.",
    ("type", "pci_id", "migration", "profile"),
)
CONNECTED = Metric("vfu_client_connected", "gauge", "1 while a vfio-user client is connected, else 0.")
CONNECTIONS = Metric(
    "vfu_client_connections_total",
    "counter",
    "vfio-user clients accepted. More than one in a VM's life means that clients come and go.",
)
PROTOCOL_ERRORS = Metric(
    "vfu_protocol_errors_total",
    "counter",
    "Clients turned away and messages that broke the protocol. Any rise means a broken or hostile client.",
)
RESETS = Metric(
    "vfu_device_resets_total",
    "counter",
    "Device resets, lost connections included. A rise without a reboot of the guest "
    "means a failing client or driver.",
)
INTERRUPTS = Metric(
    "vfu_interrupts_total",
    "counter",
    "Interrupts the device raised, of any kind. It rises with the load.",
)
INTERRUPT_ERRORS = Metric(
    "vfu_interrupt_errors_total",
    "counter",
    "Interrupts that were not delivered: no such vector, or the guest has not set it up. "
    "A rise means a driver that waits forever.",
)

METRICS = (
    BUILD,
    LIBRARY,
    DEVICE,
    CONNECTED,
    CONNECTIONS,
    PROTOCOL_ERRORS,
    RESETS,
    INTERRUPTS,
    INTERRUPT_ERRORS,
)


def collect(snapshot: Snapshot) -> Iterator[Family]:
    """Yield the families of this file."""
    device, counters = snapshot.device, snapshot.counters
    yield BUILD.one(device, snapshot.build)
    yield LIBRARY.one(device, snapshot.library)
    yield DEVICE.one(device, snapshot.identity)
    yield CONNECTED.one(device, int(snapshot.connected))
    yield CONNECTIONS.one(device, counters["connections"])
    yield PROTOCOL_ERRORS.one(device, counters["protocol_errors"])
    yield RESETS.one(device, counters["resets"])
    yield INTERRUPTS.one(device, counters["irqs"])
    yield INTERRUPT_ERRORS.one(device, counters["irq_errors"])
