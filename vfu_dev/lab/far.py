"""The far side of `lab migrate --destination ssh://HOST`: one host, commanded by lines of JSON.

The command `vfu-dev lab host` runs there. It reads one JSON object per line and answers each with one:

    {"qemu": NAME or PATH or null, "front_end": …, "iommu": …}      what is here: versions, machines
    {"machine": …, "devices": …, …}     starts servers and QEMU, and says where their sockets are

It ends everything at the end of its input. If the network is cut, sshd ends the input only when TCP gives up,
after hours by default. So the near side also sends empty lines, and everything ends as well if no line came
for `silence_seconds`, a key of each object. An error is {"error": TEXT}.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import sys
from pathlib import Path
from typing import Any

from vfu_dev import JSON_VERSION, __version__
from vfu_dev.attach.front_end import choose_front_end, choose_iommu
from vfu_dev.builds import artifact
from vfu_dev.builds.qemu_binary import VFIO_PCI, machine_versions, probe_qemu, qemu_path
from vfu_dev.client.listening import remove_socket_folder, socket_folder
from vfu_dev.errors import ConfigError, VfuDevError, shown
from vfu_dev.lab.host import Host, require_migration
from vfu_dev.lab.options import MigrateOptions, QemuChoice
from vfu_dev.vm.own_device import ask_own_device

# The near side sends an empty line every ALIVE_SECONDS. After SILENCE_SECONDS without one it is gone.
ALIVE_SECONDS = 15.0
SILENCE_SECONDS = 60.0

# Fields of MigrateOptions that the destination's host is made of, and that JSON can say.
SENT = (
    "memory_bytes",
    "page_size",
    "access",
    "pre_copy",
    "devices",
    "accel",
    "ram",
    "load_place",
    "verify",
    "server_extra",
    "qemu_extra",
    "machine",
)


def settings_of(options: MigrateOptions, machine: str) -> dict[str, Any]:
    """Return what the far side needs to know of a move."""
    own = options.own_device
    return {
        **{name: getattr(options, name) for name in SENT},
        "machine": machine,
        "guest": options.guest_image is not None,
        "own_device": None if own is None else own.spec,
        "faults": options.faults_destination,
        "silence_seconds": SILENCE_SECONDS,
    }


def _describe(asked: dict[str, Any]) -> tuple[QemuChoice, dict[str, Any]]:
    path = qemu_path(asked["qemu"])
    binary = probe_qemu(path)
    front_end, iommu = choose_front_end(binary, asked["front_end"]), asked["iommu"]
    choice = QemuChoice(path, front_end, choose_iommu(binary, iommu) if front_end == VFIO_PCI else iommu)
    require_migration(choice)
    return choice, {
        "json_version": JSON_VERSION,
        "vfu_dev": __version__,
        "version": binary.version,
        "front_end": choice.front_end,
        "iommu": choice.iommu,
        "machines": machine_versions(path),
    }


def _make(choice: QemuChoice, settings: dict[str, Any], folder: Path) -> Host:
    own = settings["own_device"]
    options = MigrateOptions(
        qemu=choice.binary,
        front_end=choice.front_end,
        iommu=choice.iommu,
        library=artifact("libvfio-user"),
        guest_image=artifact("guest") if settings["guest"] else None,
        own_device=None if own is None else ask_own_device(own),
        faults_destination=tuple(settings["faults"]),
        **{name: _tupled(settings[name]) for name in SENT},
    )
    return Host("destination", folder, folder, options, incoming=True)


def _parsed(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"expected a line of JSON, got {shown(line)}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"expected a JSON object, got {shown(line)}")
    return found


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


async def serve_host() -> bool:
    """Serve one host over standard input and output; return whether it came up."""
    folder = socket_folder("vfud-far-")
    host: Host | None = None
    lines = _Lines()
    try:
        asked = _parsed(await lines.next())
        choice, found = _describe(asked)
        _say(found)
        if not (line := await lines.next(asked.get("silence_seconds"))):
            return True  # it was asked what is here, and no more
        settings = _parsed(line)
        host = _make(choice, settings, folder)
        await host.start()
        await host.qemu.disconnect()  # a monitor has one client, who is on the other side
        _say(
            {
                "qmp": str(host.qemu.qmp_socket),
                "line": str(host.qemu.line_socket),
                "qtest": str(host.qemu.qtest_socket),
                "controls": [str(server.control) for server in host.servers],
                "trace": str(host.qemu.trace_log),
                "command_line": host.qemu.command_line,
            }
        )
        await lines.until_silent(settings.get("silence_seconds"))
        return True
    except (VfuDevError, OSError, KeyError, ValueError) as error:
        said = str(error) or type(error).__name__
        _say({"error": said})
        print(f"vfu-dev lab host: {said}", file=sys.stderr)
        return False
    finally:
        if host is not None:
            await host.stop()
        remove_socket_folder(folder)


class _Lines:
    """Lines of standard input, read in a thread that never waits longer than a given time."""

    def __init__(self) -> None:
        self._read = bytearray()

    async def next(self, seconds: float | None = None) -> str:
        """Return the next line that is not empty; "" at the end of the input, or of `seconds` without one."""
        while (line := await asyncio.to_thread(self._line, seconds)) == "\n":
            pass
        return line

    async def until_silent(self, seconds: float | None) -> None:
        """Return at the end of the input, or when no line has come for `seconds`."""
        while await asyncio.to_thread(self._line, seconds):
            pass

    def _line(self, timeout_seconds: float | None) -> str:
        fd = sys.stdin.fileno()
        while b"\n" not in self._read:
            if not select.select([fd], [], [], timeout_seconds)[0]:
                return ""
            if not (more := os.read(fd, 1 << 16)):
                break
            self._read += more
        line, end, rest = bytes(self._read).partition(b"\n")
        self._read[:] = rest
        return (line + end).decode(errors="replace")


def _say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)
