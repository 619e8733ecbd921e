"""Our QEMU has what docs/libvirt.md says that ordinary domains find in it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from serverkit import PATIENCE_SECONDS


def said(qemu: Path, *options: str, stdin: str = "") -> str:
    """Run QEMU without a VM's own devices; returns what it printed. It has to end with status 0."""
    command = [qemu, "-nodefaults", "-display", "none", "-machine", "q35", "-S", *options]
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr  # QEMU lists TPM's on the second


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("-netdev", {"user", "vhost-user"}),
        ("-tpmdev", {"emulator"}),
        ("-object", {"tls-creds-x509", "memory-backend-memfd"}),
    ],
)
def test_what_its_help_lists(qemu: Path, option: str, parts: set[str]) -> None:
    assert parts <= set(said(qemu, option, "help").split())


def test_a_domains_options_start(qemu: Path, tmp_path: Path) -> None:
    """libvirt's sandbox, slirp and io_uring, with firmware that nothing but the build names (no -L)."""
    (tmp_path / "disk").write_bytes(bytes(1 << 16))
    sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    disk = f"driver=file,filename={tmp_path / 'disk'},node-name=disk0,aio=io_uring"
    network = ["-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0,romfile="]
    options = ["-sandbox", sandbox, "-blockdev", disk, "-device", "virtio-blk-pci,drive=disk0", *network]
    monitor = said(qemu, *options, "-monitor", "stdio", stdin="info network\ninfo block\nquit\n")
    assert "net0: index=0,type=user" in monitor
    assert "disk0" in monitor
