"""The wheel of `make wheel`, where there is no compiler and no cache: what is in it, and that it works.

Installed with pip into a virtual environment; servers, migration, load and an unmodified QEMU are real.
"""

from __future__ import annotations

import email
import json
import os
import platform
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from installkit import Installed
from serverkit import PATIENCE_SECONDS, wait_until

from vfu_dev.builds.prebuilt import CARRIED
from vfu_dev.builds.qemu_binary import find_qemu
from vfu_dev.builds.qemu_packages import SUITES
from vfu_dev.client import ControlClient
from vfu_dev.client.digest import audit_over
from vfu_dev.errors import VfuDevError

PAGE = Path(__file__).parents[2] / "docs" / "install.md"


class Server:
    """`vfu-dev serve` of the wheel."""

    def __init__(self, installed: Installed, socket: Path, *options: str) -> None:
        self.socket = socket
        self.process = subprocess.Popen(
            [installed.program, "serve", "--socket", socket, *options],
            env=installed.environment,
            stderr=(socket.parent / f"{socket.name}.log").open("wb"),
        )
        wait_until(self._answers, f"{socket.name} answers")

    def _answers(self) -> bool:
        assert self.process.poll() is None, Path(f"{self.socket}.log").read_text()
        try:
            return bool(self.status())
        except VfuDevError:
            return False

    def status(self) -> dict[str, object]:
        """Return the server's status."""
        with ControlClient(Path(f"{self.socket}.ctl"), timeout_seconds=PATIENCE_SECONDS) as control:
            return control.status()


@pytest.fixture
def pair(installed: Installed, short_tmp: Path) -> Iterator[tuple[Server, Server]]:
    """Start a source with content, and a destination without."""
    with ExitStack() as stack:
        servers = []
        for name, fill in (("a", ["--fill", "7"]), ("b", [])):
            server = Server(installed, short_tmp / f"{name}.sock", "--memory", "4M", *fill)
            stack.callback(server.process.wait, PATIENCE_SECONDS)
            stack.callback(server.process.terminate)
            servers.append(server)
        yield servers[0], servers[1]


# --- what is in it ------------------------------------------------------------------------------------------


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_its_tag_names_a_glibc_that_debian_12_has(wheel: Path) -> None:
    """One wheel for every Python 3 and every Linux x86-64 from that glibc on."""
    found = re.fullmatch(r"vfu_dev-[\d.]+-py3-none-([\w.]+)\.whl", wheel.name)
    assert found
    versions = {
        (int(major), int(minor)) for major, minor in re.findall(r"manylinux_(\d+)_(\d+)_x86_64", found[1])
    }
    assert versions
    assert min(versions) <= (2, 36)


def test_every_part_has_its_licence_and_its_sources(wheel: Path) -> None:
    found = names(wheel)
    inside = {name.partition("vfu_dev/_prebuilt/licences/")[2] for name in found} - {""}
    assert inside >= {
        "vfu-dev.txt",
        "libvfio-user.txt",
        "json-c.txt",
        "glibc.txt",
        "GPL-2.0.txt",
        "LGPL-2.1.txt",
    }
    with zipfile.ZipFile(wheel) as archive:
        offer = archive.read("vfu_dev/_prebuilt/SOURCES.md").decode()
    for part in CARRIED:
        assert f"`{part}/" in offer
        assert any(name.startswith(f"vfu_dev/_prebuilt/{part}/") for name in found)
    # The parts under the GPL are there as sources.
    for folder in re.findall(r"`(vfu_dev/_native/[^`]+/)`", offer):
        assert any(name.startswith(folder) for name in found), folder
    assert any(re.match(r"vfu_dev\.libs/libjson-c", name) for name in found)


def test_its_metadata_is_complete_and_its_readme_stands_alone(wheel: Path) -> None:
    """No link and no picture of the README is a file beside it."""
    found = metadata(wheel)
    for field in ("Summary", "Author", "Keywords", "License-Expression", "Requires-Python"):
        assert found[field], field
    assert found["License-Expression"] == "BSD-3-Clause AND GPL-2.0-or-later AND LGPL-2.1-or-later AND MIT"
    assert found["Description-Content-Type"] == "text/markdown"
    readme = str(found.get_payload())
    assert len(readme) > 5000
    prose = re.sub(r"^```.*?^```", "", readme, flags=re.MULTILINE | re.DOTALL)
    assert not [link for link in re.findall(r"\]\(([^)]+)\)", prose) if not link.startswith(("https:", "#"))]
    assert "`vfu-dev docs faults`" in prose


