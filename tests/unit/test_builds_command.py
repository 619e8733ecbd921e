"""Build commands: logged whole, counted, stopped with the build, and blind to the caller's flags."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from serverkit import PATIENCE_SECONDS, runs, wait_until

from vfu_dev.builds.command import BuildContext, CommandError, build_environment
from vfu_dev.builds.progress import Reporter
from vfu_dev.errors import BuildError


def test_a_failing_command_shows_its_last_lines_and_where_the_log_is(
    context: BuildContext, tmp_path: Path
) -> None:
    script = "for i in $(seq 100); do echo line $i; done; echo 'the reason' >&2; exit 3"
    with pytest.raises(CommandError) as caught:
        context.run(["sh", "-c", script], title="compile it", cwd=tmp_path)
    error = caught.value
    assert error.returncode == 3
    assert error.tail.splitlines()[-1] == "the reason"
    assert "line 99" in error.tail
    assert "line 1\n" not in error.tail
    assert "compile it" in str(error)
    assert str(context.log) in str(error)
    assert "line 1\n" in context.log.read_text()


def test_a_command_that_is_not_installed_is_named(context: BuildContext, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no-such-compiler is not installed"):
        context.run(["no-such-compiler"], title="compile", cwd=tmp_path)


def test_ninjas_count_is_shown_and_a_last_line_without_end_is_not_lost(
    context: BuildContext, tmp_path: Path, out: io.StringIO
) -> None:
    context.run(["printf", "[1/40] CC a.o\\n[7/40] CC b.o\\ntail"], title="compile", cwd=tmp_path)
    assert "compile: [7/40]" in out.getvalue()
    assert context.log.read_text().endswith("tail\n")


def test_a_silent_command_is_reported_while_it_runs(
    context: BuildContext, tmp_path: Path, out: io.StringIO
) -> None:
    """The command ends only after a line about it was printed, so silence would hang it."""
    fifo = tmp_path / "go"
    os.mkfifo(fifo)

    class Opening(io.StringIO):
        def write(self, text: str) -> int:
            if "configure:" in text and fifo.exists():
                fd = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
                os.write(fd, b"go\n")
                fifo.unlink()
                self.fd = fd
            return super().write(text)

    opening = Opening()
    context.reporter = Reporter(opening, interval_seconds=0.0)
    context.run(["sh", "-c", f"read line < {fifo}"], title="configure", cwd=tmp_path)
    os.close(opening.fd)


def test_interrupting_a_build_stops_everything_that_its_command_started(tmp_path: Path) -> None:
    program = """
import sys
import time
from pathlib import Path
from vfu_dev.builds.cache import Cache
from vfu_dev.builds.command import BuildContext
from vfu_dev.builds.progress import Reporter
cache = Cache(Path(sys.argv[1]))
context = BuildContext(cache, Reporter(), cache.log_path("t", "k"), jobs=1)
script = "sleep 1000 & echo $! > pid.new; mv pid.new pid; wait"
context.run(["sh", "-c", script], title="x", cwd=Path(sys.argv[1]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stderr=subprocess.PIPE, start_new_session=True
    )
    pid_file = tmp_path / "pid"
    while not pid_file.exists():
        assert process.poll() is None
        os.sched_yield()
    grandchild = int(pid_file.read_text())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode != 0
    wait_until(lambda: not runs(grandchild), "the command's child has ended")


def test_flags_of_the_callers_shell_do_not_reach_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CFLAGS", "LDFLAGS", "CC", "MAKEFLAGS", "PYTHONPATH", "VIRTUAL_ENV", "GIT_DIR", "CPATH"):
        monkeypatch.setenv(name, "something")
    monkeypatch.setenv("https_proxy", "kept")
    environment = build_environment(Path("/tools/bin"))
    assert "something" not in environment.values()
    assert environment["https_proxy"] == "kept"
    assert environment["PATH"].startswith("/tools/bin:")
