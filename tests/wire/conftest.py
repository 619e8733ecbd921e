"""Fixtures for tests over the wire: one small server, shared where a test leaves it as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from serverkit import PATIENCE_SECONDS, RunningServer, ServerFactory

from vfu_dev.client import VfioUserDevice


@pytest.fixture
def server(serve: ServerFactory) -> RunningServer:
    """Return a fresh server of 1 MiB with 4 KiB pages, filled from a seed."""
    return serve("--fill", "7")


@pytest.fixture
def device(server: RunningServer) -> Iterator[VfioUserDevice]:
    """Return a client connected to it."""
    with server.connect() as device:
        yield device


@pytest.fixture
def patience_with_second_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """An honest server may need longer than a second to answer a second client, on a busy machine."""
    monkeypatch.setattr("vfu_dev.conformance.checks_handshake._SECOND_CLIENT_SECONDS", PATIENCE_SECONDS)


@pytest.fixture(scope="module", autouse=True)
def garbage_of_others_is_gone() -> None:
    """Let go of what tests of other modules dropped: tests here count this process's file descriptors."""
    gc.collect()
