"""`vfu-dev hostile`: one lie or all in turn, and what a client did about each."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from liarkit import HOSTILE
from schemakit import conforms
from serverkit import PATIENCE_SECONDS

from vfu_dev.client import VfioUserDevice
from vfu_dev.errors import VfuDevError
from vfu_dev.hostile import LIES, Device
from vfu_dev.hostile.message import RefusedError


@contextmanager
def hostile(path: Path, *options: object) -> Iterator[subprocess.Popen[str]]:
    command = [*HOSTILE, "--socket", str(path), *(str(word) for word in options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def attach(path: Path) -> str | None:
    """Attach and look around; return the error that our client gave."""
    try:
        with VfioUserDevice.connect(path, timeout_seconds=PATIENCE_SECONDS) as device:
            for index in range(device.info().num_regions):
                device.region_info(index)
    except VfuDevError as error:
        return str(error)
    return None


def test_one_lie_is_told_to_every_client(short_tmp: Path) -> None:
    with hostile(short_tmp / "s", "--lie", "region-argsz-huge") as process:
        assert process.stdout is not None
        for _ in range(2):
            assert "argsz" in (attach(short_tmp / "s") or "")
            line = process.stdout.readline()
            assert line.startswith("region-argsz-huge: told at region-info (request 3)")
            assert "the client sent no further request; the client closed the connection" in line


def test_what_a_client_goes_on_with_is_said(short_tmp: Path) -> None:
    """A lie that our client does not mind: it asks for what it would have asked for anyway."""
    with hostile(short_tmp / "s", "--lie", "info-argsz-huge", "--once") as process:
        assert process.stdout is not None
        assert attach(short_tmp / "s") is None
        line = process.stdout.readline()
        assert "told at get-info (request 2); the client went on: region-info 9" in line
        assert process.wait(PATIENCE_SECONDS) == 0


def test_a_lie_that_was_not_told_is_not_said_to_be(short_tmp: Path) -> None:
    with hostile(short_tmp / "s", "--lie", "mig-size-huge", "--once") as process:
        assert process.stdout is not None
        attach(short_tmp / "s")
        assert "mig-size-huge: not told in 11 requests" in process.stdout.readline()


def test_an_honest_server_tells_none(short_tmp: Path) -> None:
    with hostile(short_tmp / "s", "--honest", "--once") as process:
        assert process.stdout is not None
        assert attach(short_tmp / "s") is None
        assert "honest: no lie; 11 requests" in process.stdout.readline()


def test_all_lies_of_a_phase_in_turn(short_tmp: Path) -> None:
    """Each client meets the next one; the server ends after the last, and its JSON has them all."""
    wanted = [lie.name for lie in LIES.values() if lie.phase == "resume"]
    figures = short_tmp / "met.json"
    with hostile(short_tmp / "s", "--phase", "resume", "--json", figures) as process:
        assert process.stdout is not None
        for _ in wanted:
            attach(short_tmp / "s")
        assert process.wait(PATIENCE_SECONDS) == 0
        lines = process.stdout.read().splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == wanted
    assert lines[0].endswith(f" (1 of {len(wanted)})")
    assert lines[-1] == f"{len(wanted)} lies, 0 of them told"
    found = json.loads(figures.read_text())
    conforms("hostile", found)
    assert [one["lie"] for one in found["encounters"]] == wanted
    assert found["encounters"][0]["ended_by"] == "client"


def test_a_lie_can_be_armed_by_a_file(short_tmp: Path) -> None:
    trigger = short_tmp / "now"
    with hostile(short_tmp / "s", "--lie", "get-info-error", "--arm-file", trigger) as process:
        assert process.stdout is not None
        assert attach(short_tmp / "s") is None
        assert "not told" in process.stdout.readline()
        trigger.touch()
        assert "Input/output error" in (attach(short_tmp / "s") or "")
        assert "told at get-info" in process.stdout.readline()


def test_mistakes_are_said_in_words(short_tmp: Path) -> None:
    taken = short_tmp / "taken"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(taken))
        listener.listen()
        for options, status, says in (
            (["--lie", "no-such"], 2, "there is no such lie"),
            ([], 2, "--socket PATH is missing"),
            (["--socket", str(taken), "--honest"], 1, "a server is alive there"),
        ):
            done = subprocess.run(
                [*HOSTILE, *(["--socket", str(short_tmp / "x")] if "--lie" in options else []), *options],
                capture_output=True,
                text=True,
                timeout=PATIENCE_SECONDS,
                check=False,
            )
            assert done.returncode == status, done.stderr
            assert says in done.stderr


def test_capabilities_without_an_end_are_refused() -> None:
    """What a client proposes may be nested deeper than a parser goes."""
    payload = struct.pack("<HH", 0, 0) + b"[" * 100_000
    with pytest.raises(RefusedError):
        Device().version(payload)
