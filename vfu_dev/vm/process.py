"""Child processes that cannot outlive the lab, with their output kept in files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from vfu_dev.client.listening import is_listening
from vfu_dev.errors import LabError

# Whatever takes longer than this hangs, on a busy machine too: a start, an answer, a state to come.
PATIENCE_SECONDS = 120.0
# A child that ignores SIGTERM or QMP `quit` for this long is killed.
STOP_SECONDS = 30.0


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
    """One child process: in its own session, killed by the kernel when the lab dies."""

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
        self._env = dict(env) if env is not None else None
        self._descriptors = tuple(descriptors)  # open here, and there under the same numbers
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process; standard output and error go to `log`.

        Raises: ProcessError: the program cannot be executed.
        """
        # PR_SET_PDEATHSIG by setpriv (util-linux): no orphan is left even when the lab is killed with -9.
        setpriv = shutil.which("setpriv")
        wrapped = [setpriv, "--pdeathsig", "KILL", "--", *self.argv] if setpriv else self.argv
        with self.log.open("ab") as log:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *wrapped,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=asyncio.subprocess.STDOUT,
                    env=self._env,
                    pass_fds=self._descriptors,
                    start_new_session=True,
                )
            except OSError as error:
                raise ProcessError(self.name, None, self.log, f"cannot be started: {error}") from error

    @property
    def pid(self) -> int:
        """The process id; the process must have been started."""
        assert self._process is not None
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status (negative: signal), None while running or before the start."""
        return self._process.returncode if self._process is not None else None

    @property
    def running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    def check(self, what: str = "ended unexpectedly") -> None:
        """Raise ProcessError when the process is not running any more."""
        if not self.running:
            raise ProcessError(self.name, self.status, self.log, what)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone; nothing happens when it is gone."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def wait(self, timeout_seconds: float | None = None) -> int:
        """Wait for the end and return the exit status.

        Raises: TimeoutError: it still runs after `timeout_seconds`.
        """
        assert self._process is not None
        return await asyncio.wait_for(self._process.wait(), timeout_seconds)

    async def stop(self, first: signal.Signals = signal.SIGTERM) -> int | None:
        """Ask with `first`, insist with SIGKILL, and return the exit status."""
        if self._process is None:
            return None
        self.send_signal(first)
        try:
            return await self.wait(STOP_SECONDS)
        except TimeoutError:
            self.send_signal(signal.SIGKILL)
            return await self.wait()


async def wait_for_socket(path: Path, child: Child, timeout_seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until `child` listens on the UNIX socket `path`.

    Raises: ProcessError: the child ended first. LabError: nothing listens after `timeout_seconds`.
    """
    deadline = asyncio.get_running_loop().time() + timeout_seconds
    while True:
        child.check("ended before it was ready")
        if is_listening(path):
            return
        if asyncio.get_running_loop().time() > deadline:
            raise LabError(
                f"{child.name} does not listen on {path} after {timeout_seconds:g} s; log: {child.log}"
            )
        await asyncio.sleep(0.02)
