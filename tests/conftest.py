"""Fixtures for every kind of test: the native library, and real servers in their own processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from serverkit import ServerFactory, server_farm, short_folder
from versionkit import SHOWS, Evidence, claims_of

from vfu_dev.errors import VfuDevError

OUTCOME = pytest.StashKey[pytest.TestReport]()


def pytest_configure() -> None:
    """Give the programs under test a SIGINT to react to.

    A shell without job control starts what it puts into the background with SIGINT ignored, and everything
    below inherits that; Ctrl-C in a terminal is what the tests are about.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


# How long an example takes is the machine's business: tests have no speed limits.
settings.register_profile("vfu-dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vfu-dev")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure where VFU_DEV_NO_SKIP says that everything is installed, as CI does.

    A test that is skipped there for want of a tool would otherwise never run, and nobody would see it.
    """
    report = yield
    if call.when == "call":
        item.stash[OUTCOME] = report
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("VFU_DEV_NO_SKIP"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be missing (VFU_DEV_NO_SKIP): {reason}"
    return report


@pytest.fixture
def evidence(request: pytest.FixtureRequest) -> Iterator[Evidence]:
    """What the test sees of its moves; in the end it has to show what the test claims (versionkit.py)."""
    found = Evidence()
    yield found
    if (report := request.node.stash.get(OUTCOME, None)) is not None and report.passed:
        missing = sorted(claims_of(request.node) - found.cells)
        assert not missing, f"claimed, and not seen: {missing}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a claim that nobody would check."""
    for item in items:
        if item.get_closest_marker(SHOWS) and "evidence" not in getattr(item, "fixturenames", ()):
            raise pytest.UsageError(f"{item.nodeid}: shows(...) needs the fixture `evidence`")


@pytest.fixture(scope="session", autouse=True)
def optimized() -> None:
    """Have the servers and commands that tests start run under `python -O`, if VFU_DEV_TEST_OPTIMIZED is set.

    The tests themselves have begun by now, with their assertions; xdist's processes too.
    """
    if os.environ.get("VFU_DEV_TEST_OPTIMIZED"):
        os.environ["PYTHONOPTIMIZE"] = "1"


@pytest.fixture(scope="session")
def library() -> Path:
    """Return our libvfio-user.so.0, built if need be; a test without it is skipped, and says so."""
    from vfu_dev.builds import artifact

    try:
        return artifact("libvfio-user", build=True)
    except VfuDevError as error:
        pytest.skip(f"libvfio-user is not built: {error}")


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """Return a folder with a short name; see `short_folder`."""
    with short_folder() as folder:
        yield folder


@pytest.fixture
def serve(library: Path, short_tmp: Path) -> Iterator[ServerFactory]:
    """Return a function that starts `vfu-dev serve` with the given options; see `server_farm`."""
    with server_farm(library, short_tmp) as factory:
        yield factory
