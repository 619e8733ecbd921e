"""`vfu-dev attach`: adds the devices to a command line that the user wrote.

attached = attach([Path("/run/vfu/dev0.sock")], ["qemu-system-x86_64", "-m", "512M"], preload)
print(attached.text())      # or attached.execute(), which does not return
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from vfu_dev.attach.front_end import VfioPci, choose_iommu, preload_for
from vfu_dev.attach.preload import AttachError, Descriptors, Preload, inherited_environment, make_sysfs
from vfu_dev.builds.qemu_binary import (
    IOMMUFD_CDEV,
    IOMMUFD_FD,
    VFIO_PCI,
    preload_first,
    preload_problem,
    probe_qemu,
)
from vfu_dev.errors import ConfigError

# As a shell, env(1) and nohup(1) say that they could not start a command.
EXIT_CANNOT_RUN, EXIT_NOT_FOUND = 126, 127

# Not QEMU's tools: qemu-img has no devices.
_QEMU = re.compile(r"(qemu-system-\w+|qemu-kvm|kvm)$")
_NO_QEMU = "; give the path of a QEMU, 10.0 or newer: `vfu-dev doctor` lists those found"
_SYSFSDEV = re.compile(r"%sysfsdev(\d+)%")
# Every spelling of a shared memory backend. A backend of type shm is always shared.
_SHARED = re.compile(r"\bshare=(on|yes|true|y)\b|\"share\":\s*true|memory-backend-shm")
# These options name files with further options; attach does not read the files.
_HIDDEN = ("-readconfig", "--readconfig")
# The lowest descriptor that is no standard stream. Every shell can open descriptors up to 9.
_FIRST_DESCRIPTOR = 3


@dataclass(frozen=True)
class Attached:
    """What to start.

    Attributes:
        argv: the whole command line.
        environment: variables to add.
        descriptors: numbers of the descriptors to open on /dev/null.
        notes: warnings for the user, to be shown before the start.
    """

    argv: tuple[str, ...]
    environment: dict[str, str]
    descriptors: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Return it as lines to paste into a shell; numbers above 9 need bash."""
        words = ["env", *(f"{name}={value}" for name, value in self.environment.items())]
        lines = [" ".join(shlex.quote(word) for word in words)]
        # An option and its value stay on one line.
        for word in self.argv:
            quoted = shlex.quote(word)
            if word.startswith("-") or len(lines) == 1:
                lines.append(quoted)
            else:
                lines[-1] += f" {quoted}"
        if self.descriptors:
            lines.append(" ".join(f"{number}<>/dev/null" for number in self.descriptors))
        return " \\\n  ".join(lines)

    def execute(self) -> NoReturn:
        """Become the command; if it cannot be started, say why and end with 126 or 127."""
        for number in self.descriptors:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        # A child inherits ignored signals, and Python ignores these two.
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(ignored, signal.SIG_DFL)
        program = self.argv[0]
        try:
            os.execvpe(program, self.argv, inherited_environment() | self.environment)
        except OSError as error:
            hint = _NO_QEMU if error.errno == errno.ENOENT and _QEMU.search(program) else ""
            print(f"vfu-dev attach: {program}: {error.strerror}{hint}", file=sys.stderr)
            sys.exit(EXIT_NOT_FOUND if error.errno in (errno.ENOENT, errno.ENOTDIR) else EXIT_CANNOT_RUN)