def test_manual_pages_and_completion_are_installed(installed: Installed) -> None:
    """Where man(1) and the shells look below a prefix."""
    share = installed.folder / "share"
    pages = {path.stem for path in (share / "man/man1").glob("*.1")}
    assert {"vfu-dev", "vfu-dev-serve", "vfu-dev-lab-migrate", "vfu-dev-ctl-fault"} <= pages
    for name in ("bash-completion/completions/vfu-dev", "zsh/site-functions/_vfu-dev"):
        assert "_VFU_DEV_COMPLETE" in (share / name).read_text()
    words = {"_VFU_DEV_COMPLETE": "bash_complete", "COMP_WORDS": "vfu-dev mig", "COMP_CWORD": "1"}
    assert "migrate" in installed.run(env=installed.environment | words).stdout


# --- what it does -------------------------------------------------------------------------------------------


def test_version_and_doctor_say_what_is_inside(installed: Installed) -> None:
    said = installed.run("--version").stdout
    for part in CARRIED:
        assert f"carries {part} " in said
    report = json.loads(installed.run("doctor", "--json").stdout)
    assert report["library"]["ok"]
    assert "_prebuilt/libvfio-user" in report["library"]["path"]
    assert {one["name"] for one in report["carried"]} == set(CARRIED)


def test_the_pages_that_messages_name_are_there(installed: Installed) -> None:
    assert "# Faults" in installed.run("docs", "faults").stdout
    refused = installed.run("docs", "fault")
    assert (refused.returncode, "did you mean 'faults'?" in refused.stderr) == (2, True)


