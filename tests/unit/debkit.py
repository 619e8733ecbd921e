"""A made-up Debian: tiny packages built by dpkg-deb, in a signed repository on disk.

Its `qemu-system-x86` is a program that says what it was started with. It is linked with a library of its own
and with this machine's libc, which the package `libc6` carries, so that the loader has to find both.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = "usr/lib/x86_64-linux-gnu"
VERSION = "1:10.0.2+ds-1"

PROGRAM = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int tiny(void);
int main(int argc, char **argv)
{
    if (argc > 1 && !strcmp(argv[1], "--version")) {
        printf("QEMU emulator version 10.0.%d (Tiny)\n", tiny());
        return 0;
    }
    for (int i = 0; i < argc; i++)
        printf("arg %s\n", argv[i]);
    const char *names[] = {"LD_LIBRARY_PATH", "LD_PRELOAD", "QEMU_MODULE_DIR", NULL};
    for (const char **name = names; *name; name++)
        printf("%s=%s\n", *name, getenv(*name) ? getenv(*name) : "");
    fflush(stdout);
    return system("cat /proc/self/maps > /dev/null && echo child runs");
}
"""


@dataclass(frozen=True)
class Deb:
    """One package: control fields, and files as path -> content or file to copy."""

    name: str
    section: str
    depends: str
    files: dict[str, bytes | Path]
    architecture: str = "amd64"


def compile_c(out: Path, source: str, *flags: str | Path) -> Path:
    """Compile the C text `source` to `out`."""
    command = ["cc", "-x", "c", "-", "-x", "none", "-o", out, *flags]
    subprocess.run(command, input=source.encode(), check=True, capture_output=True)
    return out


def packages(folder: Path) -> list[Deb]:
    """Compile what the packages contain, below `folder`, and return them."""
    folder.mkdir()
    library = compile_c(
        folder / "libtiny.so.1",
        "int tiny(void) { return 2; }",
        "-shared",
        "-fPIC",
        "-Wl,-soname,libtiny.so.1",
    )
    sound = compile_c(
        folder / "libsound.so.1",
        "int sound(void) { return 2; }",
        "-shared",
        "-fPIC",
        "-Wl,-soname,libsound.so.1",
    )
    program = compile_c(folder / "program", PROGRAM, library)
    quiet = compile_c(folder / "accel-qtest.so", "int quiet;", "-shared", "-fPIC")
    loud = compile_c(
        folder / "audio-sound.so",
        "int sound(void); int loud(void) { return sound(); }",
        *("-shared", "-fPIC"),
        sound,
    )
    system = Path("/lib/x86_64-linux-gnu")
    libc = {
        f"{LIBRARIES}/{name}": (system / name).resolve() for name in ("libc.so.6", "ld-linux-x86-64.so.2")
    }
    modules = {f"{LIBRARIES}/qemu/{path.name}": path for path in (quiet, loud)}
    return [
        Deb(
            "qemu-system-x86",
            "otherosfs",
            f"libtiny1 (>= 1), libc6, qemu-system-common (= {VERSION}), "
            "qemu-system-data, seabios (>> 1), adduser",
            {"usr/bin/qemu-system-x86_64": program, "usr/bin/qemu-system-i386": program},
        ),
        Deb("qemu-system-common", "otherosfs", "libsound1", {**modules, "usr/share/doc/a": b"a"}),
        Deb("qemu-system-data", "otherosfs", "", {"usr/share/qemu/linuxboot_dma.bin": b"rom"}, "all"),
        Deb("seabios", "otherosfs", "", {"usr/share/seabios/bios-256k.bin": b"bios"}, "all"),
        # As some of Debian 12 do, this one unpacks to /lib.
        Deb("libtiny1", "libs", "libc6, debconf | adduser", {"lib/x86_64-linux-gnu/libtiny.so.1": library}),
        Deb("libsound1", "libs", "libc6", {f"{LIBRARIES}/libsound.so.1": sound}),
        Deb("libc6", "libs", "", {**libc}),
        Deb("adduser", "admin", "", {"usr/sbin/adduser": b"#!/bin/sh\n"}, "all"),
    ]


def build_debs(debs: Sequence[Deb], into: Path) -> None:
    """Build the .deb files under the names that apt gives what it downloads."""
    into.mkdir(parents=True)
    for deb in debs:
        tree = into / f"{deb.name}.tree"
        (tree / "DEBIAN").mkdir(parents=True)
        fields = {
            "Package": deb.name,
            "Version": VERSION,
            "Section": deb.section,
            "Architecture": deb.architecture,
            "Maintainer": "A <a@example.org>",
            "Depends": deb.depends,
            "Description": "tiny",
        }
        control = "".join(f"{name}: {value}\n" for name, value in fields.items() if value)
        (tree / "DEBIAN/control").write_text(control)
        for name, content in deb.files.items():
            path = tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copy(content, path)
            else:
                path.write_bytes(content)
        name = f"{deb.name}_{VERSION.replace(':', '%3a')}_{deb.architecture}.deb"
        command = ["dpkg-deb", "--root-owner-group", "-Znone", "-b", tree, into / name]
        subprocess.run(command, check=True, capture_output=True)
        shutil.rmtree(tree)


class Signer:
    """A key pair made for one test run."""

    def __init__(self, home: Path) -> None:
        home.mkdir(mode=0o700)
        self._environment = os.environ | {"GNUPGHOME": str(home)}
        self._gpg("--passphrase", "", "--quick-gen-key", "tiny@example.org", "ed25519")
        self.keyring = home / "keyring.gpg"
        self._gpg("--output", str(self.keyring), "--export")

    def _gpg(self, *arguments: str) -> None:
        command = ["gpg", "--batch", "--quiet", "--pinentry-mode", "loopback", *arguments]
        subprocess.run(command, env=self._environment, check=True, capture_output=True)

    def sign(self, release: Path) -> None:
        """Write the InRelease file beside `release`."""
        self._gpg("--output", str(release.with_name("InRelease")), "--clearsign", str(release))


def publish(root: Path, debs: Path, suite: str, signer: Signer | None) -> None:
    """Make `debs`, which may be an empty folder, the suite `suite` of the mirror at `root`."""
    pool = root / "pool" / suite
    shutil.copytree(debs, pool)
    scan = ["dpkg-scanpackages", "--multiversion", f"pool/{suite}"]
    index = subprocess.run(scan, cwd=root, check=True, capture_output=True).stdout
    place = root / "dists" / suite
    (place / "main/binary-amd64").mkdir(parents=True)
    (place / "main/binary-amd64/Packages").write_bytes(index)
    digest = hashlib.sha256(index).hexdigest()
    (place / "Release").write_text(
        f"Suite: {suite}\nCodename: {suite}\nComponents: main\nArchitectures: amd64\n"
        f"Date: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n {digest} {len(index)} main/binary-amd64/Packages\n"
    )
    if signer is not None:
        signer.sign(place / "Release")
