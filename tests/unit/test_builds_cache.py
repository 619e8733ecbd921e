"""The cache: names follow from inputs, publication is all or nothing, locks hold across processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from serverkit import PATIENCE_SECONDS

from vfu_dev.builds import BuildError
from vfu_dev.builds.cache import Cache, default_root, input_key, tree_digest

# A process that takes the lock, says so, starts a child that inherits it, and waits to be told to go on.
HOLDER = """
import subprocess, sys
from pathlib import Path
from vfu_dev.builds.cache import Cache
with Cache(Path(sys.argv[1])).lock("thing") as fd:
    if "child" in sys.argv:
        subprocess.Popen([sys.executable, "-c", "input()"], pass_fds=[fd])
    print("held", flush=True)
    sys.stdin.readline()
"""

BUILDER = """
import sys, time
from pathlib import Path
from vfu_dev.builds.cache import Cache
cache = Cache(Path(sys.argv[1]))
with cache.lock("thing-k"), cache.building("thing", "k") as folder:
    (folder / "half").write_text("x")
    print("building", flush=True)
    sys.stdin.readline()
"""


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_key_depends_on_values_and_not_on_the_order_of_names() -> None:
    one = input_key({"flags": ["-a", "-b"], "compiler": "cc 1"})
    assert one == input_key({"compiler": "cc 1", "flags": ["-a", "-b"]})
    assert one != input_key({"compiler": "cc 1", "flags": ["-b", "-a"]})
    assert one != input_key({"compiler": "cc 2", "flags": ["-a", "-b"]})
    assert len(one) == 16


def test_a_tree_digest_sees_content_names_and_the_executable_bit_only(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    file = tmp_path / "lib" / "a.c"
    file.write_text("int a;\n")
    before = tree_digest(tmp_path)
    assert list(before) == ["lib/a.c"]

    os.utime(file, (1, 1))
    (tmp_path / ".a.c.swp").write_text("editor")
    (tmp_path / "lib" / "a.c~").write_text("backup")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_text("cache")
    assert tree_digest(tmp_path) == before

    file.chmod(0o755)
    assert tree_digest(tmp_path) != before
    file.chmod(0o600)
    assert tree_digest(tmp_path) == before
    file.write_text("int b;\n")
    assert tree_digest(tmp_path) != before
    assert tree_digest(tmp_path / "absent") == {}


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("VFU_DEV_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_root() == Path("/home/someone/.cache/vfu-dev")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_root() == Path("/home/someone/.cache/vfu-dev")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
    assert default_root() == Path("/var/xdg/vfu-dev")
    monkeypatch.setenv("VFU_DEV_CACHE", "~/mine")
    assert default_root() == Path("/home/someone/mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VFU_DEV_CACHE", "here")
    assert default_root() == tmp_path / "here"
    monkeypatch.setenv("VFU_DEV_CACHE", "~nobody-has-this-name/here")
    with pytest.raises(BuildError, match=r"~nobody.*: there is no such home directory; .* VFU_DEV_CACHE"):
        default_root()


def test_an_artifact_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    final = cache.artifact_dir("thing", "k")

    def fail() -> None:
        with cache.building("thing", "k") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("compiler exploded")

    with pytest.raises(RuntimeError):
        fail()
    assert not final.exists()
    assert list((tmp_path / "tmp").iterdir()) == []

    with cache.building("thing", "k") as folder:
        (folder / "whole").write_text("x")
        assert not final.exists()
    assert [path.name for path in final.iterdir()] == ["whole"]


def test_what_a_killed_build_leaves_is_not_an_artifact_and_is_swept_when_unlocked(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    process = start(BUILDER, str(tmp_path))
    try:
        assert first_line(process) == "building"
        cache.sweep()
        assert (tmp_path / "tmp" / "thing-k" / "half").exists(), "a running build was swept away"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert (tmp_path / "tmp" / "thing-k").exists()
    assert not cache.artifact_dir("thing", "k").exists()
    cache.sweep()
    assert not (tmp_path / "tmp" / "thing-k").exists()


def test_a_lock_held_by_another_process_is_waited_for_and_its_holder_named(tmp_path: Path) -> None:
    process = start(HOLDER, str(tmp_path))
    assert first_line(process) == "held"
    holders: list[int | None] = []

    def waiting(holder: int | None) -> None:
        holders.append(holder)
        if len(holders) == 2:
            assert process.stdin is not None
            process.stdin.write("go on\n")
            process.stdin.flush()

    with Cache(tmp_path).lock("thing", waiting):
        pass
    assert process.wait(PATIENCE_SECONDS) == 0
    assert holders[0] == process.pid
    process.communicate()


def test_a_lock_outlives_its_process_in_the_commands_that_inherited_it(tmp_path: Path) -> None:
    """A compiler whose build was killed may still write: the next build has to wait for it."""
    process = start(HOLDER, str(tmp_path), "child")
    assert first_line(process) == "held"
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE_SECONDS)
    waited = []

    def waiting(holder: int | None) -> None:
        waited.append(holder)
        if len(waited) == 2 and process.stdin is not None:
            process.stdin.close()  # the orphan reads from the same pipe and ends

    with Cache(tmp_path).lock("thing", waiting):
        assert len(waited) >= 2
    assert process.stdout is not None
    process.stdout.close()


def test_sizes_count_a_file_with_two_names_once(tmp_path: Path) -> None:
    (tmp_path / "trees").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "trees" / "a").write_bytes(bytes(1 << 20))
    os.link(tmp_path / "trees" / "a", tmp_path / "work" / "a")
    sizes = Cache(tmp_path).sizes()
    assert sizes["trees"] >= 1 << 20
    assert sizes["work"] == 0
