"""`vfu-dev check` as a command: what it writes, what it ends with, servers that die or say nothing."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest
from checklies import CASES, lying_server
from schemakit import conforms
from serverkit import PATIENCE_SECONDS, VFU_DEV, ServerFactory

from vfu_dev.conformance import CHECKS, Status, choose, run

# Listens, and for each client runs BODY with `client`, a connected socket.
SERVER = """
import os, socket, sys
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1])
    listener.listen(4)
    while True:
        client, _ = listener.accept()
        BODY
"""


def check(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [*VFU_DEV, "check", "--timeout", str(PATIENCE_SECONDS), *(str(word) for word in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture
def honest(short_tmp: Path) -> Iterator[Path]:
    path = short_tmp / "honest"
    with lying_server(path, None):
        yield path


@contextmanager
def liar(folder: Path, name: str) -> Iterator[Path]:
    path = folder / name[:24]
    with lying_server(path, CASES[name]):
        yield path


def test_the_list_names_every_check_with_its_sentence() -> None:
    listed = check("--list").stdout
    for one in CHECKS.values():
        assert f" {one.name}: " in listed
        assert f"“{one.source.quote}”" in listed
    found = json.loads(check("--list", "--json").stdout)
    conforms("check", found)
    assert [one["name"] for one in found["checks"]] == [one.name for one in choose([], [])]


def test_only_and_skip_take_names_groups_and_patterns(honest: Path) -> None:
    done = check(honest, "--only", "states", "--skip", "arc-*", "--only", "reset-is-answered", "--json", "-")
    found = json.loads(done.stdout)
    names = {one["name"] for one in found["checks"]}
    expected = {name for name, one in CHECKS.items() if one.group == "states" and not name.startswith("arc")}
    assert names == expected | {"reset-is-answered"}
    conforms("check", found)
    assert found["ok"] is True
    assert found["counts"]["must"]["fail"] == 0


@pytest.mark.parametrize("option", ["--only", "--skip"])
def test_a_check_that_is_not_there_is_a_mistake(option: str) -> None:
    assert (
        "did you mean version-keeps-the-major?"
        in check("/nowhere", option, "version-keep-the-major", status=2).stderr
    )


def test_a_must_that_fails_is_status_1(short_tmp: Path) -> None:
    with liar(short_tmp, "device-is-a-pci-device") as path:
        done = check(path, "--only", "device", status=1)
    assert "FAILED  must      device-is-a-pci-device" in done.stdout
    assert "device flags 0x1 without PCI" in done.stdout
    assert "This version of the protocol only supports PCI devices." in done.stdout
    assert done.stdout.splitlines()[-1].endswith("must 2 of 3, optional 1 of 1")


def test_a_should_that_fails_is_shown_and_no_more(short_tmp: Path) -> None:
    with liar(short_tmp, "error-has-an-errno") as path:
        done = check(path, "--only", "error-has-an-errno", "--quiet")
    assert done.stdout.startswith("no      should    error-has-an-errno")


def test_tap_is_what_harnesses_read(short_tmp: Path) -> None:
    """A must that fails is `not ok`; a should is a TODO, which does not count; what does not apply a SKIP."""
    with liar(short_tmp, "region-read-repeats-its-request") as path:
        lines = check(path, "--only", "regions", "--tap", "-", status=1).stdout.splitlines()
    assert lines[0] == "TAP version 14"
    assert lines[1] == f"1..{sum(one.group == 'regions' for one in CHECKS.values())}"
    (broken,) = [line for line in lines if line.startswith("not ok") and "region-read-repeats" in line]
    assert "TODO" not in broken
    with liar(short_tmp, "error-has-an-errno") as path:
        lines = check(path, "--only", "error-has-an-errno", "--tap", "-").stdout.splitlines()
    assert lines[2].endswith("# TODO should")
    assert lines[3] == "  ---"
    with liar(short_tmp, "precopy-info-is-offered") as path:
        lines = check(path, "--only", "precopy-dirty-begins-at-zero", "--tap", "-").stdout.splitlines()
    assert "# SKIP the server does not offer migration_precopy_info" in lines[2]


def test_junit_is_what_ci_reads(short_tmp: Path) -> None:
    report = short_tmp / "reports" / "check.xml"
    with liar(short_tmp, "region-read-repeats-its-request") as path:
        check(path, "--only", "regions", "--only", "device", "--junit", report, status=1)
    suites = {suite.get("name"): suite for suite in ElementTree.parse(report).getroot()}
    assert suites.keys() == {"regions", "device"}
    assert suites["device"].get("failures") == "0"
    failed = [case.get("name") for case in suites["regions"] if case.find("failure") is not None]
    assert "region-read-repeats-its-request" in failed
    assert str(len(failed)) == suites["regions"].get("failures")


def test_two_reports_cannot_share_standard_output(honest: Path) -> None:
    assert "only one of --json" in check(honest, "--tap", "-", "--json", "-", status=2).stderr


def test_a_report_that_cannot_be_written_is_refused_before(honest: Path) -> None:
    assert "--tap /proc/x/y" in check(honest, "--tap", "/proc/x/y", status=2).stderr


def test_no_server_is_an_error(short_tmp: Path) -> None:
    assert "cannot connect" in check(short_tmp / "nobody", status=1).stderr


def test_a_command_that_does_not_listen_is_an_error(short_tmp: Path) -> None:
    done = check(short_tmp / "x", "--", sys.executable, "-c", "raise SystemExit(7)", status=1)
    assert "ended with status 7 before it listened" in done.stderr


def test_a_server_that_says_nothing_fails_in_its_time(short_tmp: Path) -> None:
    """The first check has its limit; then the server does not answer, which is said once for all others."""
    path = short_tmp / "silent"
    kept = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)

        def take() -> None:
            while True:
                try:
                    kept.append(listener.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=take)
        thread.start()
        results = list(run(path, choose(["device"], []), timeout_seconds=0.1))
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    for client in kept:
        client.close()
    assert [one.status for one in results] == [Status.FAIL] + [Status.SKIP] * (len(results) - 1)
    assert "no answer to VERSION in time" in results[0].detail
    assert all(one.detail == f"the server has been gone since {results[0].check.name}" for one in results[1:])


def test_a_server_that_is_killed_by_a_check_has_failed_it(short_tmp: Path) -> None:
    """The message says which signal it was."""
    path = short_tmp / "fragile"
    program = SERVER.replace("BODY", "client.recv(1); os.abort()")
    results = list(
        run(
            path,
            choose(["device-can-be-reset", "version-keeps-the-major"], []),
            command=[sys.executable, "-c", program, str(path)],
            timeout_seconds=PATIENCE_SECONDS,
        )
    )
    assert [one.status for one in results] == [Status.FAIL, Status.SKIP]
    assert "the server was killed by SIGABRT" in results[0].detail


def test_a_server_that_ends_with_its_client_is_checked_for_the_rest(short_tmp: Path) -> None:
    """Without a command nobody starts it again: what needs another connection is left out, and says why."""
    path = short_tmp / "single"
    with lying_server(path, CASES["next-client-is-served"]):
        results = list(run(path, choose(["device", "handshake"], []), timeout_seconds=PATIENCE_SECONDS))
    by_name = {one.check.name: one for one in results}
    assert by_name["device-is-a-pci-device"].status is Status.PASS
    assert by_name["next-client-is-served"].status is Status.FAIL
    assert by_name["version-keeps-the-major"].status is Status.SKIP
    assert "ended with its client" in by_name["version-keeps-the-major"].detail
    assert not any(one.broken for one in results)


def test_a_server_without_migration_is_checked_for_the_rest(short_tmp: Path) -> None:
    path = short_tmp / "plain"
    with lying_server(path, CASES["migration-has-stop-copy"]):
        results = list(run(path, choose(["states", "stream"], []), timeout_seconds=PATIENCE_SECONDS))
    assert all(one.detail for one in results if one.status is Status.SKIP)


def test_the_server_is_used_as_before_afterwards(serve: ServerFactory) -> None:
    """Whatever was checked, another client finds the device running, with nothing mapped."""
    server = serve()
    done = check(server.socket, "--only", "arc-stop-to-stop-copy", "--only", "dma-map-is-accepted")
    assert re.search(r"must 2 of 2$", done.stdout.strip())
    with server.connect() as device:
        assert device.migration.get_state().name == "RUNNING"
        device.dma_unmap(device.dma_map(0x10_0000_0000, 1 << 20))