def attach(
    sockets: Sequence[Path], command: Sequence[str], preload: Preload, iommu: str | None = None
) -> Attached:
    """Return what to start so that `command` has the devices on `sockets`, and make their folders.

    A QEMU gets `-object` and `-device` at the end, unless an argument contains `%sysfsdev0%` (`%sysfsdev1%`,
    …), which becomes the path of that device's folder. Any other program gets the environment alone.

    Args: iommu: by default the first of IOMMU_PATHS that the QEMU has.
    Raises: ConfigError: a placeholder has no socket. AttachError, QemuBinaryError: it cannot be used.
    """
    sockets = [Path(os.path.abspath(socket)) for socket in sockets]
    placed = {int(number) for word in command for number in _SYSFSDEV.findall(word)}
    if unknown := [number for number in sorted(placed) if number >= len(sockets)]:
        raise ConfigError(f"%sysfsdev{unknown[0]}%: there are {len(sockets)} sockets, counted from 0")
    if placed and iommu == IOMMUFD_FD:
        raise ConfigError("%sysfsdev0%: with iommufd-fd a device is a descriptor and has no folder in sysfs")
    program, is_qemu = _find_program(command)
    notes: list[str] = []
    if is_qemu:
        binary = probe_qemu(program)
        preload = preload_for(binary, preload)
        binary.require(VFIO_PCI)
        iommu = choose_iommu(binary, iommu)
        if not any(_SHARED.search(word) or word in _HIDDEN for word in command):
            notes.append(
                "guest RAM is not shared: all DMA of the device goes by message, which "
                "works but is slower; to share it: -machine ...,memory-backend=ram0 "
                "-object memory-backend-memfd,id=ram0,size=...,share=on"
            )
    else:
        if problem := preload_problem(program):
            raise AttachError(f"{program} {problem}, so it cannot reach a vfio-user server")
        preload = replace(preload, first=preload_first(program))
        iommu = iommu or IOMMUFD_CDEV
        if not placed:
            notes.append(
                f"{program.name} is not called qemu-system-...: nothing is appended to its command line. "
                "Where it takes a device's folder in sysfs, write %sysfsdev0%"
            )
    descriptors = None
    if iommu == IOMMUFD_FD:
        descriptors = Descriptors.numbered(_free_descriptors(len(sockets) + 1))
    front_end = VfioPci(iommu, preload, descriptors)
    environment = front_end.environment(sockets)
    if placed or not is_qemu:
        folders = {number: make_sysfs(socket, number) for number, socket in enumerate(sockets)}
        appended: list[str] = []
        command = [_SYSFSDEV.sub(lambda found: str(folders[int(found[1])]), word) for word in command]
    else:
        for socket in sockets:
            _require_server(socket)
        appended = _arguments(front_end, sockets)
    return Attached((*command, *appended), environment, front_end.descriptors, tuple(notes))


def _find_program(command: Sequence[str]) -> tuple[Path, bool]:
    """Return the program that gets the devices, and whether it is a QEMU.

    Another program may start the QEMU: `gdb --args qemu-system-x86_64 …`, `taskset -c 0 …`.
    """
    for word in command:
        if _QEMU.search(os.path.basename(word)) and (found := shutil.which(word)) is not None:
            return Path(found), True
    if (found := shutil.which(command[0])) is None:
        # This prints the shell's message and ends with the shell's status.
        Attached(tuple(command), {}).execute()
    return Path(found), False


def _free_descriptors(count: int) -> list[int]:
    """Return the lowest unused descriptors; the command may need to inherit the open ones."""
    numbers = itertools.count(_FIRST_DESCRIPTOR)
    return list(itertools.islice((number for number in numbers if not _is_open(number)), count))


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _require_server(socket: Path) -> None:
    """Raise now the error that QEMU would end with later. With a placeholder the server may start later."""
    if not socket.exists():
        raise AttachError(f"{socket}: no such socket; start a server: vfu-dev serve --socket {socket}")
    if not socket.is_socket():
        raise AttachError(f"{socket} is not a socket")


def _arguments(front_end: VfioPci, sockets: Sequence[Path]) -> list[str]:
    """Return `-object` and `-device` arguments in key=value form."""
    arguments = []
    for one in front_end.objects():
        arguments += ["-object", _keyval(one.pop("qom-type"), one)]
    for number, socket in enumerate(sockets):
        device = front_end.device(number, socket)
        arguments += ["-device", _keyval(device.pop("driver"), {"id": f"vfu{number}"} | device)]
    return arguments


def _keyval(first: str, properties: dict[str, Any]) -> str:
    """Return QEMU's key=value form, in which a comma of a value is written twice."""
    return ",".join([first, *(f"{key}={str(value).replace(',', ',,')}" for key, value in properties.items())])
