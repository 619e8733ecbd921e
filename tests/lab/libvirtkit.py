"""Two hosts with libvirt on this machine: namespaces, each with a libvirtd and folders of its own."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from serverkit import wait_until

from vfu_dev.builds import BuildError, Cache, Recipe, apt
from vfu_dev.builds.command import BuildContext
from vfu_dev.builds.making import build
from vfu_dev.vm.namespaces import ADDRESSES, NamespaceError, Namespaces, connect

ROOT = Path(__file__).parents[2]
# Hosts are reached by name, as real ones are.
NAMES = ("a", "b")

# What a host has of its own. /etc is a copy: configuration, and each host's name and peers.
_SET_UP = """
hostname {name}
for folder in /run /var/lib/libvirt /var/log/libvirt /var/cache/libvirt; do
    mkdir -p $folder
    mount -t tmpfs tmpfs $folder
done
mkdir -p /run/lock
cp -a /etc /run/etc
mount --bind /run/etc /etc
if [ -n "{packages}" ]; then
    mount -t overlay overlay -o lowerdir={packages}/usr:/usr /usr
    # Drivers of the other version are no drivers.
    drivers=/usr/lib/x86_64-linux-gnu/libvirt
    mount --bind {packages}$drivers $drivers
    cp -a {packages}/etc/libvirt /etc
fi
cat >>/etc/hosts <<'END'
{peers}
END
mkdir -p /run/bin
cat >/run/bin/systemctl <<'END'
{systemctl}
END
chmod 755 /run/bin/systemctl
cat >>/etc/libvirt/libvirtd.conf <<END
host_uuid = "{uuid}"
auth_unix_rw = "none"
listen_tls = 0
listen_tcp = 1
auth_tcp = "none"
END
# For a namespace without systemd; a real host needs none of it. Both hosts' QEMUs have the same files: the
# one must not give them to another owner under the other.
cat >>/etc/libvirt/qemu.conf <<END
cgroup_controllers = [ ]
namespaces = [ ]
stdio_handler = "file"
dynamic_ownership = 0
END
"""

_SUITE = "bookworm-backports"
_NEWER = (
    "libvirt0",
    "libvirt-clients",
    "libvirt-common",
    "libvirt-daemon",
    "libvirt-daemon-common",
    "libvirt-daemon-driver-qemu",
)

# No systemd runs here, so this is the one command that the page asks of it.
_SYSTEMCTL = """\
#!/bin/sh -e
[ "$*" = "restart libvirtd" ] || { echo "systemctl $*: only restart libvirtd is known here" >&2; exit 1; }
if pid=$(cat /run/libvirtd.pid 2>/dev/null); then
    kill $pid
    while kill -0 $pid 2>/dev/null; do sleep 0.05; done
fi
libvirtd --daemon --listen --pid-file /run/libvirtd.pid >>/var/log/libvirt/libvirtd.out 2>&1 </dev/null
until virsh -c qemu:///system list >/dev/null 2>&1; do
    kill -0 $(cat /run/libvirtd.pid)
    sleep 0.05
