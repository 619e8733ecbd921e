"""The compiler's version is asked once for each state of its file, and never remembered of another."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from serverkit import PATIENCE_SECONDS

from vfu_dev.builds import compiler
from vfu_dev.builds.compiler import compiler_version

Ask = Callable[[], str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the only folder of PATH; `cc` in it is a link to a program that answers `--version`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("VFU_DEV_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "artifacts").mkdir(parents=True)
    _install("true", folder / "gcc-12")
    (folder / "cc").symlink_to("gcc-12")
    return folder


@pytest.fixture
def ask() -> Ask:
    """Return `compiler_version`, as a process that has not called it yet has it."""

    def version() -> str:
        compiler_version.cache_clear()
        return compiler_version()

    return version


@pytest.fixture(autouse=True)
def _forget() -> object:
    yield
    compiler_version.cache_clear()


def _install(name: str, path: Path) -> None:
    """Make `path` a program: a copy of one of the system's, whose answer begins with `name`."""
    found = shutil.which(name, path="/usr/bin:/bin")
    assert found
    shutil.copy(found, path)


def _memory(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "compilers").glob("*"))


def test_a_compiler_is_asked_once(tmp_path: Path, folder: Path, ask: Ask) -> None:
    """Seen by an answer that it would not give."""
    assert ask().startswith("true (")
    (memory,) = _memory(tmp_path)
    assert memory.read_text() == f"{ask()}\n"
    memory.write_text("remembered\n")
    assert ask() == "remembered"


@pytest.mark.parametrize("content", [b"", b"true", bytes(4096), b"\xff\n", b"\n", b"true\ntrue\n"])
def test_an_answer_that_is_not_whole_is_asked_for_again(
    tmp_path: Path, folder: Path, ask: Ask, content: bytes
) -> None:
    """An empty file, as a loss of power leaves one, is no version: every artifact would get another key."""
    answer = ask()
    (memory,) = _memory(tmp_path)
    memory.write_bytes(content)
    assert ask() == answer
    assert memory.read_text() == f"{answer}\n", "and mended"


def test_another_compiler_is_asked(tmp_path: Path, folder: Path, ask: Ask) -> None:
    """Whether the link leads elsewhere, or the file was replaced or written to."""
    ask()
    _install("env", folder / "clang")
    (folder / "cc").unlink()
    (folder / "cc").symlink_to("clang")
    assert ask().startswith("env (")

    _install("sleep", folder / "new")
    (folder / "new").replace(folder / "clang")
    assert ask().startswith("sleep (")

    _install("cat", folder / "clang")
    os.utime(folder / "clang", ns=(0, 0))
    assert ask().startswith("cat (")
    assert len(_memory(tmp_path)) == 4

    (folder / "cc").unlink()
    (folder / "cc").symlink_to("gcc-12")
    assert ask().startswith("true (")
    assert len(_memory(tmp_path)) == 4, "the first one is still known"


def test_a_compiler_that_is_replaced_while_it_answers_is_not_remembered(
    tmp_path: Path, folder: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer may be that of either file."""
    asked = compiler._ask

    def replaced() -> str:
        answer = asked()
        _install("env", folder / "new")
        (folder / "new").replace(folder / "gcc-12")
        return answer

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(compiler, "_ask", replaced)
        assert ask().startswith("true (")
    assert _memory(tmp_path) == []
    assert ask().startswith("env (")


def test_what_only_leads_to_a_compiler_is_always_asked(
    tmp_path: Path, folder: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ccache, and a script: they stay as they are when the compiler behind them is upgraded."""
    (folder / "gcc-12").rename(folder / "ccache")
    (folder / "cc").unlink()
    (folder / "cc").symlink_to("ccache")
    assert ask().startswith("true (")
    (folder / "cc").unlink()
    (folder / "gcc").write_text("#!/bin/sh\necho $(/bin/cat version)\n")
    (folder / "gcc").chmod(0o755)
    (folder / "cc").symlink_to("gcc")
    monkeypatch.chdir(tmp_path)
    for version in ("one", "two"):
        (tmp_path / "version").write_text(version)
        assert ask() == version
    assert _memory(tmp_path) == []


def test_no_compiler_and_no_cache(tmp_path: Path, folder: Path, ask: Ask) -> None:
    """Neither is an error, and asking makes no cache."""
    (tmp_path / "cache" / "artifacts").rmdir()
    assert ask().startswith("true (")
    assert list((tmp_path / "cache").iterdir()) == []
    (folder / "cc").unlink()
    assert ask() == "none"


def test_processes_that_ask_at_once(tmp_path: Path, folder: Path) -> None:
    """All have the whole answer, and nothing but the answer is left."""
    program = "from vfu_dev.builds.compiler import compiler_version; input(); print(compiler_version())"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = {process.communicate(timeout=PATIENCE_SECONDS)[0] for process in processes}
    (answer,) = answers
    assert answer.startswith("true (")
    assert [memory.read_text() for memory in _memory(tmp_path)] == [answer]
