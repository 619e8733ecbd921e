"""Beside the kernel's own: KVM learns nothing of made-up devices, and real ones work on or are refused."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from inside import Served, inside
from preloadkit import SECONDS, preload_environment
from vfio import (
    BIND_IOMMUFD,
    CHECK_EXTENSION,
    GROUP_SET_CONTAINER,
    IOAS_ALLOC,
    Attached,
    Device,
    Iommufd,
    address_of,
    ioctl,
    refused,
)

KVM_CREATE_VM, KVM_CREATE_DEVICE, KVM_SET_DEVICE_ATTR = 0xAE01, 0xC00CAEE0, 0x4018AEE1
KVM_DEV_TYPE_VFIO, KVM_DEV_VFIO_FILE, ADD, DEL = 4, 1, 1, 2


@inside()
def kvm(served: Served) -> None:
    vm = fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), KVM_CREATE_VM, 0)
    _, fd, _ = ioctl(vm, KVM_CREATE_DEVICE, "III", KVM_DEV_TYPE_VFIO, 0, 0)
    way = Attached("iommufd-cdev")

    def attribute(on: int, number: int, about: int, group: int = KVM_DEV_VFIO_FILE) -> str:
        value = bytearray(struct.pack("<i", about))
        return refused(ioctl, on, KVM_SET_DEVICE_ATTR, "IIQQ", 0, group, number, address_of(value))

    for number in (ADD, DEL):
        for about in (way.device.fd, way.iommufd.fd):
            assert attribute(fd, number, about) == "ok"
    other = os.memfd_create("no VFIO file")
    assert attribute(fd, ADD, other) != "ok"  # the kernel's answer, about what is not ours
    assert attribute(fd, ADD, way.device.fd, group=9) != "ok"
    assert attribute(other, ADD, way.device.fd) == "ENOTTY"  # on what is no device of KVM's


@pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm that this user may open"
)
def test_kvm_is_not_told_of_made_up_files(served: Served, run_inside: Callable[..., str]) -> None:
    """QEMU adds every VFIO file to KVM's VFIO device; the kernel would refuse ours, and QEMU give up."""
    run_inside(kvm, served=served)


@inside()
def real_devices(served: Served) -> None:
    """A real device is any descriptor that is not ours: its calls go to the kernel, or are refused here."""
    way = Attached("iommufd-cdev")
    real = os.memfd_create("stands for a real device")
    assert refused(ioctl, real, BIND_IOMMUFD, "IIiI", 16, 0, way.iommufd.fd, 0) == "EINVAL"
    assert refused(ioctl, real, BIND_IOMMUFD, "IIiI", 16, 0, real, 0) == "ENOTTY"  # the kernel's
    group = Attached("type1", 1)
    assert refused(ioctl, real, GROUP_SET_CONTAINER, "i", group.container) == "EINVAL"
    assert refused(ioctl, real, GROUP_SET_CONTAINER, "i", real) == "ENOTTY"
    assert group.device.info()[1] == 9


def test_a_real_device_is_refused_in_ours_in_words(served: Served, run_inside: Callable[..., str]) -> None:
    said = run_inside(real_devices, served=served)
    assert (
        "a real device cannot share the iommufd of a made-up one: give it an -object iommufd of its own"
        in said
    )


def undecided() -> None:
    """Where the kernel has /dev/iommu and /dev/vfio/vfio too (here: /dev/zero, which answers differently)."""
    real = os.memfd_create("stands for a real device")
    first, second = (os.open("/dev/iommu", os.O_RDWR) for _ in range(2))
    assert (
        refused(ioctl, first, IOAS_ALLOC, "III", 12, 0, 0) == "ENOTTY"
    )  # the kernel's word, until it is decided
    assert (
        refused(ioctl, real, BIND_IOMMUFD, "IIiI", 16, 0, first, 0) == "ENOTTY"
    )  # the kernel's; so it is its own
    assert os.read(first, 4) == bytes(4)
    device = Device(os.open("/dev/vfio/devices/vfio-user0", os.O_RDWR))
    assert refused(device.bind, first) == "EBADF"
    device.bind(second)
    assert Iommufd(second).alloc() > 0
    assert refused(ioctl, real, BIND_IOMMUFD, "IIiI", 16, 0, second, 0) == "EINVAL"
    assert refused(os.read, second, 4) == "EINVAL"
    container = os.open("/dev/vfio/vfio", os.O_RDWR)
    assert refused(fcntl.ioctl, container, CHECK_EXTENSION, 3) == "ENOTTY"
    assert refused(ioctl, real, GROUP_SET_CONTAINER, "i", container) == "ENOTTY"
    assert os.read(container, 4) == bytes(4)
    os.close(device.fd)
    way = Attached("type1")
    assert way.device.info()[1] == 9
    assert fcntl.ioctl(way.container, CHECK_EXTENSION, 3) == 1


def test_whose_a_new_iommufd_is_is_decided_by_the_first_device(served: Served) -> None:
    """Until then it is the kernel's; QEMU's real devices and made-up ones open the same path."""
    here = Path(__file__)
    script = f"import sys; sys.path[:0] = [{str(here.parent)!r}]; import {here.stem}; {here.stem}.undecided()"
    setup = (
        "set -e; d=$(mktemp -d); mount -t tmpfs none $d; mkdir $d/vfio; "
        "for n in null zero urandom; do touch $d/$n; mount --bind /dev/$n $d/$n; done; "
        "for n in iommu vfio/vfio; do touch $d/$n; mount --bind /dev/zero $d/$n; done; "
        'mount --rbind $d /dev; exec "$@"'
    )
    environment = preload_environment("asan", served.sockets)
    preload = environment.pop("LD_PRELOAD")
    argv = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", setup, "bash"]
    argv += ["env", f"LD_PRELOAD={preload}", sys.executable, "-c", script]
    done = subprocess.run(
        argv, env=os.environ | environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    if re.search(r"unshare: .*(not permitted|denied)", done.stderr):
        pytest.skip(f"no mount namespaces here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
