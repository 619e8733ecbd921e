"""Namespaces of this machine that stand for hosts, and a network link between two of them.

    with Namespaces("net") as a, Namespaces("net") as b:
        connect(a, b)
        subprocess.run(a.enter(["ping", "-c1", "192.0.2.2"]))

An idle process holds each of them. It ends when this process closes it or dies: a crash leaves no namespace
and no interface behind, and nothing has a name in /run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Literal

from vfu_dev.closing import Closing
from vfu_dev.errors import LabError

Kind = Literal["net", "mount", "uts", "pid"]

# Both ends of a link, and what they are called within their namespace. RFC 5737: no network of anybody's.
INTERFACE = "vfu0"
ADDRESSES = (IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2"))
_PREFIX_BITS = 30
_TOOLS = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2"}

# The namespaces end with this process, and it ends at the end of its input. Orphans in the PID namespace
# become its children: because it ignores SIGCHLD, the kernel reaps them.
_HOLDER = "echo held; exec env --ignore-signal=CHLD cat >/dev/null"


class NamespaceError(LabError):
    """Namespaces, or a link between them, cannot be made; the text says what to do."""


class Namespaces(Closing):
    """A network namespace of its own, and other kinds where asked for.

    Args: kinds: which, besides those of its parent. With `pid`, everything in it ends with it, and /proc
              is its own.
    Raises: NamespaceError: not root, or a tool is missing.
    """

    def __init__(self, *kinds: Kind) -> None:
        require_namespaces()
        argv = ["unshare", *(f"--{kind}" for kind in kinds)]
        if "pid" in kinds:
            argv += ["--fork", "--kill-child", "--mount-proc"]
        self._kinds = kinds
        self._holder = subprocess.Popen(
            [*argv, "--", "sh", "-c", _HOLDER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C in a terminal goes to the command, not to the holder
        )
        assert self._holder.stdout is not None
        assert self._holder.stderr is not None
        if self._holder.stdout.readline() != "held\n":
            said = self._holder.stderr.read().strip()
            self.close()
            raise NamespaceError(f"no namespaces can be made here: {said or 'unshare ended'}")
        self.pid = self._holder.pid
        if "pid" in kinds:  # unshare waits outside for the one within
            self.pid = int(Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text())

    def enter(self, command: Sequence[str]) -> list[str]:
        """Return the command line that runs `command` in the namespaces.

        Without `pid` among them, nsenter becomes the command: same process, same signals.
        """
        return ["nsenter", f"--target={self.pid}", *(f"--{kind}" for kind in self._kinds), "--", *command]

    def run(self, *command: str) -> str:
        """Run a command in them and return what it printed. Raises: NamespaceError: it failed."""
        return _run(self.enter(command), command)

    def configure(self, *command: str) -> None:
        """Run a command in the network namespace alone: process ids are the caller's. Raises: as `run`."""
        _run(["nsenter", f"--target={self.pid}", "--net", "--", *command], command)

    def close(self) -> None:
        """Let go of them: what still runs in a PID namespace is killed."""
        for pipe in (self._holder.stdin, self._holder.stdout, self._holder.stderr):
            if pipe is not None:
                pipe.close()
        self._holder.wait()


def _run(argv: Sequence[str], command: Sequence[str]) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NamespaceError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def require_namespaces() -> None:
    """Raise NamespaceError, which says what to do, unless namespaces can be made here."""
    if lacking := sorted({package for tool, package in _TOOLS.items() if shutil.which(tool) is None}):
        raise NamespaceError(f"{', '.join(lacking)} is missing: apt-get install {' '.join(lacking)}")
    if os.geteuid() != 0:
        raise NamespaceError("hosts in namespaces of this machine need root: sudo vfu-dev ...")


def connect(first: Namespaces, second: Namespaces) -> None:
    """Join two by a pair of interfaces, with `ADDRESSES` in their order. Raises: NamespaceError."""
    pair = ["ip", "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE]
    first.configure(*pair, "netns", str(second.pid))
    for host, address in zip((first, second), ADDRESSES, strict=True):
        host.configure("ip", "address", "add", f"{address}/{_PREFIX_BITS}", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            host.configure("ip", "link", "set", interface, "up")
