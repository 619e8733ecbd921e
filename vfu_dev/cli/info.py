"""`vfu-dev info SOCKET`: what a vfio-user server offers, and what it lacks compared with `vfu-dev serve`."""

from __future__ import annotations

import json
from typing import Any

import click

from vfu_dev import uapi
from vfu_dev.cli.output import json_option, show_or_write
from vfu_dev.cli.params import SECONDS
from vfu_dev.cli.shape import Command
from vfu_dev.client.device import VfioUserDevice
from vfu_dev.client.frames import ClientCommandError, DisconnectedError
from vfu_dev.errors import ProtocolError
from vfu_dev.sizes import format_size
from vfu_dev.socket_paths import device_path
from vfu_dev.uapi import MigrationFlags

REGION_NAMES = ("BAR0", "BAR1", "BAR2", "BAR3", "BAR4", "BAR5", "ROM", "config", "VGA")
IRQ_NAMES = ("INTx", "MSI", "MSI-X", "ERR", "REQ")
REGION_FLAGS = {
    uapi.VFIO_REGION_INFO_FLAG_READ: "read",
    uapi.VFIO_REGION_INFO_FLAG_WRITE: "write",
    uapi.VFIO_REGION_INFO_FLAG_MMAP: "mmap",
    uapi.VFIO_REGION_INFO_FLAG_CAPS: "caps",
}


def collect(device: VfioUserDevice) -> dict[str, Any]:
    """Ask `device` everything that can be asked without changing it."""
    version, info = device.version, device.info()
    regions = []
    for index in range(info.num_regions):
        region = device.region_info(index)
        if region.size_bytes:
            regions.append(
                {
                    "index": index,
                    "name": _name(REGION_NAMES, index),
                    "size_bytes": region.size_bytes,
                    "flags": [text for bit, text in REGION_FLAGS.items() if region.flags & bit],
                    "mappable_areas": [list(area) for area in region.areas],
                }
            )
    irqs = []
    for index in range(info.num_irqs):
        irq = device.irq_info(index)
        if irq.count:
            irqs.append({"index": index, "name": _name(IRQ_NAMES, index), "count": irq.count})
    migration = _migration(device)
    return {
        "protocol_version": f"{version.major}.{version.minor}",
        "capabilities": version.capabilities,
        "max_data_xfer_size": version.max_data_xfer_size,
        "device": _identity(device, info.num_regions),
        "resettable": info.resettable,
        "regions": regions,
        "irqs": irqs,
        "migration": migration,
        "missing": _missing(migration),
    }


def _name(names: tuple[str, ...], index: int) -> str:
    return names[index] if index < len(names) else f"index {index}"


def _identity(device: VfioUserDevice, region_count: int) -> dict[str, str] | None:
    """Return vendor, device and class of config space; None where it cannot be read."""
    if region_count <= uapi.VFIO_PCI_CONFIG_REGION_INDEX:
        return None
    try:
        config = device.region_read(uapi.VFIO_PCI_CONFIG_REGION_INDEX, 0, 16)
    except ClientCommandError:
        return None
    vendor, model = config[0:2], config[2:4]
    return {
        "vendor": f"{int.from_bytes(vendor, 'little'):#06x}",
        "device": f"{int.from_bytes(model, 'little'):#06x}",
        "class": f"{int.from_bytes(config[9:12], 'little'):#08x}",
        "revision": f"{config[8]:#04x}",
    }


def _migration(device: VfioUserDevice) -> dict[str, Any]:
    migration = device.migration
    flags = migration.flags()
    found: dict[str, Any] = {
        "supported": bool(flags),
        "flags": [str(flag.name).removeprefix("VFIO_MIGRATION_") for flag in MigrationFlags if flag in flags],
        "state": None,
        "precopy_info": migration.has_precopy_info,
        "precopy_info_v2": False,
        "data_size": False,
        "stop_copy_length": None,
        "dma_logging": False,
    }
    if not flags:
        return found
    found["state"] = migration.get_state().name
    found["dma_logging"] = all(
        migration.probe(feature, method)
        for feature, method in (
            (uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, uapi.VFIO_DEVICE_FEATURE_SET),
            (uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, uapi.VFIO_DEVICE_FEATURE_SET),
            (uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, uapi.VFIO_DEVICE_FEATURE_GET),
        )
    )
    found["precopy_info_v2"] = migration.probe(
        uapi.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2, uapi.VFIO_DEVICE_FEATURE_SET
    )
    found["data_size"] = migration.probe(uapi.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, uapi.VFIO_DEVICE_FEATURE_GET)
    if found["data_size"]:
        found["stop_copy_length"] = migration.data_size()
    return found


