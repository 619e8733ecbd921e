"""Who may connect to the two sockets, where they come from, and which clients a device insists on."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from serverkit import PATIENCE_SECONDS, VFU_DEV, ServerFactory, short_folder, wait_until

from vfu_dev.client import ControlClient, VfioUserDevice, messages
from vfu_dev.client.connection import Connection
from vfu_dev.client.frames import ClientCommandError
from vfu_dev.server.listener import MAX_NEWCOMERS, MAX_VERSION_BYTES
from vfu_dev.uapi import (
    VFIO_DMA_MAP_FLAG_READ,
    VFIO_DMA_MAP_FLAG_WRITE,
    VFIO_USER_DMA_MAP,
    VFIO_USER_ERROR,
    VFIO_USER_HEADER,
    VFIO_USER_REPLY,
    VFIO_USER_VERSION,
)

STRANGER, FRIEND, GROUP = 54321, 54322, 54323
# A VERSION message as QEMU's, and the line that a control socket answers; drops its rights first.
PEER = """
import json, os, socket, struct, sys
uid, group, path, capabilities = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
peer = socket.socket(socket.AF_UNIX)
os.setgroups([group] if group else []); os.setgid(uid); os.setuid(uid)
try:
    peer.connect(path)
except OSError as error:
    print("connect", error.errno); sys.exit()
if path.endswith(".ctl"):
    peer.sendall(b'{"command": "status"}\\n')
    print(peer.makefile().readline())
else:
    body = struct.pack("<HH", 0, 0) + capabilities.encode() + b"\\0"
    peer.sendall(struct.pack("<HHIII", 1, 1, 16 + len(body), 0, 0) + body)
    reply = peer.recv(4096)
    print("reply", struct.unpack("<HHIII", reply[:16])[3:])
"""
CAPABLE = json.dumps({"capabilities": {"migration": {"pgsize": 4096}, "migration_precopy_info": True}})
STOCK = json.dumps({"capabilities": {"max_msg_fds": 8, "migration": {"pgsize": 4096}}})
MAX_DMA_REGIONS = 65535  # max_dma_maps of the specification
REFUSED, TAKEN = VFIO_USER_REPLY | VFIO_USER_ERROR, VFIO_USER_REPLY


def ask(path: Path, uid: int, group: int = 0, capabilities: str = CAPABLE) -> str:
    """Connect as a user and return what came of it."""
    command = [sys.executable, "-c", PEER, str(uid), str(group), str(path), capabilities]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True)
    return done.stdout.strip()


def replied(flags: int, error: int = 0) -> str:
    return f"reply ({flags}, {error})"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Yield a folder that every user may enter."""
    with short_folder() as folder:
        folder.chmod(0o755)
        yield folder


