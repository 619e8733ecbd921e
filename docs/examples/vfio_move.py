"""Use a VFIO device and migrate it by hand to another one, with the kernel's interface alone.

vfio_move.py SOURCE DESTINATION        character devices, such as /dev/vfio/devices/vfio0

Structures and numbers are those of <linux/vfio.h> and <linux/iommufd.h>. `use` is the driver of vfu-dev's
reference device; everything else is the same for any device with VFIO_MIGRATION_PRE_COPY.
"""

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import struct
import sys
import time

DEVICE_GET_REGION_INFO, DEVICE_FEATURE = 0x3B6C, 0x3B75
BIND_IOMMUFD, ATTACH_IOMMUFD_PT, MIG_GET_PRECOPY_INFO = 0x3B76, 0x3B77, 0x3B79
IOAS_ALLOC, IOAS_MAP = 0x3B81, 0x3B85
MAP_FIXED, MAP_WRITEABLE, MAP_READABLE = 1, 2, 4
FEATURE_GET, FEATURE_SET, FEATURE_MIGRATION, FEATURE_MIG_DEVICE_STATE = 1 << 16, 1 << 17, 1, 2
MIGRATION_PRE_COPY = 1 << 2
RUNNING, STOP_COPY, RESUMING, PRE_COPY = 2, 3, 4, 6
BAR0, BAR2, CONFIG = 0, 2, 7
CHUNK = 1 << 20
PCI_COMMAND, MEMORY_AND_MASTER = 0x04, 0x6

# The reference device: docs/device.md.
DESC_OP, DESC_ADDRESS, DESC_OFFSET, DESC_LENGTH = 0x200, 0x208, 0x210, 0x218
DESC_STATUS, DESC_CTRL = 0x230, 0x240
TO_GUEST, START, BUSY, DONE = 2, 1, 1, 2


def ioctl(fd, request, layout, *values):
    """Make the request with a structure of `values`; return the structure as it came back."""
    data = bytearray(struct.pack(layout, *values))
    fcntl.ioctl(fd, request, data)
    return struct.unpack(layout, data)


class Device:
    """An open device, bound to an iommufd and attached to an I/O address space."""

    def __init__(self, path, iommufd, ioas):
        self.fd = os.open(path, os.O_RDWR)
        ioctl(self.fd, BIND_IOMMUFD, "IIiI", 16, 0, iommufd, 0)
        ioctl(self.fd, ATTACH_IOMMUFD_PT, "III", 12, 0, ioas)

    def region(self, index):
        """Return size and offset of a region in the device's descriptor."""
        return ioctl(self.fd, DEVICE_GET_REGION_INFO, "IIIIQQ", 32, 0, index, 0, 0, 0)[4:]

    def read(self, index, at, count):
        """Read from a region."""
        return os.pread(self.fd, count, self.region(index)[1] + at)

    def write(self, index, at, data):
        """Write to a region."""
        os.pwrite(self.fd, data, self.region(index)[1] + at)

    def migration_flags(self):
        """Return VFIO_MIGRATION_*."""
        return ioctl(self.fd, DEVICE_FEATURE, "IIQ", 16, FEATURE_GET | FEATURE_MIGRATION, 0)[2]

    def set_state(self, state):
        """Go to a migration state; return the data descriptor of a new session, -1 if none begins."""
        header = 16, FEATURE_SET | FEATURE_MIG_DEVICE_STATE
        return ioctl(self.fd, DEVICE_FEATURE, "IIIi", *header, state, -1)[3]


def copy_data(source_fd, destination_fd):
    """Copy migration data until there is none, for now (ENOMSG) or at all; return its size in bytes."""
    copied = 0
    while True:
        try:
            data = os.read(source_fd, CHUNK)
        except OSError as error:
            if error.errno == errno.ENOMSG:
                return copied
            raise
        if not data:
            return copied
        copied += len(data)
        while data:
            data = data[os.write(destination_fd, data) :]


def precopy_info(data_fd):
    """Return initial_bytes and dirty_bytes."""
    return ioctl(data_fd, MIG_GET_PRECOPY_INFO, "IIQQ", 24, 0, 0, 0)[2:]


def migrate(source, destination, meanwhile):
    """Migrate, `meanwhile` being called in PRE_COPY; return what it returns."""
    saving = source.set_state(PRE_COPY)
    resuming = destination.set_state(RESUMING)
    print("PRE_COPY: initial_bytes {} dirty_bytes {}".format(*precopy_info(saving)))
    print(f"initial data: {copy_data(saving, resuming)} bytes")
    print("all read: initial_bytes {} dirty_bytes {}".format(*precopy_info(saving)))
    result = meanwhile()
    print("used: initial_bytes {} dirty_bytes {}".format(*precopy_info(saving)))
    print(f"dirty data: {copy_data(saving, resuming)} bytes")
    source.set_state(STOP_COPY)
    print(f"STOP_COPY: {copy_data(saving, resuming)} bytes")
    destination.set_state(RUNNING)
    os.close(saving)
    os.close(resuming)
    return result


def use(device, iova, memory, seed):
    """Fill the start of the device's memory; have the device copy that to ours, by DMA."""
    device.write(CONFIG, PCI_COMMAND, struct.pack("<H", MEMORY_AND_MASTER))
    data = hashlib.shake_256(seed).digest(memory.size())
    device.write(BAR2, 0, data)
    device.write(BAR0, DESC_OP, struct.pack("<I", TO_GUEST))
    for at, value in (DESC_ADDRESS, iova), (DESC_OFFSET, 0), (DESC_LENGTH, len(data)):
        device.write(BAR0, at, struct.pack("<Q", value))
    device.write(BAR0, DESC_CTRL, struct.pack("<I", START))
    while (status := struct.unpack("<I", device.read(BAR0, DESC_STATUS, 4))[0]) <= BUSY:
        time.sleep(0.001)
    if status != DONE or memory[:] != data:
        sys.exit(f"the device's DMA went wrong: status {status}")


def digest(device):
    """Return the SHA-256 of the device's memory."""
    size = device.region(BAR2)[0]
    found = hashlib.sha256()
    for at in range(0, size, CHUNK):
        found.update(device.read(BAR2, at, min(CHUNK, size - at)))
    return found.hexdigest()


def main():
    """Open both devices, map memory, use the source, migrate it, compare."""
    iommufd = os.open("/dev/iommu", os.O_RDWR)
    ioas = ioctl(iommufd, IOAS_ALLOC, "III", 12, 0, 0)[2]
    source, destination = (Device(path, iommufd, ioas) for path in sys.argv[1:])
    if not source.migration_flags() & MIGRATION_PRE_COPY:
        sys.exit("the source does not support PRE_COPY")

    memory_fd, iova = os.memfd_create("memory"), 1 << 20
    os.ftruncate(memory_fd, 64 << 10)
    memory = mmap.mmap(memory_fd, 64 << 10)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    flags = MAP_FIXED | MAP_WRITEABLE | MAP_READABLE
    ioctl(iommufd, IOAS_MAP, "IIIIQQQ", 40, flags, ioas, 0, address, memory.size(), iova)

    def meanwhile():
        use(source, iova, memory, b"meanwhile")
        return digest(source)

    use(source, iova, memory, b"before")
    sent = migrate(source, destination, meanwhile)
    arrived = digest(destination)
    print(f"SHA-256 at the source:      {sent}\nSHA-256 at the destination: {arrived}")
    if sent != arrived:
        sys.exit("the device's memory has not arrived")
    use(destination, iova, memory, b"after")


if __name__ == "__main__":
    main()
