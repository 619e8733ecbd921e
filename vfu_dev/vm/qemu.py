"""A QEMU process with the device attached: command line, QMP, events and traces.

The command line is the one that works for vfio-user servers: q35, guest RAM in a shared memfd (the server
maps it for DMA), no default devices, TCG unless asked otherwise. How devices come into it is the front end's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qemu.qmp import ConnectError, QMPError

from vfu_dev.attach import make_front_end
from vfu_dev.attach.preload import inherited_environment
from vfu_dev.builds.qemu_binary import probe_qemu
from vfu_dev.errors import LabError
from vfu_dev.qemu_events import TRACE_PATTERNS
from vfu_dev.vm.kvm_trial import LINUX_SPEAKS, LOUD
from vfu_dev.vm.monitor import Monitor
from vfu_dev.vm.monitor import QmpError as QmpError
from vfu_dev.vm.process import STOP_SECONDS, Child, wait_for_socket
from vfu_dev.vm.trace import TraceEvent, parse_trace

# The first slot of bus 0 that q35 leaves free with -nodefaults is 1; 0 is the host bridge, 31 the LPC.
FIRST_SLOT = 3

# Guest RAM: a file that servers can map; a file whose pages are QEMU's own; no file.
RamKind = Literal["shared", "private", "anonymous"]
_RAM: dict[RamKind, tuple[str, str]] = {
    "shared": ("memfd", "on"),
    "private": ("memfd", "off"),
    "anonymous": ("ram", "off"),
}


@dataclass(frozen=True)
class QemuOptions:
    """Everything about a QEMU that is not the devices' sockets.

    `front_end` and `iommu` are as in `vfu_dev.attach.front_end`, None for the best that it has; `machine` is
    a q35, of a version that the other side of a migration has too; `environment` is added to ours. With
    `preload_log` the preloaded library logs what was asked and answered, beside the other logs.
    `guest` is a folder with vmlinuz and initramfs.cpio.gz, or None for the qtest protocol and no CPU.
    `spare_ports` root ports of a Linux guest are free for `Qemu.plug`. With `reboot` a guest that reboots
    does; otherwise QEMU ends, because a guest that reboots unasked has crashed. `within` is what its command
    line begins with: the way into a network namespace.
    """

    binary: Path
    ram_bytes: int
    front_end: str | None = None
    iommu: str | None = None
    machine: str = "q35"
    ram: RamKind = "shared"
    environment: tuple[tuple[str, str], ...] = ()
    preload_log: bool = False
    accel: str = "tcg"
    guest: Path | None = None
    incoming: bool = False
    migration_events: bool = True
    traces: tuple[str, ...] = TRACE_PATTERNS
    device_properties: tuple[tuple[str, Any], ...] = ()
    spare_ports: int = 0
    reboot: bool = False
    within: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


class Qemu(Monitor):
    """One QEMU: started, driven over QMP, stopped without leaving anything behind.

    Args: devices: sockets of the devices that it has from the start. spare: of those that may be plugged.
    Raises: BuildError, AttachError: this QEMU cannot do what the options ask of it; says what to do.
    """

    def __init__(
        self,
        name: str,
        sockets: Path,
        logs: Path,
        options: QemuOptions,
        devices: list[Path],
        spare: Sequence[Path] = (),
    ) -> None:
        super().__init__(name, sockets / f"{name}.qmp")
        self.options = options
        self.binary = probe_qemu(options.binary)
        if options.guest is None and not self.binary.qtest:
            raise LabError(
                f"{options.binary} ({self.binary.version}) has no qtest accelerator, which a machine without "
                "a guest needs; use --guest linux"
            )
        reachable = [*devices, *spare]
        self.preload_log = logs / f"{name}-preload.log" if options.preload_log else None
        self.front_end = make_front_end(
            self.binary, options.front_end, options.iommu, devices=len(reachable), log=self.preload_log
        )
        self.qtest_socket = sockets / f"{name}.qtest"
        self.line_socket = sockets / f"{name}.line"
        self.trace_log = logs / f"{name}-trace.log"
        self.console_log = logs / f"{name}-console.log"
        self._devices = devices
        environment = (
            inherited_environment() | self.front_end.environment(reachable) | dict(options.environment)
        )
        descriptors = self.front_end.descriptors
        log = logs / f"{name}.log"
        self.process = Child(f"QEMU {name}", self._command_line(), log, environment, descriptors)

    def _command_line(self) -> list[str]:
        options = self.options
        argv = [*options.within, str(options.binary)]
        for folder in self.binary.firmware:
            argv += ["-L", str(folder)]
        argv += ["-name", self.name, "-nodefaults", "-no-user-config", "-display", "none"]
        argv += ["-machine", f"{options.machine},memory-backend=ram0", "-m", f"{options.ram_bytes}B"]
        backend, share = _RAM[options.ram]
        argv += ["-object", f"memory-backend-{backend},id=ram0,size={options.ram_bytes},share={share}"]
        argv += ["-qmp", f"unix:{self.qmp_socket},server=on,wait=off"]
        argv += ["-msg", "timestamp=on", "-D", str(self.trace_log)]
        for pattern in options.traces:
            argv += ["-trace", pattern]
        if options.guest is None:
            argv += ["-accel", "qtest", "-qtest-log", "none"]
            argv += ["-qtest", f"unix:{self.qtest_socket},server=on,wait=off"]
        else:
            argv += ["-accel", options.accel]
            if not options.reboot:
                argv.append("-no-reboot")
            argv += [
                "-kernel",
                str(options.guest / "vmlinuz"),
                "-initrd",
                str(options.guest / "initramfs.cpio.gz"),
            ]
            # Under KVM the guest prints its boot, so that a guest that KVM does not run is detected.
            console = LOUD if options.accel == "kvm" else "console=ttyS0 quiet"
            # init_on_free: pages that the boot used and freed are zeros, which QEMU sends as one byte each.
            # no_timer_check: on a busy host a virtual CPU may be late for that check, and Linux then panics.
            argv += ["-append", f"{console} panic=-1 init_on_free=1 no_timer_check"]
            argv += ["-chardev", f"file,id=console,path={self.console_log}", "-serial", "chardev:console"]
            argv += ["-chardev", f"socket,id=line,path={self.line_socket},server=on,wait=off"]
            argv += ["-serial", "chardev:line"]
        if options.guest is not None:
            for index in range(len(self._devices) + options.spare_ports):
                # As real devices are: below a port of its own, whose bus the guest's kernel can reset.
                place = f"addr={FIRST_SLOT + index:#x},chassis={index + 1},slot={index + 1}"
                argv += ["-device", f"pcie-root-port,id=port{index},bus=pcie.0,{place}"]
        for one in self.front_end.objects():
            argv += ["-object", json.dumps(one)]
        for index, socket in enumerate(self._devices):
            argv += ["-device", json.dumps(self._device(index, socket))]
        if options.incoming:
            argv += ["-incoming", "defer"]
        return [*argv, *options.extra]

    def _device(self, index: int, socket: Path) -> dict[str, Any]:
        """Return what `-device` and `device_add` take for the device at place `index`."""
        options = self.options
        device = self.front_end.device(index, socket) | {"id": f"vfu{index}"}
        if options.guest is None:
            device.update(bus="pcie.0", addr=f"{FIRST_SLOT + index:#x}")
        else:
            device["bus"] = f"port{index}"
        if options.migration_events and self.migrates:
            device["migration-events"] = True
        device.update(options.device_properties)
        return device

    @property
    def migrates(self) -> bool:
        """Whether it migrates the devices, or leaves them out without a word."""
        return self.binary.front_ends[self.front_end.name]

    async def plug(self, index: int, socket: Path) -> None:
        """Plug the device on `socket` into root port `index`, which is free. Raises: QmpError."""
        await self.execute("device_add", **self._device(index, socket))

    async def unplug(self, index: int) -> None:
        """Ask the guest for the device in root port `index`, and wait until it has let go of it.

        Raises: QmpError: there is none. LabError: the guest keeps it.
        """
        seen = len(self.events)
        await self.execute("device_del", id=f"vfu{index}")
        # A guest may take its time: pciehp waits five seconds, in case the button is pressed again.
        await self.wait_event("DEVICE_DELETED", first=seen, device=f"vfu{index}")

    async def start(self) -> None:
        """Start QEMU and connect to its monitor.

        Raises: ProcessError: QEMU ended; its own message is in the text. LabError: no monitor in time.
        """
        self.process.start()
        await wait_for_socket(self.qmp_socket, self.process)
        await self.connect()

    def _check(self, what: str = "ended unexpectedly") -> None:
        self.process.check(what)

    @property
    def command_line(self) -> list[str]:
        """How it is started."""
        return self.process.argv

    async def _end_of(self, error: Exception) -> None:
        """Wait for the end of a QEMU whose monitor failed: a closed one is closed by its end."""
        with contextlib.suppress(TimeoutError):
            await self.process.wait(0.5 if isinstance(error, TimeoutError) else STOP_SECONDS)

    def _is_early(self, error: ConnectError) -> bool:
        # The socket exists before devices are realized; QEMU greets only afterwards, or dies trying. Refused:
        # bound, but not listening yet, the window between two system calls of QEMU.
        early = isinstance(error.exc, ConnectionRefusedError) or super()._is_early(error)
        return early and self.process.running

    def is_silent_under_kvm(self) -> bool:
        """Say whether KVM should run the guest and its kernel has not printed its first line."""
        try:
            return self.options.accel == "kvm" and LINUX_SPEAKS not in self.console_log.read_bytes()
        except OSError:
            return True

    def trace(self) -> list[TraceEvent]:
        """Return the VFIO trace events so far."""
        return parse_trace(self.trace_log)

    async def stop(self) -> int | None:
        """Quit QEMU by QMP, kill it when that fails, and return its exit status."""
        if self.process.running:
            with contextlib.suppress(QMPError, OSError, TimeoutError):
                await asyncio.wait_for(self._qmp.execute("quit"), STOP_SECONDS)
                await self.process.wait(STOP_SECONDS)
        status = await self.process.stop()
        self.front_end.close()
        await self.disconnect()
        return status
