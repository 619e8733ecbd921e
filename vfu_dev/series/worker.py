"""What runs inside a Dask worker: it starts `job`, passes its reports on, and brings its files.

The worker measures nothing itself: its own threads and messages would disturb that.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

from distributed import Worker, get_worker

from vfu_dev.vm.own_device import package_environment

_JOB = (sys.executable, "-m", "vfu_dev.series.job")
# Interval of the check that the client still wants the result.
_CHECK_SECONDS = 0.5


async def introduce(work: dict[str, Any]) -> dict[str, Any]:
    """Return `job`'s answer about this machine: {"here": …} or {"error": …}."""
    return await asyncio.to_thread(_ask, work)


def _ask(work: dict[str, Any]) -> dict[str, Any]:
    with _start() as job:
        assert job.stdin is not None
        assert job.stdout is not None
        _tell(job.stdin, {"work": work})
        answer = job.stdout.readline()
    return dict(json.loads(answer)) if answer else {"error": f"{' '.join(_JOB)}: ended with {job.returncode}"}


def make_group(work: dict[str, Any], number: int, topic: str) -> dict[str, Any]:
    """Make a group of points here: a task. Its reports become events of `topic`.

    Returns: `files`, relative path -> content, of the group's folder; or `error`, why there are none.
    """
    worker = get_worker()
    key = worker.get_current_task()
    said: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="vfud-part-") as folder:
        with _start() as job:
            assert job.stdin is not None
            assert job.stdout is not None
            ended = threading.Event()
            watch = threading.Thread(target=_end_when_unwanted, args=(worker, key, job.stdin, ended))
            watch.start()
            try:
                _tell(job.stdin, {"work": work, "group": number, "folder": folder})
                for line in job.stdout:
                    said = json.loads(line)
                    if "event" in said:
                        worker.log_event(topic, {**said, "group": number, "worker": worker.address})
            finally:
                ended.set()
                watch.join()
        if "done" not in said:
            status = f"{' '.join(_JOB)}: ended with {job.returncode}"
            return {"error": said.get("error", status)}
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {"files": {str(path.relative_to(folder)): path.read_bytes() for path in files}}


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        _JOB, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=package_environment()
    )


def _tell(stdin: IO[str], value: dict[str, Any]) -> None:
    stdin.write(json.dumps(value) + "\n")
    stdin.flush()


def _end_when_unwanted(worker: Worker, key: Any, stdin: IO[str], ended: threading.Event) -> None:
    """End the job by the end of its input when its task is cancelled, or its client gone.

    Dask leaves a thread alone whose task is cancelled: only the worker's own state of the task says so.
    """
    while not ended.wait(_CHECK_SECONDS):
        task = worker.state.tasks.get(key)
        if task is None or task.state not in ("executing", "long-running"):
            stdin.close()
            return
