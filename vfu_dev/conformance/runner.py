"""Runs the checks in their order, against a server that it starts if a command is given."""

from __future__ import annotations

import contextlib
import fnmatch
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vfu_dev.client.frames import DisconnectedError
from vfu_dev.client.listening import is_listening
from vfu_dev.client.transport import connect as connect_to
from vfu_dev.conformance import (
    checks_device,
    checks_dma,
    checks_features,
    checks_handshake,
    checks_irqs,
    checks_logging,
    checks_messages,
    checks_regions,
    checks_resets,
    checks_sizes,
    checks_states,
    checks_stream,
    checks_window,
)
from vfu_dev.conformance.checks_handshake import next_client_is_served
from vfu_dev.conformance.model import (
    CHECKS,
    Check,
    CheckFailedError,
    ClosedError,
    NotApplicableError,
    Result,
    Status,
    group_of,
)
from vfu_dev.conformance.session import Session
from vfu_dev.errors import ConfigError, LabError, VfuDevError, nearest

# Importing these modules adds their checks to the table. Queries run before changes, and connections come
# last, because a server may end with one.
_ORDER = (
    checks_device,
    checks_messages,
    checks_regions,
    checks_irqs,
    checks_dma,
    checks_features,
    checks_states,
    checks_stream,
    checks_sizes,
    checks_window,
    checks_logging,
    checks_resets,
    checks_handshake,
)
DEFAULT_TIMEOUT_SECONDS = 10.0
DEFAULT_MAX_STATE_BYTES = 256 << 20
_START_SECONDS = 30.0
_LEAVING_SECONDS = 0.5


def choose(only: Sequence[str], skip: Sequence[str]) -> list[Check]:
    """Return the checks that `only` and `skip` select, in order: by name, group or pattern (`arc-*`).

    Raises: ConfigError: one of them matches no check.
    """
    wanted = _matching(only, "--only") if only else set(CHECKS)
    left_out = _matching(skip, "--skip")
    chosen = [check for name, check in CHECKS.items() if name in wanted - left_out]
    order = [group_of(module.__name__) for module in _ORDER]
    return sorted(chosen, key=lambda check: order.index(check.group))


def _matching(patterns: Sequence[str], option: str) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        matches = {
            name for name, one in CHECKS.items() if one.group == pattern or fnmatch.fnmatch(name, pattern)
        }
        if not matches:
            known = [*CHECKS, *{one.group for one in CHECKS.values()}]
            near = nearest(pattern, known)
            hint = f"; did you mean {near}?" if near else " (vfu-dev check --list)"
            raise ConfigError(f"{option} {pattern}: there is no such check{hint}")
        found |= matches
    return found


