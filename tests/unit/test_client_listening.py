"""Whether somebody listens on a UNIX socket is known without connecting to it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from vfu_dev.client.listening import is_listening, remove_socket_folder, socket_folder


def test_a_socket_listens_from_listen_on(short_tmp: Path) -> None:
    """Not while there is no file, not when it is only bound, not when its owner is gone."""
    path = short_tmp / "a.sock"
    assert not is_listening(path)
    with socket.socket(socket.AF_UNIX) as owner:
        owner.bind(str(path))
        assert path.exists()
        assert not is_listening(path)
        owner.listen()
        assert is_listening(path)
        assert not is_listening(short_tmp / "b.sock")
    assert path.exists()
    assert not is_listening(path)


def test_folders_of_killed_owners_are_removed_and_no_others(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock decides, not the age: one owner is killed, one lives, one folder is of an earlier vfu-dev."""
    monkeypatch.setattr(tempfile, "tempdir", str(short_tmp))
    script = (
        "from vfu_dev.client.listening import socket_folder\n"
        "print(socket_folder('vfud-x-'), flush=True)\ninput()\n"
    )
    environment = os.environ | {"TMPDIR": str(short_tmp)}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as owner:
        assert owner.stdout is not None
        killed = Path(owner.stdout.readline().strip())
        (killed / "a.sock").touch()
        foreign = short_tmp / "vfud-x-foreign"
        foreign.mkdir()
        mine = socket_folder("vfud-x-")
        assert killed.is_dir(), "its owner lives"
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    other = socket_folder("vfud-y-")
    assert killed.is_dir(), "another prefix is another program's"
    second = socket_folder("vfud-x-")
    assert not killed.exists()
    assert sorted(short_tmp.iterdir()) == sorted([foreign, mine, other, second])
    for folder in (mine, other, second):
        remove_socket_folder(folder)
    assert list(short_tmp.iterdir()) == [foreign]
