# SPDX-License-Identifier: GPL-2.0-or-later
#
# Base class of tests that live-migrate a VFIO device in software.
#
# The device and its server come from vfu-dev: "vfu-dev serve" serves a PCI
# device that supports PRE_COPY on a UNIX socket, and can write to the
# device's memory by itself. So no guest, no kernel module, no hardware and
# no privileges are needed.

import json
import os
import subprocess
import time

from qemu_test import QemuSystemTest


class VFIOMigrationTest(QemuSystemTest):

    timeout = 120
    memory = 16 << 20

    # What a subclass knows: the arguments of a QEMU with the device, and
    # what comes before the QEMU binary in its command line.
    def device_args(self, sock_path):
        raise NotImplementedError

    def wrapper(self, sock_path):
        return []

    def start_server(self, name, memory, *args):
        """Start a server; return the path of its socket once it listens."""
        sock_path = os.path.join(self.socket_dir().name, name)
        with open(self.log_file(f'{name}.log'), 'wb') as log:
            server = subprocess.Popen(
                ['vfu-dev', 'serve', '--socket', sock_path, '--name', name,
                 '--memory', str(memory), *args],
                stdout=subprocess.PIPE, stderr=log, text=True)
        self.addCleanup(self.stop_server, server)
        line = server.stdout.readline()
        self.assertIn('serving', line, f'{name} does not serve: see {name}.log')
        return sock_path

    @staticmethod
    def stop_server(server):
        server.terminate()
        server.wait()
        server.stdout.close()

    def ask_server(self, sock_path, command):
        done = subprocess.run(['vfu-dev', 'ctl', sock_path, command, '--json'],
                              check=True, capture_output=True, text=True)
        return json.loads(done.stdout)

    def start_vm(self, name, sock_path, *args):
        vm = self.get_vm(name=name)
        # The server maps guest RAM for the device's DMA.
        vm.add_args('-nodefaults', '-m', '128M',
                    '-object', 'memory-backend-memfd,id=ram,size=128M,share=on',
                    '-machine', 'memory-backend=ram')
        vm.add_args(*self.device_args(sock_path), *args)
        # QEMUMachine takes a wrapper when it is made, get_vm() has none.
        vm._wrapper = self.wrapper(sock_path)
        vm.launch()
        return vm

    def start_migration(self, src_vm, dst_vm, parameters=None):
        uri = 'unix:' + os.path.join(self.socket_dir().name, 'migration')
        # Without a return path the source says "completed" when everything
        # is sent, whether or not the destination accepts it.
        capabilities = [{'capability': name, 'state': True}
                        for name in ('events', 'return-path')]
        for vm in (src_vm, dst_vm):
            vm.cmd('migrate-set-capabilities', capabilities=capabilities)
        if parameters:
            src_vm.cmd('migrate-set-parameters', parameters)
        dst_vm.cmd('migrate-incoming', uri=uri)
        src_vm.cmd('migrate', uri=uri)

    def wait_migration(self, vm, *wanted):
        """Wait for the end of a migration, which has to be a wanted one."""
        for _ in range(100):
            event = vm.event_wait('MIGRATION', timeout=self.timeout)
            self.assertIsNotNone(event, 'the migration does not end')
            status = event['data']['status']
            if status in ('completed', 'failed', 'cancelled'):
                self.assertIn(status, wanted, vm.cmd('query-migrate'))
                return
        self.fail('the migration changes its status without end')

    def wait_device_state(self, vm, state):
        event = vm.event_wait('VFIO_MIGRATION', timeout=self.timeout,
                              match={'data': {'device-state': state}})
        self.assertIsNotNone(event, f'the device does not become {state}')

    def pair(self, src_args=(), dst_memory=memory):
        """Start two servers and a QEMU at each."""
        src_sock = self.start_server('src', self.memory, '--fill', '1',
                                     *src_args)
        dst_sock = self.start_server('dst', dst_memory)
        return (src_sock, dst_sock, self.start_vm('src-qemu', src_sock),
                self.start_vm('dst-qemu', dst_sock, '-incoming', 'defer'))

    def migrate_under_load(self):
        """The device is written to all the time, and arrives whole."""
        src_sock, dst_sock, src_vm, dst_vm = self.pair(['--dirty-rate', '1M'])
        # With the defaults the device would stop when all of it fits; here
        # it stops when 2 MiB are left.
        self.start_migration(src_vm, dst_vm, {
            'downtime-limit': 200, 'avail-switchover-bandwidth': 10 << 20})
        self.wait_device_state(src_vm, 'pre-copy')
        self.wait_device_state(dst_vm, 'resuming')
        self.wait_migration(src_vm, 'completed')
        self.wait_migration(dst_vm, 'completed')
        self.assertEqual(dst_vm.cmd('query-status')['status'], 'running')
        reply = src_vm.cmd('query-migrate')
        self.assertGreaterEqual(reply['vfio']['transferred'], self.memory)
        sent = self.ask_server(src_sock, 'status')['save']
        self.assertGreaterEqual(sent['initial_bytes'], self.memory)
        self.assertGreater(sent['precopy_bytes'], self.memory // 2)
        self.assertGreater(sent['stop_copy_bytes'], 0)
        # The load is the server's, and ends with the source.
        memories = [self.ask_server(sock, 'checksums')['memories']
                    for sock in (src_sock, dst_sock)]
        self.assertTrue(memories[0])
        self.assertEqual(memories[0], memories[1])

    def cancel_in_precopy(self):
        """The device and the VM go on at the source."""
        src_sock, _, src_vm, dst_vm = self.pair()
        # Nothing fits into the threshold, so that PRE_COPY does not end.
        self.start_migration(src_vm, dst_vm, {
            'downtime-limit': 1, 'avail-switchover-bandwidth': 1000})
        self.wait_device_state(src_vm, 'pre-copy')
        src_vm.cmd('migrate_cancel')
        # QEMU calls it failed if the migration thread finds the return path
        # shut before migrate_cancel has set the state to cancelling.
        self.wait_migration(src_vm, 'cancelled', 'failed')
        self.wait_device_state(src_vm, 'running')
        self.assertEqual(src_vm.cmd('query-status')['status'], 'running')
        self.assertEqual(self.ask_server(src_sock, 'status')['state'], 'RUNNING')

    def refuse_another_size(self):
        """The destination's device has another size: the source goes on."""
        src_sock, _, src_vm, dst_vm = self.pair(dst_memory=2 * self.memory)
        self.start_migration(src_vm, dst_vm)
        self.wait_migration(src_vm, 'failed')
        # QEMU says so before it takes the device out of PRE_COPY.
        deadline = time.monotonic() + self.timeout
        while self.ask_server(src_sock, 'status')['state'] != 'RUNNING':
            self.assertLess(time.monotonic(), deadline, 'the device runs')
        self.assertEqual(src_vm.cmd('query-status')['status'], 'running')
