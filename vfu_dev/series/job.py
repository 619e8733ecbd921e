"""One group of a run, made in a process of its own: `python -m vfu_dev.series.job`, which a worker starts.

The worker disturbs what is measured no more than a shell would. One line of JSON on standard input says what
to do, and lines on standard output report:

    {"work": …}                                       {"here": {"versions": …, "qemus": …, "machine": …}}
    {"work": …, "group": NUMBER, "folder": PATH}      {"event": "point" | "move" | "note", …}, {"done": true}

The last line may be {"error": TEXT} instead. It ends its VMs, and itself, at the end of its input.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from vfu_dev.builds import Cache
from vfu_dev.errors import VfuDevError
from vfu_dev.machine import machine_id
from vfu_dev.series.artifacts import Artifacts
from vfu_dev.series.folder import POINTS, RunFolder
from vfu_dev.series.parts import groups_of
from vfu_dev.series.prediction import annotation
from vfu_dev.series.run import RunEvent, run_groups
from vfu_dev.series.work import Work, introduce


def main() -> None:
    """Do what the line on standard input says."""
    # A worker that a shell put into the background ignores SIGINT, and what it starts inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    answer: dict[str, Any] = {"error": "cancelled"}
    try:
        asked = json.loads(sys.stdin.buffer.readline())
        threading.Thread(target=_end_with_input, daemon=True).start()
        work = Work(**asked["work"])
        if "group" not in asked:
            answer = {"here": introduce(work)}
        else:
            _make(work, asked["group"], Path(asked["folder"]))
            answer = {"done": True}
    except (VfuDevError, OSError) as error:
        answer = {"error": str(error) or type(error).__name__}
    except KeyboardInterrupt:
        pass
    # The input may end as soon as the answer is there: that interrupts nothing any more.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):
        _say(answer)


def _make(work: Work, number: int, path: Path) -> None:
    points = work.scenario.chosen(work.short)
    artifacts = Artifacts.find(points, work.asked)
    made_with = {"versions": artifacts.versions(points[0]), "qemus": artifacts.qemus()}
    folder = RunFolder(path, work.scenario, work.short, made_with, groups=[groups_of(points)[number]])
    (path / POINTS).mkdir()
    waited = threading.Event()

    def wait(_holder: int | None) -> None:
        if not waited.is_set():
            waited.set()
            _say({"event": "note", "text": "waits: vfu-dev measures something else on this machine"})

    # One group at a time on a machine: two would disturb each other. The cache may be on a file system that
    # machines share, so the lock has the machine's name.
    name = hashlib.sha256(machine_id().encode()).hexdigest()[:12]
    with Cache().lock(f"measuring-{name}", wait):
        asyncio.run(run_groups(folder, folder.groups, artifacts, _report, annotation))


def _report(what: RunEvent, data: dict[str, Any]) -> None:
    if what == "move":
        _say({"event": what, "cells": data["row"].cells()})
    elif what == "point":
        _say({"event": what, **data})


def _say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def _end_with_input() -> None:
    # Not through sys.stdin: its lock would be held when the interpreter ends.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    main()
