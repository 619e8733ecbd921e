"""`vfu-dev top` as a user runs it: in a terminal of its own (a pty), and in a pipe."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path

import pytest
from moves import CONVERGES, DOES_NOT_CONVERGE, move, moving
from observekit import Pair
from serverkit import PATIENCE_SECONDS, VFU_DEV, ServerFactory, run_vfu_dev, wait_until

ENTER_SCREEN, LEAVE_SCREEN = "\x1b[?1049h", "\x1b[?1049l"
SHOW_CURSOR = "\x1b[?25h"


class Terminal:
    """A program in a terminal of 40 lines."""

    def __init__(self, *arguments: str, term: str = "xterm-256color", columns: int = 120) -> None:
        self.master, self.slave = pty.openpty()
        ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.settings = termios.tcgetattr(self.slave)
        environment = os.environ | {"TERM": term, "LANG": "C.UTF-8", "PYTHONIOENCODING": "utf-8"}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [*VFU_DEV, "top", *arguments],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env=environment,
            start_new_session=True,
        )
        self.seen = ""

    def read(self) -> str:
        """Return everything that was written so far."""
        while select.select([self.master], [], [], 0)[0]:
            self.seen += os.read(self.master, 65536).decode(errors="replace")
        return self.seen

    def wait_for(self, text: str) -> None:
        """Read until `text` was written."""
        wait_until(lambda: text in self.read() or self.process.poll() is not None, f"{text!r} on the screen")
        assert text in self.read(), self.seen  # what it wrote just before it ended is there

    def end(self) -> int:
        """Return the exit status, and leave nothing of the output unread."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.process.poll() is None:
            self.read()
            assert time.monotonic() < deadline, "top does not end"
            time.sleep(0.01)
        self.read()
        return self.process.returncode


@contextmanager
def terminal(*arguments: str, term: str = "xterm-256color", columns: int = 120) -> Iterator[Terminal]:
    """Run top; whatever happens it is gone afterwards."""
    one = Terminal(*arguments, term=term, columns=columns)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait()
        os.close(one.master)
        os.close(one.slave)


def quit_by_key(one: Terminal) -> None:
    os.write(one.master, b"q")


def quit_by_interrupt(one: Terminal) -> None:
    one.process.send_signal(signal.SIGINT)


def quit_by_term(one: Terminal) -> None:
    one.process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize("leave", [quit_by_key, quit_by_interrupt, quit_by_term])
def test_top_leaves_the_terminal_as_it_found_it(pair: Pair, leave: object) -> None:
    """By q, Ctrl-C and SIGTERM alike: status 0, no traceback, old screen, cursor and line mode."""
    with terminal(str(pair.source.control_path), "--interval", "0.2") as top:
        top.wait_for("q quits")
        assert ENTER_SCREEN in top.seen
        leave(top)  # type: ignore[operator]
        assert top.end() == 0
        assert "Traceback" not in top.seen
        assert top.seen.rindex(LEAVE_SCREEN) > top.seen.rindex(ENTER_SCREEN)
        assert top.seen.rindex(SHOW_CURSOR) > 0
        assert termios.tcgetattr(top.slave) == top.settings


def test_several_devices_at_once_while_one_does_not_converge(pair: Pair) -> None:
    with (
        moving(pair.source, pair.destination, DOES_NOT_CONVERGE),
        terminal(str(pair.source.socket), str(pair.destination.socket), "--interval", "0.2") as top,
    ):
        # The vfio-user sockets stand for the control sockets beside them.
        top.wait_for("not converging")
        top.wait_for("receiving state")
        wait_until(lambda: re.search("[▁▂▃▄▅▆▇█]{5}", top.read()), "a curve")
        sockets = str(pair.source.control_path), str(pair.destination.control_path)
        # Whenever the load gets no processor for a second, the verdict is another one.
        wait_until(
            lambda: re.search(
                r"^source +PRE_COPY +NO ", run_vfu_dev("top", "--once", *sockets).stdout, re.MULTILINE
            ),
            "NO in the source's line",
        )
        quit_by_key(top)
        assert top.end() == 0


def test_each_side_shows_its_own_figures(pair: Pair) -> None:
    """Before a migration what to do; after it what was received there, and the limit here."""
    sockets = str(pair.source.socket), str(pair.destination.socket)
    with terminal(*sockets, "--interval", "0.2", "--downtime-limit", "50") as top:
        top.wait_for("no migration yet")
        move(pair.source, pair.destination, CONVERGES)
        top.wait_for("limit 50 ms, measured ")
        top.wait_for("1 completed")
        assert "received" in top.seen
        assert "(bars: the last migration)" in top.seen
        quit_by_key(top)
        assert top.end() == 0


def test_a_narrow_terminal_loses_no_figure(pair: Pair) -> None:
    """40 columns have no room for a line per device, nor for a panel: each device has a column."""
    sockets = str(pair.source.socket), str(pair.destination.socket)
    move(pair.source, pair.destination, CONVERGES)
    for options in ((), ("--once",)):
        with terminal(*sockets, *options, "--interval", "0.2", columns=40) as top:
            top.wait_for("received")
            text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", top.seen)
            assert re.search(r"device +source +destination", text)
            assert re.search(r"state +RUNNING +RUNNING", text)
            assert "…" not in text
            quit_by_key(top)
            assert top.end() == 0


def test_a_server_that_goes_and_comes_back_is_shown_again(serve: ServerFactory, pair: Pair) -> None:
    with terminal(str(pair.destination.control_path), "--interval", "0.2") as top:
        top.wait_for("RUNNING")
        pair.destination.stop()
        top.wait_for("no control socket")
        seen = len(top.seen)
        serve(name="destination")
        wait_until(lambda: "RUNNING" in top.read()[seen:], "the device is back")
        quit_by_key(top)
        assert top.end() == 0


def test_a_dumb_terminal_gets_plain_lines(pair: Pair) -> None:
    with terminal(str(pair.source.control_path), "--interval", "0.2", term="dumb") as top:
        wait_until(lambda: top.read().count("RUNNING") >= 2, "two samples")
        quit_by_key(top)
        assert top.end() == 0
        assert "\x1b" not in top.seen


def test_once_prints_a_line_a_device(pair: Pair) -> None:
    move(pair.source, pair.destination, CONVERGES)
    result = run_vfu_dev("top", "--once", str(pair.source.control_path), str(pair.destination.control_path))
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["device", "source", "destination"]


def test_once_as_json_has_the_figures(pair: Pair) -> None:
    move(pair.source, pair.destination, CONVERGES)
    result = run_vfu_dev("top", "--once", "--json", str(pair.source.control_path))
    assert result.returncode == 0, result.stderr
    (device,) = json.loads(result.stdout)["devices"]
    assert device["device"] == "source"
    assert device["saves"]["completed"] == 1
    assert device["last_downtime_seconds"] > 0
    assert device["error"] is None


def test_once_fails_for_a_server_that_does_not_answer(pair: Pair, tmp_path: Path) -> None:
    """Status 1 and the reason; those that answer are shown all the same."""
    result = run_vfu_dev("top", "--once", str(pair.source.control_path), str(tmp_path / "nothing.ctl"))
    assert result.returncode == 1
    assert "nothing.ctl" in result.stderr
    assert "Traceback" not in result.stderr
    assert "source" in result.stdout


def test_json_without_once_is_a_line_a_sample(pair: Pair) -> None:
    with subprocess.Popen(
        [*VFU_DEV, "top", "--json", "--interval", "0.1", str(pair.source.control_path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        samples = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0
    assert {sample["devices"][0]["state"] for sample in samples} == {"RUNNING"}