def test_what_is_carried_is_not_built(installed: Installed) -> None:
    """`build` finds it; the guest program is one that any Linux can run."""
    done = installed.run("build", *CARRIED)
    assert done.returncode == 0, done.stderr
    assert "all up to date" in done.stderr
    folder = Path(dict(line.split(": ") for line in done.stdout.splitlines())["guest-programs"])
    ran = subprocess.run([folder / "vfud-load"], capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert "vfud-load" in ran.stdout + ran.stderr
    lacking = installed.run("build", "qemu")
    assert lacking.returncode == 1
    assert "not installed: gcc" in lacking.stderr


def test_a_device_is_loaded_and_migrated(installed: Installed, pair: tuple[Server, Server]) -> None:
    """By `load`, `ctl` and `migrate`."""
    source, destination = pair
    done = installed.run(
        "load", "--control", source.socket, "--dirty-rate", "200p", "--duration", "1", "--json"
    )
    assert done.returncode in (0, 3), done.stderr
    assert json.loads(done.stdout)["writes"] > 0
    done = installed.run("migrate", source.socket, destination.socket, "--json")
    assert done.returncode == 0, done.stderr
    (device,) = json.loads(done.stdout)["devices"]
    assert device["digest_match"]
    assert device["precopy_bytes"] > 4 << 20
    status = json.loads(installed.run("ctl", destination.socket, "status", "--json").stdout)
    assert status["resume"]["status"] == "completed"


class Qemu:
    """An unmodified QEMU, started by `vfu-dev attach`."""

    def __init__(self, installed: Installed, program: Path, socket: Path, *more: str) -> None:
        memory = "memory-backend-memfd,id=ram0,size=64M,share=on"
        machine = ["-machine", "q35,memory-backend=ram0", "-object", memory, "-m", "64M"]
        quiet = ["-nodefaults", "-display", "none", "-qmp", "stdio", *more]
        self.process = subprocess.Popen(
            [installed.program, "attach", socket, "--", program, *machine, *quiet],
            env=installed.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: object) -> object:
        """Send a command; return what it answers."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            answer = json.loads(line)
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]
        raise AssertionError(f"QEMU ended with {self.process.wait(PATIENCE_SECONDS)}")

    def migration_status(self) -> str:
        """Return where the migration stands."""
        found = self.command("query-migrate")
        assert isinstance(found, dict)
        return str(found.get("status"))

    def run_state(self) -> str:
        """Return what the VM does."""
        found = self.command("query-status")
        assert isinstance(found, dict)
        return str(found["status"])


def test_an_unmodified_qemu_migrates_the_device(
    installed: Installed, pair: tuple[Server, Server], short_tmp: Path
) -> None:
    """Two of Debian's, by `attach`; the preloaded library is the wheel's. Digests agree."""
    try:
        program = find_qemu(SUITES[-1].name, build=True).path
    except VfuDevError as error:
        pytest.skip(f"no QEMU of Debian's: {error}")
    source, destination = pair
    here = Qemu(installed, program, source.socket)
    there = Qemu(installed, program, destination.socket, "-incoming", "defer")
    try:
        uri = f"unix:{short_tmp / 'move.sock'}"
        there.command("migrate-incoming", uri=uri)
        here.command("migrate", uri=uri)
        wait_until(lambda: here.migration_status() in ("completed", "failed"), "the migration ends")
        assert here.migration_status() == "completed"
        # The source has sent everything by then; the destination may still have to load some of it.
        wait_until(lambda: there.run_state() == "running", "the VM runs at the destination")
    finally:
        for qemu in (here, there):
            qemu.process.kill()
            qemu.process.wait(PATIENCE_SECONDS)
    status = wait_until(lambda: audit_over(found := source.status()) and found, "the audit is over")
    assert status["save"]["precopy_bytes"] > 0
    assert status["save"]["digest"] == destination.status()["resume"]["digest"]  # type: ignore[index]


def page_block() -> str:
    """Return the commands that docs/install.md shows for a wheel, without their prompts."""
    (block,) = re.findall(r"^```console\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return "".join(line.removeprefix("$ ") + "\n" for line in block.splitlines())


def test_what_the_page_shows_works(wheel: Path, installed: Installed, short_tmp: Path) -> None:
    """Its own lines, in an environment that has nothing yet: at last a QEMU has the device that was moved."""
    try:
        program = find_qemu(SUITES[-1].name, build=True).path
    except VfuDevError as error:
        pytest.skip(f"no QEMU of Debian's: {error}")
    fresh = short_tmp / "fresh"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", fresh], check=True)
    pip = f"{sys.executable} -m pip --disable-pip-version-check --quiet --python {fresh}/bin/python"
    (fresh / "bin" / "pip").write_text(f'#!/bin/sh\nexec {pip} "$@"\n')
    (fresh / "bin" / "pip").chmod(0o755)
    (fresh / "bin" / "qemu-system-x86_64").symlink_to(program)
    text = page_block()
    assert text.count("/tmp/") >= 2
    # The page ends with a QEMU that runs on; the commands before it have to succeed.
    script = "set -e\n" + text.replace("/tmp/", f"{short_tmp}/")
    path = os.pathsep.join([str(fresh / "bin"), "/usr/bin", "/bin"])
    log = short_tmp / "log"
    with log.open("w") as out:
        shell = subprocess.Popen(
            ["bash", "-x", "-c", script],
            cwd=wheel.parent,
            env=installed.environment | {"PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def attached() -> dict[str, object] | None:
        assert shell.poll() is None, log.read_text()
        if "vfu-dev attach" not in log.read_text():
            return None
        with ControlClient(short_tmp / "b.sock.ctl", timeout_seconds=PATIENCE_SECONDS) as control:
            status: dict[str, object] = control.status()
        return status if status["connected"] else None

    try:
        status = wait_until(attached, "QEMU has the device")
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait(PATIENCE_SECONDS)
    assert status["resume"]["status"] == "completed"  # type: ignore[index]


def test_an_older_qemu_is_refused_in_words(
    installed: Installed, pair: tuple[Server, Server], tmp_path: Path
) -> None:
    """A stand-in that says it is 7.2, as Debian 12's is."""
    program = tmp_path / "qemu-system-x86_64"
    program.write_text(
        "#!/bin/sh\ncase $* in\n*--version*) echo 'QEMU emulator version 7.2.22';;\n"
        "*vfio-pci*) echo '  sysfsdev=<str>';;\nesac\n"
    )
    program.chmod(0o755)
    done = installed.run("attach", pair[0].socket, "--", program)
    assert done.returncode == 1
    assert "is QEMU 7.2.22: vfio-pci needs 10.0 or newer" in done.stderr


def test_nothing_was_built(installed: Installed, wheel: Path) -> None:
    """After all of it the cache holds no artifact. Runs last: it is the last of this file."""
    assert platform.machine() == "x86_64"
    assert not (installed.cache / "artifacts").exists()
