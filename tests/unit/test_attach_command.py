"""`vfu-dev attach` with programs that are no QEMU: what they are started with, and what cannot work.

With real QEMUs: tests/lab/test_attach.py.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from debkit import compile_c
from serverkit import PATIENCE_SECONDS, VFU_DEV

from vfu_dev.attach.command import Attached, attach
from vfu_dev.attach.preload import AttachError, Descriptors, Preload, make_sysfs
from vfu_dev.errors import ConfigError

SAYS_SO = r"""
#include <stdio.h>
__attribute__((constructor)) static void say(void) { fputs("preloaded\n", stderr); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a library that says when it is loaded, in place of the real one."""
    return compile_c(tmp_path_factory.mktemp("preload") / "preload.so", SAYS_SO, "-shared", "-fPIC")


@pytest.fixture
def run(library: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `vfu-dev attach` in a process of its own."""

    def run_attach(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"VFU_DEV_VFIO_PRELOAD": str(library)} | environment
        return subprocess.run(
            [*VFU_DEV, "attach", *words], env=env, capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )

    return run_attach


def test_a_program_gets_the_folder_the_library_and_the_socket(tmp_path: Path, library: Path) -> None:
    """The folder is that of the device's place on the command line, and an absolute path."""
    sockets = [tmp_path / "a.sock", tmp_path / "b.sock"]
    found = attach(sockets, ["true", "x=%sysfsdev1%,%sysfsdev0%"], Preload(library))
    assert found.argv == ("true", f"x={sockets[1]}.vfio,{sockets[0]}.vfio")
    assert found.environment == {
        "LD_PRELOAD": str(library),
        "VFU_DEV_PRELOAD_SOCKET0": str(sockets[0]),
        "VFU_DEV_PRELOAD_SOCKET1": str(sockets[1]),
    }
    for number, path in enumerate(sockets):
        folder = Path(f"{path}.vfio")
        assert (folder / f"vfio-dev/vfio-user{number}/dev").read_text() == "1:3\n"
        assert os.readlink(folder / "iommu_group") == f"/sys/kernel/iommu_groups/{1_000_000 + number}"


def test_the_folder_of_an_earlier_attach_is_replaced(tmp_path: Path) -> None:
    """QEMU would take the first name, which was another device's."""
    make_sysfs(tmp_path / "a.sock", 0)
    folder = make_sysfs(tmp_path / "a.sock", 5)
    assert [path.name for path in (folder / "vfio-dev").iterdir()] == ["vfio-user5"]
    assert os.readlink(folder / "iommu_group").endswith("/1000005")


def test_what_is_preloaded_already_comes_first(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a sanitizer's library has to."""
    monkeypatch.setenv("LD_PRELOAD", "libasan.so.8")
    assert Preload(library).environment([])["LD_PRELOAD"] == f"libasan.so.8 {library}"


def test_a_sanitizer_s_library_comes_before_all(
    tmp_path: Path, library: Path, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Such a program ends at once if it does not; this one tells what it finds in its environment."""
    main = '#include <stdio.h>\n#include <stdlib.h>\nint main(void) { puts(getenv("LD_PRELOAD")); return 0; }'
    program = compile_c(tmp_path / "asan", main, "-fsanitize=address")
    alone = subprocess.run([program], env={"LD_PRELOAD": str(library)}, capture_output=True, text=True)
    assert "ASan runtime does not come first" in alone.stderr
    done = run(tmp_path / "a.sock", "--", program, LD_PRELOAD="libm.so.6")
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.split()
    assert first.startswith("libasan.so.")
    assert others == ["libm.so.6", str(library)]


def test_paths_that_cannot_be_are_refused() -> None:
    with pytest.raises(AttachError, match="a space or a colon"):
        Preload(Path("/with space/x.so")).environment([])
    with pytest.raises(AttachError, match="at most 107 bytes"):
        Preload(Path("/x.so")).environment([Path("/" + "x" * 107)])
    with pytest.raises(AttachError, match="65 devices: the preloaded library takes 64"):
        Preload(Path("/x.so")).environment([Path("/s")] * 65)
    with pytest.raises(AttachError, match="Not a directory"):
        make_sysfs(Path("/dev/null/a.sock"), 0)


def test_descriptors_are_in_the_environment_and_open_in_the_command(
    tmp_path: Path, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """On /dev/null, whatever else is open there; and only those."""
    code = (
        "import os; n = [int(os.environ['VFU_DEV_PRELOAD_' + x]) for x in ('IOMMUFD', 'FD0')]; "
        "print(*(os.major(os.fstat(i).st_rdev) * 10 + os.minor(os.fstat(i).st_rdev) for i in n), n[0] < n[1])"
    )
    done = run(tmp_path / "a.sock", "--iommu", "iommufd-fd", "--", sys.executable, "-c", code)
    assert (done.returncode, done.stdout) == (0, "13 13 True\n"), done.stderr


def test_ends_as_the_command_does(
    tmp_path: Path, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Its status, its signal, its output; Python's ways with SIGPIPE are not handed on."""
    code = "import signal, sys; print(signal.getsignal(signal.SIGPIPE)); sys.exit(7)"
    done = run(tmp_path / "a.sock", "--", "sh", "-c", "exit 7")
    assert done.returncode == 7
    assert "preloaded" in done.stderr
    assert "nothing is appended" in done.stderr
    assert run(tmp_path / "a.sock", "--", "sh", "-c", "kill -9 $$").returncode == -signal.SIGKILL
    ignored = run(tmp_path / "a.sock", "--", "grep", "SigIgn", "/proc/self/status").stdout.split()[1]
    assert not int(ignored, 16) >> (signal.SIGPIPE - 1) & 1, code


@pytest.mark.parametrize(
    ("mode", "status", "says"),
    [(None, 127, "No such file or directory"), (0o644, 126, "Permission denied")],
)
def test_what_cannot_be_started_is_126_or_127(
    mode: int | None,
    status: int,
    says: str,
    tmp_path: Path,
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """As from a shell."""
    program = tmp_path / "program"
    if mode is not None:
        program.write_text("")
        program.chmod(mode)
    done = run(tmp_path / "a.sock", "--", program)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr == f"vfu-dev attach: {program}: {says}\n"


def test_a_static_program_is_refused_in_words(
    tmp_path: Path, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    program = compile_c(tmp_path / "static", "int main(void) { return 0; }", "-static")
    done = run(tmp_path / "a.sock", "--", program)
    assert done.returncode == 1
    assert "linked statically, so nothing can be preloaded" in done.stderr


def test_devices_of_an_attach_around_this_one_are_not_inherited(
    tmp_path: Path, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The library would take them for ours."""
    around = {"VFU_DEV_PRELOAD_SOCKET1": "/elsewhere", "VFU_DEV_PRELOAD_TIMEOUT_MS": "100"}
    found = run(tmp_path / "a.sock", "--", "env", **around).stdout.splitlines()
    assert f"VFU_DEV_PRELOAD_SOCKET0={tmp_path / 'a.sock'}" in found
    assert "VFU_DEV_PRELOAD_TIMEOUT_MS=100" in found
    assert not any("SOCKET1" in line for line in found)


def test_what_is_printed_can_be_pasted(tmp_path: Path) -> None:
    """Quotes, variables and descriptors survive a shell."""
    words = ["sh", "-c", 'printf "%s|" "$A" "$@" && readlink /proc/self/fd/5', "x", "-a", "it's", "$HOME", ""]
    printed = Attached(tuple(words), {"A": "1 2"}, Descriptors.numbered([5, 6]).all).text()
    done = subprocess.run(
        ["sh", "-c", printed], capture_output=True, text=True, check=True, timeout=PATIENCE_SECONDS
    )
    assert done.stdout == "1 2|-a|it's|$HOME||/dev/null\n"
    assert shlex.split(printed.replace("\\\n", ""))[:3] == ["env", "A=1 2", "sh"]


def test_placeholders_that_stand_for_nothing_are_usage_errors(library: Path) -> None:
    with pytest.raises(ConfigError, match="%sysfsdev2%: there are 1 sockets, counted from 0"):
        attach([Path("/a")], ["true", "%sysfsdev2%"], Preload(library))
    with pytest.raises(ConfigError, match="iommufd-fd"):
        attach([Path("/a")], ["true", "%sysfsdev0%"], Preload(library), "iommufd-fd")


def test_a_socket_is_not_connected_to(tmp_path: Path, library: Path) -> None:
    """A vfio-user server has one client, and one that goes resets the device."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "a.sock"))
        server.listen()
        server.setblocking(False)
        attach([tmp_path / "a.sock"], ["true"], Preload(library))
        with pytest.raises(BlockingIOError):
            server.accept()
