"""Which source package QEMU and libvfio-user are built from; `fetch` gets it."""

from __future__ import annotations

PACKAGE = "qemu"
VERSION = "1:10.2.2+ds-1"
SUITE = "sid"
DSC = "qemu_10.2.2+ds-1.dsc"
SHA256 = {
    "qemu_10.2.2+ds.orig.tar.xz": "be05230fe47a6937cd29f28f562932c8125f9c93c2a82c625198f7a4aa601dfb",
    "qemu_10.2.2+ds-1.debian.tar.xz": "ddf75aceab4f8f77374f3cb34fc97b41514895aeb293ce8b2ddd5e072bb0f5c0",
    DSC: "f1684b3aa5ec500c3389d346c6501dee45041ea91656c6556d4da9023b7987dd",
}
