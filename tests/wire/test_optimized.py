"""Servers and commands under `python -O`, which leaves out assertions: no check of a peer's bytes is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from serverkit import ServerFactory, run_vfu_dev


def test_a_server_without_assertions_moves_and_refuses_as_ever(
    serve: ServerFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It migrates with equal digests, and keeps to the specification: `vfu-dev check` sends it nonsense."""
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    source, destination = serve("--fill", "1"), serve()
    for server in (source, destination):
        environment = Path("/proc", str(server.process.pid), "environ").read_bytes().split(b"\0")
        assert b"PYTHONOPTIMIZE=1" in environment
    done = run_vfu_dev("migrate", source.socket, destination.socket, "--json", tmp_path / "move.json")
    assert done.returncode == 0, done.stderr
    (device,) = json.loads((tmp_path / "move.json").read_text())["devices"]
    assert device["digest_match"]
    assert device["initial_bytes"] > 0
    done = run_vfu_dev("check", destination.socket, "--json", tmp_path / "check.json")
    assert done.returncode == 0, done.stdout + done.stderr
