"""The route of a migration from one host to the other, and its measurements.

By default it is a UNIX socket. Between network namespaces it is TCP, over a link that may be slow.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vfu_dev.errors import LabError
from vfu_dev.lab.options import MigrateOptions, QemuChoice
from vfu_dev.vm.network import LinkedHosts, LinkSpec
from vfu_dev.vm.qemu import Qemu

# The shortest stretch that a rate is taken over: QEMU sends in bursts, and rests.
STRETCH_SECONDS = 0.5


class Route(ABC):
    """From the source's QEMU to the destination's."""

    def place(self, choice: QemuChoice, incoming: bool) -> QemuChoice:
        """Return `choice`, started where this side's end of the route is."""
        return choice

    @abstractmethod
    async def listen(self, destination: Qemu) -> str:
        """Make `destination` listen and return the address to migrate to. Raises: QmpError."""

    def sample(self) -> dict[str, Any]:
        """Return what a sample keeps of the route."""
        return {}

    def describe(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """Return for the report what the route was like; None: nothing was asked of it."""
        return None

    def close(self) -> None:  # noqa: B027 - one has something to close
        """Take away what was made for it."""


class SocketRoute(Route):
    """A UNIX socket in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def listen(self, destination: Qemu) -> str:
        """Listen on a socket of the destination's name."""
        path = self._folder / f"migration-{destination.name}.sock"
        path.unlink(missing_ok=True)
        await destination.execute("migrate-incoming", uri=f"unix:{path}")
        return f"unix:{path}"


class LinkRoute(Route):
    """TCP between two network namespaces. Raises: NamespaceError, ConfigError: see `LinkedHosts`."""

    def __init__(self, spec: LinkSpec) -> None:
        self.linked = LinkedHosts(spec)

    def place(self, choice: QemuChoice, incoming: bool) -> QemuChoice:
        """Return it with the way into the namespace."""
        return replace(choice, within=tuple(self.linked.enter(int(incoming))))

    async def listen(self, destination: Qemu) -> str:
        """Listen on the link. Raises: LabError: the hosts have changed their roles."""
        if destination.options.within != tuple(self.linked.enter(1)):
            raise LabError("a link goes one way: a VM cannot move back")
        await destination.execute("migrate-incoming", uri=self.linked.listen_uri)
        return self.linked.uri

    def sample(self) -> dict[str, Any]:
        """Return the bytes that the link has carried, and when that was."""
        return {"link": {"time": time.monotonic(), "carried_bytes": self.linked.carried_bytes()}}

    def describe(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the link asked for, what makes it, and its measurements."""
        points = [(row["link"]["time"], row["link"]["carried_bytes"]) for row in samples]
        carried = points[-1][1] - points[0][1] if points else 0
        return {
            **self.linked.describe(),
            "carried_bytes": carried,
            "measured_bytes_per_second": busiest(points),
        }

    def close(self) -> None:
        """End the namespaces."""
        self.linked.close()


def make_route(options: MigrateOptions, sockets: Path) -> Route:
    """Return the one that the options ask for. Raises: NamespaceError, ConfigError."""
    return SocketRoute(sockets) if options.link is None else LinkRoute(options.link)


def busiest(points: Sequence[tuple[float, int]], stretch: float = STRETCH_SECONDS) -> float | None:
    """Return the highest rate of any stretch, all of it where it is shorter; None: it has no length.

    Args: points: (seconds, bytes so far), in order.
    """
    if len(points) < 2 or points[-1][0] <= points[0][0]:
        return None
    best, first = None, 0
    for last in range(1, len(points)):
        while first + 1 < last and points[last][0] - points[first + 1][0] >= stretch:
            first += 1
        seconds = points[last][0] - points[first][0]
        if seconds >= stretch:
            rate = (points[last][1] - points[first][1]) / seconds
            best = rate if best is None else max(best, rate)
    if best is None:
        best = (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
    return best
