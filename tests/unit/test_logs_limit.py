"""What a guest or a client can make the server log is bounded, and nothing of it is lost from the count."""

from __future__ import annotations

import io
import json
import logging

import pytest

from vfu_dev.logs import BURST, LINE_SECONDS, HumanFormatter, JsonFormatter, RateLimit


class Bench:
    """A logger with a limit and a clock of its own."""

    def __init__(self, formatter: logging.Formatter) -> None:
        self.now = 100.0
        self.out = io.StringIO()
        handler = logging.StreamHandler(self.out)
        handler.setFormatter(formatter)
        self.limit = RateLimit(handler, lambda: self.now)
        handler.addFilter(self.limit)
        self.logger = logging.getLogger("test-logs-limit")
        self.logger.propagate = False
        self.logger.setLevel(logging.DEBUG)
        self.logger.handlers = [handler]

    def flood(self, count: int, level: int = logging.ERROR) -> None:
        """Log `count` lines from one place."""
        for number in range(count):
            self.logger.log(level, "no interrupt %d", number)

    def lines(self) -> list[str]:
        """Return what came out."""
        return self.out.getvalue().splitlines()


@pytest.fixture
def bench() -> Bench:
    return Bench(JsonFormatter())


def counted(bench: Bench) -> int:
    """Return how many lines the log accounts for."""
    entries = [json.loads(line) for line in bench.lines()]
    return len(entries) + sum(entry.get("left_out", 0) for entry in entries)


def test_a_flood_is_cut_and_counted(bench: Bench) -> None:
    bench.flood(20_000)
    assert len(bench.lines()) == BURST
    assert bench.limit.timeout() == pytest.approx(LINE_SECONDS)
    bench.limit.advance()
    assert len(bench.lines()) == BURST
    bench.now += LINE_SECONDS
    assert bench.limit.timeout() == 0
    bench.limit.advance()
    assert bench.limit.timeout() is None
    assert json.loads(bench.lines()[-1])["message"] == "no interrupt 19999"
    assert (len(bench.lines()), counted(bench)) == (BURST + 1, 20_000)


def test_a_flood_that_goes_on_shows_a_line_now_and_then(bench: Bench) -> None:
    """One a second, each with how many like it were left out before."""
    for _ in range(30):
        bench.flood(100)
        bench.now += LINE_SECONDS
    bench.limit.advance(at_once=True)
    assert counted(bench) == 3000
    assert BURST + 29 <= len(bench.lines()) <= BURST + 31


def test_what_is_left_out_at_the_end_is_told(bench: Bench) -> None:
    bench.flood(BURST + 5)
    bench.limit.advance(at_once=True)
    assert counted(bench) == BURST + 5


def test_one_flood_hides_no_other_line(bench: Bench) -> None:
    bench.flood(1000)
    bench.logger.error("something else")
    assert json.loads(bench.lines()[-1])["message"] == "something else"


def test_few_lines_and_debug_have_no_limit(bench: Bench) -> None:
    bench.flood(BURST)
    assert bench.limit.timeout() is None
    bench.flood(1000, logging.DEBUG)
    assert len(bench.lines()) == BURST + 1000


def test_people_read_the_count_behind_the_line() -> None:
    bench = Bench(HumanFormatter())
    bench.flood(BURST + 3)
    bench.limit.advance(at_once=True)
    assert bench.lines()[-1].endswith(f"ERROR no interrupt {BURST + 2} (2 more like it left out)")