def _missing(migration: dict[str, Any]) -> list[str]:
    """List what this project's own server has and this one lacks, each with its consequence."""
    if not migration["supported"]:
        return ["migration: QEMU puts a migration blocker in place"]
    gaps = {
        "PRE_COPY: all state moves while the VM is stopped": "PRE_COPY" in migration["flags"],
        "P2P: QEMU migrates it only as the VM's single VFIO device": "P2P" in migration["flags"],
        "MIG_GET_PRECOPY_INFO: the client cannot ask how much is left in PRE_COPY": migration["precopy_info"],
        "MIG_PRECOPY_INFOv2: new initial data in PRE_COPY cannot be reported (REINIT)": migration[
            "precopy_info_v2"
        ],
        "MIG_DATA_SIZE: QEMU assumes 100 GiB of stop-copy data": migration["data_size"],
        "DMA logging: QEMU treats all guest memory as dirty": migration["dma_logging"],
    }
    return [text for text, present in gaps.items() if not present]


def show(result: dict[str, Any]) -> str:
    """Return `result` for people."""
    migration, identity = result["migration"], result["device"]
    lines = [
        f"vfio-user {result['protocol_version']}, {format_size(result['max_data_xfer_size'])} a transfer"
    ]
    if identity:
        lines.append(
            f"device {identity['vendor']}:{identity['device']} class {identity['class']} "
            f"revision {identity['revision']}{'' if result['resettable'] else ', no reset'}"
        )
    lines.append(f"capabilities {json.dumps(result['capabilities'], sort_keys=True)}")
    lines.append("regions")
    for region in result["regions"]:
        text = f"  {region['name']:8}{format_size(region['size_bytes']):>12}  {' '.join(region['flags'])}"
        if areas := region["mappable_areas"]:
            text += f"  ({len(areas)} mappable: {format_size(sum(size for _, size in areas))})"
        lines.append(text)
    lines.append("interrupts")
    lines += [f"  {irq['name']:8}{irq['count']:>12}" for irq in result["irqs"]]
    lines.append("migration")
    if migration["supported"]:
        lines.append(f"  state   {migration['state']}")
        lines.append(f"  phases  {' '.join(migration['flags'])}")
        if migration["stop_copy_length"] is not None:
            lines.append(f"  size    {format_size(migration['stop_copy_length'])} if it stopped now")
        extras = [
            name
            for name in ("precopy_info", "precopy_info_v2", "data_size", "dma_logging")
            if migration[name]
        ]
        lines.append(f"  extras  {' '.join(extras) or 'none'}")
    else:
        lines.append("  not supported")
    if result["missing"]:
        lines.append("missing, compared with vfu-dev serve")
        lines += [f"  {text}" for text in result["missing"]]
    return "\n".join(lines)


@click.command(cls=Command, examples=["vfu-dev info /tmp/vfu.sock", "vfu-dev info --json /tmp/vfu.sock"])
@click.argument("socket", type=click.Path())
@json_option("Write what it offers as JSON", any_word=False)
@click.option(
    "--timeout",
    type=SECONDS,
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for a reply.",
)
def command(socket: str, json_path: str | None, timeout: float) -> None:
    """Show what the vfio-user server on SOCKET offers.

    Connects as a client does, changes nothing and disconnects. A server serves one client at a time: one that
    is busy (QEMU is attached, say) does not answer, and this gives up after the timeout. For SOCKET.ctl, the
    server's control socket, the device's socket beside it is asked.
    """
    path = device_path(socket)
    try:
        with VfioUserDevice.connect(path, timeout_seconds=timeout) as device:
            result = collect(device)
    except DisconnectedError:
        raise
    except (ClientCommandError, ProtocolError) as error:  # EBUSY, or no answer at all: by which came first
        raise ProtocolError(f"{path}: {error}") from error
    show_or_write(result, json_path, lambda: show(result))