class ServerCommand:
    """A server that is started for the checks, and restarted whenever it has ended."""

    def __init__(self, command: Sequence[str], path: Path) -> None:
        self.command = list(command)
        self.path = path
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._ends_with_client: bool | None = None  # unknown until its first client has gone

    def ensure(self) -> None:
        """Make sure that the server listens. Raises: LabError: it does not."""
        if self._process is not None and not self._has_ended():
            return
        with contextlib.suppress(FileNotFoundError):
            if self.starts:  # the socket of the server that has ended
                self.path.unlink()
        try:
            # Standard output is reserved for the results.
            self._process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=2)
        except OSError as error:
            raise LabError(f"{self.command[0]}: {error.strerror or error}") from error
        self.starts += 1
        deadline = time.monotonic() + _START_SECONDS
        while not is_listening(self.path):
            if (status := self._process.poll()) is not None:
                raise LabError(
                    f"{self.command[0]} ended with status {status} before it listened on {self.path}"
                )
            if time.monotonic() > deadline:
                raise LabError(f"{self.command[0]} does not listen on {self.path} after {_START_SECONDS:g} s")
            time.sleep(0.01)

    def _has_ended(self) -> bool:
        """Return whether it has ended. A server that may end with its client gets a moment to do so."""
        assert self._process is not None
        if self._ends_with_client is not False:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_LEAVING_SECONDS)
            if self._ends_with_client is None:
                self._ends_with_client = self._process.poll() is not None
        return self._process.poll() is not None

    def ended(self, closed: bool, gone: bool) -> str | None:
        """Return how the server ended by itself, None while it runs.

        Args: closed: it closed a connection. gone: its client has gone. It may end after either.
        """
        if self._process is not None and (closed or (gone and self._ends_with_client is not False)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_LEAVING_SECONDS)
        status = self._process.poll() if self._process is not None else None
        if status is None:
            return None
        if status < 0:
            return f"the server was killed by {signal.Signals(-status).name}"
        return f"the server ended with status {status}"

    def close(self) -> None:
        """End the server."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def run(
    path: Path,
    chosen: Sequence[Check],
    *,
    command: Sequence[str] = (),
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    max_state_bytes: int = DEFAULT_MAX_STATE_BYTES,
) -> Iterator[Result]:
    """Run `chosen` against the server on `path`; yields each result as it comes.

    Args: command: starts the server, which is restarted when it has ended.
    Raises: VfuDevError: there is no server at the beginning.
    """
    server = ServerCommand(command, path) if command else None

    def connect() -> socket.socket:
        if server is not None:
            server.ensure()
        return connect_to(path, timeout_seconds)

    session = Session(connect, timeout_seconds, max_state_bytes)
    try:
        with contextlib.suppress(CheckFailedError):  # what is wrong with its VERSION is for the checks
            session.peer  # noqa: B018 - negotiates
        yield from run_in(session, chosen, ended=server.ended if server else None)
    finally:
        session.drop()
        if server is not None:
            server.close()


def run_in(
    session: Session, chosen: Sequence[Check], *, ended: Callable[[bool, bool], str | None] | None = None
) -> Iterator[Result]:
    """Run `chosen` in a session; `ended` returns how the server ended by itself, if it did."""
    gone: str | None = None
    shared = ended is None  # a server of ours is started again
    for check in chosen:
        if check.fresh and shared and gone is None:
            shared = False
            gone = _gone_with_its_client(session)
            if gone is not None and check.run is next_client_is_served:
                yield Result(check, Status.FAIL, gone, 0.0)
                continue
        if gone is not None:
            yield Result(check, Status.SKIP, gone, 0.0)
            continue
        begun = time.monotonic()
        status, detail, closed = _judge(session, check)
        death = ended(closed, check.fresh) if ended is not None else None
        left = _restored(session, again=ended is not None)
        if status is not Status.FAIL and (death or left) and not _may_end(check, death):
            status, detail = Status.FAIL, f"afterwards {death or left}"
        elif death and status is Status.FAIL:
            detail = f"{detail}; {death}"
        if left is not None:
            gone = f"the server has been gone since {check.name}"
        yield Result(check, status, detail, time.monotonic() - begun)


def _gone_with_its_client(session: Session) -> str | None:
    """Close the connection; return why no other one can be opened, None if it can.

    The specification allows a server to end with its client, and that may take a moment.
    """
    session.drop()
    for _ in range(2):
        session.begin()
        try:
            session.peer  # noqa: B018 - negotiates
        except DisconnectedError:
            return "the server ended with its client (vfu-dev check SOCKET -- COMMAND restarts it)"
        except CheckFailedError:
            time.sleep(_LEAVING_SECONDS)
        else:
            break
    return None


def _may_end(check: Check, death: str | None) -> bool:
    """Return whether the server ended with its client by itself, as the specification allows."""
    return check.fresh and death is not None and " ended with status " in death


def _judge(session: Session, check: Check) -> tuple[Status, str, bool]:
    """Run `check`; return status, detail, and whether it failed because the connection was closed."""
    session.begin()
    if check.fresh:
        session.drop()
    try:
        check.run(session)
    except NotApplicableError as reason:
        return Status.SKIP, str(reason), False
    except VfuDevError as error:
        notes = getattr(error, "__notes__", ())
        return Status.FAIL, "; ".join((str(error), *notes)), isinstance(error, ClosedError)
    return Status.PASS, "", False


def _restored(session: Session, again: bool) -> str | None:
    """Restore the server's state; return why it cannot be used any more, None if it can.

    Args: again: the server is restarted when it has ended; one that refuses connections may be about to end.
    """
    left = None
    for attempt in range(3):
        try:
            session.restore()
        except VfuDevError as error:
            session.drop()
            left = str(error)
            if isinstance(error, DisconnectedError) and not again:
                break
            if again and attempt:
                time.sleep(_LEAVING_SECONDS)
        else:
            return None
    return left
