"""A machine in a namespace that is reached by a real sshd, and by nothing else but its network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from serverkit import wait_until

from vfu_dev.builds import BuildError, Cache, Recipe, apt
from vfu_dev.builds.command import BuildContext
from vfu_dev.builds.making import build
from vfu_dev.vm.namespaces import ADDRESSES, NamespaceError, Namespaces, connect

ROOT = Path(__file__).parents[2]

# /etc of its own, for sshd's user; /run for its folder.
_SET_UP = """
set -e
mount -t tmpfs tmpfs /run
cp -a /etc /run/etc
mount --bind /run/etc /etc
mkdir /run/sshd
getent passwd sshd >/dev/null || useradd --system --home-dir /run/sshd --shell /usr/sbin/nologin sshd
sed -i 's/^root:[^:]*:/root:*:/' /etc/shadow
"""
_CONFIG = """\
Port 22
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
"""
_CLIENT = """\
Host far
    HostName {address}
    User root
    IdentityFile {folder}/key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    StrictHostKeyChecking accept-new
"""


def _make(context: BuildContext, out: Path) -> dict[str, object]:
    """Unpack the package. Installing it would start a daemon on the machine that runs the tests."""
    private = apt.PrivateApt(context.cache.root / "apt" / "machine")
    private.update(context, "fetch package lists")
    private.download(context, ["openssh-server"], out)
    (package,) = out.glob("*.deb")
    context.run(["dpkg-deb", "-x", package, out / "root"], title="unpack openssh-server", cwd=out)
    shutil.move(out / "root/usr/sbin/sshd", out / "sshd")
    package.unlink()
    return {"package": package.name}


SSHD = Recipe(
    name="openssh-server", summary="sshd for tests", product="", inputs=lambda: {"v": 1}, make=_make
)


def sshd() -> Path:
    """Return the machine's own sshd, else Debian's, unpacked."""
    found = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    return Path(found) if found else build(SSHD, Cache()).path / "sshd"


@dataclass
class FarMachine:
    """It, and the machine that reaches it; `client` is ssh's configuration, in which it is called `far`."""

    near: Namespaces
    far: Namespaces
    folder: Path
    program: Path

    @property
    def url(self) -> str:
        """What `--destination` takes."""
        return f"ssh://far{self.program}"

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command of vfu-dev on the near machine, to its end."""
        with self.start(*command) as process:
            out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command of vfu-dev on the near machine."""
        return subprocess.Popen(
            self.near.enter([sys.executable, "-m", "vfu_dev", *command]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | self.environment,
        )

    @property
    def environment(self) -> dict[str, str]:
        """What the near machine's commands need to reach the other."""
        return {"VFU_DEV_SSH": f"ssh -F {self.folder}/config", "PYTHONPATH": str(ROOT)}


@contextmanager
def far_machine() -> Iterator[FarMachine]:
    """Yield one with a running sshd."""
    if shutil.which("ssh") is None:
        pytest.skip("no ssh: make test-packages")
    try:
        daemon = sshd()
    except BuildError as error:
        pytest.skip(str(error))
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="vfu-ssh-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            near = stack.enter_context(Namespaces("net"))
        except NamespaceError as error:
            pytest.skip(str(error))
        far = stack.enter_context(Namespaces("net", "mount", "uts", "pid"))
        connect(near, far)
        for name in ("host_key", "key"):
            keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(keygen, check=True)
        places = {"folder": folder, "address": ADDRESSES[1]}
        (folder / "sshd_config").write_text(_CONFIG.format(**places))
        (folder / "config").write_text(_CLIENT.format(**places))
        program = folder / "vfu-dev"
        program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m vfu_dev "$@"\n')
        program.chmod(0o755)
        far.run("bash", "-c", _SET_UP)
        log = folder / "sshd.log"
        server = subprocess.Popen(
            far.enter([str(daemon), "-D", "-E", str(log), "-f", str(folder / "sshd_config")])
        )
        stack.callback(server.wait)
        stack.callback(server.kill)
        wait_until(lambda: log.exists() and "Server listening" in log.read_text(), "sshd listens")
        yield FarMachine(near, far, folder, program)
