#!/usr/bin/env python3
#
# SPDX-License-Identifier: GPL-2.0-or-later
"""Live migration of a device behind vfio-user-pci."""

import json
import subprocess

from qemu_test import skipIfMissingCommands
from vfio_migration import VFIOMigrationTest


@skipIfMissingCommands('vfu-dev')
class VfioUserMigration(VFIOMigrationTest):

    def device_args(self, sock_path):
        return ['-device', json.dumps({
            'driver': 'vfio-user-pci',
            'socket': {'type': 'unix', 'path': sock_path},
            'enable-migration': 'on',
            'migration-events': True})]

    def setUp(self):
        super().setUp()
        self.set_machine('q35')
        self.require_device('vfio-user-pci')
        properties = subprocess.run(
            [self.qemu_bin, '-device', 'vfio-user-pci,help'],
            check=True, capture_output=True, text=True).stdout
        if 'enable-migration' not in properties:
            self.skipTest('no support for migrating vfio-user devices')

    def test_migrate_under_load(self):
        self.migrate_under_load()

    def test_cancel_in_precopy(self):
        self.cancel_in_precopy()

    def test_refuse_another_size(self):
        self.refuse_another_size()


if __name__ == '__main__':
    VFIOMigrationTest.main()
