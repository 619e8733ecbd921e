"""Tests of the preloaded library, most of which run in a process that it is preloaded into.

A test marked with `@inside()` is called in a fresh Python, by run_inside.py. Its fixtures are made here; what
they give has to be JSON, or `Served`. What the library said is in the report of a failure.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from inside import Served
from preloadkit import run_preloaded
from serverkit import RunningServer, ServerFactory, server_farm, short_folder

from vfu_dev.device.reference.layout import FIELDS

HERE = Path(__file__).parent


def call_inside(function: Callable[..., Any], file: Path, name: str, arguments: dict[str, Any]) -> str:
    """Have run_inside.py call a function that is marked; return what it and the library said."""
    environment, variant, fds = function.inside  # type: ignore[attr-defined]
    served = [value for value in arguments.values() if isinstance(value, Served)]
    sockets = [socket for one in served for socket in one.sockets] or ["/nonexistent/vfu.sock"]
    text = json.dumps(
        {key: value.to_json() if isinstance(value, Served) else value for key, value in arguments.items()}
    )
    argv = [sys.executable, str(HERE / "run_inside.py"), str(file), name, text]
    done = run_preloaded(argv, sockets, environment, variant=variant, fds=fds)
    if done.returncode != 0:
        pytest.fail(f"status {done.returncode}\n{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout + done.stderr


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Call a test that is marked so in a process of its own."""
    if not hasattr(pyfuncitem.obj, "inside"):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    call_inside(pyfuncitem.obj, pyfuncitem.path, pyfuncitem.originalname, arguments)
    return True


def _served(servers: list[RunningServer]) -> Served:
    return Served(
        sockets=[str(server.socket) for server in servers],
        pids=[server.process.pid for server in servers],
        memory_bytes=1 << 20,
        registers={
            field.name: [field.offset, int(field.format[-1])] for field in FIELDS if field.format[1] == "u"
        },
    )


@pytest.fixture(scope="module")
def servers(library: Path) -> Iterator[list[RunningServer]]:
    """Two servers of 1 MiB, shared by the tests of a module."""
    with short_folder() as folder, server_farm(library, folder) as start:
        yield [start("--fill", "7"), start("--fill", "8")]


@pytest.fixture
def served(servers: list[RunningServer]) -> Served:
    """The module's servers, for a test inside; each has let go of the client before."""
    from serverkit import wait_until

    for server in servers:
        wait_until(lambda s=server: not s.status()["connected"], "the server drops its last client")  # type: ignore[misc]
    return _served(servers)


@pytest.fixture
def serve_one(serve: ServerFactory) -> Callable[..., Served]:
    """Start a server of its own, with options, for a test inside."""
    return lambda *options, **more: _served([serve(*options, **more)])


@pytest.fixture(params=["window", "messages"])
def either_way(serve: ServerFactory, request: pytest.FixtureRequest) -> Served:
    """Two servers that take migration data in memory that is shared, or in messages alone."""
    window = "on" if request.param == "window" else "off"
    return _served([serve("--fill", "7", "--data-window", window) for _ in range(2)])


@pytest.fixture
def mortal(serve: ServerFactory) -> Iterator[Served]:
    """A server that the test may kill."""
    server = serve("--fill", "7")
    yield _served([server])
    server.killed = server.process.poll() is not None


@pytest.fixture
def run_inside(request: pytest.FixtureRequest) -> Callable[..., str]:
    """Call a function marked with `@inside()` as a test is called; return what it and the library said."""

    def run(function: Callable[..., None], **arguments: Any) -> str:
        return call_inside(function, Path(request.path), function.__name__, arguments)

    return run
