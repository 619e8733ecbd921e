#!/usr/bin/env python3
#
# SPDX-License-Identifier: GPL-2.0-or-later
"""
Live migration of a device behind vfio-pci, without the kernel's VFIO.

"vfu-dev attach" starts QEMU with a preloaded library that answers what
vfio-pci asks of /dev/vfio, as the kernel would, from the device's server. So
hw/vfio runs as it is, and its migration code is tested without hardware.
"""

from qemu_test import skipIfMissingCommands
from vfio_migration import VFIOMigrationTest


@skipIfMissingCommands('vfu-dev')
class VfioPciMigration(VFIOMigrationTest):

    def wrapper(self, sock_path):
        return ['vfu-dev', 'attach', sock_path, '--iommu', 'type1', '--']

    def device_args(self, sock_path):
        # attach replaces the word between percent signs
        return ['-device', 'vfio-pci,sysfsdev=%sysfsdev0%,'
                'enable-migration=on,migration-events=on']

    def setUp(self):
        super().setUp()
        self.set_machine('q35')
        self.require_device('vfio-pci')

    def test_migrate_under_load(self):
        self.migrate_under_load()

    def test_cancel_in_precopy(self):
        self.cancel_in_precopy()

    def test_refuse_another_size(self):
        self.refuse_another_size()


if __name__ == '__main__':
    VFIOMigrationTest.main()
