"""Every check of `vfu-dev check` passes against an honest server, and fails against one that lies to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from checklies import CASES, Case, Liar, fine, lie, lying_server, of, put, refuse, version
from serverkit import PATIENCE_SECONDS, short_folder

from vfu_dev.conformance import CHECKS, Result, Status, choose, run
from vfu_dev.conformance.report import line
from vfu_dev.hostile import Reply, Request
from vfu_dev.uapi import VFIO_USER_REPLY, VFIO_USER_VERSION

IMPATIENT_SECONDS = 0.3


def results(path: Path, names: list[str], case: Case | None) -> list[Result]:
    seconds = IMPATIENT_SECONDS if case is not None and case.impatient else PATIENCE_SECONDS
    with lying_server(path, case):
        return list(run(path, choose(names, []), timeout_seconds=seconds))


@pytest.mark.usefixtures("patience_with_second_clients")
def test_an_honest_server_passes_every_check() -> None:
    """None is skipped either: so each of them can be seen to fail below."""
    before = set(os.listdir("/proc/self/fd"))
    with short_folder() as folder:
        found = results(folder / "honest", [], None)
    assert len(found) == len(CHECKS) > 150
    assert [(one.check.name, one.detail) for one in found if one.status is not Status.PASS] == []
    assert set(os.listdir("/proc/self/fd")) <= before


def test_there_is_a_lie_for_every_check() -> None:
    assert {name.partition(" ")[0] for name in CASES} == CHECKS.keys()


@pytest.mark.parametrize("name", list(CASES))
def test_a_lie_fails_its_check(name: str) -> None:
    """And says what was found; a must that fails is what the exit status is about."""
    with short_folder() as folder:
        (found,) = results(folder / "liar", [name.partition(" ")[0]], CASES[name])
    assert found.status is Status.FAIL, (found.status, found.detail)
    assert found.detail


def _all_but_version(change: Callable[[Reply], None]) -> Case:
    """Change every answer that follows VERSION, and call none of them an error."""

    def lie(liar: Liar, request: Request, reply: Reply) -> None:
        if request.command != VFIO_USER_VERSION:
            reply.flags, reply.error = VFIO_USER_REPLY, 0
            change(reply)

    return Case(lie, impatient=True)


def _filled(value: int) -> Callable[[Reply], None]:
    def change(reply: Reply) -> None:
        reply.payload = bytearray([value]) * max(64, len(reply.payload))

    return change


def _cut(count: int) -> Callable[[Reply], None]:
    def change(reply: Reply) -> None:
        del reply.payload[count:]

    return change


@pytest.mark.parametrize(
    "change",
    [*map(_cut, (0, 1, 3, 4, 8, 16, 31)), *map(_filled, (0, 1, 0x7F, 0xFF))],
    ids=[*(f"cut-{count}" for count in (0, 1, 3, 4, 8, 16, 31)), "zeros", "ones", "0x7f", "0xff"],
)
def test_no_answer_ends_the_run(change: Callable[[Reply], None]) -> None:
    """What a server answers is judged; it is never a reason to say nothing about the other checks."""
    with short_folder() as folder:
        found = results(folder / "liar", [], _all_but_version(change))
    assert len(found) == len(CHECKS)
    assert any(one.broken for one in found)


@pytest.mark.parametrize("limit", [(1 << 32) - 1, 1 << 40, 1 << 200])
def test_no_limit_ends_the_run(limit: int) -> None:
    with short_folder() as folder:
        found = results(folder / "liar", ["stream"], version(max_data_xfer_size=limit, migration={}))
    assert {one.status for one in found if one.check.name == "stream-read-beyond-the-limit"} == {Status.SKIP}


def _without_config_space(size: int) -> Case:
    """Have every region be of `size` bytes, of which none can be read or written."""
    sized, accesses = put("<Q", 16, size), ("region-read", "region-write")

    def lie(liar: Liar, request: Request, reply: Reply) -> None:
        if of("region-info", fine)(liar, request, reply):
            sized(liar, request, reply)
        elif any(of(name)(liar, request, reply) for name in accesses):
            refuse()(liar, request, reply)

    return Case(lie)


@pytest.mark.parametrize("size", [0, 1])
def test_no_size_of_a_region_ends_the_run(size: int) -> None:
    with short_folder() as folder:
        found = results(folder / "liar", ["regions"], _without_config_space(size))
    assert any(one.broken for one in found)


def test_no_number_of_interrupts_ends_the_run() -> None:
    with short_folder() as folder:
        found = results(folder / "liar", ["irqs"], lie(of("irq-info", fine), put("<I", 12, 0xFFFFFFFF)))
    assert any(one.broken for one in found)


def test_what_a_server_says_cannot_steer_the_terminal() -> None:
    """Names of capabilities are the server's own words; and half of a surrogate pair is no text at all."""
    with short_folder() as folder:
        (found,) = results(
            folder / "liar", ["version-offers-what-was-proposed"], version(**{"\x1b[2J\ud800": True})
        )
    assert found.status is Status.FAIL
    shown = line(found)
    assert "?[2J?" in shown
    shown.encode()
    assert "\x1b" not in shown
