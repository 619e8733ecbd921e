"""Child processes that cannot outlive the lab, with their output kept in files."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vfu_dev.client.listening import is_listening
from vfu_dev.errors import LabError

# Whatever takes longer than this hangs, on a busy machine too: a start, an answer, a state to come.
PATIENCE_SECONDS = 120.0
# A child that ignores SIGTERM or QMP `quit` for this long is killed.
STOP_SECONDS = 30.0
# Seconds between two checks whether a socket exists.
POLL_SECONDS = 0.02


class ProcessError(LabError):
    """A child process did not start or ended when it should not have.

    Attributes: `name`; `status`, its exit status (negative: signal number) or None; `log`, its output.
    """

    def __init__(self, name: str, status: int | None, log: Path, what: str) -> None:
        tail = last_lines(log, 3)
        super().__init__(f"{name} {what}{describe_status(status)}; log: {log}{': ' if tail else ''}{tail}")
        self.name = name
        self.status = status
        self.log = log


def describe_status(status: int | None) -> str:
    """Return ` (exit status 1)`, ` (killed by SIGKILL)` or nothing."""
    if status is None:
        return ""
    if status < 0:
        return f" (killed by {signal.Signals(-status).name})"
    return f" (exit status {status})"


def last_lines(path: Path, count: int) -> str:
    """Return the last `count` non-empty lines of a text file as one line; empty when there is no file."""
    try:
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return " | ".join(lines[-count:])


class Child:
    """One child process: in its own session, killed by the kernel when the main thread that started it dies.

    Attributes: `process`: what was started, for those who wait for its end without asyncio.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        descriptors: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.argv = list(argv)
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self._env = dict(env) if env is not None else None
        self._descriptors = tuple(descriptors)  # open here, and there under the same numbers

    def start(self) -> None:
        """Start the process; standard output and error go to `log`.

        Raises: ProcessError: the program cannot be executed.
        """
        # PR_SET_PDEATHSIG by setpriv (util-linux): no orphan is left even when the lab is killed with -9. The
        # signal comes when the thread ends that started the child, so a thread that may end asks for none.
        in_main = threading.current_thread() is threading.main_thread()
        setpriv = shutil.which("setpriv") if in_main else None
        wrapped = [setpriv, "--pdeathsig", "KILL", "--", *self.argv] if setpriv else self.argv
        with self.log.open("ab") as log:
            try:
                self.process = subprocess.Popen(
                    wrapped,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._env,
                    pass_fds=self._descriptors,
                    start_new_session=True,
                )
            except OSError as error:
                raise ProcessError(self.name, None, self.log, f"cannot be started: {error}") from error

    @property
    def pid(self) -> int:
        """The process id; the process must have been started."""
        assert self.process is not None
        return self.process.pid

    @property
    def status(self) -> int | None:
        """The exit status (negative: signal), None while running or before the start."""
        return self.process.poll() if self.process is not None else None

    @property
    def running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self.process is not None and self.process.poll() is None

    def check(self, what: str = "ended unexpectedly") -> None:
        """Raise ProcessError when the process is not running any more."""
        if not self.running:
            raise ProcessError(self.name, self.status, self.log, what)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone; nothing happens when it is gone."""
        if self.process is not None:
            self.process.send_signal(number)

    async def wait(self, timeout_seconds: float | None = None) -> int:
        """Wait for the end and return the exit status.

        Raises: TimeoutError: it still runs after `timeout_seconds`.
        """
        assert self.process is not None
        if self.process.poll() is None:
            loop = asyncio.get_running_loop()
            ended = asyncio.Event()
            fd = os.pidfd_open(self.pid)
            loop.add_reader(fd, ended.set)
            try:
                await asyncio.wait_for(ended.wait(), timeout_seconds)
            finally:
                loop.remove_reader(fd)
                os.close(fd)
        return self.process.wait()

    async def stop(self, first: signal.Signals = signal.SIGTERM) -> int | None:
        """Ask with `first`, insist with SIGKILL, and return the exit status."""
        if self.process is None:
            return None
        self.send_signal(first)
        try:
            return await self.wait(STOP_SECONDS)
        except TimeoutError:
            self.send_signal(signal.SIGKILL)
            return await self.wait()

    def end(self) -> int | None:
        """Do as `stop` does, without asyncio."""
        if self.process is None:
            return None
        self.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.send_signal(signal.SIGKILL)
            return self.process.wait()


def until_listening(child: Child, *paths: Path, timeout_seconds: float = PATIENCE_SECONDS) -> Iterator[float]:
    """Yield how many seconds to pause, again and again, until `child` listens on all UNIX sockets `paths`.

    The caller pauses in its own way: with sleep(), in asyncio, or interruptibly.

    Raises: ProcessError: the child ended first. LabError: nothing listens after `timeout_seconds`.
    """
    deadline = time.monotonic() + timeout_seconds
    for path in paths:
        while not is_listening(path, child.pid):
            child.check("ended before it was ready")
            if time.monotonic() > deadline:
                raise LabError(
                    f"{child.name} does not listen on {path} after {timeout_seconds:g} s; log: {child.log}"
                )
            yield POLL_SECONDS


async def wait_for_socket(path: Path, child: Child) -> None:
    """Wait as `until_listening` says, in asyncio."""
    for pause in until_listening(child, path):
        await asyncio.sleep(pause)