@contextmanager
def served(*arguments: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    """Run `vfu-dev serve` until the end; yield it once it says that clients can connect."""
    command = [*VFU_DEV, "serve", "--memory", "1M", *arguments]
    with subprocess.Popen(  # type: ignore[call-overload]
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serving "), line + process.stderr.read()
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE_SECONDS)


def test_by_default_both_sockets_are_their_owners_alone(serve: ServerFactory) -> None:
    """The umask says nothing about it: a device socket that anybody may open is a way into a guest's RAM."""
    before = os.umask(0)
    try:
        server = serve()
    finally:
        os.umask(before)
    for path in (server.socket, server.control_path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert ask(path, STRANGER) == f"connect {errno.EACCES}"


def test_a_group_may_be_let_in(open_folder: Path) -> None:
    path = open_folder / "s"
    with served("--socket-path", str(path), "--socket-group", str(GROUP)):
        control = path.with_name("s.ctl")
        for one in (path, control):
            found = one.stat()
            assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, GROUP)
            assert ask(one, STRANGER) == f"connect {errno.EACCES}"
        assert ask(path, FRIEND, GROUP) == replied(TAKEN)
        assert json.loads(ask(control, FRIEND, GROUP))["ok"]


def test_users_may_be_let_in_by_number(open_folder: Path) -> None:
    """Everybody reaches the socket, and a user that is not named gets EACCES."""
    path = open_folder / "s"
    with served("--socket", str(path), "--allow-uid", str(FRIEND)) as server:
        control = path.with_name("s.ctl")
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(control.stat().st_mode) == 0o666
        assert ask(path, STRANGER) == replied(REFUSED, errno.EACCES)
        answer = json.loads(ask(control, STRANGER))
        assert answer == {"ok": False, "error": f"user {STRANGER} may not connect, see --allow-uid (EACCES)"}
        for uid in (FRIEND, 0):
            assert ask(path, uid) == replied(TAKEN)
            assert json.loads(ask(control, uid))["ok"]
        server.terminate()
        assert server.stderr is not None
        log = server.stderr.read()
    assert log.count(f"a client was turned away: user {STRANGER} may not connect") == 2


def test_a_server_that_its_namespace_does_not_know_lets_in_no_strangers(open_folder: Path) -> None:
    """They all have its own number there: 65534, as everybody who is not known."""
    path = open_folder / "s"
    command = ["unshare", "--user", *VFU_DEV, "serve", "--memory", "1M", "--socket", str(path)]
    with subprocess.Popen(
        [*command, "--allow-uid", str(FRIEND)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serving "), line + process.stderr.read()  # type: ignore[union-attr]
            assert ask(path, STRANGER) == replied(REFUSED, errno.EACCES)
            assert not json.loads(ask(path.with_name("s.ctl"), STRANGER))["ok"]
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE_SECONDS)


def test_a_user_that_stands_for_others_cannot_be_named(tmp_path: Path) -> None:
    nobody = Path("/proc/sys/kernel/overflowuid").read_text().strip()
    for options, text in (
        (["--allow-uid", nobody], f"{nobody} stands for every user that this namespace does not know"),
        (["--allow-uid", "no-such-user"], "there is no user 'no-such-user' here"),
        (["--allow-uid", str(1 << 32)], f"{1 << 32} is no user's number"),
        (["--socket-group", "no-such-group"], "there is no group 'no-such-group' here"),
        (["--socket-group", str((1 << 32) - 1)], f"{(1 << 32) - 1} is no group's number"),
        (["--socket-group", str(1 << 64)], f"{1 << 64} is no group's number"),
        (["--socket-group", "0", "--allow-uid", "7"], "--socket-group and --allow-uid: expected one of them"),
        (["--fd", "3"], "--socket and --fd: expected one of them"),
    ):
        command = [*VFU_DEV, "serve", "--socket", str(tmp_path / "s"), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
        assert done.returncode == 2, done.stderr
        assert text in done.stderr


def test_a_group_that_this_user_is_not_in_is_an_error_and_leaves_no_socket(open_folder: Path) -> None:
    """The server runs as somebody who may not give the socket away."""
    open_folder.chmod(0o777)
    script = (
        "import os, sys; os.setgroups([]); os.setgid(54321); os.setuid(54321)\n"
        "from pathlib import Path; from vfu_dev.server.door import Access, Door\n"
        "from vfu_dev.errors import ConfigError\n"
        "try:\n    Door.at(Path(sys.argv[1]), 'socket', 1, Access(group=54323))\n"
        "except ConfigError as error:\n    print(error)\n"
    )
    # Imported before the rights are gone: the interpreter may lie in a folder of root's.
    script = "import vfu_dev.server.door\n" + script
    command = [sys.executable, "-c", script, str(open_folder / "s")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True)
    assert "--socket-group 54323" in done.stdout
    assert "the server has to be root, or a member of the group" in done.stdout
    assert not (open_folder / "s").exists()


def test_a_socket_that_listens_is_inherited(open_folder: Path) -> None:
    """`--fd` of the backend program conventions; the path is somebody else's and stays."""
    path = open_folder / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        fd = listener.fileno()
        with served("--fd", str(fd), pass_fds=(fd,)):
            for _ in range(2):  # one client after the other
                with VfioUserDevice.connect(path, timeout_seconds=PATIENCE_SECONDS) as device:
                    device.region_read(0, 0, 4)
    assert path.exists()
    assert not path.with_name("s.ctl").exists()


def test_a_connected_socket_is_served_until_its_client_leaves(open_folder: Path) -> None:
    ours, theirs = socket.socketpair()
    control = open_folder / "c"
    with ours, theirs:
        fd = theirs.fileno()
        arguments = ["--fd", str(fd), "--control", str(control)]
        with served(*arguments, pass_fds=(fd,)) as server:
            theirs.close()
            with VfioUserDevice(Connection(ours, timeout_seconds=PATIENCE_SECONDS)) as device:
                device.region_read(0, 0, 4)
                with ControlClient(control, timeout_seconds=PATIENCE_SECONDS) as client:
                    assert client.status()["connected"]
            assert server.wait(PATIENCE_SECONDS) == 0
    assert not control.exists()


@pytest.mark.parametrize(
    ("options", "listens", "text"),
    [
        (["--socket-group", "0"], True, "was handed over and keeps its group and mode. Set them where"),
        (["--socket-group", "0", "--control", "c"], False, "was handed over and keeps its group and mode."),
        (["--allow-uid", "0"], False, "is a connection, so no user can connect any more; hand over a socket"),
    ],
)
def test_an_option_that_a_handed_over_socket_cannot_follow_is_an_error(
    options: list[str], listens: bool, text: str, short_tmp: Path
) -> None:
    """It would change nothing, and its user would believe that somebody may connect."""
    with socket.socket(socket.AF_UNIX) as listener:
        if listens:
            listener.bind(str(short_tmp / "s"))
            listener.listen()
        fd = listener.fileno()
        command = [*VFU_DEV, "serve", "--fd", str(fd), *options]
        done = subprocess.run(
            command,
            pass_fds=(fd,),
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
            cwd=short_tmp,
        )
    assert done.returncode == 2, done.stderr
    assert text in " ".join(done.stderr.split())


def test_a_client_that_spoke_before_the_server_was_there_is_served(open_folder: Path) -> None:
    """Whoever makes both ends may start QEMU first: its VERSION then waits in the socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        body = struct.pack("<HH", 0, 0) + CAPABLE.encode() + b"\0"
        ours.sendall(
            VFIO_USER_HEADER.pack(1, VFIO_USER_VERSION, VFIO_USER_HEADER.size + len(body), 0, 0) + body
        )
        fd = theirs.fileno()
        with served("--fd", str(fd), pass_fds=(fd,)) as server:
            theirs.close()
            ours.settimeout(PATIENCE_SECONDS)
            _, command, _, flags, error = VFIO_USER_HEADER.unpack(ours.recv(VFIO_USER_HEADER.size))
            assert (command, flags, error) == (VFIO_USER_VERSION, TAKEN, 0)
            ours.close()
            assert server.wait(PATIENCE_SECONDS) == 0


def test_a_connection_that_ends_before_it_is_a_client_ends_the_server(open_folder: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fd = theirs.fileno()
        with served("--fd", str(fd), pass_fds=(fd,)) as server:
            theirs.close()
            ours.close()
            assert server.wait(PATIENCE_SECONDS) == 0


@pytest.mark.parametrize("kind", ["file", "tcp", "closed"])
def test_what_is_no_unix_socket_is_refused(kind: str, tmp_path: Path) -> None:
    with socket.socket() as tcp, (tmp_path / "f").open("wb") as file:
        fd = {"file": file.fileno(), "tcp": tcp.fileno(), "closed": 999}[kind]
        passed = () if kind == "closed" else (fd,)
        command = [*VFU_DEV, "serve", "--fd", str(fd)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False, pass_fds=passed
        )
    assert done.returncode == 2
    assert f"--fd {fd}: " in done.stderr
    assert "Traceback" not in done.stderr


def _listening() -> set[str]:
    """Return the paths of sockets that somebody listens on; one exists from bind(2) on, before that."""
    flag = 1 << 16  # __SO_ACCEPTCON, linux/net.h
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return {path for _, _, _, flags, _, _, _, *rest in lines if int(flags, 16) & flag for path in rest}


@pytest.mark.skipif(
    not shutil.which("systemd-socket-activate"), reason="needs systemd's systemd-socket-activate"
)
@pytest.mark.parametrize("names", [None, "control:device"])
def test_sockets_come_from_systemd(open_folder: Path, names: str | None) -> None:
    """By their names, or else in order; the program starts with the first connection."""
    device, control = open_folder / "device", open_folder / "control"
    in_order = (device, control) if names is None else (control, device)
    listen = [f"--listen={path}" for path in in_order]
    named = [f"--fdname={names}"] if names else []
    command = ["systemd-socket-activate", *listen, *named, *VFU_DEV, "serve", "--memory", "1M"]
    environment = [f"--setenv={name}={value}" for name, value in os.environ.items()]
    command[1:1] = environment
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            wait_until(lambda: {str(device), str(control)} <= _listening(), "systemd listens")
            with VfioUserDevice.connect(device, timeout_seconds=PATIENCE_SECONDS) as client:
                client.region_read(0, 0, 4)
            with ControlClient(control, timeout_seconds=PATIENCE_SECONDS) as asked:
                assert asked.status()["name"] == "vfu-dev"
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0


def test_the_program_of_the_description_is_one_of_ours() -> None:
    """It takes what the backend program conventions want of it."""
    top = Path(__file__).parents[2]
    about = json.loads((top / "deploy/vfio-user/50-vfu-dev.json").read_text())
    scripts = tomllib.loads((top / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts[Path(about["binary"]).name].partition(":")
    code = f"import sys; from {module} import {name}; sys.argv[1:] = ['--help']; {name}()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE_SECONDS
    )
    assert "Usage: vfu-dev serve" in done.stdout
    assert "--fd NUMBER" in done.stdout


def test_a_client_that_cannot_migrate_the_device_is_refused_when_that_is_asked_for(
    serve: ServerFactory,
) -> None:
    """What stock QEMU proposes is no sign; the one sign is the capability that makes the state whole."""
    server = serve("--require-migration")
    assert ask(server.socket, 0, capabilities=STOCK) == replied(REFUSED, errno.ENOTSUP)
    for text in ("", "null", "[]", '{"capabilities": 1}', "{", STOCK.replace('"migration"', '"x"')):
        assert ask(server.socket, 0, capabilities=text) == replied(REFUSED, errno.ENOTSUP)
    assert ask(server.socket, 0, capabilities=CAPABLE) == replied(TAKEN)
    with server.connect() as device:
        device.region_read(0, 0, 4)
    assert "it does not propose migration_precopy_info (ENOTSUP, --require-migration)" in server.log()


def test_without_it_the_log_says_what_the_client_shows_no_sign_of(serve: ServerFactory) -> None:
    server = serve()
    with server.connect() as device:
        device.region_read(0, 0, 4)
    assert "gives no sign" not in server.log()
    assert ask(server.socket, 0, capabilities=STOCK) == replied(TAKEN)
    wait_until(lambda: "gives no sign that it can migrate the device" in server.log(), "the log says so")


def test_newcomers_are_limited(serve: ServerFactory) -> None:
    """Who has said nothing for longest makes room for who comes, and a client is let in all the same."""
    server = serve()
    with ExitStack() as stack:
        silent = [stack.enter_context(_connected(server.socket)) for _ in range(MAX_NEWCOMERS + 4)]
        with server.connect() as device:
            device.region_read(0, 0, 4)
        for one in silent[:4]:
            one.settimeout(PATIENCE_SECONDS)
            assert one.recv(1) == b""
    assert server.log().count("a client was turned away: it sent no complete VERSION message") >= 5


def test_a_version_message_is_limited(serve: ServerFactory) -> None:
    """A header that announces more ends the connection before any of it is received."""
    server = serve()
    with _connected(server.socket) as one:
        one.sendall(VFIO_USER_HEADER.pack(1, VFIO_USER_VERSION, MAX_VERSION_BYTES + 1, 0, 0))
        one.settimeout(PATIENCE_SECONDS)
        assert one.recv(1) == b""
    assert "a client was turned away: it sent no VERSION message" in server.log()


def test_a_client_with_all_mappings_and_a_log_costs_little(serve: ServerFactory) -> None:
    """65535 regions, each of them logged: no descriptor, no mapping and little memory each."""
    server = serve()
    status = Path(f"/proc/{server.process.pid}/status")

    def used_kib() -> int:
        return int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1])  # type: ignore[index]

    with server.connect() as device:
        before, size = used_kib(), 8 << 30
        flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE
        for number in range(MAX_DMA_REGIONS):
            request = messages.DMA_MAP.pack(messages.DMA_MAP.size, flags, 0, number * size, size)
            device.connection.call(VFIO_USER_DMA_MAP, request)
        request = messages.DMA_MAP.pack(messages.DMA_MAP.size, flags, 0, MAX_DMA_REGIONS * size, size)
        with pytest.raises(ClientCommandError):
            device.connection.call(VFIO_USER_DMA_MAP, request)
        device.migration.dma_logging_start([(0, MAX_DMA_REGIONS * size)])
        assert not any(device.migration.dma_logging_report(0, size))
        assert used_kib() - before < 100 << 10
        assert device.info().resettable


def _connected(path: Path) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(str(path))
    return peer
