"""A network link between two hosts that are namespaces of this machine, as slow as asked for.

    with LinkedHosts(LinkSpec.parse("1Gbit,delay=5ms")) as linked:
        linked.enter(0)                 # what a command line of the source begins with
        linked.listen_uri, linked.uri   # for QEMU's migrate-incoming, and migrate

The rate is the kernel's (tbf), on both ends of the link. Delay and loss are too where it has netem; otherwise
a relay in the source's namespace delays, and loss is refused.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfu_dev.closing import Closing
from vfu_dev.errors import ConfigError, shown
from vfu_dev.sizes import parse_bandwidth
from vfu_dev.vm.namespaces import ADDRESSES, INTERFACE, NamespaceError, Namespaces, connect
from vfu_dev.vm.own_device import package_environment

PORT = 4444
# The bucket of tbf holds what the rate brings in this time: it is filled less often than packets come.
BURST_SECONDS = 0.002
MIN_BURST_BYTES = 64 << 10  # the largest packet that TCP hands to an interface
# What waits for the link beyond that is dropped, as a switch does it.
QUEUE_SECONDS = 0.05
# What netem holds on to: packets of a link of 100 Gbit/s and 50 ms.
_NETEM_PACKETS = 1 << 20
# A relay's buffer where the link has no rate.
_ROOM_BYTES = 64 << 20

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_EXAMPLES = "examples: 1Gbit; 100Mbit,delay=5ms; 10Gbit,delay=200us,loss=0.1%"


@dataclass(frozen=True)
class LinkSpec:
    """The properties of a link, each way. A value of 0 leaves the machine's own.

    Attributes:
        text: as it was asked for.
        rate_bytes: a second.
        loss: share of packets, 0 to 1.
    """

    text: str
    rate_bytes: int = 0
    delay_seconds: float = 0.0
    loss: float = 0.0

    @classmethod
    def parse(cls, text: str) -> LinkSpec:
        """Return what `text` says: a rate in bits, `delay=`, `loss=`, each at most once.

        Raises: ConfigError: it says something else.
        """
        values: dict[str, Any] = {}
        for part in text.split(","):
            key, equals, value = part.strip().partition("=")
            if not equals:
                key, value = "rate", key
            if key in values:
                raise ConfigError(f"{shown(text)}: {key} twice ({_EXAMPLES})")
            try:
                values[key] = _PARSERS[key](value)
            except (KeyError, ValueError) as error:
                what = str(error) if isinstance(error, ValueError) else f"unknown: {shown(key)}"
                raise ConfigError(f"{shown(text)}: {what} ({_EXAMPLES})") from None
        return cls(text, values.get("rate", 0), values.get("delay", 0.0), values.get("loss", 0.0))


def _rate(text: str) -> int:
    if "bit" not in text.lower():
        raise ValueError(f"{shown(text)}: a link's rate is in bits, decimal")
    rate = parse_bandwidth(text)
    if rate < 1000:
        raise ValueError(f"{shown(text)}: at least 8kbit")
    return rate


def _delay(text: str) -> float:
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(us|ms|s)", text)
    if found is None:
        raise ValueError(f"{shown(text)}: a delay has a unit: us, ms or s")
    return float(found[1]) * _SECONDS[found[2]]


def _loss(text: str) -> float:
    found = re.fullmatch(r"(\d{1,2}(?:\.\d{1,9})?)%", text)
    if found is None:
        raise ValueError(f"{shown(text)}: loss is in percent, below 100%")
    return float(found[1]) / 100


_PARSERS = {"rate": _rate, "delay": _delay, "loss": _loss}


def shaping(spec: LinkSpec, netem: bool) -> list[list[str]]:
    """Return the queueing disciplines that make an interface like `spec`, as words of `tc qdisc add`."""
    found = []
    parent = ["root"]
    if netem and (spec.delay_seconds or spec.loss):
        words = ["netem", "limit", str(_NETEM_PACKETS)]
        if spec.delay_seconds:
            words += ["delay", f"{spec.delay_seconds * 1e6:.0f}us"]
        if spec.loss:
            words += ["loss", f"{spec.loss * 100:g}%"]
        found.append(["root", "handle", "1:", *words])
        parent = ["parent", "1:", "handle", "2:"]
    if spec.rate_bytes:
        burst = max(MIN_BURST_BYTES, round(spec.rate_bytes * BURST_SECONDS))
        limit = burst + max(MIN_BURST_BYTES, round(spec.rate_bytes * QUEUE_SECONDS))
        rate = f"{spec.rate_bytes * 8}bit"
        found.append([*parent, "tbf", "rate", rate, "burst", str(burst), "limit", str(limit)])
    return found


class LinkedHosts(Closing):
    """Two hosts, 0 and 1, and the link between them.

    Raises: NamespaceError: they cannot be made here. ConfigError: the link has loss, which needs netem.
    """

    def __init__(self, spec: LinkSpec) -> None:
        self.spec = spec
        self._relay: subprocess.Popen[str] | None = None
        self._hosts = [Namespaces("net")]
        try:
            self._hosts.append(Namespaces("net"))
            connect(*self._hosts)
            self.netem = self._has_netem()
            if spec.loss and not self.netem:
                raise ConfigError(f"--link {spec.text}: loss needs the kernel's netem, which this one lacks")
            for host in self._hosts:
                for words in shaping(spec, self.netem):
                    host.run("tc", "qdisc", "add", "dev", INTERFACE, *words)
            if spec.delay_seconds and not self.netem:
                self._relay = self._start_relay()
        except BaseException:
            self.close()
            raise

    def _has_netem(self) -> bool:
        device = ["dev", INTERFACE, "root"]
        try:
            self._hosts[0].run("tc", "qdisc", "add", *device, "netem")
        except NamespaceError:
            return False
        self._hosts[0].run("tc", "qdisc", "del", *device)
        return True

    def _start_relay(self) -> subprocess.Popen[str]:
        spec = self.spec
        room = round(spec.rate_bytes * spec.delay_seconds) or _ROOM_BYTES
        # QEMU counts bytes in a sender's buffer as sent: the buffer holds no more than the link. With Linux's
        # 4 MiB a move over 100 Mbit and 5 ms stood still for 714 ms, so for 320 ms; without a relay 393 ms.
        most = max(room, MIN_BURST_BYTES)
        self.run(0, "sh", "-c", f"echo 4096 {MIN_BURST_BYTES} {most} >/proc/sys/net/ipv4/tcp_wmem")
        where = ["127.0.0.1", str(PORT), str(ADDRESSES[1]), str(PORT)]
        command = [sys.executable, "-m", "vfu_dev.vm.relay", *where, str(spec.delay_seconds), str(room)]
        started = subprocess.Popen(
            self.enter(0, command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=package_environment(),
            start_new_session=True,
        )
        assert started.stdout is not None
        if started.stdout.readline() != "listening\n":
            raise NamespaceError(f"the relay of --link ended with status {started.wait()}")
        return started

    def enter(self, host: int, command: Sequence[str] = ()) -> list[str]:
        """Return the command line that runs `command` on a host; without one, what it begins with."""
        return self._hosts[host].enter(command)

    def run(self, host: int, *command: str) -> str:
        """Run a command on a host and return what it printed. Raises: NamespaceError: it failed."""
        return self._hosts[host].run(*command)

    @property
    def listen_uri(self) -> str:
        """Where the destination, host 1, listens."""
        return f"tcp:{ADDRESSES[1]}:{PORT}"

    @property
    def uri(self) -> str:
        """Where the source, host 0, migrates to."""
        return f"tcp:127.0.0.1:{PORT}" if self._relay is not None else self.listen_uri

    def carried_bytes(self) -> int:
        """Return how many bytes host 0 has sent over the link so far, headers included."""
        for line in Path(f"/proc/{self._hosts[0].pid}/net/dev").read_text().splitlines():
            name, _, figures = line.partition(":")
            if name.strip() == INTERFACE:
                return int(figures.split()[8])
        return 0

    def describe(self) -> dict[str, Any]:
        """Return for a report the link asked for and what makes it."""
        spec = self.spec
        slow = "netem" if self.netem else "relay"
        return {
            "asked": spec.text,
            "rate_bytes_per_second": spec.rate_bytes or None,
            "delay_seconds": spec.delay_seconds or None,
            "loss": spec.loss or None,
            "rate_by": "tbf" if spec.rate_bytes else None,
            "delay_by": slow if spec.delay_seconds else None,
            "loss_by": slow if spec.loss else None,
        }

    def close(self) -> None:
        """Take the link and the hosts away."""
        if self._relay is not None:
            for pipe in (self._relay.stdin, self._relay.stdout):
                if pipe is not None:
                    pipe.close()
            self._relay.wait()
            self._relay = None
        for host in self._hosts:
            host.close()
