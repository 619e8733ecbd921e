"""The unit template: systemd's own judgement, and a server that lives within its system call filter."""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from promkit import DEPLOY
from serverkit import PATIENCE_SECONDS, VFU_DEV, RunningServer, ServerFactory, wait_until

from vfu_dev.bench.peers import free_port
from vfu_dev.builds import artifact
from vfu_dev.cli.serve import command as serve_command
from vfu_dev.client import ControlClient, VfioUserDevice
from vfu_dev.client.migrator import Migrator

UNIT = DEPLOY / "systemd/vfu-dev@.service"
SOCKETS = UNIT.with_suffix(".socket")
EXAMPLE = DEPLOY / "systemd/example.env"
UNITS = Path("/usr/lib/systemd/system")
# numpy's OpenBLAS asks for these at start, and does without: the unit refuses them, and so does the test.
REFUSED = {"mbind"}
PR_SET_MDWE, PR_GET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 66, 1  # <linux/prctl.h>
MAX_EXPOSURE = 1.2  # of 10, as systemd-analyze counts; what remains is the network, for the metrics


def directives(name: str) -> list[str]:
    """Return the values of a directive, in order; continued lines as one."""
    text = UNIT.read_text().replace("\\\n", " ")
    return re.findall(rf"^{name}=(.*)$", text, re.MULTILINE)


def analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed: apt-get install systemd")
    command = [program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a root file system that has systemd's units, ours, and something in the place of the program."""
    if not UNITS.is_dir():
        pytest.skip("systemd is not installed: apt-get install systemd")
    shutil.copytree(UNITS, tmp_path / UNITS.relative_to("/"), symlinks=True)
    for unit in (UNIT, SOCKETS):
        shutil.copy(unit, tmp_path / UNITS.relative_to("/"))
    program = tmp_path / directives("ExecStart")[0].split()[0].removeprefix("/")
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return tmp_path


def test_systemd_accepts_it(root: Path) -> None:
    for unit in ("vfu-dev@disk0.service", "vfu-dev@disk0.socket"):
        done = analyze("verify", f"--root={root}", "--man=no", unit)
        ours = [line for line in done.stderr.splitlines() if "vfu-dev" in line]
        assert (done.returncode, ours) == (0, [])


def test_systemd_would_notice(root: Path) -> None:
    for unit, right, wrong in (
        (UNIT, "Restart=on-failure", "Restart=on-failures"),
        (SOCKETS, "SocketMode=0660", "SocketMode=0999"),
    ):
        file = root / UNITS.relative_to("/") / unit.name
        file.write_text(file.read_text().replace(right, wrong))
        done = analyze("verify", f"--root={root}", "--man=no", unit.name.replace("@", "@disk0"))
        assert wrong.partition("=")[2] in done.stderr


def test_its_exposure_is_low(root: Path) -> None:
    done = analyze("security", "--offline=yes", f"--root={root}", "vfu-dev@disk0.service")
    level = re.search(r"exposure level for vfu-dev@disk0.service: ([0-9.]+)", done.stdout)
    assert level is not None, done.stdout + done.stderr
    assert float(level[1]) <= MAX_EXPOSURE


def test_its_command_is_one_of_ours() -> None:
    """ExecStart with the values of example.env is a command line that the server takes."""
    values = dict(
        line.split("=", 1) for line in EXAMPLE.read_text().splitlines() if line and not line.startswith("#")
    )
    text = directives("ExecStart")[0].replace("%i", "disk0").replace("%t", "/run")
    arguments = shlex.split(re.sub(r"\$\{?(\w+)\}?", lambda match: values[match[1]], text))
    assert arguments[1] == "serve"
    given = serve_command.make_context("serve", arguments[2:]).params
    assert given["name"] == "disk0"
    assert given["socket_path"] is None
    assert directives("Requires") == ["vfu-dev@%i.socket"]
    listens = re.findall(r"^ListenStream=(.*)$", SOCKETS.read_text(), re.MULTILINE)
    assert listens == ["%t/vfu-dev/%i/vfu.sock", "%t/vfu-dev/%i/vfu.sock.ctl"]  # in the order of Activation
    assert str(given["metrics_port"]) == values["VFU_METRICS_PORT"]


def test_each_instance_is_a_user_of_its_own() -> None:
    """DynamicUser= alone would give all instances of the template the same one."""
    assert directives("DynamicUser") == ["yes"]
    assert "%i" in directives("User")[0]


def allowed_calls() -> set[str]:
    """Return the system calls that SystemCallFilter= lets through, sets taken apart by systemd itself."""
    allowed: set[str] = set()
    for line in directives("SystemCallFilter"):
        denied = line.startswith("~")
        for name in line.removeprefix("~").split():
            calls = _calls_of(name)
            allowed = allowed - calls if denied else allowed | calls
    return allowed


def _calls_of(name: str) -> set[str]:
    if not name.startswith("@"):
        return {name}
    done = analyze("syscall-filter", name)
    assert done.returncode == 0, done.stderr
    names = [line.strip() for line in done.stdout.splitlines()[1:]]
    return set().union(*(_calls_of(one) for one in names if one and not one.startswith("#")))


def live(
    prefix: list[str], library: Path, destination: RunningServer, folder: Path, access: str = "trap"
) -> None:
    """Run a server that `prefix` starts: start, scrape, migration and stop have to work."""
    path, control, log = (folder / name for name in ("confined", "confined.ctl", "confined.log"))
    port = free_port()
    options = [
        "--socket",
        path,
        "--control",
        control,
        "--memory",
        "4M",
        "--access",
        access,
        "--fill",
        "1",
        "--metrics-port",
        port,
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*prefix, *VFU_DEV, "serve", *map(str, options)],
            env=os.environ
            | {
                "VFU_DEV_LIBVFIO_USER": str(library),
                "VFU_DEV_KERNELS": str(artifact("vfu-kernels", build=True)),
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_until(lambda: control.exists() or process.poll() is not None, "the server is up")
        assert process.poll() is None, log.read_text()
        with (
            VfioUserDevice.connect(path, timeout_seconds=PATIENCE_SECONDS) as source,
            destination.connect() as other,
        ):
            with urllib.request.urlopen(
                f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_SECONDS
            ) as reply:
                assert b"vfu_migration_state" in reply.read()
            Migrator(source, other).run()
        with ControlClient(control, timeout_seconds=PATIENCE_SECONDS) as client:
            client.command("quit")
        assert process.wait(PATIENCE_SECONDS) == 0, log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the server would outlive its tracer
        process.wait()


@pytest.mark.parametrize(
    ("access", "calls"),
    [("trap", {"accept4", "recvmsg"}), ("mmap", {"memfd_create", "accept4", "recvmsg"})],
)
def test_the_server_lives_within_its_filter(
    access: str, calls: set[str], library: Path, serve: ServerFactory, short_tmp: Path
) -> None:
    """Start, scrape, migration and stop need no call and no address family that the unit denies."""
    tracer = shutil.which("strace")
    if tracer is None:
        pytest.skip("strace is not installed: apt-get install strace")
    trace = short_tmp / "trace"
    refuse = f"--inject={','.join(REFUSED)}:error=EPERM"
    destination = serve("--access", access, memory="4M")
    live([tracer, "-f", "-qq", refuse, "-o", str(trace)], library, destination, short_tmp, access)
    text = trace.read_text()
    used = set(re.findall(r"^\d+ +(\w+)\(", text, re.MULTILINE))
    assert calls <= used  # the trace is of the whole life
    assert used - allowed_calls() <= REFUSED
    families = set(re.findall(r"\bsocket(?:pair)?\((AF_\w+)", text))
    assert families <= set(directives("RestrictAddressFamilies")[0].split())


def test_the_server_needs_no_writable_code(library: Path, serve: ServerFactory, short_tmp: Path) -> None:
    """It works where memory cannot be writable and executable, as MemoryDenyWriteExecute= demands.

    ctypes asks for such a page first; refused, libffi maps a file twice. The kernel's own switch
    (prctl(2), PR_SET_MDWE, Linux 6.3) refuses what systemd's filter refuses.
    """
    assert directives("MemoryDenyWriteExecute") == ["yes"]
    if ctypes.CDLL(None).prctl(PR_GET_MDWE, 0, 0, 0, 0) < 0:
        pytest.skip("this kernel has no PR_SET_MDWE")
    enter = (
        "import ctypes, os, sys\n"
        f"assert ctypes.CDLL(None).prctl({PR_SET_MDWE}, {PR_MDWE_REFUSE_EXEC_GAIN}, 0, 0, 0) == 0\n"
        "os.execv(sys.argv[1], sys.argv[1:])\n"
    )
    live([sys.executable, "-c", enter], library, serve(memory="4M"), short_tmp)


def test_the_filter_denies_something() -> None:
    allowed = allowed_calls()
    assert {"read", "memfd_create"} <= allowed
    assert not {"ptrace", "mount", "init_module", "bpf", "setrlimit"} & allowed
