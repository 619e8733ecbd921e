"""Runs the commands of a build: logs their output, shows their progress, stops them with the build."""

from __future__ import annotations

import errno
import os
import re
import selectors
import shlex
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from vfu_dev.builds.cache import Cache
from vfu_dev.builds.progress import Reporter, Step
from vfu_dev.errors import BuildError

_NINJA_COUNT = re.compile(rb"\[(\d+)/(\d+)\] ")
_TAIL_LINES = 25
_STOP_SECONDS = 5.0

# Variables that change what a compiler, make, meson or Python does. They are not part of an artifact's key,
# so a build must not see them: the same key has to mean the same thing from every shell.
_UNSEEN = re.compile(
    r"(C|CXX|CPP|LD|OBJC)FLAGS|(MAKE|GNUMAKE|M)FLAGS|MAKELEVEL|NINJA_STATUS|CC|CXX|LD|AR|NM|STRIP"
    r"|C_INCLUDE_PATH|CPATH|LIBRARY_PATH|PKG_CONFIG.*|PYTHON.*|VIRTUAL_ENV|MESON.*|GIT_.*"
)


class CommandError(BuildError):
    """A build command ended with an error.

    `command`, `returncode`, `log` (path) and `tail` (last lines) say more.
    """

    def __init__(self, title: str, command: Sequence[str], returncode: int, log: Path, tail: str) -> None:
        self.command = list(command)
        self.returncode = returncode
        self.log = log
        self.tail = tail
        how = f"killed by signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
        super().__init__(
            f"{title}: {os.path.basename(command[0])} failed ({how})\n{tail}\n  the whole log: {log}"
        )


@dataclass
class BuildContext:
    """Settings of a build: its cache and log, reporter, number of jobs, and sources."""

    cache: Cache
    reporter: Reporter
    log: Path
    jobs: int
    sources: Path | None = None  # a folder with the pinned files; then no network is used for them
    sources_fallback: Path | None = None  # the same, tried only after the mirror failed
    fds: list[int] = field(default_factory=list)  # locks, inherited by every command (see Cache.lock)

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        title: str,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        step: Step | None = None,
    ) -> None:
        """Run `argv` to its end, its output appended to the log, as part of `step` or a step of its own.

        The command has no stdin and its own session. If this process is interrupted, the command and all its
        children are stopped.

        Raises: CommandError: it ended with anything but 0. BuildError: it is not installed.
        """
        command = [os.fspath(part) for part in argv]
        tail: deque[bytes] = deque(maxlen=_TAIL_LINES)
        shown = nullcontext(step) if step is not None else self.reporter.step(title)
        with self.log.open("ab") as log, shown as step:
            log.write(f"\n$ {shlex.join(command)}    # in {cwd}\n".encode())
            log.flush()
            process: subprocess.Popen[bytes] | None = None
            try:
                with _interrupts_deferred():
                    process = subprocess.Popen(
                        command,
                        cwd=cwd,
                        env=dict(env) if env is not None else build_environment(),
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        pass_fds=self.fds,
                    )
                assert process.stdout is not None
                with process.stdout:
                    for line in _lines(process.stdout, step.tick):
                        log.write(line)
                        tail.append(line)
                        if count := _NINJA_COUNT.match(line):
                            step.update(int(count[1]), int(count[2]))
                returncode = process.wait()
            except FileNotFoundError as error:
                raise BuildError(f"{title}: {command[0]} is not installed") from error
            except BaseException:
                if process is not None:
                    _stop(process)
                raise
            if returncode:
                text = b"".join(tail).decode(errors="replace").rstrip()
                raise CommandError(title, command, returncode, self.log, text)

    def reporter_waiting(self, what: str) -> Callable[[int | None], None]:
        """Return a callback for `Cache.lock` that names the process it waits for, once."""
        said = False

        def waiting(holder: int | None) -> None:
            nonlocal said
            if not said:
                said = True
                who = f"process {holder}" if holder is not None else "another process"
                self.reporter.say(f"{who} is busy with {what}: waiting for it")

        return waiting

    def note(self, text: str) -> None:
        """Write a line to the log only."""
        with self.log.open("ab") as log:
            log.write(f"# {text}\n".encode())


def build_environment(path_first: Path | None = None) -> dict[str, str]:
    """Return the environment without variables that change a build, with `path_first` in front of PATH."""
    environment = {name: value for name, value in os.environ.items() if not _UNSEEN.fullmatch(name)}
    environment["LC_ALL"] = "C.UTF-8"
    if path_first is not None:
        environment["PATH"] = f"{path_first}:{environment.get('PATH', os.defpath)}"
    return environment


def output_of(argv: Sequence[str | Path], *, cwd: Path | None = None) -> str:
    """Return the standard output of a short command; empty if the command is missing or fails.

    Raises: BuildError: this process has no free descriptor, so the command was not tried.
    """
    try:
        done = subprocess.run(
            argv, cwd=cwd, env=build_environment(), stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    except OSError as err:
        if err.errno in (errno.EMFILE, errno.ENFILE):
            raise BuildError(f"{argv[0]} cannot be run: {err.strerror} (see ulimit -n)") from err
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def _lines(pipe: IO[bytes], tick: Callable[[], None]) -> Iterator[bytes]:
    """Yield lines as they come; call `tick` at least once per second between them."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            ready = selector.select(timeout=1.0)
            tick()
            if not ready:
                continue
            chunk = os.read(pipe.fileno(), 1 << 16)
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line + b"\n"
    if rest:
        yield rest + b"\n"


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Defer signals that end this process until after the block.

    An exception from a signal handler inside Popen would lose a command that has already started.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs signal handlers in the main thread only
        return
    pending: list[int] = []
    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if (handler := signal.getsignal(number)) is not None:
            previous[number] = handler
            signal.signal(number, lambda received, frame: pending.append(received))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if pending:
        signal.raise_signal(pending[0])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End `process` and its children, by SIGINT first: ninja then removes half-written outputs."""
    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(_STOP_SECONDS)
            break
        except subprocess.TimeoutExpired:
            continue
    # What is left of the group: children that ignore SIGINT, as those that a shell put in the background do.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
