"""Kernel and protocol constants, under the names their authorities give them.

Each group names its source. `<linux/vfio.h>` is the copy in the pinned QEMU tree (`linux-headers/`), because
Debian 12's own header predates PRE_COPY; what is newer than that copy says so.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

UNIX_PATH_MAX = 108  # <linux/un.h>; the terminating zero is one of them

# --- <linux/vfio.h>: regions, in struct vfio_region_info index order --------------------------------------

VFIO_PCI_BAR0_REGION_INDEX = 0
VFIO_PCI_BAR1_REGION_INDEX = 1
VFIO_PCI_BAR2_REGION_INDEX = 2
VFIO_PCI_BAR3_REGION_INDEX = 3
VFIO_PCI_BAR4_REGION_INDEX = 4
VFIO_PCI_BAR5_REGION_INDEX = 5
VFIO_PCI_ROM_REGION_INDEX = 6
VFIO_PCI_CONFIG_REGION_INDEX = 7
VFIO_PCI_VGA_REGION_INDEX = 8
VFIO_PCI_NUM_REGIONS = 9

VFIO_REGION_INFO_FLAG_READ = 1 << 0
VFIO_REGION_INFO_FLAG_WRITE = 1 << 1
VFIO_REGION_INFO_FLAG_MMAP = 1 << 2
VFIO_REGION_INFO_FLAG_CAPS = 1 << 3

VFIO_REGION_INFO_CAP_SPARSE_MMAP = 1

# --- <linux/pci_regs.h>: BARs and interrupts of a function -------------------------------------------------

PCI_STD_NUM_BARS = 6
PCI_BASE_ADDRESS_MEM_TYPE_64 = 0x04
PCI_BASE_ADDRESS_MEM_PREFETCH = 0x08

# --- <linux/vfio.h>: interrupts, VFIO_DEVICE_SET_IRQS ------------------------------------------------------

VFIO_PCI_INTX_IRQ_INDEX = 0
VFIO_PCI_MSI_IRQ_INDEX = 1
VFIO_PCI_MSIX_IRQ_INDEX = 2
VFIO_PCI_ERR_IRQ_INDEX = 3
VFIO_PCI_REQ_IRQ_INDEX = 4

MAX_MSIX_VECTORS = 2048  # PCI_MSIX_FLAGS_QSIZE + 1, <linux/pci_regs.h>
MAX_MSI_MESSAGES = 32  # PCI Local Bus Specification 3.0, section 6.8.1.3

VFIO_IRQ_SET_DATA_NONE = 1 << 0
VFIO_IRQ_SET_DATA_BOOL = 1 << 1
VFIO_IRQ_SET_DATA_EVENTFD = 1 << 2
VFIO_IRQ_SET_ACTION_MASK = 1 << 3
VFIO_IRQ_SET_ACTION_UNMASK = 1 << 4
VFIO_IRQ_SET_ACTION_TRIGGER = 1 << 5

# --- <linux/vfio.h>: DMA mapping ---------------------------------------------------------------------------

VFIO_DMA_MAP_FLAG_READ = 1 << 0
VFIO_DMA_MAP_FLAG_WRITE = 1 << 1
VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP = 1 << 0
VFIO_DMA_UNMAP_FLAG_ALL = 1 << 1

# --- <linux/vfio.h>: VFIO_DEVICE_FEATURE -------------------------------------------------------------------

VFIO_DEVICE_FEATURE_MASK = 0xFFFF
VFIO_DEVICE_FEATURE_GET = 1 << 16
VFIO_DEVICE_FEATURE_SET = 1 << 17
VFIO_DEVICE_FEATURE_PROBE = 1 << 18

VFIO_DEVICE_FEATURE_MIGRATION = 1
VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE = 2
VFIO_DEVICE_FEATURE_DMA_LOGGING_START = 6
VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP = 7
VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT = 8
VFIO_DEVICE_FEATURE_MIG_DATA_SIZE = 9
VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 = 12  # Linux 7.1, newer than the pinned header

VFIO_PRECOPY_INFO_REINIT = 1 << 0  # struct vfio_precopy_info.flags, Linux 7.1


class MigrationFlags(IntFlag):
    """`flags` of struct vfio_device_feature_migration."""

    VFIO_MIGRATION_STOP_COPY = 1 << 0
    VFIO_MIGRATION_P2P = 1 << 1
    VFIO_MIGRATION_PRE_COPY = 1 << 2


class DeviceState(IntEnum):
    """enum vfio_device_mig_state; the member names drop the VFIO_DEVICE_STATE_ prefix."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7


# --- vfio-user protocol (QEMU docs/interop/vfio-user.rst); 19 and 27 are native/spec/'s additions -----------

VFIO_USER_HEADER = struct.Struct("<HHIII")  # message id, command, size with this header, flags, error
VFIO_USER_VERSION = 1
VFIO_USER_DMA_MAP = 2
VFIO_USER_DMA_UNMAP = 3
VFIO_USER_DEVICE_GET_INFO = 4
VFIO_USER_DEVICE_GET_REGION_INFO = 5
VFIO_USER_DEVICE_GET_REGION_IO_FDS = 6
VFIO_USER_DEVICE_GET_IRQ_INFO = 7
VFIO_USER_DEVICE_SET_IRQS = 8
VFIO_USER_REGION_READ = 9
VFIO_USER_REGION_WRITE = 10
VFIO_USER_DMA_READ = 11
VFIO_USER_DMA_WRITE = 12
VFIO_USER_DEVICE_RESET = 13
VFIO_USER_REGION_WRITE_MULTI = 15
VFIO_USER_DEVICE_FEATURE = 16
VFIO_USER_MIG_DATA_READ = 17
VFIO_USER_MIG_DATA_WRITE = 18
VFIO_USER_MIG_GET_PRECOPY_INFO = 19
VFIO_USER_MIG_DATA_WINDOW = 27

VFIO_USER_REPLY = 0x1
VFIO_USER_TYPE = 0xF
VFIO_USER_NO_REPLY = 0x10
VFIO_USER_ERROR = 0x20

VFIO_USER_DEF_MAX_XFER_BYTES = 1024 * 1024
