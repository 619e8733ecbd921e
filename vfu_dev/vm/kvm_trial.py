"""Whether KVM runs a guest here. That /dev/kvm answers says little: inside some virtual machines it does, and
a guest's first instructions run, but Linux never reaches its first message."""

from __future__ import annotations

import selectors
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from vfu_dev.builds.qemu_binary import QemuBinary
from vfu_dev.errors import LabError

# The first line that Linux prints. It comes half a second after the start where KVM works.
LINUX_SPEAKS = b"Linux version "
# Options of a guest's kernel with which it prints that line before it has found its serial port.
LOUD = "console=ttyS0 earlyprintk=ttyS0"
KVM_SECONDS = 10.0


@dataclass(frozen=True)
class KvmTrial:
    """Whether the guest's kernel spoke within `KVM_SECONDS`, after how long, and what QEMU said."""

    runs: bool
    seconds: float
    said: str


def try_kvm(
    qemu: QemuBinary, guest: Path, accel: str = "kvm", limit_seconds: float = KVM_SECONDS
) -> KvmTrial:
    """Start the kernel of the artifact folder `guest` until it prints its first line.

    Args: accel: another one than KVM, to compare with.
    Raises: LabError: QEMU cannot be started.
    """
    command: list[str | Path] = [qemu.path]
    for folder in qemu.firmware:
        command += ["-L", folder]
    command += ["-machine", "q35", "-accel", accel, "-m", "256M", "-nodefaults", "-no-user-config"]
    command += ["-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", guest / "vmlinuz"]
    command += ["-append", f"{LOUD} panic=-1"]
    began = time.monotonic()
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except OSError as error:
        raise LabError(f"{qemu.path} does not run: {error}") from error
    assert process.stdout is not None
    seen = b""
    with process, selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while LINUX_SPEAKS not in seen and (left := began + limit_seconds - time.monotonic()) > 0:
            if not selector.select(left):
                break
            if not (chunk := process.stdout.read1(1 << 16)):  # type: ignore[attr-defined]
                break
            seen += chunk
        seconds = time.monotonic() - began
        process.kill()
        assert process.stderr is not None
        said = process.stderr.read().decode(errors="replace").strip()
    return KvmTrial(LINUX_SPEAKS in seen, seconds, said)