done
"""


class LibvirtHost:
    """One host; `shell` types into the one console that it has."""

    def __init__(
        self,
        name: str,
        namespaces: Namespaces,
        folder: Path,
        packages: Path | None,
        environment: dict[str, str],
    ) -> None:
        self.name = name
        self.namespaces = namespaces
        self._folder = folder
        self._scripts = 0
        self._log = folder / f"{name}.out"
        tools = f"/run/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        with self._log.open("w") as out:  # a file: a pipe would stay open with what is in the background
            self._console = subprocess.Popen(
                namespaces.enter(["bash", "-e"]),
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                bufsize=1,
                cwd="/",
                env=os.environ | {"PATH": tools, "PYTHONPATH": str(ROOT)} | environment,
            )
        peers = "\n".join(f"{address} {peer}" for peer, address in zip(NAMES, ADDRESSES, strict=True))
        values = {"name": name, "peers": peers, "uuid": uuid.uuid4(), "systemctl": _SYSTEMCTL}
        self.shell(_SET_UP.format(**values, packages=packages or ""))

    def shell(self, script: str) -> str:
        """Run commands up to the first that fails, and return all that they said. It has to be none."""
        self._scripts += 1
        file, done = (self._folder / f"{self.name}-{self._scripts:02}.{end}" for end in ("sh", "done"))
        file.write_text(script)
        before = self._log.stat().st_size
        assert self._console.stdin is not None
        # Two lines: errexit does not hold in what stands before `&&`.
        self._console.stdin.write(f". {file} </dev/null\n: >{done}\n")
        ended = self._console.poll
        wait_until(lambda: done.exists() or ended() is not None, f"on host {self.name}:\n{script}")
        said = self._log.read_bytes()[before:].decode(errors="replace")
        if not done.exists():
            pytest.fail(f"on host {self.name}:\n{script}\nsaid:\n{said}\n{self.logs()}")
        return said

    def logs(self) -> str:
        """Return the ends of what libvirt, QEMU and the servers wrote there."""
        tail = "tail -n 15 /var/log/libvirt/libvirtd.out /var/log/libvirt/qemu/*.log /run/vfu/*.log 2>&1"
        return self.namespaces.run("sh", "-c", f"{tail} || true")

    def close(self) -> None:
        """Hang up."""
        assert self._console.stdin is not None
        self._console.kill()
        self._console.stdin.close()
        self._console.wait()


def _inputs() -> dict[str, object]:
    return {"packages": _NEWER, "suite": _SUITE}


def _make(context: BuildContext, out: Path) -> dict[str, object]:
    """Unpack the packages. Installing them would take the place of the machine's own libvirt."""
    reasons = []
    for mirror in apt.mirrors(context):
        private = apt.PrivateApt(out / "apt", apt.binary_line(mirror, _SUITE, "amd64"))
        try:
            private.update(context, f"fetch package lists of {_SUITE}")
            private.download(context, [f"{name}/{_SUITE}" for name in _NEWER], out)
            break
        except BuildError as error:
            reasons.append(f"{mirror}: {error}")
    else:
        raise BuildError("; ".join(reasons))
    packages = sorted(out.glob("*.deb"))
    for package in packages:
        context.run(["dpkg-deb", "-x", package, out / "root"], title="unpack libvirt", cwd=out)
        package.unlink()
    shutil.rmtree(out / "apt")
    return {"packages": [package.name for package in packages]}


NEWER = Recipe(name="libvirt-backports", summary="libvirt for tests", product="", inputs=_inputs, make=_make)


def newer_libvirt() -> Path:
    """Return the folder in which the libvirt of Debian 12's backports is unpacked. Skips on other systems."""
    if platform.freedesktop_os_release().get("VERSION_CODENAME") != "bookworm":
        pytest.skip(f"{_SUITE} is for Debian 12, whose own libvirt is older")
    return build(NEWER, Cache()).path / "root"


def require_libvirt() -> None:
    """Skip where there is no libvirt, or no root for namespaces."""
    for program in ("libvirtd", "virsh"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program}: make test-packages")


@contextmanager
def libvirt_hosts(
    packages: Path | None = None, **environment: str
) -> Iterator[tuple[LibvirtHost, LibvirtHost]]:
    """Yield two hosts, `a` and `b`, joined by a network.

    Args: packages: where a libvirt is unpacked that they have in place of the machine's.
          environment: of their consoles.
    """
    require_libvirt()
    folder = Path(tempfile.mkdtemp(prefix="vfu-libvirt-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            both = [stack.enter_context(Namespaces("net", "mount", "uts", "pid")) for _ in NAMES]
        except NamespaceError as error:
            pytest.skip(str(error))
        connect(both[0], both[1])
        first, second = (
            stack.enter_context(closing(LibvirtHost(name, one, folder, packages, environment)))
            for name, one in zip(NAMES, both, strict=True)
        )
        yield first, second
